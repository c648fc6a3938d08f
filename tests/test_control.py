"""Skip, augment or keep: decisions equal a loop over samples, and the loss is the mean over what is kept."""

import math
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ietagc_diffusers import (
    LossMemoryBank,
    PlainControl,
    RandomControl,
    StrengthRandAugment,
    ThresholdAwareControl,
    WenControl,
    testing,
)
from ietagc_diffusers.data import Batch
from ietagc_diffusers.method.control import WORTH_A_GRADIENT


@pytest.fixture(scope="module")
def pipeline():
    return testing.random_pipeline(["a red picture", "a blue picture"])


def make_objective(pipeline, **options):
    return testing.family_of_pipeline(pipeline, **options).objective


@pytest.fixture
def objective(pipeline):
    return make_objective(pipeline)


@pytest.fixture
def model(pipeline):
    pipeline.unet.zero_grad()
    return pipeline.unet


def make_batch(pipeline, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = pipeline.tokenizer(["a red picture"] * size, padding="max_length", return_tensors="pt").input_ids
    images = torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1
    return Batch(images, {"input_ids": tokens}, seeds=list(range(100, 100 + size)))


def draw(objective, batch):
    return objective.draw(objective.encode(batch))


def full_bank(average, **options):
    """A bank that every timestep has visited, with the same average everywhere."""
    bank = LossMemoryBank(1000, **options)
    bank.averages.fill_(average)
    bank.visits.fill_(1e6)
    return bank


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_decisions_equal_a_loop_over_samples():
    threshold, reach, decay = 0.8, 1.5, 5.0
    control = ThresholdAwareControl(LossMemoryBank(20, 0.8, True, 10), threshold, reach, decay, StrengthRandAugment(5))
    averages, visits = [0.0] * 10, [0] * 10
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for _ in range(30):
        losses, timesteps = torch.rand(8, generator=generator) + 0.2, torch.randint(20, (8,), generator=generator)
        decision = control.decide(losses, timesteps)
        control.observe(losses, timesteps)
        for i, (loss, t) in enumerate(zip(losses.tolist(), timesteps.tolist(), strict=True)):
            n = visits[t // 2]
            ratio = loss / (averages[t // 2] / (1 - 0.8**n)) if n else math.inf
            skip = ratio < threshold
            augment = threshold <= ratio < reach * threshold
            seen.add((skip, augment))
            assert (decision.skip[i].item(), decision.augment[i].item()) == (skip, augment)
            assert decision.strength[i].item() == pytest.approx(
                math.exp(-decay * abs(ratio - threshold) / threshold), rel=1e-3
            )
        for loss, t in zip(losses.tolist(), timesteps.tolist(), strict=True):
            averages[t // 2] = 0.8 * averages[t // 2] + 0.2 * loss
            visits[t // 2] += 1
    assert seen == {(True, False), (False, True), (False, False)}


def test_infinite_range_augments_all_that_has_a_history():
    bank = full_bank(1.0)
    bank.visits[7] = bank.averages[7] = 0
    control = ThresholdAwareControl(bank, 0.8, math.inf, 5.0, StrengthRandAugment(5))
    decision = control.decide(torch.tensor([0.5, 0.9, 50.0, 1.0]), torch.tensor([0, 1, 2, 7]))
    assert decision.skip.tolist() == [True, False, False, False]
    assert decision.augment.tolist() == [False, True, True, False]
    assert decision.strength[3] == 0


def test_deciding_never_waits_for_the_device():
    """Fake tensors have no values: anything that asks for one fails."""
    with FakeTensorMode():
        control = ThresholdAwareControl(LossMemoryBank(100, num_buckets=10), 0.8, math.inf, 5.0, StrengthRandAugment(5))
        losses, timesteps = torch.rand(8), torch.randint(100, (8,))
        control.decide(losses, timesteps)
        control.observe(losses, timesteps)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            losses.sum().item()


def test_skipped_samples_have_no_part_in_the_gradient(pipeline, objective, model):
    batch = make_batch(pipeline)
    torch.manual_seed(3)
    losses = objective.losses(model, draw(objective, batch))
    median = losses.detach().median().item()
    keep = losses.detach() >= median * 0.9999
    losses[keep].mean().backward()
    wanted = gradients(model)
    model.zero_grad()

    torch.manual_seed(3)
    control = ThresholdAwareControl(full_bank(median), 0.9999)
    controlled = control.step(model, objective, batch)
    controlled.loss.backward()
    assert controlled.skipped.tolist() == (~keep).tolist() and 0 < int(keep.sum()) < 6
    assert controlled.total_loss.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_augmented_samples_keep_noise_timestep_and_caption(pipeline, objective, model):
    """By hand: encode the augmented images with the same posterior noise, run the kept samples, take the mean."""
    batch, augment = make_batch(pipeline, 8), StrengthRandAugment(20)
    torch.manual_seed(4)
    drawn = draw(objective, batch)
    with torch.no_grad():
        losses = objective.losses(model, drawn)
    bank = full_bank(losses.median().item())
    decision = ThresholdAwareControl(bank, 0.99, 1.1, 5.0, augment).decide(losses, drawn.timesteps)
    magnitudes = (augment.magnitudes(decision.strength) * decision.augment).tolist()
    assert any(magnitudes) and decision.skip.any() and not all(magnitudes)
    latents = drawn.latents.clone()
    with torch.no_grad():
        for i, magnitude in enumerate(magnitudes):
            if magnitude:
                image = augment(batch.images[i : i + 1], [magnitude], [batch.seeds[i]])
                posterior = pipeline.vae.encode(image).latent_dist
                latent = posterior.mean + posterior.std * drawn.posterior_noise[i]
                latents[i] = latent[0] * pipeline.vae.config.scaling_factor
    noisy = pipeline.scheduler.add_noise(latents, drawn.noise, drawn.timesteps)
    target = pipeline.scheduler.get_velocity(latents, drawn.noise, drawn.timesteps)
    prediction = model(noisy, drawn.timesteps, **drawn.condition).sample
    kept = (prediction - target).pow(2).mean(dim=(1, 2, 3))[~decision.skip]
    kept.mean().backward()
    wanted = gradients(model)
    model.zero_grad()

    torch.manual_seed(4)
    controlled = ThresholdAwareControl(bank, 0.99, 1.1, 5.0, augment).step(model, objective, batch)
    controlled.loss.backward()
    assert controlled.augmented.tolist() == [m > 0 for m in magnitudes]
    assert controlled.loss.item() == pytest.approx(kept.mean().item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "average, passes", [(1e-9, 1), (1e9, 1), (None, 2)], ids=["all kept", "all skipped", "augmented"]
)
def test_the_pass_that_decides_is_the_step_s_own_where_it_can_be(pipeline, objective, model, average, passes):
    """One pass where nothing is left out or augmented; before a second one the first is let go."""
    batch, made = make_batch(pipeline), []
    torch.manual_seed(5)
    plain = objective.losses(model, draw(objective, batch))
    plain.mean().backward()
    wanted = gradients(model)
    model.zero_grad()

    measure = objective.losses

    def losses(*arguments):
        assert all(earlier() is None for earlier in made)
        result = measure(*arguments)
        made.append(weakref.ref(result))
        return result

    objective.losses = losses
    torch.manual_seed(5)
    bank = full_bank(average or plain.detach().mean().item())
    control = ThresholdAwareControl(bank, 0.9, math.inf, 5.0, StrengthRandAugment(20))
    controlled = control.step(model, objective, batch)
    assert len(made) == passes
    if average == 1e-9:
        controlled.loss.backward()
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(model).items())


def test_whether_the_deciding_pass_keeps_its_gradient_changes_no_bit(pipeline, objective, model):
    """It does as long as there are batches that are kept as they are, and a resumed control goes on alike."""
    torch.manual_seed(6)
    typical = objective.losses(model, draw(objective, make_batch(pipeline))).detach().mean().item()

    def stepped(control, seed, average):
        control.bank = full_bank(average)
        model.zero_grad()
        torch.manual_seed(seed)
        control.step(model, objective, make_batch(pipeline, seed=seed)).loss.backward()
        return gradients(model)

    def fresh():
        return ThresholdAwareControl(full_bank(1), 0.9, math.inf, 5.0, StrengthRandAugment(20))

    control, without = fresh(), fresh()
    averages = [1e-9, typical] + 25 * [typical] + [1e-9]
    shares = []
    for seed, average in enumerate(averages):
        without.whole_share = 0.0
        ours, wanted = stepped(control, seed, average), stepped(without, seed, average)
        assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in ours)
        shares.append(control.whole_share)
    assert shares[0] == 1 and min(shares) < WORTH_A_GRADIENT and shares[-1] > shares[-2]
    for kind in (lambda control: control, lambda control: WenControl(1.0, control)):
        kept, resumed = kind(fresh()), kind(fresh())
        kept.whole_share = 0.3
        resumed.load_state_dict(kept.state_dict())
        assert resumed.whole_share == 0.3


@pytest.mark.parametrize("reach", [1.0, math.inf])
def test_the_bank_decides_before_it_learns_and_learns_from_skipped_samples_too(pipeline, objective, model, reach):
    bank = full_bank(1e9)
    control = ThresholdAwareControl(bank, 0.8, reach, 5.0, StrengthRandAugment(5))
    controlled = control.step(model, objective, make_batch(pipeline))
    assert controlled.skipped.all()
    assert controlled.loss.item() == 0
    assert (bank.visits > 1e6).any()


def test_threshold_zero_is_plain_training(pipeline, objective, model):
    batch = make_batch(pipeline)
    results = []
    for control in (PlainControl(), ThresholdAwareControl(full_bank(1.0), 0.0)):
        model.zero_grad()
        torch.manual_seed(0)
        controlled = control.step(model, objective, batch)
        controlled.loss.backward()
        assert not controlled.skipped.any()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_weights_come_after_the_decision(pipeline, model):
    """min-SNR weights scale the loss, not the ratio."""
    batch = make_batch(pipeline)
    plain = make_objective(pipeline)
    weighted = make_objective(pipeline, snr_gamma=5.0)
    outcomes = []
    for objective in (plain, weighted):
        torch.manual_seed(1)
        outcomes.append(ThresholdAwareControl(full_bank(1.0), 0.8).step(model, objective, batch))
    assert torch.equal(outcomes[0].ratio, outcomes[1].ratio)
    assert outcomes[0].loss.item() != outcomes[1].loss.item()


@pytest.mark.parametrize("reach", [1.0, math.inf])
def test_nonfinite_samples_are_counted_and_left_out(pipeline, model, reach):
    objective = make_objective(pipeline)
    whole = objective.losses

    def poisoned(model, drawn):
        losses = whole(model, drawn)
        return torch.cat([losses[:1] * torch.nan, losses[1:]]) if len(losses) == 6 else losses

    objective.losses = poisoned
    bank = full_bank(1e-9)
    control = ThresholdAwareControl(bank, 0.8, reach, 5.0, StrengthRandAugment(5))
    controlled = control.step(model, objective, make_batch(pipeline))
    assert controlled.nonfinite.tolist() == [True] + [False] * 5
    assert controlled.loss.isfinite() and bank.averages.isfinite().all()


class Sick(torch.nn.Module):
    """A model whose first sample of a full batch comes out NaN, with NaN gradients."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, noisy, timesteps, encoder_hidden_states, return_dict):
        prediction = self.unet(noisy, timesteps, encoder_hidden_states, return_dict=False)[0]
        if len(prediction) == 6:
            prediction = prediction * torch.tensor([torch.nan, 1, 1, 1, 1, 1]).view(6, 1, 1, 1)
        return (prediction,)


@pytest.mark.parametrize("kind", ["plain", "masked", "augmented"])
def test_a_sample_that_is_not_finite_leaves_the_gradient_of_the_others(pipeline, objective, model, kind):
    control = {
        "plain": lambda: PlainControl(),
        "masked": lambda: ThresholdAwareControl(full_bank(1e-9), 0.8),
        "augmented": lambda: ThresholdAwareControl(full_bank(1e-9), 0.8, 1.1, 5.0, StrengthRandAugment(5)),
    }[kind]()
    batch = make_batch(pipeline)
    torch.manual_seed(0)
    drawn = draw(objective, batch)
    objective.losses(model, drawn[1:]).mean().backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(0)
    controlled = control.step(Sick(model), objective, batch)
    controlled.loss.backward()
    assert controlled.nonfinite.tolist() == [True] + [False] * 5 and not controlled.all_finite
    assert controlled.total_loss.isfinite()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_random_control_skips_and_augments_at_its_rates():
    control = RandomControl(0.25, 0.5, 0.4, StrengthRandAugment(5))
    torch.manual_seed(0)
    decision = control.decide(torch.rand(40_000), torch.zeros(40_000, dtype=torch.long))
    assert decision.skip.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert decision.augment[~decision.skip].float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert not (decision.skip & decision.augment).any()


@pytest.fixture
def filtering(pipeline):
    """An objective that knows the empty caption."""
    tokens = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    nothing = pipeline.text_encoder(tokens)[0].detach()
    return make_objective(pipeline, unconditional={"encoder_hidden_states": nothing})


def measured(model, objective, batch, seed):
    """Losses, magnitudes, and a threshold with as many magnitudes below it as above."""
    torch.manual_seed(seed)
    with torch.no_grad():
        losses, magnitudes = objective.losses_and_magnitudes(model, draw(objective, batch))
    middle = len(magnitudes) // 2
    return losses, magnitudes, magnitudes.sort().values[middle - 1 : middle + 1].mean().item()


def test_the_filter_of_wen_et_al_equals_a_loop_over_samples(pipeline, filtering, model):
    batch = make_batch(pipeline, 6)
    threshold = measured(model, filtering, batch, 5)[2]
    torch.manual_seed(5)
    drawn = draw(filtering, batch)
    skipped, kept = [], []
    for i, t in enumerate(drawn.timesteps):
        one, a = drawn[i : i + 1], pipeline.scheduler.alphas_cumprod[t]
        noisy = a.sqrt() * one.latents + (1 - a).sqrt() * one.noise
        predicted = model(noisy, t, **one.condition).sample
        difference = predicted - model(noisy, t, **filtering.unconditional).sample
        skipped.append(difference.detach().norm().item() >= threshold)
        if not skipped[-1]:
            target = a.sqrt() * one.noise - (1 - a).sqrt() * one.latents
            kept.append((predicted - target).pow(2).mean())
    torch.stack(kept).mean().backward()
    wanted = gradients(model)
    model.zero_grad()

    torch.manual_seed(5)
    controlled = WenControl(threshold).step(model, filtering, batch)
    controlled.loss.backward()
    assert controlled.skipped.tolist() == skipped and sum(skipped) == 3
    assert not controlled.augmented.any() and not controlled.nonfinite.any()
    assert controlled.loss.item() == pytest.approx(torch.stack(kept).mean().item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("reach", [1.0, math.inf])
def test_what_either_control_skips_is_skipped_and_the_bank_learns_from_all(pipeline, filtering, model, reach):
    batch = make_batch(pipeline, 12)
    losses, magnitudes, threshold = measured(model, filtering, batch, 6)
    average = losses.median().item()

    def inner():
        return ThresholdAwareControl(full_bank(average), 0.999, reach, 0.5, StrengthRandAugment(20))

    outcomes = []
    alone, both = inner(), WenControl(threshold, inner())
    for control in (alone, both):
        torch.manual_seed(6)
        outcomes.append(control.step(model, filtering, batch))
    filtered = magnitudes >= threshold
    assert outcomes[1].skipped.tolist() == (outcomes[0].skipped | filtered).tolist()
    assert outcomes[1].augmented.tolist() == (outcomes[0].augmented & ~filtered).tolist()
    assert 0 < outcomes[0].skipped.sum() < outcomes[1].skipped.sum() < 12
    assert (reach == 1) or outcomes[1].augmented.any()
    for name, tensor in alone.bank.state_dict().items():
        assert torch.equal(both.state_dict()[name], tensor)
    resumed = WenControl(threshold, inner())
    resumed.load_state_dict(both.state_dict())
    assert torch.equal(resumed.inner.bank.averages, alone.bank.averages)


@pytest.mark.parametrize("reach", [1.0, math.inf])
def test_a_batch_that_is_filtered_whole_has_loss_0(pipeline, filtering, model, reach):
    bank = full_bank(1.0)
    inner = ThresholdAwareControl(bank, 0.8, reach, 5.0, StrengthRandAugment(5))
    controlled = WenControl(1e-9, inner).step(model, filtering, make_batch(pipeline))
    assert controlled.skipped.all() and not controlled.augmented.any()
    assert controlled.loss.item() == 0 and controlled.total_loss.item() > 0
    assert (bank.visits > 1e6).any()


def test_the_filter_keeps_and_augments_only_what_is_below_its_threshold():
    inner = ThresholdAwareControl(full_bank(1.0), 0.5, math.inf, 5.0, StrengthRandAugment(5))
    measurements = torch.ones(3), torch.tensor([1, 2, 3]), torch.tensor([0.5, torch.nan, 1.0])
    for control, augment in ((WenControl(1.0), False), (WenControl(1.0, inner), True)):
        decision = control.decide(*measurements)
        assert decision.skip.tolist() == [False, True, True]
        assert decision.augment.tolist() == [augment, False, False]


def test_a_group_s_mean_is_over_what_the_filter_leaves_in_all_its_processes(pipeline, filtering, model):
    """Two processes that meet at every sum; one of them has nothing left, and still comes."""
    batch = make_batch(pipeline, 8)
    torch.manual_seed(7)
    drawn = draw(filtering, batch)
    with torch.no_grad():
        losses, magnitudes = filtering.losses_and_magnitudes(model, drawn)
    order = magnitudes.argsort()
    parts, threshold = [drawn[order[:4]], drawn[order[4:]]], magnitudes[order[3]].item()
    sums = []

    class Half:
        size, rank = 2, 0

        def gather(self, tensor):
            return tensor

        def sum(self, tensor):
            sums.append(int(tensor))
            return tensor + 3 - tensor  # the group keeps 3, all of them in its first process

    class Given:
        def __init__(self, part):
            self.part = part

        def draw(self, batch):
            return self.part

        def __getattr__(self, name):
            return getattr(filtering, name)

    steps = [WenControl(threshold, group=Half()).step(model, Given(part), batch) for part in parts]
    assert sums == [3, 0]
    assert steps[0].loss.item() == pytest.approx(losses[order[:3]].mean().item(), rel=1e-5)
    assert steps[1].loss.item() == 0 and steps[1].skipped.all()
