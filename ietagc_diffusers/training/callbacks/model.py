"""What happens whenever the aggregated model exists."""

from abc import abstractmethod

from ..ensemble import Callback, IterativeEnsemble


class ModelCallback(Callback):
    """After each step of one shard's training; with several shards, which are one model only between rounds, after each
    round.
    """

    @abstractmethod
    def on_model(self, run: IterativeEnsemble, before: int) -> None:
        """What happens. All processes call this. ``before``: the global step at the last call."""

    def on_step(self, run, proxy, before):
        if run.single:
            self.on_model(run, before)

    def on_round(self, run, row, before):
        self.on_model(run, before if run.single else run.rounds.steps_before(run.round - 1))
