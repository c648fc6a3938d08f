"""The tiny pipelines: made the same each time, and saved and loaded as the real ones."""

import pytest
import torch
from diffusers import DiffusionPipeline
from mitigated import generate, generators

from ietagc_diffusers import testing

CAPTIONS = ["a red picture", "a blue picture"]
KINDS = [testing.random_pipeline, testing.random_xl_pipeline, testing.random_sd3_pipeline]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_tiny_pipeline_is_a_function_of_its_seed_and_survives_the_disk(kind, tmp_path):
    state = torch.get_rng_state()
    first, again, other = (quiet(kind(CAPTIONS, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    first.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is type(first)
    images = generate(first, CAPTIONS)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(generate(again, CAPTIONS), images) and torch.equal(generate(loaded, CAPTIONS), images)
    assert not torch.equal(generate(other, CAPTIONS), images)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_tiny_pipeline_listens_to_its_prompt(kind):
    red, blue = (generate(quiet(kind(CAPTIONS)), caption, generator=generators(1)[0]) for caption in CAPTIONS)
    assert not torch.equal(red, blue)


def test_the_tiny_stable_diffusion_3_has_what_the_real_one_has():
    pipeline = testing.random_sd3_pipeline(CAPTIONS)
    config = pipeline.vae.config
    assert config.latent_channels == 16 and config.shift_factor and not config.use_quant_conv
    assert pipeline.scheduler.config.shift == 3.0
    embeddings, _, pooled, _ = pipeline.encode_prompt(*[CAPTIONS] * 3)
    clip = pipeline.text_encoder.config.hidden_size + pipeline.text_encoder_2.config.hidden_size
    assert not embeddings[:, :77, clip:].any() and embeddings[:, 77:].all() and pooled.shape == (2, clip)
