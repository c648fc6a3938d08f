"""Calibrated control judges each loss over the base model's on the same noisy sample."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import train_flags, train_here, unet_bytes

from ietagc_diffusers import (
    LossMemoryBank,
    MitigationConfig,
    StrengthRandAugment,
    ThresholdAwareControl,
    UsageError,
    WenControl,
    testing,
)
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.data import Batch
from ietagc_diffusers.run_folder import ADAPTER_FILE
from ietagc_diffusers.training.controls import WithoutAdapters, reference_of
from ietagc_diffusers.training.cost import cost_of
from ietagc_diffusers.training.layout import Layout
from ietagc_diffusers.training.lora import adapted_layers, add_adapter
from ietagc_diffusers.training.scripts import UnconditionalScript

CAPTIONS = ["a red picture", "a blue picture"]
NAMES = ["--pretrained_model_name_or_path=m", "--train_data_dir=d"]
RUN = ["--mitigation=iet-agc+c", "--num_shards=2", "--skip_rate=0.4", "--bank_buckets=2", "--report_to=none"]
RUN += ["--max_train_steps=8", "--steps_per_round=2"]


class Given:
    """A reference with these losses."""

    def __init__(self, losses):
        self.given = torch.as_tensor(losses)

    def losses(self, objective, drawn):
        return self.given


@pytest.fixture(scope="module")
def family():
    return testing.family_of_pipeline(testing.random_pipeline(CAPTIONS))


@pytest.fixture
def adapted():
    """A family with adapters that say something."""
    family = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS))
    settings = parse_flags([*NAMES, "--lora_rank=2", "--mitigation=agc-c"])
    add_adapter(family, settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in family.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return family, settings


def batch_of(family, size=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1
    return Batch(images, family.tokenize(CAPTIONS * (size // 2)), seeds=list(range(size)))


def full_bank(average):
    bank = LossMemoryBank(1000)
    bank.averages.fill_(average)
    bank.visits.fill_(1e6)
    return bank


def draw(family, seed=0):
    torch.manual_seed(seed)
    return family.objective.draw(family.objective.encode(batch_of(family)))


@pytest.mark.parametrize("wrap", [lambda control: control, lambda control: WenControl(1e9, control)])
@pytest.mark.parametrize("reach", [1.0, 1.1])
def test_losses_over_the_reference_s_are_what_is_decided_on_and_remembered(family, wrap, reach):
    drawn = draw(family)
    with torch.no_grad():
        losses = family.objective.losses(family.denoiser, drawn)
    difficulty = losses * torch.tensor([1.25, 1.0, 1.05, 0.5, 2.0, 0.9])
    augment = StrengthRandAugment(5)
    bank = full_bank(1.0)
    control = wrap(ThresholdAwareControl(bank, 0.9, reach, 5.0, augment, reference=Given(difficulty)))
    family.objective.unconditional = family.tokenize([""])
    wanted = ThresholdAwareControl(full_bank(1.0), 0.9, reach, 5.0, augment).decide(losses / difficulty, drawn.levels)
    torch.manual_seed(0)
    controlled = control.step(family.denoiser, family.objective, batch_of(family))
    assert controlled.skipped.tolist() == wanted.skip.tolist() == [True, False, False, False, True, False]
    torch.testing.assert_close(controlled.ratio, wanted.ratio, rtol=1e-5, atol=0)
    other = full_bank(1.0)
    other.update(losses / difficulty, drawn.levels)
    torch.testing.assert_close(bank.averages, other.averages)
    # What is differentiated and logged are the losses themselves.
    assert controlled.total_loss.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    if reach == 1:
        assert controlled.loss.item() == pytest.approx(losses[~wanted.skip].mean().item(), rel=1e-5)


@pytest.mark.parametrize("nothing", [0.0, math.inf, math.nan])
def test_a_reference_that_says_nothing_of_a_sample_decides_nothing_about_it(family, nothing):
    bank = full_bank(1e9)  # all others are skipped
    control = ThresholdAwareControl(bank, 0.9, reference=Given([1.0, nothing, 1.0, 1.0, 1.0, 1.0]))
    torch.manual_seed(0)
    controlled = control.step(family.denoiser, family.objective, batch_of(family))
    assert controlled.skipped.tolist() == [True, False, True, True, True, True]
    assert controlled.loss.isfinite() and bank.averages.isfinite().all() and bank.visits.sum() == 1000 * 1e6 + 5


def test_without_adapters_a_model_is_its_base_and_afterwards_itself(adapted):
    family, settings = adapted
    base = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS))
    drawn = draw(family)
    reference = reference_of(settings, family, family.denoiser, None)
    with torch.no_grad():
        before = family.objective.losses(family.denoiser, drawn)
        wanted = base.objective.losses(base.denoiser, drawn)
    found = reference.losses(family.objective, drawn)
    assert torch.equal(found, wanted) and not torch.equal(before, wanted)
    with torch.no_grad():
        assert torch.equal(family.objective.losses(family.denoiser, drawn), before)


def test_a_look_at_the_base_changes_no_gradient(adapted):
    """The reference runs between a forward pass and its backward pass."""
    family, settings = adapted
    drawn, trained = draw(family), [p for p in family.denoiser.parameters() if p.requires_grad]
    family.objective.losses(family.denoiser, drawn).mean().backward()
    wanted = [p.grad.clone() for p in trained]
    family.denoiser.zero_grad()
    loss = family.objective.losses(family.denoiser, drawn).mean()
    reference_of(settings, family, family.denoiser, None).losses(family.objective, drawn)
    loss.backward()
    assert all(p.requires_grad for p in trained) and trained
    for parameter, gradient in zip(trained, wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_failing_look_leaves_the_adapters_on(adapted):
    family, _ = adapted

    class Failing:
        def losses(self, model, drawn):
            raise RuntimeError("out of memory")

    layers = [*adapted_layers(family).values()]
    with pytest.raises(RuntimeError, match="out of memory"):
        WithoutAdapters(family.denoiser, layers).losses(Failing(), None)
    assert not any(layer.disable_adapters for layer in layers)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_copy_stays_the_base_while_the_model_is_trained(precision):
    family = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS))
    family.dtype = precision
    settings = parse_flags([*NAMES, "--mitigation=agc-c"])
    reference = reference_of(settings, family, family.denoiser, lambda module: module)
    drawn = draw(family)
    with torch.no_grad():
        wanted = family.objective.losses(family.denoiser, drawn)
        for parameter in family.denoiser.parameters():
            parameter.add_(1.0)
    family.objective.dtype = precision
    drawn = replace(drawn, condition={name: tensor.to(precision) for name, tensor in drawn.condition.items()})
    found = reference.losses(family.objective, drawn)
    torch.testing.assert_close(found, wanted, rtol=0 if precision is torch.float32 else 0.02, atol=0)
    assert not any(p.requires_grad for p in reference.model.parameters())
    held = sum(p.nbytes for p in reference.model.parameters())
    plain = parse_flags([*NAMES, "--mitigation=agc"])
    assert cost_of(settings, family, Layout(1)).device - cost_of(plain, family, Layout(1)).device == held


@pytest.fixture(scope="module", params=[[], ["--lora_rank=2", "--no-shard_data"]])
def flags(request, base, pictures):
    return train_flags(base, pictures, *RUN, *request.param)


def result(folder):
    return (folder / ADAPTER_FILE).read_bytes() if (folder / ADAPTER_FILE).exists() else unet_bytes(folder)


def test_a_stopped_run_goes_on_bit_for_bit(flags, tmp_path):
    whole = result(train_here(flags, tmp_path / "whole"))
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut", stop_at=5)
    assert result(train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut")) == whole


def test_presets_are_the_paper_s_with_another_judge():
    for name in ("agc", "iet-agc", "iet-agc+"):
        paper, ours = (
            MitigationConfig.preset(each).to_dict() for each in (name, f"{name}c" if "+" in name else f"{name}-c")
        )
        changed = {key for key in paper if paper[key] != ours[key]} - {"mitigation"}
        assert changed <= {"calibrate", "skip_threshold", "augment_range", "augment_decay"}, name
        assert (ours["calibrate"], ours["skip_threshold"]) == ("base", 0.97)
    assert MitigationConfig.preset("iet-agc+", skip_rate=0.3).skip_threshold == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mitigation=none", "--calibrate=base"], "`calibrate` base: calibrates the control by loss, which is off"),
        (["--skip_rate=0.3", "--skip_threshold=0.5"], "`skip_threshold` and `skip_rate` were both given"),
        (["--skip_rate=1"], r"`skip_rate` 1.0: must be in \[0, 1\)"),
        (["--mitigation=agc-c", "--random_skip_rate=0.1"], "`random_skip_rate` and `random_augment_rate` replace"),
        (["--mitigation=iet-agc-c", "--lora_rank=4", "--lora_average=fold"], "`calibrate` base: with `lora_average`"),
    ],
)
def test_flags_that_do_not_go_together(more, message):
    with pytest.raises(UsageError, match=message):
        parse_flags([*NAMES, *more])


def test_a_model_from_scratch_has_no_base():
    with pytest.raises(UsageError, match="`calibrate` base: a model that is trained from scratch has no base"):
        parse_flags(["--train_data_dir=d", "--mitigation=iet-agc+c"], UnconditionalScript)
    parse_flags(["--train_data_dir=d", "--mitigation=iet-agc+c", NAMES[0]], UnconditionalScript)
