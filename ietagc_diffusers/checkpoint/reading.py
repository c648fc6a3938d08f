"""Finding and reading checkpoints."""

import json
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ..errors import UsageError
from ..run_folder import RunFolder
from ..tensor_files import TensorFile
from . import ownership
from .states import State, unflatten

logger = get_logger(__name__)

FORMAT = 3


class CheckpointError(UsageError):
    """A checkpoint that cannot be used; the message says why."""


class Checkpoint:
    """A checkpoint folder that was found whole.

    fingerprint: what a run must share to be resumed from it, as a JSON dict.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        about = ownership.about(self.folder)
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder}: written by version {about.get('version', '0.1')} in another format; finish that run with "
                "the version that began it, or start a new one"
            )
        self.fingerprint = about["fingerprint"]

    def names(self, prefix: str) -> list[str]:
        """Names of the states that begin with ``prefix``."""
        return sorted(path.stem for path in (self.folder / "ietagc").glob(f"{prefix}*.json"))

    def state(self, name: str) -> State:
        return read_state(self.folder / "ietagc" / name)

    def held(self, name: str) -> TensorFile | None:
        """A large set of tensors, read as it is asked for; None if the checkpoint has none of that name."""
        path = self.folder / name
        return TensorFile(path) if path.is_file() else None


def read_state(path: Path) -> State:
    """A named state by its path without an ending."""
    tensors = path.with_suffix(".safetensors")
    rest = json.loads(path.with_suffix(".json").read_text())
    return unflatten(rest, TensorFile(tensors) if tensors.exists() else {})


def measure(path: Path) -> list[int]:
    """Size and CRC of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "ietagc" / "manifest.json").read_text())
    except (OSError, ValueError):
        return "its manifest is missing or unreadable"
    for name, recorded in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if measure(path) != recorded:
            return f"{name} is damaged"
    return None


def find(wanted: str, run: RunFolder) -> Path | None:
    """The checkpoint that is meant: ``latest``, a name in the run's folder, or a path.

    ``latest`` is the newest of the folder's run, or else the newest; it passes over damaged ones with a warning and is
    None where there is none at all. Raises ``CheckpointError`` for a named one that is missing or damaged, and for
    ``latest`` where none can be used.
    """
    known = run.checkpoints()
    if wanted == "latest":
        passed_over = []
        own = [path for path in known if ownership.owns(run, path)]
        for folder in reversed([path for path in known if path not in own] + own):
            why = damage(folder)
            if why is None:
                return folder
            passed_over.append(f"{folder.name}: {why}")
            logger.warning(f"{folder.name} is passed over: {why}")
        if passed_over:
            raise CheckpointError(
                f"`resume_from_checkpoint` latest: no checkpoint in {run.path} can be used ({'; '.join(passed_over)}); "
                "remove them to start a new run"
            )
        return None
    folder = Path(wanted)
    if not folder.is_dir():
        folder = run.path / folder.name
    if not folder.is_dir():
        names = ", ".join(path.name for path in known) or "none"
        raise CheckpointError(f"`resume_from_checkpoint` {wanted}: not found; checkpoints in {run.path}: {names}")
    why = damage(folder)
    if why is not None:
        raise CheckpointError(f"`resume_from_checkpoint` {wanted}: {why}; 'latest' takes the newest undamaged one")
    return folder


def check_fingerprint(
    saved: dict[str, Any], current: dict[str, Any], allowed: Collection[str] = (), fixed: Collection[str] = ()
) -> None:
    """Raise ``CheckpointError`` naming what differs; keys in ``allowed`` may, those in ``fixed`` never."""
    different = [
        key
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and key not in allowed
    ]
    if different:
        listed = "; ".join(f"{key} was {saved.get(key)!r}, is {current.get(key)!r}" for key in different)
        if set(different) & set(fixed):
            advice = "Give what it had, or start a new run in another folder: this cannot change within a run"
        else:
            advice = "Give the same flags, or name those that may change in `resume_allow`"
        raise CheckpointError(f"the checkpoint is of another run: {listed}. {advice}")
