"""The front and the figures of models without prompts: from the untrained model on, and with the labels of the run."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from conftest import train_here, write_folder
from diffusers import UNet2DModel

from ietagc_diffusers import testing
from ietagc_diffusers.cli import main
from ietagc_diffusers.data import ClassLabels
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.image_sets import load_images, load_training_set
from ietagc_diffusers.eval.losses import SavedModel, untrained
from ietagc_diffusers.eval.record import training_set
from ietagc_diffusers.eval.report import Scored, same_prompt_and_seed
from ietagc_diffusers.eval.told import told_by
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.scripts import UnconditionalScript

LABELS = ["--class_labels=column", "--label_column=label", "--num_classes=3"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Training images with labels and without captions, held-out ones, and a configuration."""
    folder = tmp_path_factory.mktemp("places")
    for name, seed in (("train", 0), ("heldout", 1)):
        metadata = write_folder(folder / name, 10, size=16, seed=seed) / "metadata.jsonl"
        rows = [json.loads(line) for line in metadata.read_text().splitlines()]
        metadata.write_text("".join(json.dumps({k: row[k] for k in ("file_name", "label")}) + "\n" for row in rows))
    testing.random_unconditional_pipeline().unet.save_config(folder / "unet")
    return folder


def trained(places, output, *more):
    flags = [
        f"--train_data_dir={places / 'train'}", f"--model_config_name_or_path={places / 'unet'}", "--resolution=16",
        "--train_batch_size=5", "--max_train_steps=4", "--lr_warmup_steps=0", "--report_to=none", "--save_rounds",
        "--steps_per_round=2", "--center_crop", "--checkpointing_steps=100", *more,
    ]  # fmt: skip
    return train_here(flags, output, kind=UnconditionalScript)


@pytest.fixture(scope="module")
def runs(places):
    """A run without classes and one with them, which skips samples."""
    plain = trained(places, places / "plain", "--mitigation=none", "--seed=3", "--learning_rate=1e-3")
    method = ["--mitigation=agc", "--skip_threshold=1", "--bank_buckets=1"]
    return plain, trained(places, places / "classes", *method, *LABELS, "--seed=3", "--learning_rate=1e-3")


def front(run, places, output, *more):
    flags = ["front", f"--run=a={run}", f"--heldout={places / 'heldout'}", f"--output={output}", "--draws=1"]
    assert main([*flags, "--feature_cache=none", "--descriptor=pixel", "--device=cpu", *more]) == 0
    return list(csv.DictReader((output / "front.csv").open()))


def test_a_run_from_scratch_starts_at_the_untrained_model_of_its_seed(places, tmp_path):
    """A run that learns nothing ends where it started."""
    run = trained(places, tmp_path / "run", "--mitigation=none", "--seed=8", "--learning_rate=0", "--max_train_steps=1")
    (start,) = untrained({"a": [run]}, [SavedModel("a", 0, 1, run / "unet")], tmp_path / "o").values()
    first, last = (UNet2DModel.from_pretrained(place, subfolder="unet").state_dict() for place in (start, run))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("number", [0, 1])
def test_the_front_measures_and_samples_runs_from_scratch(runs, places, tmp_path, number):
    rows = front(runs[number], places, tmp_path / "out", "--sample=4", "--num_inference_steps=2", "--scheduler=ddim")
    assert [row["step"] for row in rows] == ["0", "2", "4"] and float(rows[0]["gap"]) == 0
    for row in rows[1:]:  # nothing is subtracted
        assert float(row["gap"]) == pytest.approx(float(row["heldout_loss"]) - float(row["train_loss"]), abs=1e-7)
    levels = list(csv.DictReader((tmp_path / "out" / "front_levels.csv").open()))
    assert all(float(row["gap"]) == 0 for row in levels[:10] if row["train_count"] != "0")
    for row in levels[10:]:
        gap = float(row["heldout_loss"]) - float(row["train_loss"])
        assert float(row["gap"]) == pytest.approx(gap, abs=1e-7, nan_ok=True)
    assert float(rows[0]["train_loss"]) > float(rows[2]["train_loss"]) and float(rows[2]["frechet"]) > 0
    drawn = sorted((tmp_path / "out" / "samples").iterdir())
    assert [path.name.rsplit("-", 1)[0] for path in drawn] == ["a-0-0", "a-0-2", "a-0-4"]
    labels = {json.loads(line).get("label") for line in (drawn[0] / "images" / "metadata.jsonl").open()}
    assert labels == ({0, 1, 2} if number else {None})


def test_losses_are_those_under_the_labels_that_the_run_was_told(runs, places):
    run = runs[1]
    images, told = training_set(run).images, told_by(yaml.safe_load((run / "ietagc/config.yaml").read_text()), run)
    labels = [label for _, label in told.of_training(images)]
    assert labels == [number % 3 for number in range(10)]
    held = load_images(places / "heldout", "heldout", label_column="label")
    assert [label for _, label in told.of_heldout(held)] == labels
    family = testing.family_of_pipeline(testing.random_unconditional_pipeline(classes=3))
    pixels = torch.rand(10, 3, 16, 16) * 2 - 1
    losses = FixedLosses(family, pixels, labels, draws=1)
    _, _, drawn = next(losses.drawn())
    with torch.no_grad():
        noisy = family.scheduler.add_noise(pixels, drawn.noise, drawn.timesteps)
        predicted = family.denoiser(noisy, drawn.timesteps, class_labels=torch.tensor(labels)).sample
    wanted = (predicted - drawn.noise).square().flatten(1).mean(1)
    torch.testing.assert_close(losses(family.denoiser), wanted)


def test_random_labels_are_those_of_the_run_and_others_for_held_out_images(runs, places):
    config = {"class_labels": "random", "seed": 3}
    told, images = told_by(config, runs[1]), load_training_set(places / "train")
    of_run = ClassLabels("random", 3, seed=3)
    labels = [label for _, label in told.of_training(images)]
    assert labels == [of_run.read({"sample_id": number}) for number in range(10)]
    others = [label for _, label in told.of_heldout(images)]
    assert set(others) <= {0, 1, 2} and others != labels
    assert told_by(config | {"class_labels": "unique"}, runs[1]).of_training(images.select([2]))[0][1] == 2


def test_each_run_is_measured_under_its_own_labels(runs, places, tmp_path):
    """Copies of a run whose records say other labels: none changes another's losses."""

    def other(name, seed):
        run = shutil.copytree(runs[1], tmp_path / name)
        path = run / "ietagc" / "config.yaml"
        recorded = yaml.safe_load(path.read_text()) | {"class_labels": "random", "seed": seed}
        path.write_text(yaml.safe_dump(recorded))
        return run

    first, second = other("first", 3), other("second", 4)
    alone = [front(run, places, tmp_path / f"{run.name}-alone", "--points=1")[-1] for run in (first, second)]
    others = f"--run=true={runs[1]}", f"--run=none={runs[0]}", "--control=none"
    both = front(f"{first},{second}", places, tmp_path / "both", "--points=1", *others)
    last = {(row["run"], row["replicate"]): row for row in both if row["step"] == "4"}
    assert [last["a", number]["train_loss"] for number in "01"] == [row["train_loss"] for row in alone]
    assert len({row["train_loss"] for row in last.values()}) == 4
    assert front(runs[0], places, tmp_path / "first", "--points=1", f"--run=true={runs[1]}")[-1] == last["true", "0"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_labels": "unique"}, "`heldout` .*heldout: .*`class_labels` unique"),
        ({"class_labels": "column", "label_column": "kind"}, "`heldout` .*: 000_0.png has no label from 0 to 2 in col"),
    ],
)
def test_held_out_images_without_a_class_are_refused(runs, places, config, message):
    told = told_by(config, runs[1])
    with pytest.raises(UsageError, match=message):
        told.of_heldout(load_images(places / "heldout", "heldout"))


def test_labels_of_a_parquet_folder_are_read(places, tmp_path):
    from datasets import load_dataset

    rows = load_dataset("imagefolder", data_dir=str(places / "heldout"), split="train", cache_dir=str(tmp_path / "c"))
    (tmp_path / "p").mkdir()
    rows.to_parquet(str(tmp_path / "p" / "test.parquet"))
    held = load_images(tmp_path / "p", "heldout", label_column="label")
    assert [row["label"] for row in held.rows] == [number % 3 for number in range(10)]


def test_runs_from_scratch_and_from_a_base_have_no_common_start(runs, places, tmp_path, capsys):
    other = shutil.copytree(runs[0], tmp_path / "other")
    config = other / "ietagc" / "config.yaml"
    config.write_text(config.read_text() + "pretrained_model_name_or_path: somewhere\n")
    flags = ["front", f"--run=a={runs[0]}", f"--run=b={other}", f"--heldout={places / 'heldout'}"]
    assert main([*flags, f"--output={tmp_path / 'o'}", "--device=cpu"]) == 2
    assert f"--run {other}: was trained from somewhere, and others from scratch" in capsys.readouterr().err


def test_every_figure_is_drawn_of_a_run_without_prompts(runs, places, tmp_path, capsys):
    for number, run in enumerate(runs):
        drawn = ["generate", f"--model={run}", "--num_images=6", "--num_inference_steps=2", "--device=cpu"]
        assert main([*drawn, f"--output={tmp_path / f'd{number}'}"]) == 0
        scored = ["score", f"--generated={tmp_path / f'd{number}'}", f"--train={places / 'train'}"]
        scored += [f"--output={tmp_path / f's{number}'}", "--descriptor=pixel", "--feature_cache=none", "--device=cpu"]
        assert main(scored) == 0
        scores = json.loads((tmp_path / f"s{number}" / "scores.json").read_text())
        assert scores["clip_score"] is None and scores["reasons"]["clip_score"]
    figures = ["figures", f"--run={runs[1]}", f"--train={places / 'train'}", "--device=cpu", "--scores"]
    assert main([*figures, str(tmp_path / "s1"), f"--output={tmp_path / 'f'}"]) == 0
    names = {f"fig{number}.png" for number in (3, 6, 7, 8, 9)}
    assert {path.name for path in (tmp_path / "f").iterdir()} == names
    both = [f"{name}={tmp_path / 's1'}" for name in "ab"]
    assert main(["report", *both, f"--output={tmp_path / 'report.html'}"]) == 0
    assert '"class 2"' in (tmp_path / "report.html").read_text()
    # Of a run without classes that skipped nothing, beside a model of classes: pairs have the same seed.
    figures[1] = f"--run={runs[0]}"
    assert main([*figures, str(tmp_path / "s0"), str(tmp_path / "s1"), f"--output={tmp_path / 'g'}"]) == 0
    assert {path.name for path in (tmp_path / "g").iterdir()} == {"fig3.png", "fig6.png", "fig7.png"}
    assert "fig9.png not drawn" in capsys.readouterr().out


def test_images_of_the_same_seed_and_label_are_paired():
    def model(*labels):
        nearest = {"text": [None] * 3, "seed": [0, 1, 2], "similarity": [0.1, 0.3, 0.2]}
        return Scored("m", {}, nearest | ({"label": [*labels]} if labels else {}), {})

    def paired(*models):
        return [key for key, _ in same_prompt_and_seed([*models])]

    assert paired(model(4, 5, 6), model(4, 0, 6)) == [(None, 2, 6), (None, 0, 4)]
    assert paired(model(4, 5, 6), model()) == [(None, 1, None), (None, 2, None), (None, 0, None)]
