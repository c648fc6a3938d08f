"""Records of the rounds."""

import json

from ...files import write_text
from ...run_folder import RunFolder
from ..ensemble import Callback


class RoundRecords(Callback):
    """rounds.jsonl: a line per round, written whole each time, so that a resumed run has no line twice."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_start(self, run):
        self._write(run)

    def on_round(self, run, row, before):
        self._write(run)

    def _write(self, run):
        if run.layout.is_main:
            write_text(self.folder.rounds_file, "".join(json.dumps(row) + "\n" for row in run.rows))


class SavedRounds(Callback):
    """The aggregated model of every round, as a pipeline."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_round(self, run, row, before):
        if run.layout.is_main:
            run.weights.save_pipeline(self.folder.round(run.round))
