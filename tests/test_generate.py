"""An image depends on its prompt and seed alone: not on batches, processes or interruptions."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import launch
from datasets import load_dataset
from PIL import Image

from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval import generate as module
from ietagc_diffusers.eval.generate import Settings, generate, model_hash
from ietagc_diffusers.eval.prompts import Prompt

PROMPTS = [Prompt(f"a {colour} picture", number) for number, colour in enumerate(("red", "green", "blue") * 3)][:7]
SETTINGS = Settings(seed=5, num_inference_steps=2, guidance_scale=3.0, batch_size=3, scheduler="ddim")


def read(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def drawn(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("drawn") / "images"
    generate(base, PROMPTS, output, SETTINGS)
    return output


def test_the_folder_is_one_that_datasets_loads(drawn):
    rows = load_dataset("imagefolder", data_dir=str(drawn), split="train")
    assert len(rows) == 7 and rows["text"] == [prompt.text for prompt in PROMPTS]
    assert rows["seed"] == list(range(5, 12)) and rows["sample_id"] == list(range(7))
    assert rows[0]["image"].size == (16, 16)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_show(base, drawn, tmp_path, batch_size):
    generate(base, PROMPTS, tmp_path, replace(SETTINGS, batch_size=batch_size))
    ours, theirs = read(tmp_path), read(drawn)
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) <= 1  # rounding of the arithmetic
    assert len({image.tobytes() for image in ours.values()}) == 7


def test_a_stochastic_scheduler_draws_from_the_image_s_seed_too(base, tmp_path):
    for name, size in (("a", 2), ("b", 5)):
        generate(base, PROMPTS, tmp_path / name, replace(SETTINGS, scheduler="ddpm", batch_size=size))
    ours, theirs = read(tmp_path / "a"), read(tmp_path / "b")
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) <= 1


def test_interrupted_and_continued_equals_uninterrupted(base, drawn, tmp_path, monkeypatch):
    draw, calls = module.draw, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(module, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(base, PROMPTS, tmp_path, SETTINGS)
    assert len(read(tmp_path)) == 3 and not (tmp_path / "metadata.jsonl").exists()
    (tmp_path / "000001.png").unlink()  # as a kill between two images of a batch leaves it
    monkeypatch.setattr(module, "draw", draw)
    generate(base, PROMPTS, tmp_path, SETTINGS)
    assert files(tmp_path) == files(drawn)


def test_what_is_there_is_not_drawn_again(base, drawn, monkeypatch):
    monkeypatch.setattr(module, "load_pipeline", lambda *_: pytest.fail("loads the model"))
    before = files(drawn)
    generate(base, PROMPTS, drawn, SETTINGS)
    assert files(drawn) == before


def test_two_processes_equal_one(base, drawn, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": p.text}) + "\n" for p in PROMPTS))
    flags = ["--model", base, "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "images", "--seed", 5]
    flags += ["--num_inference_steps", 2, "--guidance_scale", 3, "--batch_size", 3, "--scheduler", "ddim"]
    launch(["generate", *flags], None, processes=2, script="eval")
    assert {k: v for k, v in files(tmp_path / "images").items() if k.endswith("png")} == {
        k: v for k, v in files(drawn).items() if k.endswith("png")
    }


def test_another_model_or_other_settings_do_not_mix(base, drawn, tmp_path):
    with pytest.raises(UsageError, match="begun with `guidance_scale` 3"):
        generate(base, PROMPTS, drawn, replace(SETTINGS, guidance_scale=4.0))
    with pytest.raises(UsageError, match="begun with `prompts`"):
        generate(base, [*PROMPTS[:-1], Prompt("another")], drawn, SETTINGS)
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    with pytest.raises(UsageError, match="of another origin"):
        generate(base, PROMPTS, tmp_path, SETTINGS)


def test_the_hash_knows_the_weights_and_not_the_place(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    assert model_hash(tmp_path / "copy") == model_hash(base)
    weights = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert model_hash(tmp_path / "copy") != model_hash(base)
    assert model_hash(base, denoiser=tmp_path / "copy" / "unet") == model_hash(tmp_path / "copy")


def test_the_hash_knows_the_configuration_and_not_where_it_came_from(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    path = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"_diffusers_version": "0.1", "_name_or_path": "elsewhere"}))
    assert model_hash(tmp_path / "copy") == model_hash(base)
    path.write_text(json.dumps(values | {"prediction_type": "epsilon"}))
    assert model_hash(tmp_path / "copy") != model_hash(base)


def test_images_are_of_the_size_that_the_model_was_trained_at(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "ietagc").mkdir()
    (tmp_path / "model" / "ietagc" / "config.yaml").write_text("resolution: 36\n")
    generate(tmp_path / "model", PROMPTS[:1], tmp_path / "images", SETTINGS)
    assert Image.open(tmp_path / "images" / "000000.png").size == (32, 32)  # the next smaller multiple of 8
    generate(tmp_path / "model", PROMPTS[:1], tmp_path / "small", replace(SETTINGS, resolution=24))
    assert Image.open(tmp_path / "small" / "000000.png").size == (24, 24)


def test_a_start_that_failed_does_not_bind_the_folder(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(module, "load_pipeline", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        generate(base, PROMPTS[:2], tmp_path, replace(SETTINGS, guidance_scale=9.0))
    generate(base, PROMPTS[:2], tmp_path, SETTINGS)
    generate(base, PROMPTS[:2], tmp_path, replace(SETTINGS, batch_size=1))  # what does not show may change
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere", "--prompts", "{prompts}"], "--model nowhere"),
        (["--model", "{base}"], "--prompts or --train"),
        (["--model", "{base}", "--prompts", "{prompts}", "--num_images", "0"], "--num_images 0"),
        (["--model", "{base}", "--prompts", "{prompts}", "--batch_size", "-1"], "--batch_size -1"),
        (["--model", "{base}", "--prompts", "{prompts}", "--device", "warp"], "--device warp"),
        (["--model", "{base}", "--prompts", "{prompts}", "--resolution", "33"], "--resolution 33"),
        (["--model", "{base}", "--prompts", "{prompts}", "--seed", "-1"], "--seed -1"),
    ],
)
def test_wrong_use_exits_with_2_and_names_the_flag(base, tmp_path, capsys, flags, message):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    flags = [flag.format(base=base, prompts=tmp_path / "prompts.txt") for flag in flags]
    assert main(["generate", *flags, "--output", str(tmp_path / "images")]) == 2
    assert message in capsys.readouterr().err
