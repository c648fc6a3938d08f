"""Ambient Diffusion: what a mask hides never reaches the training, and a model that sees all draws as usual."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ietagc_diffusers import UsageError, hub, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.eval.generate import Settings, load_pipeline
from ietagc_diffusers.families.ambient import Ambient
from ietagc_diffusers.families.unconditional import draw
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.scripts import UnconditionalScript

IDS = [3, 14, 15, 92]


def pipeline_with_mask(prediction_type="epsilon"):
    """A tiny DDPM whose UNet takes a mask."""
    plain = testing.random_unconditional_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DModel.from_config(plain.unet.config, in_channels=4)
    return DDPMPipeline(unet, DDPMScheduler(prediction_type=prediction_type))


def batch_of(family, seed=0):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return replace(family.batch(images, [""] * 4), ids=IDS)


def drawn_by(family, batch):
    torch.manual_seed(0)
    return family.objective.draw(family.objective.encode(batch))


def losses_and_input(family, drawn):
    seen = []
    hook = family.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        losses = family.objective.losses(family.denoiser, drawn)
    hook.remove()
    return losses, seen[0]


def test_masks_are_the_images_own():
    masks = Ambient(0.4, 0.1, 7).masks(IDS, (64, 64))
    counted, shown = masks["counted"], masks["shown"]
    assert counted.shape == shown.shape == (4, 1, 64, 64) and set(counted.unique().tolist()) == {0, 1}
    assert counted.mean().item() == pytest.approx(0.6, abs=0.02)
    assert shown.mean().item() == pytest.approx(0.6 * 0.9, abs=0.02) and not (shown > counted).any()
    alone = Ambient(0.4, 0.1, 7).masks(IDS[2:3], (64, 64))
    assert torch.equal(alone["counted"][0], counted[2]) and torch.equal(alone["shown"][0], shown[2])
    assert not torch.equal(counted[0], counted[1])
    assert not torch.equal(Ambient(0.4, 0.1, 8).masks(IDS, (64, 64))["counted"], counted)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_losses_are_the_errors_of_the_image_over_the_first_mask(kind):
    """By hand: x_0 from what the model is shown, compared with x where the first mask shows it."""
    pipeline = pipeline_with_mask(kind)
    family = testing.family_of_pipeline(pipeline, ambient=Ambient(0.4, 0.2, 7))
    batch = batch_of(family)
    drawn = drawn_by(family, batch)
    losses, seen = losses_and_input(family, drawn)
    masks = Ambient(0.4, 0.2, 7).masks(IDS, (16, 16))
    alpha_bar = pipeline.scheduler.alphas_cumprod[drawn.timesteps].view(-1, 1, 1, 1)
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    z = masks["shown"] * (a * batch.images + b * drawn.noise)
    torch.testing.assert_close(seen, torch.cat([z, masks["shown"]], dim=1))
    with torch.no_grad():
        said = pipeline.unet(seen, drawn.timesteps).sample
    image = said if kind == "sample" else (z - b * said) / a
    errors = masks["counted"] * (image - batch.images).square()
    wanted = errors.sum((1, 2, 3)) / (3 * masks["counted"].sum((1, 2, 3)))
    if kind == "epsilon":
        wanted = wanted * (a / b).square().flatten()
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_hidden_pixels_do_not_matter(kind):
    family = testing.family_of_pipeline(pipeline_with_mask(kind), ambient=Ambient(0.4, 0.2, 7))
    batch = batch_of(family)
    hidden = 1 - Ambient(0.4, 0.2, 7).masks(IDS, (16, 16))["counted"]
    other = replace(batch, images=torch.where(hidden > 0, -batch.images, batch.images))
    (losses, seen), (of_other, seen_other) = (losses_and_input(family, drawn_by(family, b)) for b in (batch, other))
    assert torch.equal(seen, seen_other) and torch.equal(losses, of_other)
    wrong = replace(batch, images=torch.where(hidden > 0, batch.images, -batch.images))
    assert not torch.equal(losses_and_input(family, drawn_by(family, wrong))[0], losses)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_with_nothing_hidden_it_is_plain_training(kind):
    pipeline = pipeline_with_mask(kind)
    plain, ambient = (
        testing.family_of_pipeline(pipeline),
        testing.family_of_pipeline(pipeline, ambient=Ambient(1e-12, 0, 7)),
    )
    batch = batch_of(plain)
    (losses, seen), (of_ambient, seen_ambient) = (
        losses_and_input(family, drawn_by(family, batch)) for family in (plain, ambient)
    )
    assert torch.equal(seen, seen_ambient) and (seen[:, 3] == 1).all()
    torch.testing.assert_close(losses, of_ambient)
    measured = FixedLosses(plain, batch.images, [""] * 4, draws=2)(pipeline.unet)
    assert measured.isfinite().all()


def test_it_draws_as_a_model_that_sees_all():
    """A model that does not heed its mask draws what the same model without one does."""
    masked, plain = pipeline_with_mask(), testing.random_unconditional_pipeline()
    with torch.no_grad():
        state = masked.unet.state_dict()
        state["conv_in.weight"][:, 3] = 0
    plain.unet.load_state_dict(state | {"conv_in.weight": state["conv_in.weight"][:, :3]})
    one, other = (
        [np.asarray(image) for image in draw(pipeline, torch.Generator().manual_seed(0), 2, 3)]
        for pipeline in (masked, plain)
    )
    assert all(map(np.array_equal, one, other))


def test_the_commands_draw_with_it_and_the_card_says_so(tmp_path):
    pipeline_with_mask().save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(tmp_path / "model", Settings(num_inference_steps=2))
    assert draw(pipeline, torch.Generator().manual_seed(0), 1, 2)[0].size == (16, 16)
    flags = ["--train_data_dir=d", "--ambient_corruption=0.4", f"--output_dir={tmp_path}"]
    hub.write_card(parse_flags(flags, UnconditionalScript), "me/hidden", [], [])
    card = (tmp_path / "README.md").read_text()
    assert "ietagc generate --model hidden" in card and "pipeline()" not in card
    assert "`ambient_further_corruption` | 0.1" in card


def test_bases_must_fit(tmp_path):
    pipeline_with_mask().save_pretrained(tmp_path / "masked")
    testing.random_unconditional_pipeline().save_pretrained(tmp_path / "plain")
    for base, flags, message in (
        ("masked", [], "`ambient_corruption`: the base takes such a mask"),
        ("plain", ["--ambient_corruption=0.4"], "`ambient_corruption`: the base takes no mask"),
    ):
        flags = [f"--pretrained_model_name_or_path={tmp_path / base}", "--train_data_dir=d", "--resolution=16", *flags]
        settings = parse_flags(flags, UnconditionalScript)
        family = type(testing.family_of_pipeline(testing.random_unconditional_pipeline()))
        with pytest.raises(UsageError, match=message):
            family.load(settings, config=settings.method)
    with pytest.raises(UsageError, match="`ambient_corruption`: hides pixels from models of pixels"):
        parse_flags(["--pretrained_model_name_or_path=b", "--train_data_dir=d", "--ambient_corruption=0.4"])
