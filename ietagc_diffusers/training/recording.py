"""What a run shows and leaves behind while it goes: progress, tracker, checkpoints, rounds.jsonl, validation images,
and a clean stop on signals.
"""

import json
import os
import signal
from pathlib import Path

import torch
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from .. import checkpoint
from .ensemble import Callbacks
from .proxy import ROUND_TOTALS

logger = get_logger(__name__)


class Diverged(RuntimeError):
    """The losses stopped being finite; the message says what would do."""


class Recorder(Callbacks):
    """The callbacks of the training script.

    Args:
        args: the flags.
        accelerator: for trackers and logging.
        validate: called with (ensemble) where validation is due, or None.
        save_round: called with (ensemble, folder) after each round, or None.
    """

    def __init__(self, args, accelerator, validate=None, save_round=None):
        self.args = args
        self.accelerator = accelerator
        self.validate = validate
        self.save_round = save_round
        self.output_dir = Path(args.output_dir)
        self.signalled = None
        self.questions = 0
        self.bad_rows = None
        self.fingerprint = None
        self.last_step = 0
        self.logged = torch.zeros(len(ROUND_TOTALS), dtype=torch.float64)
        self.logged_shard = None

    def begin(self, ensemble, fingerprint, steps_per_epoch, sample_ids):
        """Call once the ensemble is where it starts.

        ``steps_per_epoch``: global steps in an epoch over the whole training set; ``sample_ids`` (N,): of the rows.
        """
        self.sample_ids = sample_ids
        self.fingerprint = fingerprint
        self.steps_per_epoch = steps_per_epoch
        self.last_step = ensemble.global_step
        self.last_checkpoint = self.last_step or None  # a run that starts late was resumed from there
        self.bar = tqdm(
            total=ensemble.rounds.total_steps,
            initial=ensemble.global_step,
            desc="Steps",
            disable=not self.accelerator.is_local_main_process,
        )
        self._write_rounds(ensemble)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number, frame):
        if self.signalled is not None and number == signal.SIGINT:
            raise SystemExit(130)
        self.signalled = number

    def on_step(self, ensemble, proxy):
        step, before = ensemble.global_step, self.last_step
        self.bar.update(step - before)
        self.last_step = step
        if proxy is not None and proxy.steps % self.args.log_every == 0:
            self._log(ensemble, proxy)
        if ensemble.single:
            self._validate(ensemble, before)
        self._checkpoint(ensemble, before)

    def on_round(self, ensemble, row):
        step, before = ensemble.global_step, self.last_step
        self.bar.update(step - before)
        self.last_step = step
        self.logged_shard = None
        self._write_rounds(ensemble)
        numbers = {key: row[key] for key in ("loss", "skip_rate", "augment_rate", "moved")}
        self.accelerator.log({f"round/{key}": value for key, value in numbers.items()}, step=step)
        if ensemble.single:
            self._validate(ensemble, before)
        else:
            self._validate(ensemble, ensemble.rounds.steps_before(ensemble.round - 1))
        if self.save_round is not None and ensemble.layout.is_main:
            self.save_round(ensemble, self.output_dir / "rounds" / f"round-{ensemble.round:04d}")
        self._checkpoint(ensemble, before)

    def _log(self, ensemble, proxy):
        """One read of the device for the steps since the last."""
        totals = proxy.round_totals.cpu().double()
        visits = ROUND_TOTALS.index("visits")
        new_round = totals[visits] < self.logged[visits]
        since = totals if proxy.shard != self.logged_shard or new_round else totals - self.logged
        self.logged, self.logged_shard = totals, proxy.shard
        of = dict(zip(ROUND_TOTALS, since.tolist(), strict=True))
        values = {
            "train_loss": of["loss"] / of["visits"],
            "skip_rate": of["skipped"] / of["visits"],
            "augment_rate": of["augmented"] / of["visits"],
            "lr": proxy.schedule.get_last_lr()[0],
            "round": ensemble.round + 1,
            "shard": proxy.shard + 1,
        }
        self.accelerator.log(values, step=ensemble.global_step)
        num_rounds, num_shards = ensemble.rounds.num_rounds, ensemble.layout.num_shards
        self.bar.set_postfix_str(
            f"round {ensemble.round + 1}/{num_rounds} shard {proxy.shard + 1}/{num_shards}"
            f" loss {values['train_loss']:.4f} skip {values['skip_rate']:.1%} augment {values['augment_rate']:.1%}"
        )

    def on_nonfinite(self, ensemble, proxy, samples):
        ids = ", ".join(str(self.sample_ids[sample]) for sample in samples[:10])
        logger.warning(
            f"Step {ensemble.global_step}, shard {proxy.shard + 1}: {len(samples)} losses are not finite and left out"
            f" (sample_id {ids}{', ...' if len(samples) > 10 else ''})",
            main_process_only=False,
        )
        if proxy.nonfinite_in_a_row >= self.args.max_nonfinite:
            raise Diverged(
                f"{proxy.nonfinite_in_a_row} steps in a row had losses that are not finite: the training has diverged. "
                "Resume from an earlier checkpoint with a lower --learning_rate or --max_grad_norm, or with "
                "--mixed_precision bf16 or no instead of fp16"
            )

    def on_bad_samples(self, ensemble, proxy, bad):
        """Each is logged once: ``bad`` holds [row, reason]."""
        path = self.output_dir / "ietagc" / "bad_samples.jsonl"
        if self.bad_rows is None:
            known = path.read_text().splitlines() if path.exists() else []
            self.bad_rows = {json.loads(line)["sample_id"] for line in known}
        for row, reason in bad:
            sample_id = self.sample_ids[row]
            if sample_id not in self.bad_rows:
                self.bad_rows.add(sample_id)
                with path.open("a") as file:
                    file.write(json.dumps({"sample_id": sample_id, "shard": proxy.shard, "reason": reason}) + "\n")
                logger.warning(f"Replaced by another sample of its shard: {reason}", main_process_only=False)

    def _validate(self, ensemble, before):
        """Validation is due after epochs 1, 1 + X, 1 + 2X, ... as in the official script."""
        if self.validate is None:
            return
        first, last = before // self.steps_per_epoch, ensemble.global_step // self.steps_per_epoch
        if any(epoch % self.args.validation_epochs == 0 for epoch in range(first, last)):
            self.validate(ensemble)

    def _checkpoint(self, ensemble, before):
        every = self.args.checkpointing_steps
        if ensemble.global_step // every > before // every:
            self.save(ensemble)

    def save(self, ensemble):
        """Write a checkpoint; a full disk costs the checkpoint, not the run."""
        try:
            checkpoint.save(ensemble, self.output_dir, self.fingerprint, self.args.checkpoints_total_limit)
        except OSError as error:
            logger.error(
                f"No checkpoint at step {ensemble.global_step}: {error}. Earlier ones are untouched; training goes on"
            )
        else:
            self.last_checkpoint = ensemble.global_step

    def should_stop(self, ensemble):
        """After SIGTERM or SIGINT on any process."""
        layout = ensemble.layout
        if layout.num_processes == 1:
            return self.signalled is not None
        # Asking costs every process a wait: ask as often as the log is written, all at the same steps.
        self.questions += 1
        if self.questions % self.args.log_every:
            return False
        return layout.total(torch.tensor([float(self.signalled is not None)])).item() > 0

    def stop(self, ensemble):
        """Write a checkpoint where there is none yet and say how to go on."""
        if self.last_checkpoint != ensemble.global_step:
            self.save(ensemble)
        self.bar.close()
        if ensemble.layout.is_main:
            on = "without a checkpoint"
            if self.last_checkpoint is not None:
                on = f"go on with --resume_from_checkpoint checkpoint-{self.last_checkpoint}"
            print(f"Stopped at step {ensemble.global_step}; {on}", flush=True)

    def _write_rounds(self, ensemble):
        if not ensemble.layout.is_main:
            return
        path = self.output_dir / "ietagc" / "rounds.jsonl"
        part = path.with_suffix(".jsonl.tmp")
        part.write_text("".join(json.dumps(row) + "\n" for row in ensemble.rows))
        os.replace(part, path)
