"""How the steps of a run are divided among proxies and rounds."""

import math
from dataclasses import dataclass, replace

from ..method.config import MitigationConfig


@dataclass(frozen=True)
class Rounds:
    """How many steps each proxy takes in each round.

    Steps of the whole run count over all proxies, so that K proxies take as many as the official training would:
    each proxy takes ceil(total_steps / K) steps, ``steps_per_round`` of them in each round but the last, which takes
    what is left.
    """

    num_shards: int
    steps_per_proxy: int
    steps_per_round: int
    first_round: int = 0  # since when rounds have this length: a run that was extended had a shorter one before
    steps_at_first: int = 0  # that a proxy had taken by then

    @classmethod
    def plan(cls, config: MitigationConfig, total_steps: int, steps_per_epoch: int, default_rounds: int) -> "Rounds":
        """``steps_per_epoch``: global steps in which the whole training set is seen once."""
        steps_per_proxy = math.ceil(total_steps / config.num_shards)
        if config.steps_per_round is not None:
            steps_per_round = config.steps_per_round
        elif config.epochs_per_round is not None:
            steps_per_round = math.ceil(config.epochs_per_round * steps_per_epoch / config.num_parts)
        else:
            steps_per_round = math.ceil(steps_per_proxy / default_rounds)
        return cls(config.num_shards, steps_per_proxy, min(steps_per_round, steps_per_proxy))

    @property
    def num_rounds(self) -> int:
        return self.first_round + math.ceil((self.steps_per_proxy - self.steps_at_first) / self.steps_per_round)

    @property
    def total_steps(self) -> int:
        return self.num_shards * self.steps_per_proxy

    def _steps_of_proxy(self, round_index):
        """Steps of a proxy before this round."""
        steps = self.steps_at_first + (round_index - self.first_round) * self.steps_per_round
        return min(max(steps, 0), self.steps_per_proxy)

    def steps_in(self, round_index: int) -> int:
        """Steps of each proxy in this round, ``first_round`` or later."""
        return self._steps_of_proxy(round_index + 1) - self._steps_of_proxy(round_index)

    def steps_before(self, round_index: int) -> int:
        """Global steps before this round, ``first_round`` or later."""
        return self.num_shards * self._steps_of_proxy(round_index)

    def continued(self, steps_per_round: int, round_index: int, steps_taken: int) -> "Rounds":
        """The same budget for a run that is in a round of ``steps_per_round`` steps, which began when each proxy had
        taken ``steps_taken``.
        """
        return replace(self, steps_per_round=steps_per_round, first_round=round_index, steps_at_first=steps_taken)
