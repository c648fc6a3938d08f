"""A base is taken for what it is, and drawing is apart from encoding."""

import json

import pytest
import torch
from conftest import train_flags, train_here, write_index

from ietagc_diffusers import StableDiffusion, UsageError, family_of, testing
from ietagc_diffusers.data import Batch
from ietagc_diffusers.families import StableDiffusionXL


def test_a_base_is_known_by_its_index(base, tmp_path):
    assert family_of(base) is StableDiffusion
    assert family_of(write_index(tmp_path / "xl", "StableDiffusionXLPipeline")) is StableDiffusionXL
    flux = write_index(tmp_path / "flux", "FluxPipeline")
    with pytest.raises(UsageError, match=r"`base` .*flux: is a FluxPipeline; .* Stable Diffusion \(.* Diffusion XL \("):
        family_of(flux, setting="base")


def test_a_base_of_another_family_is_refused_before_training(pictures, tmp_path):
    flux = write_index(tmp_path / "flux", "FluxPipeline")
    with pytest.raises(UsageError, match=r"`pretrained_model_name_or_path` .*FluxPipeline"):
        train_here(train_flags(flux, pictures, "--max_train_steps=1"), tmp_path / "out")


def test_encoding_is_deterministic_and_drawing_is_all_that_is_random():
    objective = testing.family_of_pipeline(testing.random_pipeline(["a red picture"])).objective
    batch = Batch(torch.rand(3, 3, 16, 16) * 2 - 1, {"input_ids": torch.zeros(3, 77, dtype=torch.long)})
    before = torch.get_rng_state()
    first, second = objective.encode(batch), objective.encode(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)
    torch.manual_seed(0)
    one = objective.draw(first)
    torch.manual_seed(0)
    other = objective.draw(objective.encode(batch))
    assert torch.equal(one.latents, other.latents) and torch.equal(one.levels, one.timesteps)


def test_the_saved_pipeline_predicts_what_was_trained(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=1", "--prediction_type=epsilon")
    scheduler = train_here(flags, tmp_path) / "scheduler" / "scheduler_config.json"
    assert json.loads((base / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    assert json.loads(scheduler.read_text())["prediction_type"] == "epsilon"
