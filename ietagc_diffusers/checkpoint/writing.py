"""Writing checkpoints: whole or not at all, and nothing twice."""

import json
import os
import shutil
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.logging import get_logger

from .. import __version__, tensor_files
from ..run_folder import RunFolder
from ..tensor_files import NotFinite, TensorFile, Tensors
from . import ownership
from .reading import FORMAT, measure
from .states import State, flatten

logger = get_logger(__name__)


class NoRoom(OSError):
    """The disk has too little room; the message says how much is needed."""


class Held(NamedTuple):
    """Tensors that are a file of a checkpoint. Equal versions of a name have equal content; None: not known.

    ``metadata``: what the file's header says besides.
    """

    name: str
    version: Hashable
    tensors: Tensors
    metadata: Mapping[str, str] = {}


class Processes(Protocol):
    """The processes that write a checkpoint together, see ``training.layout.Layout``."""

    process_index: int
    is_main: bool

    def total(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def any(self, flag: bool) -> bool: ...


class Source(Protocol):
    """What is saved, see ``training.ensemble.IterativeEnsemble``: what this process has to write of it."""

    layout: Processes

    def states(self) -> Iterable[tuple[str, State]]:
        """(name, state), the small ones."""

    def held(self) -> Iterable[Held]:
        """The large sets of tensors, by name within the checkpoint."""

    def write_configs(self, folder: Path) -> None:
        """The other files beside sets of weights; called by the main process."""


class Writer:
    """Writes the checkpoints of a run, each process its part.

    Args:
        run: the folder.
        fingerprint: a JSON dict of what a resumed run must share.
        total_limit: older checkpoints of this run over it are removed once a new one is complete.
    """

    def __init__(self, run: RunFolder, fingerprint: dict[str, Any], total_limit: int | None = None):
        self.run, self.fingerprint, self.total_limit = run, fingerprint, total_limit
        self._last: Path | None = None  # the newest checkpoint that this process helped to write
        self._versions: dict[str, tuple[Hashable, list[int]]] = {}  # of its files, with size and CRC

    def save(self, source: Source, step: int) -> Path:
        """Write ``checkpoint-<step>``; called by all processes at the same step. Returns its path.

        Raises:
            OSError: the disk refuses, or has no room (``NoRoom``). Earlier checkpoints are left as they were.
            NotFinite: weights or moments are not finite; likewise.
        """
        layout, final = source.layout, self.run.checkpoint(step)
        folder = final.with_name(final.name + ".tmp")
        manifest: dict[str, list[int]] = {}
        versions: dict[str, tuple[Hashable, list[int]]] = {}

        def prepare():
            if layout.is_main:
                shutil.rmtree(folder, ignore_errors=True)
                (folder / "ietagc").mkdir(parents=True)

        def write():
            if layout.is_main:
                source.write_configs(folder)
                about = {"format": FORMAT, "version": __version__, "fingerprint": self.fingerprint}
                (folder / "ietagc" / "checkpoint.json").write_text(json.dumps(about))
                for path in filter(Path.is_file, folder.rglob("*")):
                    manifest[str(path.relative_to(folder))] = measure(path)
            for name, state in source.states():
                manifest.update(_save_state(folder, f"ietagc/{name}", state))
            for held in source.held():
                manifest[held.name] = self._put(folder, held)
                versions[held.name] = held.version, manifest[held.name]
            (folder / "ietagc" / f"part-{layout.process_index}.json").write_text(json.dumps(manifest))

        def publish():
            if layout.is_main:
                _join_manifest(folder)
                _rename(folder, final)
                self._remove_old(final)

        _together(layout, lambda: self._check_room(source, final))
        try:
            for action in (prepare, write, publish):
                _together(layout, action)
        except (OSError, NotFinite):
            if layout.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self._last, self._versions = final, versions
        return final

    def _same(self, held):
        """The file of the last checkpoint that has the same content, if there is one."""
        version, _ = self._versions.get(held.name, (None, None))
        if version is not None and version == held.version and (self._last / held.name).is_file():
            return self._last / held.name
        return None

    def _put(self, folder, held):
        """Link or write one file. Returns its size and CRC."""
        target, same = folder / held.name, self._same(held)
        target.parent.mkdir(exist_ok=True)
        if same is not None:
            tensor_files.link(same, target)
            return self._versions[held.name][1]
        if isinstance(held.tensors, TensorFile):
            file = held.tensors
            file.sync()
            tensor_files.link(file.path, target)
        else:
            file = tensor_files.write(target, held.tensors, metadata={"format": "pt", **held.metadata})
            file.sync()
        if file.not_finite:
            raise NotFinite(f"{held.name}: {file.not_finite} is not finite")
        return measure(file.path) if file.crc is None else [file.size, file.crc]

    def need(self, source: Source) -> int:
        """Bytes that the next checkpoint takes on the disk, of all processes."""
        own = sum(
            sum(tensor.nbytes for tensor in held.tensors.values())
            for held in source.held()
            if not isinstance(held.tensors, TensorFile) and self._same(held) is None
        )
        return int(source.layout.total(torch.tensor(float(own), dtype=torch.float64)).item())

    def _check_room(self, source, final):
        need = self.need(source)
        if not source.layout.is_main:
            return
        going = self._over_limit([*self._own(final), final])
        for old in going[: len(going) if room(self.run.path) < need else 0]:
            if old != self._last and room(self.run.path) < need:
                logger.warning(f"Removing {old.name} to make room for {final.name}")
                shutil.rmtree(old)
        left = room(self.run.path)
        if left < need:
            raise NoRoom(f"it needs {gigabytes(need)}, {self.run.path} has {gigabytes(left)} left")

    def _own(self, final=None):
        """Checkpoints of this run but ``final``, those that will be removed first first."""
        own = [path for path in self.run.checkpoints() if path != final and ownership.owns(self.run, path)]
        if final is None:
            return own
        # Steps beyond this one are of a branch that was left when an earlier checkpoint was resumed.
        step = {path: int(path.name.split("-")[1]) for path in [*own, final]}
        return sorted(own, key=lambda path: (step[path] < step[final], step[path]))

    def _over_limit(self, own):
        return [] if self.total_limit is None else own[: -self.total_limit]

    def _remove_old(self, final):
        for old in self._over_limit([*self._own(final), final]):
            shutil.rmtree(old)

    def make_room(self, need: int) -> None:
        """Remove this run's checkpoints but the newest, the oldest first, until ``need`` bytes are free.

        Raises ``NoRoom`` if they do not suffice.
        """
        *older, newest = self._own() or [None]
        for old in older:
            if room(self.run.path) >= need:
                break
            logger.warning(f"Removing {old.name} to make room for the trained pipeline")
            shutil.rmtree(old)
        left = room(self.run.path)
        if left < need:
            kept = "" if newest is None else f"; make room and continue with `resume_from_checkpoint` {newest.name}"
            raise NoRoom(
                f"the trained pipeline needs {gigabytes(need)}, {self.run.path} has {gigabytes(left)} left{kept}"
            )


def room(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(next(path for path in [folder, *folder.resolve().parents] if path.exists())).free


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB"


def _together(processes, action):
    """Run ``action`` on all processes; if it fails on one of them, all raise an error."""
    error = None
    try:
        action()
    except (OSError, NotFinite) as refused:
        error = refused
    if processes.any(error is not None):
        raise error or OSError("another process could not write its part")


def _save_state(folder, name, state):
    """Write a small state. Returns size and CRC of its files by name."""
    tensors: dict[str, torch.Tensor] = {}
    text, path = json.dumps(flatten(state, tensors)), folder / f"{name}.json"
    path.write_text(text)
    done = {f"{name}.json": measure(path)}
    if tensors:
        file = tensor_files.write(path.with_suffix(".safetensors"), tensors)
        file.sync()
        done[f"{name}.safetensors"] = measure(file.path) if file.crc is None else [file.size, file.crc]
    return done


def _join_manifest(folder):
    manifest: dict[str, list[int]] = {}
    for part in sorted((folder / "ietagc").glob("part-*.json")):
        manifest |= json.loads(part.read_text())
        part.unlink()
    (folder / "ietagc" / "manifest.json").write_text(json.dumps(manifest))
    for path in filter(Path.is_file, folder.rglob("*.json")):
        _sync(path)


def _rename(folder, final):
    """Give a complete checkpoint its name, on the disk too, before anything else is removed."""
    for path in [*filter(Path.is_dir, folder.rglob("*")), folder]:
        _sync(path)
    replaced = final.with_name(final.name + ".old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(folder, final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path):
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
