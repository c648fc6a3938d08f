"""What is measured along the run (losses of training and held-out images, copies), and what follows from it."""

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ...files import read_json, read_json_lines, write_json, write_text
from ...run_folder import RunFolder
from ...tensor_files import NotFinite
from ..ensemble import IterativeEnsemble
from ..monitor import Compared, CopyMeter, Meter, Row, advice, beside_base
from ..monitor_page import page
from ..monitor_settings import MonitorSettings
from .model import ModelCallback
from .validation import send_images

logger = get_logger(__name__)


class Seen(NamedTuple):
    """What the meters say of a model; None of what is not measured."""

    losses: tuple[torch.Tensor, torch.Tensor] | None
    compared: Compared | None


class Monitor(ModelCallback):
    """Measures the aggregated model after every so many rounds or steps and after the last, which changes nothing of
    the training: monitor.jsonl, a page, sheets, the tracker, and on request a stop or the best model so far.

    Args:
        accelerator: whose trackers are told.
        settings: how often, and what follows.
        meter: of losses; None where no image is held out.
        copies: of drawn images; None where none are drawn.
        at_base: within what it returns the family is the model that training started from, for a resumed run; None for
            a model from scratch.

    Attributes:
        stopped: whether a measurement ended the training, on all processes; also that of an earlier run which this one
            resumes where it ended, if its limits still hold.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        settings: MonitorSettings,
        meter: Meter | None,
        copies: CopyMeter | None,
        at_base: Callable[[], AbstractContextManager[None]] | None,
    ):
        self.accelerator, self.folder, self.settings = accelerator, folder, settings
        self.meter, self.copies, self.at_base = meter, copies, at_base
        self.rows: list[Row] = []
        self.of_base = Seen(None, None)
        self.stopped = False
        self.started = time.monotonic()
        self.seconds, self.longest, self.count = 0.0, 0.0, 0  # of measuring

    def on_start(self, run):
        self.started = time.monotonic()
        if run.layout.is_main:
            self._start(run)
            self.stopped = not run.finished and self._ended_here(run)
        self.stopped = run.layout.any(self.stopped)

    def _start(self, run):
        if run.global_step == 0:
            for place in (self.folder.best, self.folder.monitor_sheets):
                shutil.rmtree(place, ignore_errors=True)
            self._measure(run)
            return
        self.rows = [row for row in read_json_lines(self.folder.monitor_file) if row["global_step"] <= run.global_step]
        best = self._best()
        if best is not None and best["global_step"] > run.global_step:  # of a branch that is left
            shutil.rmtree(self.folder.best, ignore_errors=True)
        if self.at_base is not None:
            started = time.monotonic()
            with self.at_base():
                self.of_base = self._look(run.weights.family)
            self._took(started)

    def _ended_here(self, run):
        """Whether the last measurement is of the model as it is now, and over a limit."""
        return bool(self.rows) and self.rows[-1]["global_step"] == run.global_step and self._is_over(run, self.rows[-1])

    def on_step(self, run, proxy, before):
        if self.settings.monitor_steps is not None:
            super().on_step(run, proxy, before)

    def on_model(self, run, before):
        if not run.finished and not self._is_due(run, before):
            return
        if run.layout.is_main and (run.finished or self._affordable()):
            self._measure(run)
            self.stopped = not run.finished and self._is_over(run, self.rows[-1])
        self.stopped = run.layout.any(self.stopped)  # the others wait as long as it takes

    def _is_due(self, run, before):
        rounds, steps = self.settings.monitor_every, self.settings.monitor_steps
        if steps is not None:
            return run.global_step // steps > before // steps
        return rounds is not None and run.round % rounds == 0

    def should_stop(self, run):
        return self.stopped

    def on_end(self, run):
        if run.layout.is_main and self.rows:
            spent = self.seconds / max(time.monotonic() - self.started, 1e-9)
            logger.info(f"Monitor: {self.count} measurements, {self.seconds:.0f} s, {spent:.1%} of the time")
            logger.info(f"Monitor: {advice(self.rows)}")
            self._write(run, ended=True)

    def _affordable(self):
        elapsed, budget = time.monotonic() - self.started, self.settings.monitor_budget
        return budget is None or self.seconds + self.longest <= budget * elapsed

    def _took(self, started):
        seconds = time.monotonic() - started
        self.seconds, self.longest = self.seconds + seconds, max(self.longest, seconds)

    def _look(self, family):
        """What the meters say of the family as it is now."""
        losses = None if self.meter is None else self.meter.losses(family.denoiser)
        return Seen(losses, None if self.copies is None else self.copies())

    def _measure(self, run):
        started = time.monotonic()
        with run.weights.averaged():
            seen = self._look(run.weights.family)
        if run.global_step == 0 and self.at_base is not None:
            self.of_base = seen
        row: Row = {"round": run.round, "global_step": run.global_step}
        if self.meter is not None and seen.losses is not None:
            row |= self.meter.measurement(seen.losses, self.of_base.losses)
        if seen.compared is not None:
            base = self.of_base.compared
            row |= seen.compared.numbers
            row |= beside_base(row, base and base.numbers)
        if run.rows and "disagreement" in run.rows[-1]:
            row["disagreement"] = run.rows[-1]["disagreement"]
        self.rows.append(row | {"visits_per_image": self._visits(run)})
        self._took(started)
        self.count += 1
        if seen.compared is not None:
            self._show(run, seen.compared)
        self._write(run)
        logger.info(f"Monitor, step {run.global_step}: {_in_words(row)}")
        self.accelerator.log({f"monitor/{key}": value for key, value in _scalars(row).items()}, step=run.global_step)
        if self._is_best(run, row):
            self._keep(run, row)

    @staticmethod
    def _visits(run):
        """How often each training image has been visited so far, on average."""
        proxies = list(run.proxies.values())
        visits = sum(proxy.visits_of_group(run.layout.size) for proxy in proxies) / len(proxies)
        return visits * run.layout.num_shards / len(proxies[0].total_visits)

    def _show(self, run, compared):
        """The sheet, to the run's folder and to the trackers."""
        path = self.folder.monitor_sheet(run.global_step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            compared.sheet.save(path)
        except OSError as error:
            logger.error(f"The monitor could not write: {error}; training continues")
        about = "drawn images beside their nearest training images"
        send_images(self.accelerator, "monitor/sheet", [compared.sheet], [about], run.global_step)

    def _write(self, run, ended=False):
        title, last = self.folder.path.resolve().name, self.rows[-1]
        sheet = self.folder.monitor_sheet(last["global_step"]) if "copy_rate" in last else None
        text = page(self.rows, title, advice(self.rows), run.rounds.total_steps, ended, sheet=sheet)
        try:
            write_text(self.folder.monitor_file, "".join(json.dumps(row) + "\n" for row in self.rows))
            write_text(self.folder.monitor_page, text)
        except OSError as error:  # what is only watched must not end the training
            logger.error(f"The monitor could not write: {error}; training continues")

    def _is_over(self, run, row):
        """Whether a limit ends the training; a line of the log says which."""
        settings = self.settings
        limits = [
            ("stop_at_gap", settings.stop_at_gap, row.get("gap"), "gap of {:.4f}"),
            ("stop_at_copy_rate", settings.stop_at_copy_rate, row.get("excess_copy_rate"), "copy rate of {:.1%}"),
        ]
        over = [
            (name, what.format(value)) for name, limit, value, what in limits if limit is not None and value > limit
        ]
        for name, what in over:
            beyond = " beyond the base's" if name == "stop_at_copy_rate" and row["base_copy_rate"] else ""
            logger.warning(f"Training ends at step {run.global_step}: the {what}{beyond} is over `{name}`")
        return bool(over)

    def _is_best(self, run, row):
        rule, loss = self.settings.keep_best, row.get("heldout_loss")
        if rule is None or row["global_step"] == 0 or (loss is not None and not math.isfinite(loss)):
            return False  # nothing would be better than a loss that is not a number
        if rule == "gap":
            return row["gap"] <= self.settings.stop_at_gap
        if rule == "copies" and row["excess_copy_rate"] > self.settings.stop_at_copy_rate:
            return False
        if loss is None:
            return run.weights.is_finite()  # a broken model copies nothing
        best = self._best()
        return best is None or loss < best["heldout_loss"]

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
        """Put the best model in the place of the last one, if one is kept; it stays kept, for a run that is resumed.
        The main process calls this at the end.
        """
        keeps = self.settings.keep_best is not None
        best: Any = self._best() if keeps else None
        if keeps and best is None:
            logger.warning("`keep_best`: no measured model was good enough to be kept; the last one is saved")
        if best is not None and best["global_step"] != run.global_step:
            run.weights.load(self.folder.best)
            run.weights.place.close()  # loading it kept a copy
            logger.info(f"Saved is the model of step {best['global_step']}: {_in_words(best)}")


def _in_words(row: Row) -> str:
    """A measurement in a line."""
    said = []
    if "gap" in row:
        low, high = row["gap_ci95"]
        said.append(
            f"training loss {row['train_loss']:.4f}, held-out loss {row['heldout_loss']:.4f}, gap {row['gap']:.4f} "
            f"({low:.4f} to {high:.4f})"
        )
    if "copy_rate" in row:
        low, high = row["copy_rate_ci95"]
        of_base = "" if row["base_copy_rate"] is None else f", the base's {row['base_copy_rate']:.1%}"
        said.append(
            f"copy rate {row['copy_rate']:.1%} ({low:.1%} to {high:.1%}{of_base}), Sim Score {row['sim_score']:.3f} by "
            f"{row['descriptor']}"
        )
    return ", ".join(said)


def _scalars(row: Row) -> dict[str, float]:
    """The numbers of a measurement for the tracker; the proxies' disagreement is among those of each round."""
    names = ("train_loss", "heldout_loss", "gap", "sim_score", "copy_rate", "excess_copy_rate")
    levels = {f"gap_level_{level['from']}": level["gap"] for level in row.get("levels", ())}
    return {name: row[name] for name in names if name in row} | levels
