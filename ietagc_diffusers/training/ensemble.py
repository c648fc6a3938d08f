"""Iterative ensemble training: rounds of proxies, averaged and redistributed after each (section IV-C, IV-D)."""

import math
import time
from dataclasses import dataclass

import torch

from ..method.averaging import ModelAverage
from .proxy import ROUND_TOTALS


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

    @classmethod
    def plan(cls, config, total_steps, steps_per_epoch, default_rounds):
        """``steps_per_epoch``: global steps in which the whole training set is seen once."""
        steps_per_proxy = math.ceil(total_steps / config.num_shards)
        if config.steps_per_round is not None:
            steps_per_round = config.steps_per_round
        elif config.epochs_per_round is not None:
            steps_per_round = math.ceil(config.epochs_per_round * steps_per_epoch / config.num_shards)
        else:
            steps_per_round = math.ceil(steps_per_proxy / default_rounds)
        return cls(config.num_shards, steps_per_proxy, min(steps_per_round, steps_per_proxy))

    @property
    def num_rounds(self):
        return math.ceil(self.steps_per_proxy / self.steps_per_round)

    @property
    def total_steps(self):
        return self.num_shards * self.steps_per_proxy

    def steps_in(self, round_index):
        """Steps of each proxy in this round."""
        return min(self.steps_per_round, self.steps_per_proxy - round_index * self.steps_per_round)

    def steps_before(self, round_index):
        """Global steps before this round."""
        return self.num_shards * min(round_index * self.steps_per_round, self.steps_per_proxy)


class Callbacks:
    """What a run tells the outside; every method may be overridden."""

    def on_step(self, ensemble, proxy):
        """After each step but the last of a round; ``proxy`` is the one that took it, None where this process is done
        with its shards.
        """

    def on_nonfinite(self, ensemble, proxy, samples):
        """After a step in which the losses of these samples were not finite. May raise to end the run."""

    def on_bad_samples(self, ensemble, proxy, bad):
        """After a step in which unreadable rows were replaced: [row, reason] each."""

    def on_round(self, ensemble, row):
        """After a round's averaging and redistribution; ``row`` is its line of rounds.jsonl."""

    def should_stop(self, ensemble):
        """Whether to leave after this step. Must answer alike on all processes."""
        return False


class IterativeEnsemble:
    """The run: K proxies on K shards, trained in rounds from their common mean theta_hat.

    The model on the device is whichever proxy is being trained; between rounds it is theta_hat. Of the others there
    are only sums (float64) and optimizer states in host memory, so device memory does not grow with K.

    Args:
        model: the UNet as it is called: prepared, perhaps compiled, on the device.
        unet: the UNet itself, whose parameters the model uses.
        proxies: those of this process, by shard.
        objective: what is trained.
        plan: ``ShardPlan``.
        rounds: ``Rounds``.
        config: ``MitigationConfig``.
        layout: ``Layout``.
        streams: ``RandomStreams``.
        seed: of the redistribution.
        ema: a diffusers ``EMAModel``, or None. ``offload_ema`` keeps it in host memory between steps.
        scaler: gradient scaler of fp16, or None.
        callbacks: ``Callbacks``.
    """

    def __init__(
        self,
        model,
        unet,
        proxies,
        objective,
        plan,
        rounds,
        config,
        layout,
        streams,
        seed,
        ema=None,
        offload_ema=False,
        scaler=None,
        callbacks=None,
    ):
        self.model = model
        self.unet = unet
        self.proxies = proxies
        self.objective = objective
        self.plan = plan
        self.rounds = rounds
        self.config = config
        self.layout = layout
        self.streams = streams
        self.seed = seed
        self.ema = ema
        self.offload_ema = offload_ema
        self.scaler = scaler
        self.callbacks = callbacks or Callbacks()
        self.round = 0
        self.progress = [0] * layout.num_shards  # steps of each shard's proxy in this round
        self.active = None  # the proxy on the device
        self.rows = []  # one a finished round
        self.seconds = 0.0  # of this round, over interruptions
        self.single = layout.num_shards == 1
        # theta_hat, and the running mean of the next one, by name; with one shard, the model itself.
        self.aggregates = {} if self.single else {key: _host_copy(tensors) for key, tensors in self.live().items()}
        self.averages = {key: ModelAverage(tensors) for key, tensors in self.aggregates.items()}

    def live(self):
        """The weights on the device by name: those of the proxy in training, or of theta_hat between rounds."""
        parameters = {name: p.detach() for name, p in self.unet.named_parameters()}
        live = {"unet": parameters}
        if self.ema is not None:
            live["unet_ema"] = dict(zip(parameters, self.ema.shadow_params, strict=True))
        return live

    def deployable(self):
        """theta_hat, as far as it is known: that of the last round, or with one shard the model as it is."""
        return self.live() if self.single else self.aggregates

    @property
    def global_step(self):
        """Steps taken by all proxies together."""
        return self.rounds.steps_before(self.round) + sum(self.progress)

    @property
    def finished(self):
        return self.round >= self.rounds.num_rounds

    def run(self):
        """Train to the end. Returns False if ``callbacks.should_stop`` ended it before."""
        while not self.finished:
            if not self._train_round():
                return False
            self._end_round()
            if not self.finished and self.callbacks.should_stop(self):
                return False
        return True

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
                    self.callbacks.on_bad_samples(self, proxy, bad)
                if nonfinite:
                    self.callbacks.on_nonfinite(self, proxy, nonfinite)
                self._update_ema()
            for shard in stepping:
                if shard is not None:
                    self.progress[shard] += 1
            if proxy is not None and self.progress[proxy.shard] == quota:
                self._retire(proxy)
            self.seconds += time.perf_counter() - started
            if min(self.progress) < quota:
                self.callbacks.on_step(self, proxy)
                if self.callbacks.should_stop(self):
                    return False
        return True

    def _activate(self, proxy):
        """Make ``proxy`` the one on the device: from theta_hat, or from where a checkpoint found it."""
        if self.active is proxy:
            return
        self.put(self.aggregates if proxy.weights is None else proxy.weights)
        proxy.weights = None
        if self.ema is not None:
            self.ema.optimization_step = proxy.steps
        proxy.activate(self.streams)
        self.active = proxy

    def _retire(self, proxy):
        """A proxy has done its steps of the round."""
        if self.layout.leads:
            for key, average in self.averages.items():
                average.add(self.live()[key])
        proxy.suspend(self.streams)
        self.active = None

    @torch.no_grad()
    def put(self, weights):
        """Copy weights by name onto the device."""
        live = self.live()
        for key, tensors in weights.items():
            for name, tensor in tensors.items():
                live[key][name].copy_(tensor)

    def _update_ema(self):
        if self.ema is None:
            return
        if self.offload_ema:
            self.ema.to(device=self.layout.device)
        self.ema.step(self.unet.parameters())
        if self.offload_ema:
            self.ema.to(device="cpu")

    def _end_round(self):
        for key, average in self.averages.items():
            for name, mean in average.mean(self.layout.total):
                self.aggregates[key][name].copy_(mean)
        self.put(self.aggregates)
        totals, skips = self._gather_counts()
        previous = self.plan
        self.plan = previous.redistribute(
            skips.numpy(),
            self.config.redistribute_fraction,
            mode=self.config.redistribute_mode,
            by=self.config.redistribute_by,
            seed=[self.seed, self.round],
        )
        for proxy in self.proxies.values():
            proxy.end_round(self.plan.shards[proxy.shard], reset_optimizer=self.config.optimizer_state == "reset")
        row = self._round_row(totals, self.plan.num_moved(previous))
        self.rows.append(row)
        self.round, self.progress, self.seconds = self.round + 1, [0] * self.layout.num_shards, 0.0
        self.callbacks.on_round(self, row)

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

    def sample_counts(self):
        """Visits and skips of each sample in the whole run, both int64 (N,), summed over shards."""
        visits = sum(proxy.total_visits.cpu() for proxy in self.proxies.values())
        skips = sum(proxy.total_skips.cpu() for proxy in self.proxies.values())
        return self.layout.total(visits), self.layout.total(skips)


def _host_copy(tensors):
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _ratios(by_shard, numerator, denominator):
    return [a / b for a, b in zip(by_shard[numerator], by_shard[denominator], strict=True)]
