"""Losses of training and held-out images along the run, and what follows from them."""

import json
import math
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ...files import read_json, read_json_lines, write_json, write_text
from ...run_folder import RunFolder
from ...tensor_files import NotFinite
from ..ensemble import Callback, IterativeEnsemble
from ..monitor import Meter, Row, advice
from ..monitor_page import page

logger = get_logger(__name__)
Losses = tuple[torch.Tensor, torch.Tensor]


class Monitor(Callback):
    """Measures the aggregated model after every so many rounds and after the last, which changes nothing of the
    training: monitor.jsonl, a page, the tracker, and on request a stop or the best model so far.

    Args:
        accelerator: whose trackers are told.
        meter: ``Meter``.
        every: rounds between two measurements.
        base: gives the losses of the model that training started from, for a resumed run; None for a model from
            scratch.
        budget: share of the time since the start that measuring may take, but for the last measurement; None: any.
        stop_at_gap: a gap over this ends the training.
        keep_best: ``heldout`` keeps the model of the lowest held-out loss, ``gap`` the last whose gap is not over
            ``stop_at_gap``; None keeps none.

    Attributes:
        stopped: whether a gap ended the training, on all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        meter: Meter,
        every: int,
        base: Callable[[], Losses] | None,
        budget: float | None = None,
        stop_at_gap: float | None = None,
        keep_best: str | None = None,
    ):
        self.accelerator, self.folder, self.meter, self.every, self.base = accelerator, folder, meter, every, base
        self.budget, self.stop_at_gap, self.keep_best = budget, stop_at_gap, keep_best
        self.rows: list[Row] = []
        self.of_base: Losses | None = None
        self.stopped = False
        self.started = time.monotonic()
        self.seconds, self.longest, self.count = 0.0, 0.0, 0  # of measuring

    def on_start(self, run):
        self.started = time.monotonic()
        if not run.layout.is_main:
            return
        self.rows = [row for row in read_json_lines(self.folder.monitor_file) if row["round"] <= run.round]
        if run.global_step == 0:
            self.rows = []
            shutil.rmtree(self.folder.best, ignore_errors=True)
        started = time.monotonic()
        if self.base is not None:
            fresh = run.global_step == 0
            self.of_base = self.meter.losses(run.weights.family.denoiser) if fresh else self.base()
        self._took(started)
        if run.global_step == 0:
            self._measure(run)

    def on_round(self, run, row, before):
        if run.round % self.every and not run.finished:
            return
        if run.layout.is_main and (run.finished or self._affordable()):
            self._measure(run)
            gap = self.rows[-1]["gap"]
            if self.stop_at_gap is not None and gap > self.stop_at_gap and not run.finished:
                logger.warning(f"Training ends at step {run.global_step}: the gap of {gap:.4f} is over `stop_at_gap`")
                self.stopped = True
        if self.stop_at_gap is not None:
            self.stopped = run.layout.any(self.stopped)

    def should_stop(self, run):
        return self.stopped

    def on_end(self, run):
        if run.layout.is_main and self.rows:
            spent = self.seconds / max(time.monotonic() - self.started, 1e-9)
            logger.info(f"Monitor: {self.count} measurements, {self.seconds:.0f} s, {spent:.1%} of the time")
            logger.info(f"Monitor: {advice(self.rows)}")
            self._write(run, ended=True)

    def _affordable(self):
        elapsed = time.monotonic() - self.started
        return self.budget is None or self.seconds + self.longest <= self.budget * elapsed

    def _took(self, started):
        seconds = time.monotonic() - started
        self.seconds, self.longest = self.seconds + seconds, max(self.longest, seconds)

    def _measure(self, run):
        started = time.monotonic()
        with run.weights.averaged():
            losses = self.meter.losses(run.weights.family.denoiser)
        row = {"round": run.round, "global_step": run.global_step} | self.meter.measurement(losses, self.of_base)
        self.rows.append(row | {"visits_per_image": self._visits(run)})
        self._took(started)
        self.count += 1
        self._write(run)
        low, high = row["gap_ci95"]
        logger.info(
            f"Monitor, step {run.global_step}: training loss {row['train_loss']:.4f}, held-out loss "
            f"{row['heldout_loss']:.4f}, gap {row['gap']:.4f} ({low:.4f} to {high:.4f})"
        )
        numbers = {name: row[name] for name in ("train_loss", "heldout_loss", "gap")}
        numbers |= {f"gap_level_{level['from']}": level["gap"] for level in row["levels"]}
        self.accelerator.log({f"monitor/{name}": value for name, value in numbers.items()}, step=run.global_step)
        if self._is_best(row):
            self._keep(run, row)

    @staticmethod
    def _visits(run):
        """How often each training image has been visited so far, on average."""
        proxies = list(run.proxies.values())
        visits = sum(int(proxy.total_visits.sum()) for proxy in proxies) / len(proxies) * run.layout.num_shards
        return visits * run.layout.size / len(proxies[0].total_visits)

    def _write(self, run, ended=False):
        title = self.folder.path.resolve().name
        text = page(self.rows, title, advice(self.rows), run.rounds.total_steps, ended)
        try:
            write_text(self.folder.monitor_file, "".join(json.dumps(row) + "\n" for row in self.rows))
            write_text(self.folder.monitor_page, text)
        except OSError as error:  # what is only watched must not end the training
            logger.error(f"The monitor could not write: {error}; training continues")

    def _is_best(self, row):
        if self.keep_best is None or row["round"] == 0 or not math.isfinite(row["heldout_loss"]):
            return False  # nothing would be better than a loss that is not a number
        if self.keep_best == "gap":
            return row["gap"] <= self.stop_at_gap
        best = self._best()
        return best is None or row["heldout_loss"] < best["heldout_loss"]

    def _best(self) -> Row | None:
        record = self.folder.best / "measurement.json"
        return read_json(record) if record.is_file() else None

    def _keep(self, run, row):
        part = self.folder.best.with_name(self.folder.best.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            run.weights.save(part)
            write_json(part / "measurement.json", row)
            shutil.rmtree(self.folder.best, ignore_errors=True)
            part.replace(self.folder.best)
        except (OSError, NotFinite) as error:
            shutil.rmtree(part, ignore_errors=True)
            logger.error(f"The model of step {run.global_step} could not be kept: {error}; training continues")

    def restore(self, run: IterativeEnsemble) -> None:
        """Put the best model in the place of the last one, if one is kept. The main process calls this at the end."""
        best: Any = None if self.keep_best is None else self._best()
        if self.keep_best is not None and best is None:
            logger.warning("`keep_best`: no measured model was good enough to be kept; the last one is saved")
        if best is not None and best["round"] != run.round:
            run.weights.load(self.folder.best)
            logger.info(
                f"Saved is the model of step {best['global_step']}: held-out loss {best['heldout_loss']:.4f}, gap "
                f"{best['gap']:.4f}"
            )
        shutil.rmtree(self.folder.best, ignore_errors=True)
