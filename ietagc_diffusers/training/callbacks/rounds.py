"""Records of the rounds."""

import json
import shutil

from accelerate.logging import get_logger

from ...checkpoint import NoRoom, gigabytes, room
from ...files import write_text
from ...run_folder import RunFolder
from ..ensemble import Callback
from .checkpoints import of_the_disk

logger = get_logger(__name__)


class RoundRecords(Callback):
    """rounds.jsonl: a line per round, written whole each time, so that a resumed run has no line twice, and that what a
    full disk refused is there with the next round.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_start(self, run):
        self._write(run)

    def on_round(self, run, row, before):
        self._write(run)

    def _write(self, run):
        if not run.layout.is_main:
            return
        try:
            write_text(self.folder.rounds_file, "".join(json.dumps(row) + "\n" for row in run.rows))
        except OSError as error:
            logger.error(f"The record of the rounds could not be written: {error}; training continues")


class SavedRounds(Callback):
    """The aggregated model of every round, as a pipeline. What training leaves as it is is on the disk once, and room
    stays for the trained pipeline.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_round(self, run, row, before):
        if not run.layout.is_main:
            return
        target, earlier = self.folder.round(run.round), self.folder.round(run.round - 1)
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        needed = run.weights.unfinished_bytes + run.weights.output_bytes
        left = room(self.folder.path)
        try:
            if left < needed:
                raise NoRoom(f"it and the trained one need {gigabytes(needed)}, the disk has {gigabytes(left)} left")
            run.weights.save_pipeline(part, earlier=earlier if earlier.is_dir() else None)
            shutil.rmtree(target, ignore_errors=True)
            part.replace(target)
        except Exception as error:
            if not of_the_disk(error):
                raise
            for left_over in (part, target):  # a model of that round is of a branch that was left
                shutil.rmtree(left_over, ignore_errors=True)
            logger.error(f"The model of round {run.round} could not be written: {error}; training continues")
