"""The commands on Stable Diffusion 3: prompts, seeds and batches as with any other model, and what it cannot do."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import COLOURS, write_folder
from diffusers import StableDiffusion3Pipeline
from mitigated import generators
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.guard import SimilarityGuard, TrainingIndex
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.mitigations import mitigate, text_conditional_noise
from ietagc_diffusers.sscd import pixel_descriptor

PROMPTS = [f"a {colour} picture" for colour in COLOURS]


@pytest.fixture(scope="module")
def pipeline():
    made = testing.random_sd3_pipeline(PROMPTS)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(model):
    (model.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--model", str(model), "--prompts", str(model.parent / "prompts.txt")]
    return [*flags, "--num_inference_steps", "2", "--device", "cpu", "--seed", "3"]


def test_images_are_those_of_the_stock_pipeline_whatever_the_batch(pipeline, flags, tmp_path):
    stock = pipeline(PROMPTS, num_inference_steps=2, guidance_scale=7.5, generator=generators(3, 4, 5, 6)).images
    for size in ("4", "3"):
        assert main(["generate", *flags, "--batch_size", size, "--output", str(tmp_path / size)]) == 0
        for number, image in enumerate(stock):
            drawn = np.asarray(Image.open(tmp_path / size / f"{number:06d}.png")).astype(int)
            assert np.abs(drawn - np.asarray(image)).max() <= (0 if size == "4" else 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mitigation", "rt+memattn"], "mitigation memattn: acts on cross-attention, but in a StableDiffusion3Pip"),
        (["--scheduler", "ddim"], "--scheduler ddim: a StableDiffusion3Pipeline works by flow matching"),
    ],
)
def test_what_it_cannot_do_is_one_line(flags, tmp_path, capsys, more, message):
    assert main(["generate", *flags, *more, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ietagc generate: error: ") and message in error


def test_a_size_must_fit_the_patches(pipeline, tmp_path, flags, capsys):
    wider = testing.random_sd3_pipeline(PROMPTS)
    wider.vae = testing.build_vae((8, 8, 8, 8), latent_channels=16, shift_factor=0.06, use_quant_conv=False)
    wider.save_pretrained(tmp_path / "model")  # a VAE that shrinks by 8, as the real one; patches are 2 wide
    given = ["generate", *flags, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main([*given, "--resolution", "24"]) == 2
    assert "--resolution 24: must be a multiple of 16 for a StableDiffusion3Pipeline" in capsys.readouterr().err


def test_prompts_are_scored_by_the_velocity(pipeline, flags, tmp_path):
    assert main(["detect", *flags, "--generations", "2", "--steps", "2", "--output", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "detect.csv").open()))
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    by_hand = text_conditional_noise(pipeline, repeated, list(range(3, 11)), 2, 2, 7.5).magnitude.view(4, 2).mean(1)
    np.testing.assert_allclose([float(row["magnitude"]) for row in rows], by_hand.numpy(), rtol=1e-4)


def test_an_audit_finds_its_copies(flags, model, tmp_path):
    train = write_folder(tmp_path / "train", 6)
    audit = ["audit", *flags, "--train", str(train), "--descriptor", "pixel", "--mitigation", "gni+cfg"]
    assert main([*audit, "--output", str(tmp_path / "first")]) == 0
    drawn = tmp_path / "first" / "images" / "000002.png"
    Image.open(drawn).save(train / "000_0.png")  # as if this picture had been trained on
    assert main([*audit, "--output", str(tmp_path / "second")]) == 3
    scores = json.loads((tmp_path / "second" / "scores.json").read_text())
    assert scores["copy_rate"] == pytest.approx(1 / 4)


def test_the_guard_draws_a_copy_again(pipeline, tmp_path):
    options = {"num_inference_steps": 2, "prompt_3": ["red", "blue"], "negative_prompt_3": ["grey", "black"]}
    guarded = mitigate(pipeline, "gni", scale=0.5)
    plain = guarded(PROMPTS[:2], generator=generators(0, 1), **options).images
    (tmp_path / "train").mkdir()
    plain[1].save(tmp_path / "train" / "0.png")
    index = TrainingIndex.build(load_images(tmp_path / "train", "train"), pixel_descriptor())
    made = SimilarityGuard(guarded, pixel_descriptor(), index, 0.999)(
        PROMPTS[:2], generator=generators(0, 1), **options
    )
    assert made.tries == [1, 2] and made.images[0].tobytes() == plain[0].tobytes()
    assert made.images[1].tobytes() != plain[1].tobytes()
    assert isinstance(made.similarity[0], float) and torch.isfinite(torch.tensor(made.similarity)).all()


def test_a_model_saved_without_t5_is_drawn_from_and_scored(pipeline, flags, tmp_path):
    """diffusers itself loads it only if it is told of the missing parts again."""
    small = StableDiffusion3Pipeline(**pipeline.components | dict.fromkeys(("text_encoder_3", "tokenizer_3")))
    small.save_pretrained(tmp_path / "small")
    small.set_progress_bar_config(disable=True)
    stock = small(PROMPTS, num_inference_steps=2, guidance_scale=7.5, generator=generators(3, 4, 5, 6)).images
    own = [*flags, "--model", str(tmp_path / "small")]
    assert main(["generate", *own, "--batch_size", "4", "--output", str(tmp_path / "images")]) == 0
    for number, image in enumerate(stock):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / f"{number:06d}.png")), np.asarray(image))
    assert main(["detect", *own, "--output", str(tmp_path / "detect")]) == 0
