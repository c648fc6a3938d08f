"""The commands on models without prompts: seeds, and labels where the model has them."""

import json

import numpy as np
import pytest
import torch
from conftest import train_here, write_folder
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.cli import main
from ietagc_diffusers.families.unconditional import draw
from ietagc_diffusers.training.scripts import UnconditionalScript

STEPS = ["--num_inference_steps", "2", "--device", "cpu", "--seed", "3"]


@pytest.fixture(scope="module")
def pipeline():
    return testing.random_unconditional_pipeline()


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm") / "model"
    pipeline.save_pretrained(folder)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_images_are_those_of_their_seeds_whatever_the_batch(pipeline, model, tmp_path):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3, 8)]
    wanted = draw(pipeline, generators, 5, 2)
    for size in ("5", "2"):
        flags = ["--model", str(model), *STEPS, "--num_images", "5", "--batch_size", size]
        assert main(["generate", *flags, "--output", str(tmp_path / size)]) == 0
        for number, image in enumerate(wanted):
            drawn = np.asarray(Image.open(tmp_path / size / f"{number:06d}.png")).astype(int)
            assert np.abs(drawn - np.asarray(image)).max() <= (0 if size == "5" else 1)
    assert [(row["text"], row["seed"]) for row in rows_of(tmp_path / "5")] == [("", seed) for seed in range(3, 8)]


def test_fewer_steps_by_another_scheduler(model, tmp_path):
    drawn = []
    for scheduler in ("ddim", "dpm", "euler", "pndm"):
        flags = ["--model", str(model), *STEPS, "--num_images", "1", "--scheduler", scheduler]
        flags[flags.index("--num_inference_steps") + 1] = "8"  # pndm starts with four of another kind
        assert main(["generate", *flags, "--output", str(tmp_path / scheduler)]) == 0
        drawn.append((tmp_path / scheduler / "000000.png").read_bytes())
    assert len(set(drawn)) == 4


def test_each_class_is_drawn_as_often_as_any_other(tmp_path):
    classes = testing.random_unconditional_pipeline(classes=3)
    classes.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), *STEPS, "--num_images", "7", "--batch_size", "7"]
    assert main(["generate", *flags, "--output", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    labels = [row["label"] for row in rows]
    assert sorted(np.bincount(labels).tolist()) == [2, 2, 3]
    generators = [torch.Generator().manual_seed(row["seed"]) for row in rows]
    for number, image in enumerate(draw(classes, generators, 7, 2, labels)):
        assert Image.open(tmp_path / "out" / f"{number:06d}.png").tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--num_images: {model} draws without prompts; say how many images"),
        (["--num_images", "2", "--prompts", "{prompts}"], "{model} draws without prompts; leave it out"),
        (["--num_images", "2", "--mitigation", "gni"], "--mitigation gni: a DDPMPipeline takes no prompt"),
        (["--num_images", "2", "--negative_prompt", "a"], "--negative_prompt a: a DDPMPipeline takes no prompt"),
        (["--num_images", "2", "--resolution", "24"], "--resolution 24: a DDPMPipeline draws at its own, 16"),
    ],
)
def test_what_it_cannot_do_is_one_line(model, tmp_path, capsys, more, message):
    (tmp_path / "prompts.txt").write_text("a cat")
    more = [word.format(prompts=tmp_path / "prompts.txt") for word in more]
    assert main(["generate", "--model", str(model), *STEPS, *more, "--output", str(tmp_path / "out")]) == 2
    assert message.format(model=model) in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_audit_finds_copies_of_a_run(tmp_path, capsys):
    """The training set and what was shown of it are those that the run recorded."""
    train = write_folder(tmp_path / "train", 6)
    testing.random_unconditional_pipeline().unet.save_config(tmp_path / "config")
    flags = [
        f"--train_data_dir={train}", f"--model_config_name_or_path={tmp_path / 'config'}", "--resolution=16",
        "--max_train_steps=2", "--mitigation=none", "--train_batch_size=3", "--seed=1", "--report_to=none",
    ]  # fmt: skip
    run = train_here(flags, tmp_path / "run", kind=UnconditionalScript)
    audit = ["audit", "--model", str(run), *STEPS, "--num_images", "4", "--descriptor", "pixel"]
    assert main([*audit, "--output", str(tmp_path / "first")]) == 0
    assert "warning" not in capsys.readouterr().err  # the folder's captions, which the model was not told, do not count
    scores = json.loads((tmp_path / "first" / "scores.json").read_text())
    assert scores["num_train"] == 6 and scores["num_prompts"] == scores["num_generated"] == 4
    assert "Drawn without prompts: 4 images, 2 steps" in (tmp_path / "first" / "summary.md").read_text()
    Image.open(tmp_path / "first" / "images" / "000002.png").save(train / "000_0.png")
    assert main([*audit, "--train", str(train), "--output", str(tmp_path / "second")]) == 3
    scores = json.loads((tmp_path / "second" / "scores.json").read_text())
    assert scores["copy_rate"] == pytest.approx(1 / 4)
