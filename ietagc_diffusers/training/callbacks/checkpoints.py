"""Checkpoints along the run, and the trained pipeline at its end."""

from typing import Any

from accelerate.logging import get_logger

from ...checkpoint import NoRoom, Writer, gigabytes, room
from ...errors import UsageError
from ...run_folder import RunFolder
from ...tensor_files import NotFinite
from ..ensemble import Callback
from .faults import Ended

logger = get_logger(__name__)


class Checkpoints(Callback):
    """Writes one every ``every`` steps and where a run is stopped; a full disk costs the checkpoint, not the run.

    ``last``: the step of the newest checkpoint of this run, or None.
    """

    def __init__(self, folder: RunFolder, fingerprint: dict[str, Any], every: int, total_limit: int | None = None):
        self.folder, self.every = folder, every
        self.writer = Writer(folder, fingerprint, total_limit)
        self.last: int | None = None

    def on_start(self, run):
        self.last = run.global_step or None  # a run that starts late was resumed from there
        final, next_one = run.weights.output_bytes, self.writer.need(run)
        if not run.layout.is_main:
            return
        left = room(self.folder.path)
        if left < final and not run.global_step:  # a resumed run has checkpoints that can make room at its end
            raise UsageError(
                f"`output_dir` {self.folder.path}: the trained pipeline needs {gigabytes(final)}, the disk has "
                f"{gigabytes(left)} left"
            )
        if left < final + next_one and run.rounds.total_steps >= self.every:
            logger.warning(
                f"{self.folder.path} has {gigabytes(left)} left; the trained pipeline needs {gigabytes(final)}, a "
                f"checkpoint {gigabytes(next_one)} and more. Make room, or checkpoints will be left out"
            )

    def on_step(self, run, proxy, before):
        self._save_if_due(run, before)

    def on_round(self, run, row, before):
        self._save_if_due(run, before)

    def on_stop(self, run):
        if self.last != run.global_step:
            self.save(run)

    def on_end(self, run):
        run.weights.place.close()  # what waited is in the checkpoints, or done with

    def _save_if_due(self, run, before):
        if run.global_step // self.every > before // self.every:
            self.save(run)

    def save(self, run) -> None:
        try:
            self.writer.save(run, run.global_step)
        except (OSError, NotFinite) as error:
            logger.error(
                f"No checkpoint at step {run.global_step}: {error}. Earlier ones are untouched; training continues"
            )
        else:
            self.last = run.global_step

    def save_pipeline(self, run) -> None:
        """Write the trained pipeline; the main process calls this. Older checkpoints make room for it if they must.

        Raises ``Ended`` if the disk refuses all the same, or the weights are not finite.
        """
        path = self.folder.path
        if not run.weights.is_finite():
            raise Ended(f"{path}: no pipeline is written, since trained weights are not finite")
        try:
            self.writer.make_room(run.weights.output_bytes)
            run.weights.save_pipeline(path, final=True)
        except NoRoom as error:
            raise Ended(f"`output_dir` {path}: {error}") from error
        except Exception as error:
            if not of_the_disk(error):
                raise
            again = "" if self.last is None else f"; continue with `resume_from_checkpoint` checkpoint-{self.last}"
            raise Ended(f"`output_dir` {path}: the trained pipeline could not be written: {error}{again}") from error


def of_the_disk(error: BaseException) -> bool:
    """Whether an error says that a file could not be written; safetensors has one of its own for that."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
