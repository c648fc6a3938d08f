"""Rounds of proxies: a run equals K separate trainings, averaged by hand."""

import gc

import numpy as np
import pytest
import torch

from ietagc_diffusers import (
    Callback,
    IterativeEnsemble,
    Layout,
    MitigationConfig,
    PlainControl,
    Proxy,
    Rounds,
    ShardPlan,
    Weights,
)
from ietagc_diffusers.data import Batch
from ietagc_diffusers.method.control import DecidingControl, Decision
from ietagc_diffusers.training.moments import moments as moments_of
from ietagc_diffusers.training.proxy import ROUND_TOTALS
from ietagc_diffusers.training.streams import RandomStreams

N, WIDTH = 24, 3
INPUTS = torch.arange(N * WIDTH, dtype=torch.float32).view(N, WIDTH).sin()
TARGETS = INPUTS.sum(1, keepdim=True).cos()


class Regression:
    """An objective on rows of INPUTS: no images, no timesteps, but noise from the stream."""

    def encode(self, batch):
        return batch.samples

    def draw(self, rows):
        return _Rows(INPUTS[rows] + 0.1 * torch.randn(len(rows), WIDTH), TARGETS[rows])

    def plain_loss(self, model, drawn):
        return (model(drawn.inputs) - drawn.targets).pow(2).mean()


class _Rows:
    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)


class Cycle:
    """A loader that walks through its shard in order."""

    def __init__(self, shard_samples):
        self.shard_samples, self.position = shard_samples, 0

    def next(self):
        rows = np.take(self.shard_samples, range(self.position, self.position + 4), mode="wrap")
        self.position += 4
        rows = torch.from_numpy(rows)
        return Batch(images=rows, samples=rows), False

    def set_samples(self, shard_samples):
        self.shard_samples = shard_samples

    def close(self):
        """There are no workers."""


def make_model():
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, 1)


def make_proxy(model, shard, samples, streams):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    proxy = Proxy(shard, Cycle(samples), PlainControl(), optimizer, schedule, N, max_grad_norm=1e9)
    proxy.streams_state = streams.fresh([7, shard])
    return proxy


class Linear:
    """A family of one linear layer."""

    denoiser_name = "linear"

    def __init__(self, model):
        self.denoiser = model


def make_run(num_shards=3, steps=12, per_round=2, **config):
    config = MitigationConfig.preset("iet", num_shards=num_shards, steps_per_round=per_round, **config)
    model, streams = make_model(), RandomStreams()
    plan = ShardPlan.split(N, num_shards, seed=1)
    proxies = {k: make_proxy(model, k, plan.shards[k], streams) for k in range(num_shards)}
    rounds = Rounds.plan(config, steps, 6, 25)
    weights = Weights(Linear(model), num_shards > 1)
    return IterativeEnsemble(
        model, weights, proxies, Regression(), plan, rounds, config, Layout(num_shards), streams, seed=1
    )


def test_a_run_equals_separate_trainings_averaged_by_hand():
    run = make_run()
    assert run.run()
    streams, weights = RandomStreams(), dict(make_model().state_dict())
    plan = ShardPlan.split(N, 3, seed=1)
    models = [make_model() for _ in range(3)]
    proxies = [make_proxy(model, k, plan.shards[k], streams) for k, model in enumerate(models)]
    states = [proxy.streams_state for proxy in proxies]
    for _ in range(2):  # 12 steps = 2 rounds x 3 proxies x 2 steps
        for k, (model, proxy) in enumerate(zip(models, proxies, strict=True)):
            model.load_state_dict(weights)
            streams.set(states[k])
            for _ in range(2):
                loss = Regression().plain_loss(model, Regression().draw(proxy.loader.next()[0].samples))
                proxy.optimizer.zero_grad()
                loss.backward()
                proxy.optimizer.step()
                proxy.schedule.step()
            states[k] = streams.get()
        stacked = {name: torch.stack([m.state_dict()[name].double() for m in models]) for name in weights}
        weights = {name: value.mean(0).float() for name, value in stacked.items()}
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize(
    ("shards", "steps", "flags", "expected"),
    [
        (4, 100, {"steps_per_round": 10}, [10, 10, 5]),
        (1, 7, {"steps_per_round": 3}, [3, 3, 1]),
        (4, 10, {"steps_per_round": 50}, [3]),
        (2, 24, {"epochs_per_round": 2}, [6, 6]),
        (2, 24, {"epochs_per_round": 1, "shard_data": False}, [6, 6]),
        (3, 75, {}, [1] * 25),
    ],
)
def test_rounds_share_out_the_steps(shards, steps, flags, expected):
    rounds = Rounds.plan(MitigationConfig.preset("iet", num_shards=shards, **flags), steps, 6, 25)
    assert [rounds.steps_in(r) for r in range(rounds.num_rounds)] == expected
    assert 0 <= rounds.total_steps - steps < shards
    assert [rounds.steps_before(r + 1) - rounds.steps_before(r) for r in range(rounds.num_rounds)] == [
        shards * s for s in expected
    ]


def test_learning_rates_follow_the_steps_a_proxy_takes():
    run = make_run()
    run.run()
    for proxy in run.proxies.values():
        assert proxy.steps == 4
        assert proxy.schedule.get_last_lr()[0] == pytest.approx(0.05 * 0.95**4)


def test_a_step_with_nothing_kept_works_under_a_gradient_scaler():
    class Nothing(PlainControl):
        def step(self, model, objective, batch):
            return super().step(model, objective, batch)._replace(loss=torch.zeros(()))

    model = make_model()
    proxy = make_proxy(model, 0, np.arange(N), RandomStreams())
    proxy.control = Nothing()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert proxy.step(model, Regression(), Layout(1), torch.amp.GradScaler("cpu")) == ([], [])
    assert proxy.steps == 1 and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_optimizer_state_can_be_reset():
    kept, reset = make_run(), make_run(optimizer_state="reset")
    kept.run()
    reset.run()
    assert all(kept.moments.of(proxy) for proxy in kept.proxies.values())
    assert not any(reset.moments.of(proxy) for proxy in reset.proxies.values())


@pytest.mark.parametrize("num_shards", [2, 8])
def test_only_one_proxy_is_on_the_device(num_shards, monkeypatch):
    """However many shards: one model, and one optimizer's moments at a time."""
    on_device, most = set(), []
    activate, suspend = Proxy.activate, Proxy.suspend

    def track_activate(proxy, streams):
        on_device.add(proxy.shard)
        most.append((len(on_device), sum(isinstance(o, torch.nn.Linear) for o in gc.get_objects())))
        activate(proxy, streams)

    def track_suspend(proxy, streams):
        suspend(proxy, streams)
        on_device.discard(proxy.shard)

    gc.collect()
    before = sum(isinstance(o, torch.nn.Linear) for o in gc.get_objects())
    monkeypatch.setattr(Proxy, "activate", track_activate)
    monkeypatch.setattr(Proxy, "suspend", track_suspend)
    make_run(num_shards=num_shards, steps=2 * num_shards).run()
    assert {count for count, _ in most} == {1}
    assert {models - before for _, models in most} == {1}


def test_a_stop_is_honoured_at_each_step():
    class Stop(Callback):
        def should_stop(self, run):
            return run.global_step == 5

    run = make_run()
    assert not run.run([Stop()])
    assert run.global_step == 5 and run.progress == [2, 2, 1]


class Spoilt(PlainControl):
    """The losses are finite; at the given step the gradient is not."""

    def __init__(self, step, wrong=float("nan")):
        self.at, self.wrong, self.taken = step, wrong, 0

    def step(self, model, objective, batch):
        controlled = super().step(model, objective, batch)
        self.taken += 1
        if self.taken == self.at:
            next(model.parameters()).register_hook(lambda gradient: gradient * self.wrong)
            controlled.loss.backward(retain_graph=True)
        return controlled


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_step_whose_gradient_is_not_finite_is_left_out(wrong):
    model = make_model()
    proxy = make_proxy(model, 0, np.arange(N), RandomStreams())
    proxy.control = Spoilt(2, wrong)
    assert proxy.step(model, Regression(), Layout(1)) == ([], [])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {name: value.clone() for name, value in moments_of(proxy.optimizer).items()}
    rate = proxy.schedule.get_last_lr()
    nonfinite, _ = proxy.step(model, Regression(), Layout(1))
    assert nonfinite == [4, 5, 6, 7] and proxy.left_out and proxy.nonfinite_in_a_row == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, moments[name]) for name, value in moments_of(proxy.optimizer).items())
    assert proxy.schedule.get_last_lr() == rate
    assert proxy.round_totals[ROUND_TOTALS.index("overflows")] == 1
    assert all(p.grad is None for p in model.parameters())


class Keep(DecidingControl):
    """Keeps as many samples of each micro-batch as it is told."""

    def __init__(self, numbers):
        super().__init__(augment=None)
        self.numbers = iter(numbers)

    def decide(self, losses, levels):
        skip = torch.arange(len(losses)) >= next(self.numbers)
        nothing = torch.zeros_like(skip)
        return Decision(skip, nothing, torch.zeros(len(losses)), torch.zeros(len(losses)))


class PerSample(Regression):
    def draw(self, rows):
        drawn = _Levelled(INPUTS[rows], TARGETS[rows])
        return drawn

    def losses(self, model, drawn):
        return (model(drawn.inputs) - drawn.targets).pow(2).mean(1)

    def weights(self, drawn):
        return None


class _Levelled(_Rows):
    @property
    def levels(self):
        return torch.zeros(len(self), dtype=torch.long)


@pytest.mark.parametrize("kept", [(1, 4, 2), (0, 3, 4), (4, 4, 4), (0, 0, 0)])
def test_each_kept_sample_of_a_step_weighs_the_same(kept):
    model = make_model()
    proxy = make_proxy(model, 0, np.arange(N), RandomStreams())
    proxy.accumulation, proxy.control = 3, Keep(kept)
    gradients = []
    proxy.optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in model.parameters()]))
    reference = make_model()
    proxy.step(model, PerSample(), Layout(1))
    rows = [4 * number + row for number, count in enumerate(kept) for row in range(count)]
    if not rows:
        assert all(not gradient.any() for gradient in gradients[0])
        return
    PerSample().losses(reference, PerSample().draw(torch.tensor(rows))).mean().backward()
    for got, wanted in zip(gradients[0], reference.parameters(), strict=True):
        torch.testing.assert_close(got, wanted.grad)


def test_waiting_proxies_close_their_loaders(monkeypatch):
    closed = []
    monkeypatch.setattr(Cycle, "close", lambda self: closed.append(tuple(self.shard_samples[:1])))
    make_run().run()
    assert len(closed) == 3 * 2
    closed.clear()
    make_run(num_shards=1).run()
    assert not closed


def test_no_clipping_where_the_norm_is_0():
    model = make_model()
    proxy = make_proxy(model, 0, np.arange(N), RandomStreams())
    proxy.max_grad_norm = 0
    before = model.weight.detach().clone()
    proxy.step(model, Regression(), Layout(1))
    assert not torch.equal(model.weight, before)
