"""Stable Diffusion XL: what the UNet is told, its losses, and a run of it."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COLOURS, train_flags, train_here, unet_bytes
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.families import StableDiffusionXL
from ietagc_diffusers.families.text_to_image import biased_timesteps
from ietagc_diffusers.families.views import SizedPixels

CAPTIONS = [f"a {colour} picture" for colour in COLOURS]
METHOD = [
    "--num_shards=2", "--steps_per_round=3", "--max_train_steps=12", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--random_flip", "--report_to=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "xl"
    testing.random_xl_pipeline(CAPTIONS).save_pretrained(folder)
    return folder


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def view(**options):
    settings = {"resolution": 8, "center_crop": False, "random_flip": False, "image_interpolation_mode": "bilinear"}
    return SizedPixels.of(SimpleNamespace(**settings | options))


@pytest.mark.parametrize(("width", "height"), [(8, 8), (12, 8), (8, 13), (31, 17)])
@pytest.mark.parametrize("flip", [False, True])
def test_the_crop_that_is_told_is_the_crop_that_is_shown(width, height, flip):
    image = picture(width, height)
    edges, mirrored = set(), set()
    for seed in range(12):
        torch.manual_seed(seed)
        pixels, told = view(random_flip=flip)(image, random.Random(seed))
        tall, wide, top, left, *size = map(int, told["time_ids"])
        assert (tall, wide) == (height, width) and size == [8, 8]
        scale = 8 / min(width, height)
        resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
        wanted = []
        for shown in (resized, resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            crop = np.asarray(shown)[top : top + 8, left : left + 8]
            wanted.append(torch.from_numpy(crop.copy()).permute(2, 0, 1) / 127.5 - 1)
        which = [bool(torch.allclose(pixels, one, atol=1e-5)) for one in wanted]
        assert any(which)
        mirrored.add(which[1])
        edges.add((top, left))
    assert mirrored == ({False, True} if flip else {False})
    assert (len(edges) > 1) == (width != height)


def test_fixed_views_are_what_visits_show():
    image, sized = picture(23, 17), view(center_crop=True, random_flip=True)
    for seed in range(6):
        pixels, told = sized(image, random.Random(seed))
        fixed, fixed_told = sized.fixed[sized.draw(random.Random(seed))](image)
        assert torch.equal(pixels, fixed) and torch.equal(told["time_ids"], fixed_told["time_ids"])
    assert told["time_ids"].tolist() == [17, 23, 0, 1, 8, 8]  # resized to 10 x 8: (10 - 8) / 2
    assert view().fixed == ()


def test_captions_are_encoded_as_the_pipeline_does():
    pipeline = testing.random_xl_pipeline(CAPTIONS)
    family = testing.family_of_pipeline(pipeline)
    told = family.encode_text(family.tokenize(CAPTIONS))
    embeddings, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    torch.testing.assert_close(told["encoder_hidden_states"], embeddings)
    torch.testing.assert_close(told["text_embeds"], pooled)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_losses_are_the_mean_squared_errors(kind):
    pipeline = testing.random_xl_pipeline(CAPTIONS, prediction_type=kind)
    family = testing.family_of_pipeline(pipeline)
    batch = family.batch(torch.rand(4, 3, 16, 16) * 2 - 1, CAPTIONS)
    sizes = torch.tensor([[30.0, 20, 1, 2, 16, 16]]).repeat(4, 1)
    drawn = family.objective.draw(family.objective.encode(replace(batch, told={"time_ids": sizes})))
    alphas = pipeline.scheduler.alphas_cumprod[drawn.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * drawn.latents + (1 - alphas).sqrt() * drawn.noise
    target = {
        "epsilon": drawn.noise,
        "v_prediction": alphas.sqrt() * drawn.noise - (1 - alphas).sqrt() * drawn.latents,
        "sample": drawn.latents + drawn.noise,  # the official script takes the noise off the prediction
    }[kind]
    added = {"text_embeds": drawn.condition["text_embeds"], "time_ids": sizes}
    with torch.no_grad():
        prediction = pipeline.unet(
            noisy, drawn.timesteps, drawn.condition["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
        losses = family.objective.losses(pipeline.unet, drawn)
    torch.testing.assert_close(losses, (prediction - target).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


def test_a_batch_without_views_is_told_its_own_size():
    family = testing.family_of_pipeline(testing.random_xl_pipeline(CAPTIONS))
    batch = family.batch(torch.zeros(2, 3, 24, 16), CAPTIONS[:2])
    assert batch.told["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]] * 2


def test_timesteps_are_biased_as_the_official_script_does():
    assert biased_timesteps(1000, "none") is None
    later = biased_timesteps(1000, "later", 3.0, portion=0.25)
    assert later.sum().item() == pytest.approx(1) and (later[-1] / later[0]).item() == pytest.approx(3)
    assert (later == later[-1]).sum() == 250 and (later[:750] == later[0]).all()
    earlier = biased_timesteps(1000, "earlier", 3.0, portion=0.25)
    torch.testing.assert_close(earlier, later.flip(0))
    middle = biased_timesteps(1000, "range", 0.5, begin=100, end=300)
    assert (middle < middle[0]).nonzero().flatten().tolist() == list(range(100, 300))
    with pytest.raises(UsageError, match="`timestep_bias_end` 1200: must be a range within 0 to 1000"):
        biased_timesteps(1000, "range", begin=3, end=1200)
    pipeline = testing.random_xl_pipeline(CAPTIONS)
    family = testing.family_of_pipeline(pipeline, timestep_weights=biased_timesteps(1000, "range", 1e6, 200, 300))
    batch = family.batch(torch.zeros(64, 3, 16, 16), CAPTIONS[:1] * 64)
    drawn = family.objective.draw(family.objective.encode(batch))
    assert drawn.levels.min() >= 200 and drawn.levels.max() < 300 and len(drawn.levels.unique()) > 20


def test_a_cache_does_not_change_a_bit(xl, pictures, tmp_path):
    flags = train_flags(xl, pictures, *METHOD, "--center_crop", "--use_ema", "--caption_dropout=0.3")
    without = train_here(flags, tmp_path / "without")
    made, read = (
        train_here([*flags, f"--cache_latents={tmp_path / 'cache'}"], tmp_path / name) for name in ("made", "read")
    )
    assert unet_bytes(without) == unet_bytes(made) == unet_bytes(read)
    other = train_here([*flags, "--caption_dropout=0"], tmp_path / "other")
    assert unet_bytes(other) != unet_bytes(without)


@pytest.mark.parametrize("more", [[], ["--mitigation=none"]], ids=["method", "official"])
def test_a_stopped_run_ends_as_one_that_was_not(xl, pictures, tmp_path, more):
    flags = train_flags(xl, pictures, *METHOD, *more)
    whole = train_here(flags, tmp_path / "whole")
    train_here(flags, tmp_path / "stopped", stop_at=5)
    resumed = train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "stopped")
    assert unet_bytes(whole) == unet_bytes(resumed)


def test_a_trained_adapter_loads_into_a_stock_pipeline(xl, pictures, tmp_path):
    out = train_here(train_flags(xl, pictures, *METHOD, "--lora_rank=2", "--save_merged"), tmp_path / "out")
    adapted, merged = (StableDiffusionXLPipeline.from_pretrained(place) for place in (xl, out))
    plain = StableDiffusionXLPipeline.from_pretrained(xl)
    adapted.load_lora_weights(out)
    drawn = []
    for pipeline in (adapted, merged, plain):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipeline(CAPTIONS[0], num_inference_steps=2, generator=generator, output_type="np").images)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)
    assert abs(drawn[0] - drawn[2]).max() > 1e-4


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--dream_training", "`dream_training`: does not apply to Stable Diffusion XL"),
        ("--weighting_scheme=mode", "`weighting_scheme`: does not apply to Stable Diffusion XL"),
        ("--pretrained_vae_model_name_or_path=nowhere", "`pretrained_vae_model_name_or_path` nowhere: no Autoencoder"),
    ],
)
def test_what_cannot_be_is_said_before_training(xl, pictures, tmp_path, flag, why):
    with pytest.raises(UsageError, match=why):
        train_here(train_flags(xl, pictures, flag, "--max_train_steps=1"), tmp_path / "out")


@pytest.mark.parametrize(
    ("own", "more", "precision"),
    [
        (False, [], torch.float32),
        (True, [], torch.float32),
        (False, ["--lora_rank=2"], torch.float32),
        (True, ["--lora_rank=2"], torch.bfloat16),
    ],
)
def test_the_vae_has_the_precision_of_the_official_scripts(xl, own, more, precision):
    vae = [f"--pretrained_vae_model_name_or_path={xl / 'vae'}"] if own else []
    flags = [f"--pretrained_model_name_or_path={xl}", "--train_data_dir=d", "--resolution=16", *vae, *more]
    family = StableDiffusionXL.load(parse_flags(flags), dtype=torch.bfloat16)
    assert family.vae.dtype == precision
    assert {encoder.dtype for encoder in family.text_encoders.values()} == {torch.bfloat16}


@pytest.mark.parametrize("more", [[], ["--lora_rank=2", "--train_text_encoder"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("zeros", [True, False])
def test_magnitudes_are_measured_against_what_the_pipeline_draws_without_a_prompt(tmp_path, zeros, more):
    pipeline = testing.random_xl_pipeline(CAPTIONS)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    pipeline.save_pretrained(tmp_path)
    flags = [f"--pretrained_model_name_or_path={tmp_path}", "--train_data_dir=d", "--resolution=16", *more]
    settings = parse_flags([*flags, "--wen_threshold=3"])
    family = StableDiffusionXL.load(settings, config=settings.method)
    batch = family.batch(torch.zeros(2, 3, 16, 16), CAPTIONS[:2])
    drawn = family.objective.draw(family.objective.encode(batch))
    _, magnitudes = family.objective.losses_and_magnitudes(family.denoiser, drawn)
    embeddings = pipeline.encode_prompt(CAPTIONS[:2], do_classifier_free_guidance=True)
    noisy = family.objective.scheduler.add_noise(drawn.latents, drawn.noise, drawn.timesteps)
    one, other = (
        pipeline.unet(
            noisy,
            drawn.timesteps,
            tokens,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": drawn.condition["time_ids"]},
        ).sample
        for tokens, pooled in (embeddings[::2], embeddings[1::2])
    )
    torch.testing.assert_close(magnitudes, (one - other).detach().flatten(1).norm(dim=1))


@pytest.mark.parametrize("own", [False, True])
def test_a_vae_that_scales_each_channel_is_refused(xl, pictures, tmp_path, own):
    """Playground 2.5's: its latents would be trained at another scale than they are drawn at."""
    pipeline = testing.random_xl_pipeline(CAPTIONS)
    channels = pipeline.vae.config.latent_channels
    pipeline.vae.register_to_config(latents_mean=[0.5] * channels, latents_std=[2.0] * channels)
    pipeline.save_pretrained(tmp_path / "odd")
    flags = train_flags(xl if own else tmp_path / "odd", pictures, "--max_train_steps=1")
    flags += [f"--pretrained_vae_model_name_or_path={tmp_path / 'odd' / 'vae'}"] if own else []
    name = "pretrained_vae_model_name_or_path" if own else "pretrained_model_name_or_path"
    with pytest.raises(UsageError, match=f"`{name}` .*latents_mean"):
        train_here(flags, tmp_path / "out")


def test_parts_that_do_not_fit_are_named(pictures, tmp_path):
    pipeline = testing.random_xl_pipeline(CAPTIONS)
    unet = testing.build_unet(
        (8, 16), 8, 32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(tmp_path / "odd")
    with pytest.raises(UsageError, match="added conditions of width 80, text_encoder_2 and the sizes make 64"):
        train_here(train_flags(tmp_path / "odd", pictures, "--max_train_steps=1"), tmp_path / "out")
