"""Checkpoints along the run."""

from typing import Any

from accelerate.logging import get_logger

from ... import checkpoint
from ...run_folder import RunFolder
from ..ensemble import Callback

logger = get_logger(__name__)


class Checkpoints(Callback):
    """Writes one every ``every`` steps and where a run is stopped; a full disk costs the checkpoint, not the run.

    ``last``: the step of the newest checkpoint of this run, or None.
    """

    def __init__(self, folder: RunFolder, fingerprint: dict[str, Any], every: int, total_limit: int | None = None):
        self.folder, self.fingerprint, self.every, self.total_limit = folder, fingerprint, every, total_limit
        self.last: int | None = None

    def on_start(self, run):
        self.last = run.global_step or None  # a run that starts late was resumed from there

    def on_step(self, run, proxy, before):
        self._save_if_due(run, before)

    def on_round(self, run, row, before):
        self._save_if_due(run, before)

    def on_stop(self, run):
        if self.last != run.global_step:
            self.save(run)

    def _save_if_due(self, run, before):
        if run.global_step // self.every > before // self.every:
            self.save(run)

    def save(self, run) -> None:
        try:
            checkpoint.save(
                self.folder,
                run.global_step,
                run.states,
                run.weights.save,
                self.fingerprint,
                run.layout,
                self.total_limit,
            )
        except OSError as error:
            logger.error(
                f"No checkpoint at step {run.global_step}: {error}. Earlier ones are untouched; training continues"
            )
        else:
            self.last = run.global_step
