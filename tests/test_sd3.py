"""Stable Diffusion 3: flow matching as a family like any other."""

import math

import numpy as np
import pytest
import torch
from conftest import COLOURS, train_flags, train_here
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig

from ietagc_diffusers import UsageError, family_of, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.families import StableDiffusion3
from ietagc_diffusers.families.flow_matching import SCHEMES, LevelDensity
from ietagc_diffusers.families.settings import BaseModelSettings
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.lora import adapted, add_adapter, saved_names

CAPTIONS = [f"a {colour} picture" for colour in COLOURS]
METHOD = [
    "--num_shards=2", "--steps_per_round=3", "--max_train_steps=12", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--random_flip", "--report_to=none",
]  # fmt: skip
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    return testing.random_sd3_pipeline(CAPTIONS)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("base") / "sd3"
    pipeline.save_pretrained(folder)
    return folder


def draw(family, number=4):
    images = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return family.objective.draw(family.objective.encode(family.batch(images, (CAPTIONS * number)[:number])))


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_are_those_of_the_official_script(pipeline, scheme, precondition):
    """Written down as the script has them: with preconditioning the error is of the image."""
    density = LevelDensity(scheme)
    family = testing.family_of_pipeline(pipeline, density=density, precondition_outputs=precondition)
    drawn = draw(family, 6)
    scheduler = pipeline.scheduler
    sigmas = scheduler.sigmas[drawn.steps].view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * drawn.latents + sigmas * drawn.noise
    with torch.no_grad():
        prediction = pipeline.transformer(
            hidden_states=noisy,
            timestep=scheduler.timesteps[drawn.steps],
            encoder_hidden_states=drawn.condition["encoder_hidden_states"],
            pooled_projections=drawn.condition["pooled_projections"],
        ).sample
        losses = family.objective.losses(pipeline.transformer, drawn)
        plain = family.objective.plain_loss(pipeline.transformer, drawn)
    torch.testing.assert_close(losses, (prediction - (drawn.noise - drawn.latents)).square().flatten(1).mean(1))
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    target = drawn.noise - drawn.latents
    if precondition:
        prediction, target = prediction * (-sigmas) + noisy, drawn.latents
    official = (weighting.float() * (prediction - target) ** 2).reshape(len(drawn), -1).mean(1)
    torch.testing.assert_close(plain, official.mean(), rtol=1e-4, atol=1e-6)
    weights = family.objective.weights(drawn)
    torch.testing.assert_close(losses if weights is None else losses * weights, official, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "density",
    [*map(LevelDensity, SCHEMES), LevelDensity("logit_normal", 0.7, 0.5), LevelDensity("mode", mode_scale=-1)],
)
def test_noise_levels_are_drawn_as_diffusers_draws_them(density):
    torch.manual_seed(3)
    uniform, u = density.draw(20_000, torch.device("cpu"))
    torch.manual_seed(3)
    official = compute_density_for_timestep_sampling(
        density.scheme, 20_000, density.logit_mean, density.logit_std, density.mode_scale
    )
    assert torch.equal(u, official)
    torch.testing.assert_close(density.of(uniform.double()).float(), u, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_level_of_the_bank_is_as_likely_as_any_other(pipeline, scheme):
    family = testing.family_of_pipeline(pipeline, density=LevelDensity(scheme))
    levels = torch.cat([draw(family, 500).levels for _ in range(4)])
    counts = torch.histc(levels.double(), bins=10, min=0, max=1000)
    assert (counts - 200).abs().max() < 5 * math.sqrt(200)
    assert levels.min() >= 0 and levels.max() < 1000


def test_a_level_stands_for_its_noise(pipeline):
    family = testing.family_of_pipeline(pipeline)
    objective, drawn = family.objective, draw(family, 40)
    again = objective.at_levels(drawn, drawn.levels)
    assert torch.equal(again.levels, drawn.levels) and again.noise is drawn.noise
    first, last = (1000 * objective.density.of((drawn.levels.double() + edge) / 1000) for edge in (0, 1))
    for steps in (again.steps, drawn.steps):  # a level is a range of noise
        assert (first.floor() - 1 <= steps).all() and (steps <= last.ceil() + 1).all()
    ordered = objective.at_levels(drawn, torch.arange(0, 1000, 25))
    assert (objective.sigmas(ordered).diff() < 0).all()


def test_the_middle_level_is_the_median_of_the_noise(pipeline):
    family = testing.family_of_pipeline(pipeline, density=LevelDensity("logit_normal", 0.5, 0.8))
    drawn = family.objective.at_levels(draw(family, 2), torch.tensor([500, 500]))
    assert drawn.steps[0].item() == pytest.approx(1000 / (1 + math.exp(-0.5)), abs=1)


@pytest.mark.parametrize("length", [77, 20])
@pytest.mark.parametrize("t5", [True, False])
def test_captions_are_encoded_as_the_pipeline_does(t5, length):
    pipeline = testing.random_sd3_pipeline(CAPTIONS)
    if not t5:
        pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    family = StableDiffusion3.of_pipeline(pipeline, BaseModelSettings(max_sequence_length=length))
    told = family.encode_text(family.tokenize(CAPTIONS))
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=length
    )
    torch.testing.assert_close(told["encoder_hidden_states"], embeddings)
    torch.testing.assert_close(told["pooled_projections"], pooled)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_in_float16_the_layers_of_t5_that_overflow_stay_in_float32(stored, tmp_path):
    pipeline = testing.random_sd3_pipeline(CAPTIONS)
    pipeline.to(stored).save_pretrained(tmp_path)
    flags = [f"--pretrained_model_name_or_path={tmp_path}", "--train_data_dir=d", "--resolution=16"]
    family = StableDiffusion3.load(parse_flags(flags), dtype=torch.float16)
    t5 = family.text_encoders["text_encoder_3"]
    assert {name.rpartition(".")[0][-2:] for name, p in t5.named_parameters() if p.dtype != torch.float16} == {"wo"}


def test_latents_are_shifted_and_scaled_as_the_pipeline_undoes_it(pipeline):
    family = testing.family_of_pipeline(pipeline)
    drawn, vae = draw(family), pipeline.vae
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = vae.encode(images).latent_dist
    unscaled = drawn.latents / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(unscaled, posterior.mean + posterior.std * drawn.posterior_noise)


def test_a_run_trains_caches_and_resumes(sd3, pictures, tmp_path):
    assert family_of(sd3) is StableDiffusion3
    flags = train_flags(sd3, pictures, *METHOD, "--center_crop", "--use_ema")
    whole = train_here(flags, tmp_path / "whole")
    cached = train_here([*flags, f"--cache_latents={tmp_path / 'cache'}"], tmp_path / "cached")
    train_here(flags, tmp_path / "stopped", stop_at=5)
    resumed = train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "stopped")
    assert (whole / WEIGHTS).read_bytes() == (cached / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()
    assert StableDiffusion3Pipeline.from_pretrained(whole).transformer.config.sample_size == 8


def test_a_base_without_t5_is_trained(pictures, tmp_path):
    pipeline = testing.random_sd3_pipeline(CAPTIONS)
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "base")
    flags = train_flags(tmp_path / "base", pictures, *METHOD, "--validation_prompts=a red picture")
    out = train_here(flags, tmp_path / "out")
    assert not (out / "text_encoder_3").exists()
    StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)  # diffusers wants it said
    frozen = StableDiffusion3.load_frozen(out)
    transformer = StableDiffusion3.load_denoiser(out, "transformer")
    losses = FixedLosses(frozen, torch.zeros(4, 3, 16, 16), CAPTIONS, draws=2)(transformer)
    assert losses.shape == (4,) and losses.isfinite().all()


def test_a_trained_adapter_loads_into_a_stock_pipeline(sd3, pictures, tmp_path):
    out = train_here(train_flags(sd3, pictures, *METHOD, "--lora_rank=2", "--save_merged"), tmp_path / "out")
    adapted, merged, plain = (StableDiffusion3Pipeline.from_pretrained(place) for place in (sd3, out, sd3))
    adapted.load_lora_weights(out)
    drawn = []
    for pipeline in (adapted, merged, plain):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        drawn.append(pipeline(CAPTIONS[0], generator=generator, **options).images)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)
    assert abs(drawn[0] - drawn[2]).max() > 1e-4


def test_an_adapter_is_on_the_layers_of_diffusers_script_unless_others_are_named(pipeline, sd3, pictures):
    """Both halves of joint attention, and not SD 3.5's second attention, which only the image's tokens have."""
    official = [f"add_{name}_proj" for name in "kqv"] + ["to_add_out", "to_k", "to_out.0", "to_q", "to_v"]
    transformer = SD3Transformer2DModel.from_config(pipeline.transformer.config, dual_attention_layers=(0,))
    reference = SD3Transformer2DModel.from_config(transformer.config)
    reference.add_adapter(LoraConfig(target_modules=[f"attn.{name}" for name in official]))
    family = testing.family_of_pipeline(StableDiffusion3Pipeline(**pipeline.components | {"transformer": transformer}))
    settings = parse_flags(train_flags(sd3, pictures, "--lora_rank=2"))
    add_adapter(family, settings)
    assert adapted(transformer).keys() == adapted(reference).keys()
    assert sorted(settings.values()["lora_target_modules"]) == sorted(f"attn.{name}" for name in official)
    assert {name.rpartition(".lora")[0] for name in saved_names(family).values()} == {
        f"transformer.{name}" for name in adapted(reference)
    }


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--snr_gamma=5", "snr_gamma"),
        ("--prediction_type=epsilon", "prediction_type"),
        ("--noise_offset=0.1", "noise_offset"),
        ("--timestep_bias_strategy=later", "timestep_bias_strategy"),
    ],
)
def test_what_has_no_meaning_is_said_before_training(sd3, pictures, tmp_path, flag, name):
    with pytest.raises(UsageError, match=f"`{name}`: does not apply to Stable Diffusion 3"):
        train_here(train_flags(sd3, pictures, flag, "--max_train_steps=1"), tmp_path / "out")


@pytest.mark.parametrize(("resolution", "found"), [(18, 18), (68, 68)])
def test_a_resolution_that_is_not_cut_into_patches_is_refused(sd3, pictures, tmp_path, resolution, found):
    flags = train_flags(sd3, pictures, "--max_train_steps=1")
    with pytest.raises(UsageError, match=f"`resolution` {found}: Stable Diffusion 3 takes multiples of 4, at most 64"):
        train_here([*flags, f"--resolution={resolution}"], tmp_path / "out")


def test_embedding_noise_leaves_what_fills_up(pipeline):
    """As GNI at inference: on every embedding that an encoder computed, the pooled one too."""
    plain, noisy = testing.family_of_pipeline(pipeline), testing.family_of_pipeline(pipeline, embedding_noise=0.1)
    torch.manual_seed(0)
    before = draw(plain, 32)
    torch.manual_seed(0)
    after = draw(noisy, 32)
    assert torch.equal(before.steps, after.steps) and torch.equal(before.noise, after.noise)
    for name in ("encoder_hidden_states", "pooled_projections"):
        computed = before.condition[name] != 0
        change = after.condition[name] - before.condition[name]
        assert not change[~computed].any() and change[computed].std().item() == pytest.approx(0.1, rel=0.06)
    assert (~(before.condition["encoder_hidden_states"] != 0)).any()
