"""Iterative ensemble training: rounds of proxies, averaged and redistributed after each (section IV-C, IV-D)."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, Held
from ..method.config import MitigationConfig
from ..method.sharding import ShardPlan, SkipHistory
from ..tensor_files import Place
from .layout import Layout
from .moments import Moments
from .past import PastModel
from .proxy import ROUND_TOTALS, Proxy
from .rounds import Rounds
from .streams import RandomStreams
from .weights import Weights


class Callback:
    """One thing that happens along a run. Callbacks are asked in their order; every method may be overridden."""

    def on_start(self, run: "IterativeEnsemble") -> None:
        """Before the first step, once the run is where it starts."""

    def on_step(self, run: "IterativeEnsemble", proxy: Proxy | None, before: int) -> None:
        """After each step but the last of a round.

        ``proxy`` took the step; None where this process is done with its shards. ``before``: the global step at the
        last call of this method or of ``on_round``.
        """

    def on_retire(self, run: "IterativeEnsemble", proxy: Proxy) -> None:
        """After the last step that a proxy takes in a round."""

    def on_nonfinite(self, run: "IterativeEnsemble", proxy: Proxy, samples: list[int]) -> None:
        """After a step in which the losses of these samples were not finite. May raise to end the run."""

    def on_bad_samples(self, run: "IterativeEnsemble", proxy: Proxy, bad: list) -> None:
        """After a step in which unreadable rows were replaced: [row, reason] each."""

    def on_round(self, run: "IterativeEnsemble", row: dict[str, Any], before: int) -> None:
        """After a round's averaging and redistribution; ``row`` is its line of rounds.jsonl."""

    def should_stop(self, run: "IterativeEnsemble") -> bool:
        """Whether to leave after this step. Must answer alike on all processes."""
        return False

    def on_stop(self, run: "IterativeEnsemble") -> None:
        """After a callback stopped the run before its end."""

    def on_end(self, run: "IterativeEnsemble") -> None:
        """After the last step, or after ``on_stop``."""


class IterativeEnsemble:
    """The run: K proxies on K shards, trained in rounds from their common mean theta_hat.

    The model on the device is whichever proxy is being trained; between rounds it is theta_hat. Of the others there
    are only sums (float64) and optimizer states, in host memory or on the disk, so device memory does not grow with K.

    Args:
        model: the denoiser as it is called: prepared, perhaps compiled, on the device.
        weights: what is trained, and its means.
        proxies: those of this process, by shard.
        objective: from batches to losses.
        plan: ``ShardPlan``.
        rounds: ``Rounds``.
        config: ``MitigationConfig``.
        layout: ``Layout``.
        streams: ``RandomStreams``.
        seed: of the redistribution.
        scaler: gradient scaler of fp16, or None.
        place: where optimizer states wait; default: host memory.
        past: the run's own past, if its control compares with that.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        proxies: dict[int, Proxy],
        objective: Any,
        plan: ShardPlan,
        rounds: Rounds,
        config: MitigationConfig,
        layout: Layout,
        streams: RandomStreams,
        seed: int,
        scaler: Any = None,
        place: Place | None = None,
        past: PastModel | None = None,
    ):
        self.model = model
        self.weights = weights
        self.proxies = proxies
        self.objective = objective
        self.plan = plan
        self.rounds = rounds
        self.config = config
        self.layout = layout
        self.streams = streams
        self.seed = seed
        self.scaler = scaler
        self.past = past
        self.moments = Moments(config.optimizer_state, place, alone=len(proxies) == 1)
        self.history = SkipHistory(config.redistribute_counts)
        self.round = 0
        self.progress = [0] * layout.num_shards  # steps of each shard's proxy in this round
        self.active: Proxy | None = None  # the proxy on the device
        self.rows: list[dict[str, Any]] = []  # one for each finished round
        self.seconds = 0.0  # of this round, over interruptions
        self.callbacks: Sequence[Callback] = ()
        self._reported = 0  # the global step of the last report

    @property
    def single(self) -> bool:
        return self.layout.num_shards == 1

    @property
    def global_step(self) -> int:
        """Steps taken by all proxies together."""
        return self.rounds.steps_before(self.round) + sum(self.progress)

    @property
    def finished(self) -> bool:
        return self.round >= self.rounds.num_rounds

    def run(self, callbacks: Sequence[Callback] = ()) -> bool:
        """Train to the end. Returns False if a callback stopped the run before it."""
        self.callbacks, self._reported = callbacks, self.global_step
        self._tell("on_start")
        ended = self._train()
        if not ended:
            self._tell("on_stop")
        self._tell("on_end")
        return ended

    def _train(self):
        if self.global_step and self._should_stop():  # an earlier run ended here
            return False
        while not self.finished:
            if not self._train_round():
                return False
            self._end_round()
            if not self.finished and self._should_stop():
                return False
        return True

    def _tell(self, event, *about):
        for callback in self.callbacks:
            getattr(callback, event)(self, *about)

    def _report(self, event, about):
        before, self._reported = self._reported, self.global_step
        self._tell(event, about, before)

    def _should_stop(self):
        answers = [callback.should_stop(self) for callback in self.callbacks]  # all are asked: some count the questions
        return any(answers)

    def _train_round(self):
        quota = self.rounds.steps_in(self.round)

        def current(shards):
            return next((shard for shard in shards if self.progress[shard] < quota), None)

        while current(range(self.layout.num_shards)) is not None:
            started = time.perf_counter()
            # Every process keeps the whole table of progress, so that all agree on the step without asking each other.
            stepping = [current(shards) for shards in self.layout.groups]
            proxy = self.proxies.get(current(self.layout.shards))
            if proxy is not None:
                self._activate(proxy)
                nonfinite, bad = proxy.step(self.model, self.objective, self.layout, self.scaler)
                if bad:
                    self._tell("on_bad_samples", proxy, bad)
                if nonfinite:
                    self._tell("on_nonfinite", proxy, nonfinite)
                self.weights.after_step()
            for shard in stepping:
                if shard is not None:
                    self.progress[shard] += 1
            if proxy is not None and self.progress[proxy.shard] == quota:
                self._retire(proxy)
            self.seconds += time.perf_counter() - started
            if min(self.progress) < quota:
                self._report("on_step", proxy)
                if self._should_stop():
                    return False
        return True

    def _activate(self, proxy):
        """Make ``proxy`` the one on the device: from theta_hat, or from where a checkpoint found it."""
        if self.active is proxy:
            return
        if proxy.weights is not None or not self.single:
            self.weights.put(proxy.weights)
        proxy.weights = None
        self.weights.start_average(proxy.steps)
        proxy.activate(self.streams)
        self.moments.activate(proxy)
        self.active = proxy

    def _retire(self, proxy):
        """A proxy has done its steps of the round."""
        self._tell("on_retire", proxy)
        if self.layout.leads:
            self.weights.add_to_mean(proxy.shard)
        proxy.suspend(self.streams)
        self.moments.retire(proxy, self.layout.leads)
        if len(self.proxies) > 1:
            proxy.close()
        self.active = None

    def _end_round(self):
        self.weights.aggregate(self.layout.total)
        self.moments.end_round(self.layout.total)
        totals, skips = self._gather_counts()
        previous = self.plan
        self.plan = previous.redistribute(
            self.history.add(skips.numpy()),
            self.config.redistribute_fraction,
            mode=self.config.redistribute_mode,
            by=self.config.redistribute_by,
            seed=[self.seed, self.round],
        )
        for proxy in self.proxies.values():
            proxy.end_round(self.plan.shards[proxy.shard])
        row = self._round_row(totals, self.plan.num_moved(previous)) | self.weights.notes
        self.rows.append(row)
        self.round, self.progress, self.seconds = self.round + 1, [0] * self.layout.num_shards, 0.0
        if self.past is not None:
            self.past.end_round(self.round, self.weights.latest())
        self._report("on_round", row)

    def _gather_counts(self):
        """Every shard's totals (K, len(ROUND_TOTALS)) and skip counts (K, N), on all processes."""
        num_shards = self.layout.num_shards
        num_samples = len(next(iter(self.proxies.values())).round_skips)
        totals = torch.zeros(num_shards, len(ROUND_TOTALS), dtype=torch.float64)
        skips = torch.zeros(num_shards, num_samples, dtype=torch.int64)
        for proxy in self.proxies.values():
            totals[proxy.shard] = proxy.round_totals.cpu()
            skips[proxy.shard] = proxy.round_skips.cpu()
        return self.layout.total(totals), self.layout.total(skips)

    def _round_row(self, totals, moved):
        of = dict(zip(ROUND_TOTALS, totals.sum(dim=0).tolist(), strict=True))
        by_shard = dict(zip(ROUND_TOTALS, totals.T.tolist(), strict=True))
        return {
            "round": self.round + 1,
            "global_step": self.rounds.steps_before(self.round + 1),
            "loss": of["loss"] / of["visits"],
            "skip_rate": of["skipped"] / of["visits"],
            "augment_rate": of["augmented"] / of["visits"],
            "nonfinite": int(of["nonfinite"]),
            "overflow_steps": int(of["overflows"]),
            "moved": moved,
            "shard_loss": _ratios(by_shard, "loss", "visits"),
            "shard_skip_rate": _ratios(by_shard, "skipped", "visits"),
            "seconds": round(self.seconds, 2),
        }

    def sample_counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Visits and skips of each sample in the whole run, both int64 (N,), summed over shards."""
        visits = torch.stack([proxy.total_visits.cpu() for proxy in self.proxies.values()]).sum(dim=0)
        skips = torch.stack([proxy.total_skips.cpu() for proxy in self.proxies.values()]).sum(dim=0)
        return self.layout.total(visits), self.layout.total(skips)

    def states(self) -> Iterator[tuple[str, Any]]:
        """(name, state) of what this process has to write of all that the future depends on, but for large tensors.

        Every process calls this: processes of a group count together.
        """
        if self.layout.is_main:
            yield (
                "run",
                {
                    "round": self.round,
                    "progress": self.progress,
                    "rows": self.rows,
                    "seconds": self.seconds,
                    "scaler": self.scaler.state_dict() if self.scaler else None,
                },
            )
            yield "plan", self.plan.state_dict()
            yield "history", self.history.state_dict()
        for shard, proxy in self.proxies.items():
            state = proxy.state_dict(self.layout)
            if proxy is self.active:
                state["streams"] = self.streams.get()
            if self.layout.leads:
                yield f"proxy-{shard}", state
        if self.weights.added:
            yield f"mean-{self.layout.process_index}", self.weights.added_state()

    def held(self) -> Iterator[Held]:
        """The large tensors that this process has to write, by the file of the checkpoint that they are."""
        if self.layout.is_main:
            yield from self.weights.held()
            if self.past is not None:
                yield from self.past.held()
        for shard, proxy in self.proxies.items() if self.layout.leads and not self.single else ():
            midway = self.weights.live() if proxy is self.active else proxy.weights or {}
            for key, tensors in midway.items():
                yield Held(f"{_midway(shard)}{key}.safetensors", (self.round, proxy.steps), tensors)
        yield from self.weights.held_means(self.layout.process_index)
        yield from self.moments.held(self.proxies, self.layout)

    def write_configs(self, folder: Path) -> None:
        """The small files beside the weights in a checkpoint."""
        self.weights.write_configs(folder)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Put a freshly built run where the checkpoint was, whatever the number of processes that wrote it."""
        run = checkpoint.state("run")
        self.round, self.progress = run["round"], run["progress"]
        self.rows, self.seconds = run["rows"], run["seconds"]
        if self.scaler and run["scaler"]:
            self.scaler.load_state_dict(run["scaler"])
        self.plan = ShardPlan.from_state_dict(checkpoint.state("plan"))
        self.history.load_state_dict(checkpoint.state("history"))
        self.weights.round = self.round
        self.weights.load(checkpoint.folder)
        if self.past is not None:
            self.past.resume(checkpoint, self.round)
        added = {int(name.split("-")[1]): checkpoint.state(name) for name in checkpoint.names("mean-")}
        counts = {process: state["count"] for process, state in added.items()}
        if self.layout.is_main:
            self.weights.load_means(checkpoint, added)
        self.moments.resume(checkpoint, self.proxies, counts, self.layout.is_main)
        for shard, proxy in self.proxies.items():
            proxy.load_state_dict(checkpoint.state(f"proxy-{shard}"), self.plan.shards[shard], self.layout.leads)
            midway = {key: checkpoint.held(f"{_midway(shard)}{key}.safetensors") for key in self.weights.live()}
            proxy.weights = midway if all(file is not None for file in midway.values()) else None


def _midway(shard):
    """How the files begin that hold the weights of a proxy in the middle of a round."""
    return f"ietagc/weights-{shard}-"


def _ratios(by_shard, numerator, denominator):
    return [a / b for a, b in zip(by_shard[numerator], by_shard[denominator], strict=True)]
