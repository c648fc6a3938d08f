"""What happens every so many epochs."""

import shutil
from abc import abstractmethod

from accelerate.logging import get_logger

from ...run_folder import RunFolder
from ..ensemble import IterativeEnsemble
from .model import ModelCallback

logger = get_logger(__name__)


class EveryEpochs(ModelCallback):
    """After epochs 1, 1 + X, 1 + 2X, ... as in the official scripts; with several shards after the next round.

    Args:
        every: X.
        steps_per_epoch: global steps in an epoch over the whole training set.
    """

    def __init__(self, every: int, steps_per_epoch: int):
        self.every, self.steps_per_epoch = every, steps_per_epoch

    @abstractmethod
    def act(self, run: IterativeEnsemble) -> None:
        """What happens. All processes call this."""

    def on_model(self, run: IterativeEnsemble, before: int) -> None:
        first, last = before // self.steps_per_epoch, run.global_step // self.steps_per_epoch
        if any(epoch % self.every == 0 for epoch in range(first, last)):
            self.act(run)


class SavedEpochs(EveryEpochs):
    """The model of then, as a pipeline that the next one replaces, and the trained one at the end."""

    def __init__(self, folder: RunFolder, every: int, steps_per_epoch: int):
        super().__init__(every, steps_per_epoch)
        self.folder = folder.unfinished

    def act(self, run: IterativeEnsemble) -> None:
        if not run.layout.is_main:
            return
        part = self.folder.with_name(self.folder.name + ".part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            run.weights.save_pipeline(part)
            shutil.rmtree(self.folder, ignore_errors=True)
            part.replace(self.folder)
        except Exception as error:  # of the disk, by whichever library writes
            shutil.rmtree(part, ignore_errors=True)
            logger.error(f"{self.folder} could not be written: {error}; training continues")

    def clear(self) -> None:
        """The trained pipeline is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
