"""A proxy theta_i: all of one shard's training but the weights, which live in the one model on the device."""

import math
from typing import Any

import numpy as np
import torch

from ..data import Batch
from ..method.control import Control, Controlled
from .layout import Layout
from .moments import put, scalars
from .prior import Prior
from .privacy import PrivateGradients
from .streams import RandomStreams

# What a proxy counts over a round, on the device; "overflows": steps left out, since the gradient was not finite.
ROUND_TOTALS = ("loss", "visits", "skipped", "augmented", "nonfinite", "overflows")
COUNTS = ("round_totals", "round_skips", "total_skips", "total_visits")  # what a proxy counts, by attribute


class Proxy:
    """One shard's training. Keeps its batches, control (with the memory bank), optimizer, schedule and random streams
    over the rounds.

    Only one proxy of a process is on the device at a time: ``activate`` and ``suspend`` move its control and its counts
    and swap the random streams; ``Moments`` moves its optimizer's state.

    Args:
        shard: i, in 0..K-1.
        loader: ``StreamLoader`` or ``SeededLoader``.
        control: what decides about each sample.
        optimizer: over the shared model's parameters.
        schedule: learning-rate schedule, stepped once a step.
        num_samples: N, of the whole training set.
        accumulation: micro-batches a step.
        max_grad_norm: of the gradient clipping; 0: none.
        prior: ``Prior``, whose loss is added; None: none.
        private: ``PrivateGradients``, which the proxies of a process share; None: off. ``control`` then sums losses.
    """

    def __init__(
        self,
        shard: int,
        loader: Any,
        control: Control,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        num_samples: int,
        accumulation: int = 1,
        max_grad_norm: float = 1.0,
        prior: Prior | None = None,
        private: PrivateGradients | None = None,
    ):
        self.shard = shard
        self.loader = loader
        self.control = control
        self.optimizer = optimizer
        self.schedule = schedule
        self.accumulation = accumulation
        self.max_grad_norm = max_grad_norm
        self.prior = prior
        self.private = private
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the last step: samples and mean loss of each batch
        self.steps = 0
        self.nonfinite_in_a_row = 0  # steps
        self.left_out = False  # whether the last step was, since its gradient was not finite
        self.streams_state: dict[str, Any] | None = None
        self.weights: Any = None  # those with which a checkpoint found this proxy in the middle of a round
        self.round_totals = torch.zeros(len(ROUND_TOTALS))
        self.round_skips = torch.zeros(num_samples, dtype=torch.int64)
        self.total_skips = torch.zeros(num_samples, dtype=torch.int64)
        self.total_visits = torch.zeros(num_samples, dtype=torch.int64)
        self.resumed_visits = 0  # of all its group, in ``total_visits`` of the process that counts for it

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def activate(self, streams: RandomStreams) -> None:
        """Onto the device."""
        self._move(self.device)
        if self.streams_state is not None:
            streams.set(self.streams_state)

    def suspend(self, streams: RandomStreams) -> None:
        """Off the device, to wait in host memory."""
        self.streams_state = streams.get()
        self.to_host()

    def to_host(self) -> None:
        self._move("cpu")

    def _move(self, device):
        self.control.to(device)
        for name in COUNTS:
            setattr(self, name, getattr(self, name).to(device))

    def close(self) -> None:
        """End the data workers, until the next step."""
        self.loader.close()
        self.control.close()
        if self.prior is not None:
            self.prior.loader.close()

    def step(self, model: Any, objective: Any, layout: Layout, scaler: Any = None) -> tuple[list, list]:
        """One optimizer step: forward and backward over its micro-batches, which end with the epoch if need be.

        Each kept sample of a step weighs the same, and each prior sample too: the loss is the mean over what is kept
        plus the prior's weight times the mean over the prior samples. A step whose gradient is not finite is left out.

        Returns two lists, as a rule empty: the samples whose loss was not finite (all of the step, if only its gradient
        was not), and [row, reason] of replaced rows; the row of a prior sample is None.
        """
        nonfinite, bad, scale = self._add_own(model, objective, layout, scaler)
        finite = True
        if self.prior is not None:
            finite = self._add_prior(model, objective, layout, scaler, scale, bad)
        if self.private is not None:
            self.private.release()
        for parameter in self.parameters:
            if parameter.grad is None:  # nothing was kept
                parameter.grad = torch.zeros_like(parameter)
        layout.sum_gradients()
        if scale is not None:
            self._scale_gradients(scale)
        if scaler:
            scaler.scale(torch.zeros((), device=self.device))  # a scaler that never scaled cannot unscale
            scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        self.left_out = not finite or (scaler is None and not bool(norm.isfinite()))
        if self.left_out:
            nonfinite = nonfinite or torch.cat([samples for samples, _ in self.seen]).tolist()
        if self._apply(scaler):
            self.schedule.step()
        else:
            self.round_totals[ROUND_TOTALS.index("overflows")] += 1
        self.optimizer.zero_grad()
        self.steps += 1
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if nonfinite else 0
        return nonfinite, bad

    def _add_own(self, model, objective, layout, scaler):
        """Add the gradients of the shard's own micro-batches. Returns the samples whose loss is not finite, replaced
        rows, and what all gradients are to be multiplied by afterwards, or None.
        """
        nonfinite, bad = [], []
        self.seen = []
        full = 0  # samples of the step
        kept: Any = 0  # those of them that are kept: a tensor on the device
        for number in range(1, self.accumulation + 1):
            batch, last_of_epoch = self.loader.next()
            last = last_of_epoch or number == self.accumulation
            if last and self.prior is None:
                layout.expect_gradients(self.parameters)
            bad += batch.bad
            batch = batch.to(self.device)
            controlled = self.control.step(model, objective, batch)
            if self.private is not None:
                loss = controlled.loss
            elif self.accumulation > 1 and controlled.kept is not None:
                full = full or self.accumulation * layout.size * len(batch)
                kept = kept + controlled.kept
                loss = controlled.loss * (controlled.kept / full)
            else:
                loss = controlled.loss / self.accumulation
            if loss.requires_grad:
                (scaler.scale(loss) if scaler else loss).backward()
            if self.private is not None:
                self.private.collect(batch.samples)
            self._count(batch, controlled)
            self.seen.append((batch.samples, controlled.total_loss / len(batch)))
            if not controlled.all_finite:
                nonfinite += batch.samples[controlled.nonfinite].tolist()
            if last:
                break
        return nonfinite, bad, full / kept.clamp(min=1) if full else None

    def _add_prior(self, model, objective, layout, scaler, scale, bad):
        """Add the gradients of as many prior batches as the step has micro-batches, each of which weighs the same
        however many samples were kept: that all gradients are multiplied by ``scale`` afterwards is undone.

        Adds replaced rows to ``bad``. Returns whether the loss is finite, as far as the gradient will not show it.
        """
        assert self.prior is not None
        batches = len(self.seen)
        total = torch.zeros((), device=self.device)
        for number in range(batches):
            loss, replaced = self.prior.loss(model, objective, self.device)
            bad += replaced
            total = total + loss.detach()
            loss = loss / (self.accumulation * layout.size)
            loss = loss if scale is None else loss / scale
            if number == batches - 1:
                layout.expect_gradients(self.parameters)
            (scaler.scale(loss) if scaler else loss).backward()
        return scaler is None or bool(total.isfinite())

    @torch.no_grad()
    def _scale_gradients(self, factor):
        for parameter in self.parameters:
            parameter.grad.mul_(factor)

    def _apply(self, scaler):
        """Step the optimizer. Returns False where the step is left out, also since the fp16 loss scale overflowed."""
        if scaler is None:
            if self.left_out:
                return False
            self.optimizer.step()
            return True
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return scaler.get_scale() >= scale

    def _count(self, batch: Batch, controlled: Controlled) -> None:
        samples = batch.samples
        skipped = controlled.skipped.long()
        self.round_skips.index_add_(0, samples, skipped)
        self.total_skips.index_add_(0, samples, skipped)
        self.total_visits.index_add_(0, samples, torch.ones_like(skipped))
        masks = (controlled.skipped, controlled.augmented, controlled.nonfinite)
        counts = [torch.full_like(controlled.total_loss, len(samples)), *(mask.sum() for mask in masks)]
        self.round_totals[:5] += torch.stack([controlled.total_loss, *(c.to(controlled.total_loss) for c in counts)])

    def visits_of_group(self, size: int) -> int:
        """About how often all ``size`` processes of its group have visited a sample, told without asking them."""
        return self.resumed_visits + (int(self.total_visits.sum()) - self.resumed_visits) * size

    def end_round(self, shard_samples: np.ndarray) -> None:
        """Start a new round on ``shard_samples``."""
        self.round_totals.zero_()
        self.round_skips.zero_()
        self.loader.set_samples(shard_samples)

    def state_dict(self, layout: Layout) -> dict[str, Any]:
        """All but weights and moments. Every process of the shard's group calls this: each counts its own samples."""
        return {
            "steps": self.steps,
            "loader": self.loader.state_dict(),
            "control": self.control.state_dict(),
            "optimizer": {"groups": self.optimizer.state_dict()["param_groups"], "scalars": scalars(self.optimizer)},
            "schedule": self.schedule.state_dict(),
            "streams": self.streams_state,
            "counts": {name: layout.sum(getattr(self, name)) for name in COUNTS},
            **({} if self.prior is None else {"prior": self.prior.loader.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any], shard_samples: np.ndarray, leads: bool) -> None:
        """``shard_samples``: those of the checkpoint's plan; ``leads``: whether this process counts for its group."""
        self.steps = state["steps"]
        self.loader.set_samples(shard_samples)
        self.loader.load_state_dict(state["loader"])
        self.control.load_state_dict(state["control"])
        self.optimizer.load_state_dict({"state": {}, "param_groups": state["optimizer"]["groups"]})
        put(self.optimizer, state["optimizer"]["scalars"])
        self.schedule.load_state_dict(state["schedule"])
        if self.prior is not None:
            self.prior.loader.load_state_dict(state["prior"])
        self.streams_state = state["streams"]
        if leads:
            for name in COUNTS:
                getattr(self, name).copy_(state["counts"][name])
            self.resumed_visits = int(self.total_visits.sum())
        self.to_host()
