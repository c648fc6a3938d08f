"""The model of then on the Hub, along the training."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ...checkpoint import gigabytes, room
from ...hub import Repository
from ...run_folder import RunFolder
from ..ensemble import IterativeEnsemble
from .model import ModelCallback

logger = get_logger(__name__)

PACKAGE_PLACE = Path(__file__).resolve().parents[3]
GRACE = 5.0  # seconds for an upload that is stopped


def start_push(folder: Path, repository: Repository, message: str, log: Path) -> subprocess.Popen:
    """``ietagc push`` in a process of its own, which neither a slow network nor a signal to this one can tie to the
    training. Its output goes into a file.
    """
    words = [sys.executable, "-m", "ietagc_diffusers", "push", str(folder), repository.name, "--message", message]
    if repository.revision is not None:
        words += ["--revision", repository.revision]
    search = [os.environ.get("PYTHONPATH"), str(PACKAGE_PLACE)]  # where this package was found
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    if repository.token is not None:
        environment["HF_TOKEN"] = repository.token  # a command line would show it to everyone on this machine
    with log.open("wb") as output:
        return subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Uploads(ModelCallback):
    """Saves the model to a folder of its own and has it uploaded while training goes on. While an upload is under way
    the next one is left out; the last is the result's, at the end. A failure is logged and costs nothing else.

    All processes wait for the saving, as long as it takes, and none for the upload.

    Args:
        folder: of the run.
        repository: where to.
        every: a number of steps, or None for every round. With several shards the model exists only between rounds: it
            is that after the next one.
        card: writes the model's card into a folder, for a run.
    """

    def __init__(
        self,
        folder: RunFolder,
        repository: Repository,
        every: int | None,
        card: Callable[[IterativeEnsemble, Path], None],
    ):
        self.folder, self.repository, self.every, self.card = folder, repository, every, card
        self.process: Any = None
        self.message = ""  # of the upload under way

    @property
    def _log(self) -> Path:
        return self.folder.snapshot.with_suffix(".log")

    def on_start(self, run):
        if run.layout.is_main:
            self._clear()

    def on_step(self, run, proxy, before):
        if self.every is not None:
            super().on_step(run, proxy, before)

    def on_end(self, run):
        """An upload that is still under way is stopped, and nothing of it committed: the result's follows, or the run
        is over.
        """
        if not run.layout.is_main:
            return
        if self._under_way():
            self._stop()
        self._clear()

    def on_model(self, run, before):
        due = self.every is None or run.global_step // self.every > before // self.every
        if not due or run.finished:
            return
        if run.layout.is_main:
            try:
                self._act(run)
            except Exception as error:  # of the disk, by whichever library writes
                logger.error(f"The model of step {run.global_step} is not uploaded: {error}; training continues")
                self._clear()
        run.layout.barrier()

    def _act(self, run):
        if self._under_way():
            logger.warning(f"“{self.message}” is still being uploaded: the model of step {run.global_step} is not")
            return
        self._clear()
        needed = run.weights.unfinished_bytes + run.weights.output_bytes
        left = room(self.folder.path)
        if left < needed:
            raise OSError(f"it and the trained one need {gigabytes(needed)}, the disk has {gigabytes(left)} left")
        # A name of its own: what an upload of a killed run may still be reading is never written to.
        folder = RunFolder(self.folder.snapshot / f"step-{run.global_step}")
        run.weights.save_pipeline(folder.path)
        folder.records.mkdir()
        for name in ("config_file", "training_set_file", "rounds_file"):
            if getattr(self.folder, name).is_file():
                shutil.copyfile(getattr(self.folder, name), getattr(folder, name))
        self.card(run, folder.path)
        self.message = f"Step {run.global_step} of {run.rounds.total_steps}, after {run.round} rounds"
        self.process = start_push(folder.path, self.repository, self.message, self._log)

    def _under_way(self):
        """Whether an upload is; of one that is over the log says how it ended."""
        if self.process is None:
            return False
        code = self.process.poll()
        if code is None:
            return True
        self.process = None
        if code:
            said = self._log.read_text(errors="replace").split("\n") if self._log.is_file() else []
            last = next((line for line in reversed(said) if line.strip()), f"exit code {code}")
            logger.error(f"“{self.message}” was not uploaded: {last}; training continues")
        else:
            logger.info(f"Uploaded to {self.repository.name}: {self.message}")
        return False

    def _stop(self):
        process, self.process = self.process, None
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        logger.info(f"“{self.message}” was still being uploaded and was stopped")

    def _clear(self):
        shutil.rmtree(self.folder.snapshot, ignore_errors=True)
        self._log.unlink(missing_ok=True)
