"""Checkpoints: named states and weights in a folder that is whole or not there, in safetensors and JSON.

Layout of ``checkpoint-<global_step>/``: a folder for each set of weights (``unet/``, ``unet_ema/``: theta_hat, as
diffusers loads it), and ``ietagc/``: ``checkpoint.json`` (format, version, fingerprint of the run), each named state as
``<name>.json`` and, if it has tensors, ``<name>.safetensors``, and ``manifest.json`` (sizes and CRCs of all files). It
is written under a temporary name and renamed.

What the states are is the business of those who give them.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import __version__
from .errors import UsageError
from .run_folder import RunFolder

logger = get_logger(__name__)

FORMAT = 2
State = Any  # a nest of dicts, lists, numbers, strings, None and tensors


class CheckpointError(UsageError):
    """A checkpoint that cannot be used; the message says why."""


class Processes(Protocol):
    """The processes that write a checkpoint together, see ``training.layout.Layout``."""

    is_main: bool

    def total(self, tensor: torch.Tensor) -> torch.Tensor: ...


def flatten(state: State, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """Move the tensors of a nested dict into ``tensors``; returns the rest, JSON-ready, with ``{"tensor": name}`` in
    their places.
    """
    if torch.is_tensor(state):
        tensors[prefix] = state.detach().cpu().contiguous()
        return {"tensor": prefix}
    if isinstance(state, dict):
        # JSON keys are strings: keep integer keys apart.
        return {"dict": [[key, flatten(value, tensors, f"{prefix}/{key}")] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"list": [flatten(value, tensors, f"{prefix}/{i}") for i, value in enumerate(state)]}
    if isinstance(state, np.generic):
        state = state.item()
    return {"value": state}


def unflatten(state: Any, tensors: dict[str, torch.Tensor]) -> State:
    """The state that ``flatten`` took apart."""
    if "tensor" in state:
        return tensors[state["tensor"]]
    if "dict" in state:
        return {key: unflatten(value, tensors) for key, value in state["dict"]}
    if "list" in state:
        return [unflatten(value, tensors) for value in state["list"]]
    return state["value"]


def _save_state(path, state):
    tensors: dict[str, torch.Tensor] = {}
    rest = flatten(state, tensors)
    if tensors:
        # Shared storage is not allowed in safetensors.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(rest))


def _load_state(path):
    tensors = path.with_suffix(".safetensors")
    return unflatten(json.loads(path.with_suffix(".json").read_text()), load_file(tensors) if tensors.exists() else {})


class Checkpoint:
    """A checkpoint folder that was found whole.

    fingerprint: what a run must share to be resumed from it, as a JSON dict.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        about = _about(self.folder)
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder}: written by version {about.get('version', '0.1')} in another format; finish that run with "
                "the version that began it, or start a new one"
            )
        self.fingerprint = about["fingerprint"]

    def names(self, prefix: str = "") -> list[str]:
        """Names of the states that begin with ``prefix``."""
        found = (path.stem for path in (self.folder / "ietagc").glob(f"{prefix}*.json"))
        return sorted(set(found) - {"checkpoint", "manifest"})

    def state(self, name: str) -> State:
        return _load_state(self.folder / "ietagc" / name)


def _about(folder):
    try:
        return json.loads((folder / "ietagc" / "checkpoint.json").read_text())
    except (OSError, ValueError):
        return {}


def save(
    run: RunFolder,
    step: int,
    states: Callable[[], Iterable[tuple[str, State]]],
    save_weights: Callable[[Path], None],
    fingerprint: dict[str, Any],
    processes: Processes,
    total_limit: int | None = None,
) -> Path:
    """Write ``checkpoint-<step>``; called by all processes at the same step. Returns its path.

    Args:
        states: gives (name, state) of what this process has to write.
        save_weights: writes the weights into a folder; called by the main process.
        fingerprint: a JSON dict of what a resumed run must share.
        total_limit: older checkpoints over it are removed once the new one is complete.

    Raises:
        OSError: the disk refuses. Earlier checkpoints are left as they were.
    """
    final = run.checkpoint(step)
    folder = final.with_name(final.name + ".tmp")

    def prepare():
        if processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "ietagc").mkdir(parents=True)

    def write():
        if processes.is_main:
            save_weights(folder)
            about = {"format": FORMAT, "version": __version__, "fingerprint": fingerprint}
            (folder / "ietagc" / "checkpoint.json").write_text(json.dumps(about))
        for name, state in states():
            _save_state(folder / "ietagc" / name, state)

    def publish():
        if processes.is_main:
            _write_manifest(folder)
            replaced = final.with_name(final.name + ".old")
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                os.replace(final, replaced)
            os.replace(folder, final)
            shutil.rmtree(replaced, ignore_errors=True)
            if total_limit is not None:
                for old in run.checkpoints()[:-total_limit]:
                    shutil.rmtree(old)

    try:
        for action in (prepare, write, publish):
            _together(processes, action)
    except OSError:
        if processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return final


def _together(processes, action):
    """Run ``action`` on all processes; if the disk refuses one of them, all raise ``OSError``."""
    error = None
    try:
        action()
    except (OSError, SafetensorError) as refused:
        error = refused
    if processes.total(torch.tensor([float(error is not None)])).item():
        raise OSError(str(error) if error else "another process could not write its part")


def _crc(path):
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _write_manifest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, _crc(path)] for path in files}
    (folder / "ietagc" / "manifest.json").write_text(json.dumps(manifest))


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "ietagc" / "manifest.json").read_text())
    except (OSError, ValueError):
        return "its manifest is missing or unreadable"
    for name, (size, crc) in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _crc(path) != crc:
            return f"{name} is damaged"
    return None


def find(wanted: str, run: RunFolder) -> Path | None:
    """The checkpoint that is meant: ``latest``, a name in the run's folder, or a path.

    ``latest`` passes over damaged ones with a warning and is None where there is none. Raises ``CheckpointError`` for
    a named one that is missing or damaged.
    """
    if wanted == "latest":
        for folder in reversed(run.checkpoints()):
            why = damage(folder)
            if why is None:
                return folder
            logger.warning(f"{folder.name} is passed over: {why}")
        return None
    folder = Path(wanted)
    if not folder.is_dir():
        folder = run.path / folder.name
    if not folder.is_dir():
        known = ", ".join(path.name for path in run.checkpoints()) or "none"
        raise CheckpointError(f"`resume_from_checkpoint` {wanted}: not found; checkpoints in {run.path}: {known}")
    why = damage(folder)
    if why is not None:
        raise CheckpointError(f"`resume_from_checkpoint` {wanted}: {why}; 'latest' takes the newest undamaged one")
    return folder


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any], allowed: Collection[str] = ()) -> None:
    """Raise ``CheckpointError`` naming what differs; keys in ``allowed`` may."""
    differences = [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and key not in allowed
    ]
    if differences:
        raise CheckpointError(
            "the checkpoint is of another run: "
            + "; ".join(differences)
            + ". Give the same flags, or name those that may change in `resume_allow`"
        )
