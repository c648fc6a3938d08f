"""The numbers of the steps."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..ensemble import Callback
from ..proxy import ROUND_TOTALS
from .progress import Progress

logger = get_logger(__name__)


class StepLog(Callback):
    """Loss, skip rate and augment rate since the last line, to the tracker and the bar.

    The device is read only every ``every`` steps of a proxy, and after its last step of a round: the step itself counts
    on the device.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress, every: int):
        self.accelerator, self.progress, self.every = accelerator, progress, every
        self.logged = torch.zeros(len(ROUND_TOTALS), dtype=torch.float64)
        self.logged_shard = None

    def on_step(self, run, proxy, before):
        if proxy is not None and proxy is run.active and proxy.steps % self.every == 0:
            self._log(run, proxy)

    def on_retire(self, run, proxy):
        self._log(run, proxy)
        self.logged_shard = None  # a proxy counts from 0 in each round

    def on_round(self, run, row, before):
        numbers = {key: row[key] for key in ("loss", "skip_rate", "augment_rate", "moved")}
        if row.get("disagreement") is not None:
            numbers["disagreement"] = row["disagreement"]
        self.accelerator.log({f"round/{key}": value for key, value in numbers.items()}, step=run.global_step)

    def _log(self, run, proxy):
        totals = proxy.round_totals.cpu().double()
        since = totals if proxy.shard != self.logged_shard else totals - self.logged
        self.logged, self.logged_shard = totals, proxy.shard
        of = dict(zip(ROUND_TOTALS, since.tolist(), strict=True))
        values = {
            "train_loss": of["loss"] / of["visits"],
            "skip_rate": of["skipped"] / of["visits"],
            "augment_rate": of["augmented"] / of["visits"],
            "lr": proxy.schedule.get_last_lr()[0],
            "round": run.round + 1,
            "shard": proxy.shard + 1,
        }
        if proxy.prior is not None:
            values["prior_loss"] = proxy.prior.mean_loss()
        self.accelerator.log(values, step=run.global_step)
        self.progress.show(
            f"round {run.round + 1}/{run.rounds.num_rounds} shard {proxy.shard + 1}/{run.layout.num_shards}"
            f" loss {values['train_loss']:.4f} skip {values['skip_rate']:.1%} augment {values['augment_rate']:.1%}"
        )


class FileLosses(Callback):
    """The mean loss of each batch, to the tracker, under the file names of its images: ``loss_for_<name>``.

    It is the loss before any sample is skipped or augmented. Reads the device at each step.

    Args:
        names (N,): of the training rows' files, None where a row has none.
    """

    def __init__(self, accelerator: Accelerator, names: Sequence[str | None]):
        self.accelerator, self.names = accelerator, names
        if not any(names):
            logger.warning("`debug_loss`: the training rows have no file names, so that nothing is logged for them")

    def on_step(self, run, proxy, before):
        if proxy is not None and proxy is run.active:
            self._log(run, proxy)

    def on_retire(self, run, proxy):
        self._log(run, proxy)

    def _log(self, run, proxy):
        for samples, loss in proxy.seen:
            names = (self.names[sample] for sample in samples.tolist())
            self.accelerator.log({f"loss_for_{name}": loss.item() for name in names if name}, step=run.global_step)
