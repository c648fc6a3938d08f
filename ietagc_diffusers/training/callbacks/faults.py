"""Losses that are not finite, and rows that cannot be read."""

import json
from collections.abc import Callable, Sequence

from accelerate.logging import get_logger

from ...errors import UsageError
from ...run_folder import RunFolder
from ..ensemble import Callback

logger = get_logger(__name__)


class Ended(RuntimeError):
    """The run cannot continue; the message says why and what would do."""


class Diverged(Ended):
    """The losses stopped being finite."""


class NonFinite(Callback):
    """Names the samples whose loss or gradient is not finite, and ends the run after ``limit`` such steps in a row.

    ``sample_ids`` (N,): of the training rows.
    """

    def __init__(self, sample_ids: Sequence[int], limit: int):
        self.sample_ids, self.limit = sample_ids, limit

    def on_nonfinite(self, run, proxy, samples):
        ids = ", ".join(str(self.sample_ids[sample]) for sample in samples[:10])
        what = "the gradient is not finite, the step is left out"
        if not proxy.left_out:
            what = f"{len(samples)} losses are not finite and left out"
        more = ", ..." if len(samples) > 10 else ""
        logger.warning(
            f"Step {run.global_step}, shard {proxy.shard + 1}: {what} (sample_id {ids}{more})",
            main_process_only=False,
        )
        if proxy.nonfinite_in_a_row >= self.limit:
            where = "gradients" if proxy.left_out else "losses"
            steps = f"{proxy.nonfinite_in_a_row} steps in a row had {where} that are not finite"
            if proxy.nonfinite_in_a_row == proxy.steps:
                raise Diverged(
                    f"{steps}, all since the first: the base model has weights that are not finite, or does not bear "
                    "`mixed_precision`; or `learning_rate` is far too high"
                )
            raise Diverged(
                f"{steps}: the training has diverged. Resume from an earlier checkpoint with a lower `learning_rate` "
                "or `max_grad_norm`, or with `mixed_precision` bf16 or no instead of fp16"
            )


class BadSamples(Callback):
    """bad_samples.jsonl: each row that was replaced once, with the reason; prior pictures have no sample id.

    ``stop``: asked for a stop with the first reason, where bad rows are not to be replaced; None where they are.
    """

    def __init__(self, folder: RunFolder, sample_ids: Sequence[int], stop: Callable[[UsageError], None] | None = None):
        self.path, self.sample_ids, self.stop = folder.bad_samples_file, sample_ids, stop
        self.named: set[int | str | None] | None = None

    def on_bad_samples(self, run, proxy, bad):
        if self.named is None:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            written = map(json.loads, lines)
            self.named = {row["reason"] if row["sample_id"] is None else row["sample_id"] for row in written}
        for row, reason in bad:
            sample_id = None if row is None else self.sample_ids[row]
            key = reason if row is None else sample_id
            if key not in self.named:
                self.named.add(key)
                self._record({"sample_id": sample_id, "shard": proxy.shard, "reason": reason})
                if self.stop is None:
                    another = "prior picture" if row is None else "sample of its shard"
                    logger.warning(f"Replaced by another {another}: {reason}", main_process_only=False)
        if self.stop is not None:
            self.stop(
                UsageError(
                    f"{bad[0][1]}. To continue from the checkpoint without it, set `on_bad_sample` to skip; with the "
                    "row repaired or removed the training set is another one, for a new run"
                )
            )

    def _record(self, row):
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.error(f"{self.path} could not be written: {error}; training continues")
