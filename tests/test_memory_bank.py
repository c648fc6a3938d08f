"""The bank is the sequential moving average of eq. 3, whatever the order and number of repeated timesteps."""

import math

import pytest
import torch

from ietagc_diffusers import LossMemoryBank


class SequentialBank:
    """Eq. 3 and 4 one sample at a time, in Python floats."""

    def __init__(self, num_timesteps, decay, bias_correction, num_buckets):
        self.scale, self.decay, self.bias_correction = num_buckets / num_timesteps, decay, bias_correction
        self.averages, self.visits = [0.0] * num_buckets, [0] * num_buckets

    def ratio(self, loss, timestep):
        bucket = math.floor(timestep * self.scale)
        if not self.visits[bucket]:
            return math.inf
        average = self.averages[bucket]
        if self.bias_correction:
            average /= 1 - self.decay ** self.visits[bucket]
        return loss / average

    def update(self, loss, timestep):
        bucket = math.floor(timestep * self.scale)
        self.averages[bucket] = self.decay * self.averages[bucket] + (1 - self.decay) * loss
        self.visits[bucket] += 1


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize(
    ("num_timesteps", "num_buckets", "decay"), [(12, 12, 0.8), (12, 4, 0.8), (1000, 50, 0.95), (7, 1, 0.0)]
)
def test_equals_the_sequential_update(num_timesteps, num_buckets, decay, bias_correction):
    bank = LossMemoryBank(num_timesteps, decay, bias_correction, num_buckets)
    reference = SequentialBank(num_timesteps, decay, bias_correction, num_buckets)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        timesteps = torch.randint(num_timesteps, (16,), generator=generator)
        losses = torch.rand(16, generator=generator) + 0.01
        wanted = [reference.ratio(loss, t) for loss, t in zip(losses.tolist(), timesteps.tolist(), strict=True)]
        torch.testing.assert_close(bank.loss_ratio(losses, timesteps), torch.tensor(wanted), rtol=2e-5, atol=0)
        bank.update(losses, timesteps)
        for loss, t in zip(losses.tolist(), timesteps.tolist(), strict=True):
            reference.update(loss, t)
        torch.testing.assert_close(bank.averages, torch.tensor(reference.averages), rtol=1e-5, atol=1e-7)
    assert bank.visits.tolist() == reference.visits


def test_repeated_timestep_is_updated_twice():
    bank = LossMemoryBank(10, decay=0.8, bias_correction=False)
    bank.update(torch.tensor([1.0, 3.0]), torch.tensor([4, 4]))
    assert bank.averages[4].item() == pytest.approx(0.76)


def test_unseen_timestep_has_infinite_ratio():
    bank = LossMemoryBank(10)
    bank.update(torch.tensor([1.0]), torch.tensor([3]))
    ratio = bank.loss_ratio(torch.tensor([0.5, 0.5]), torch.tensor([3, 4]))
    torch.testing.assert_close(ratio, torch.tensor([0.5, math.inf]))


def test_bias_correction_makes_a_constant_loss_ratio_one():
    bank = LossMemoryBank(5, decay=0.9)
    for _ in range(3):
        bank.update(torch.full((5,), 0.7), torch.arange(5))
        torch.testing.assert_close(bank.loss_ratio(torch.full((5,), 0.7), torch.arange(5)), torch.ones(5))


def test_nonfinite_losses_leave_no_trace():
    clean, dirty = LossMemoryBank(6), LossMemoryBank(6)
    clean.update(torch.tensor([1.0, 2.0]), torch.tensor([2, 2]))
    dirty.update(torch.tensor([1.0, torch.nan, 2.0, torch.inf]), torch.tensor([2, 2, 2, 5]))
    assert torch.equal(clean.averages, dirty.averages)
    assert torch.equal(clean.visits, dirty.visits)


def test_state_round_trip_and_wrong_size():
    bank, other = LossMemoryBank(8, num_buckets=4), LossMemoryBank(8, num_buckets=4)
    bank.update(torch.rand(6), torch.randint(8, (6,)))
    other.load_state_dict({key: value.clone() for key, value in bank.state_dict().items()})
    assert torch.equal(bank.averages, other.averages)
    with pytest.raises(ValueError, match="4 buckets, this one 8"):
        LossMemoryBank(8).load_state_dict(bank.state_dict())
