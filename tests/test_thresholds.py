"""A threshold that follows the ratios is the quantile of the latest ones at its noise level."""

from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ietagc_diffusers import LossMemoryBank, StrengthRandAugment, ThresholdAwareControl
from ietagc_diffusers.method.thresholds import WINDOW, RunningQuantile

T = 40  # four levels a bucket


def batches(number, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        ratios = torch.rand(size, generator=generator) + 0.5
        ratios[torch.rand(size, generator=generator) < 0.1] = torch.inf  # levels without a history
        yield ratios, torch.randint(T, (size,), generator=generator)


@pytest.mark.parametrize(("rate", "size"), [(0.05, 7), (0.3, 64), (0.9, 1), (0.25, 900)])
def test_it_is_the_quantile_of_the_latest_ratios(rate, size):
    """The largest batches hold more ratios of a bucket than are kept."""
    quantile, latest = RunningQuantile(rate, T), defaultdict(lambda: deque(maxlen=WINDOW))
    levels = torch.arange(T)
    for ratios, at in batches(max(3, min(100, 600 // size)), size):
        quantile.update(ratios, at)
        for ratio, level in zip(ratios.tolist(), at.tolist(), strict=True):
            if np.isfinite(ratio):
                latest[level // 4].append(ratio)
        seen = [latest[level // 4] for level in levels.tolist()]
        needed = min(WINDOW, 1 / rate)
        wanted = [np.quantile(values, rate) if len(values) >= needed else 0.0 for values in seen]
        np.testing.assert_allclose(quantile(levels).numpy(), wanted, rtol=1e-6)


def test_about_the_share_is_skipped_whatever_the_ratios_are_like():
    """Also where they spread more at some levels than at others, which no fixed threshold does justice."""
    generator = torch.Generator().manual_seed(1)
    control = ThresholdAwareControl(LossMemoryBank(T, num_buckets=10), RunningQuantile(0.2, T))
    skipped, visits = torch.zeros(2), torch.zeros(2)
    for step in range(800):
        levels = torch.randint(T, (16,), generator=generator)
        wide = (levels >= T // 2).long()
        losses = (wide + 1) * (1 + (0.02 + 0.2 * wide) * torch.randn(16, generator=generator))
        skip = control.decide(losses, levels).skip
        control.observe(losses, levels)
        if step >= 100:
            skipped.index_add_(0, wide, skip.float())
            visits.index_add_(0, wide, torch.ones(16))
    np.testing.assert_allclose(skipped / visits, 0.2, atol=0.03)


def test_augmentation_starts_at_the_quantile():
    quantile = RunningQuantile(0.5, T)
    quantile.update(torch.linspace(0.5, 1.5, WINDOW), torch.zeros(WINDOW, dtype=torch.int64))
    bank = LossMemoryBank(T)
    bank.averages.fill_(1.0)
    bank.visits.fill_(1e6)
    control = ThresholdAwareControl(bank, quantile, 1.2, 5.0, StrengthRandAugment(5))
    levels = torch.tensor([0, 0, 0, T - 1])
    decision = control.decide(torch.tensor([0.9, 1.1, 1.3, 0.1]), levels)
    assert decision.skip.tolist() == [True, False, False, False]  # nothing is known of the last level
    assert decision.augment.tolist() == [False, True, False, False]
    assert decision.strength[1].item() == pytest.approx(np.exp(-5 * 0.1), rel=1e-4) and decision.strength[3] == 0


def test_a_restored_one_continues_as_if_it_had_not_stopped():
    stopped, whole = (ThresholdAwareControl(LossMemoryBank(T), RunningQuantile(0.3, T)) for _ in range(2))
    for number, (losses, levels) in enumerate(batches(40, 16)):
        if number == 20:
            state = {name: value.clone() for name, value in stopped.state_dict().items()}
            stopped = ThresholdAwareControl(LossMemoryBank(T), RunningQuantile(0.3, T))
            stopped.load_state_dict(state)
        for one, other in zip(stopped.decide(losses, levels), whole.decide(losses, levels), strict=True):
            assert torch.equal(one, other)
        for control in (stopped, whole):
            control.observe(losses, levels)


def test_it_never_waits_for_the_device():
    """Fake tensors have no values: anything that asks for one fails."""
    with FakeTensorMode():
        control = ThresholdAwareControl(LossMemoryBank(T), RunningQuantile(0.3, T))
        losses, levels = torch.rand(8), torch.randint(T, (8,))
        control.decide(losses, levels)
        control.observe(losses, levels)


@pytest.mark.parametrize("rate", [0, 1, -0.1])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ValueError, match="over 0 and under 1"):
        RunningQuantile(rate, T)
