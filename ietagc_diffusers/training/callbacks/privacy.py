"""What DP-SGD has spent."""

from accelerate import Accelerator

from ..ensemble import Callback
from ..privacy import NAMES, PrivacyAccount


class PrivacySpent(Callback):
    """``epsilon`` and ``epsilon_poisson`` after each round, to its line of rounds.jsonl and to the tracker."""

    def __init__(self, accelerator: Accelerator, account: PrivacyAccount):
        self.accelerator, self.account = accelerator, account

    def on_round(self, run, row, before):
        row |= self.account.spent(row["global_step"] // run.layout.num_shards)
        shown = {f"round/{name}": row[name] for name in NAMES if row[name] is not None}
        self.accelerator.log(shown, step=run.global_step)
