"""Effective model memorization: nested subsets, ratios, sizes; and a study that keeps what is finished."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import train_here, write_folder
from PIL import Image

from ietagc_diffusers import UsageError
from ietagc_diffusers.cli import main
from ietagc_diffusers.eval import emm
from ietagc_diffusers.eval.capacity import Capacity, Ratio, capacity, of_snapshots
from ietagc_diffusers.eval.configuration import short_hash
from ietagc_diffusers.eval.emm import Study, gu_ratios, run
from ietagc_diffusers.eval.image_sets import load_training_set
from ietagc_diffusers.eval.processes import Processes
from ietagc_diffusers.eval.subsets import first_of_each
from ietagc_diffusers.training.scripts import UnconditionalScript

TINY = {
    "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip


def write_study(tmp_path, images, **changes):
    content = {
        "train": str(images),
        "output": str(tmp_path / "out"),
        "sizes": [6, 12],
        "epochs": 4,
        "num_images": 5,
        "snapshots": 2,
        "common": {
            "model_config_name_or_path": "unet_ddpm_32", "resolution": 16, "train_batch_size": 4,
            "learning_rate": 1e-3, "lr_warmup_steps": 0, "label_column": "label",
        },
        "generate": {"num_inference_steps": 1, "scheduler": "ddim"},
        "configurations": {
            "none": {"mitigation": "none", "unet": TINY},
            "ours": {"num_shards": 2, "epochs_per_round": 1, "class_labels": "unique", "unet": TINY},
        },
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("emm") / "noise", 16, size=16)


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        ({10: 1.0, 100: 0.95, 1000: 0.2}, (100, 1000)),
        ({10: 1.0, 100: 0.9}, (100, None)),
        ({10: 0.89, 100: 1.0}, (None, 10)),
        ({10: 0.99, 100: 0.4, 1000: 0.99}, (10, 100)),  # stays over: a size that is memorized by chance does not count
    ],
)
def test_the_capacity_is_the_largest_size_up_to_which_the_ratio_stays(ratios, wanted):
    found = capacity(dict(reversed(ratios.items())), 0.9)
    assert (found.size, found.below) == wanted and (found.interpolated is None) == (None in wanted)


def test_between_sizes_it_is_interpolated_in_their_logarithm():
    found = capacity({100: 1.0, 10_000: 0.8}, 0.9)
    assert found == Capacity(100, 10_000, pytest.approx(1000))
    assert str(found) == "100 (interpolated: 1,000)"
    assert str(capacity({5: 0.1}, 0.9)) == "under 5" and str(capacity({5: 0.9}, 0.9)) == "at least 5"


def test_subsets_are_nested_and_have_the_first_of_each_class():
    labels = np.array([2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 1, 2])
    before: set[int] = set()
    for size in range(1, 13):
        chosen = first_of_each(labels, 12, size).tolist()
        assert chosen == sorted(chosen) and len(set(chosen)) == size and before <= set(chosen)
        before = set(chosen)
        for label in range(3):
            of_class = [row for row in range(12) if labels[row] == label]
            taken = [row for row in chosen if labels[row] == label]
            assert taken == of_class[: len(taken)] and len(taken) in (size // 3, size // 3 + 1)
    assert first_of_each(None, 9, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="sizes 13: needs 5 images of class 0, and there are 4"):
        first_of_each(labels, 12, 13)
    with pytest.raises(UsageError, match="sizes 13: the training set has 12 images"):
        first_of_each(None, 12, 13)


@pytest.mark.parametrize("mirrored", [False, True])
def test_ratios_are_those_of_all_distances(mirrored):
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(0, 256, (7, 3 * 4 * 4), dtype=torch.uint8, generator=generator)
    generated = torch.randint(0, 256, (5, 3 * 4 * 4), dtype=torch.uint8, generator=generator)
    generated[0] = training[3].view(3, 4, 4).flip(2).flatten()
    found = gu_ratios(generated, training, mirrored)
    for image, ratio in zip(generated, found, strict=True):
        ways = [image.view(3, 4, 4), image.view(3, 4, 4).flip(2)][: 1 + mirrored]
        distances = sorted(
            min((way.flatten() - other.float()).norm().item() for way in (w.float() for w in ways))
            for other in training
        )
        assert ratio.item() == pytest.approx(distances[0] / distances[1], abs=1e-5)
    assert (found[0] == 0) == mirrored


def test_both_statistics_are_of_the_snapshots():
    ratios = [Ratio(value, 0, 1, step) for step, value in ((1, 0.2), (2, 0.8), (3, 0.5))]
    assert of_snapshots(ratios, "max").step == 2 and of_snapshots(ratios, "last").step == 3


class Planted:
    """In place of drawing: copies of training images, as many of five as ``share(size, step)`` says; else noise."""

    def __init__(self, study, share):
        self.study, self.share = study, share

    def __call__(self, model, prompts, output, settings, device, desc):
        size, step = (int(desc.split(word)[1].split(",")[0].split()[0]) for word in (", ", "step "))
        assert len(prompts) == 5 and (model / "model_index.json").is_file()
        training = load_training_set(self.study.subset(size))
        output.mkdir(parents=True)
        rng = np.random.default_rng(step)
        for index in range(5):
            picture = training.image(index).crop((2, 0, 18, 16))  # the centre of 19 x 16
            if index >= self.share(size, step):
                picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            picture.save(output / f"{index}.png")


@pytest.fixture
def here(monkeypatch):
    """Jobs run in this process, one after another. Gives the commands that were run."""
    commands = []

    def call(self, command, log):
        commands.append(list(map(str, command)))
        words = commands[-1][commands[-1].index("ietagc_diffusers") + 1 :]
        if words[0] == "train":
            (folder,) = (word.removeprefix("--output_dir=") for word in words if word.startswith("--output_dir="))
            train_here([w for w in words[2:] if not w.startswith("--output_dir=")], folder, kind=UnconditionalScript)
            return None
        return f"exit {code}" if (code := main(words)) else None

    class Bar:
        def update(self):
            """Shows nothing."""

    def run_jobs(works, jobs, total, desc):
        for work in works:
            work(Bar(), Processes())

    monkeypatch.setattr(Processes, "call", call)
    monkeypatch.setattr(emm, "run_jobs", run_jobs)
    return commands


def test_a_study_finds_what_was_planted_and_keeps_what_is_finished(noise, tmp_path, here, monkeypatch):
    path = write_study(tmp_path, noise, snapshots=3)
    study = Study(path)
    # All are copies at 6 images. At 12 images 4 of 5 are before the last step, which is 12, and 2 of 5 after it.
    drawn = Planted(study, lambda size, step: 5 if size == 6 else 4 if step < 12 else 2)
    monkeypatch.setattr(emm, "generate", drawn)
    assert run(path) == 0
    found = json.loads((tmp_path / "out" / "emm.json").read_text())
    by_cell = {(model["configuration"], model["size"]): model["snapshots"] for model in found["models"]}
    assert [each["memorization_ratio"] for each in by_cell["none", 6]] == [1.0, 1.0]  # the first of 3 is left out
    assert [each["memorization_ratio"] for each in by_cell["none", 12]] == pytest.approx([0.8, 0.4])
    assert [each["step"] for each in by_cell["none", 12]] == [8, 12]
    low, high = by_cell["none", 12][1]["memorization_ratio_ci95"]
    assert 0.1 < low < 0.4 < high < 0.8
    of_none = found["emm"]["none"]
    assert (of_none["max"]["size"], of_none["max"]["below"]) == (6, 12) == (of_none["last"]["size"], 12)
    assert of_none["max"]["interpolated"] == pytest.approx(6 * math.exp(math.log(2) * 0.1 / 0.2))
    assert of_none["last"]["interpolated"] == pytest.approx(6 * math.exp(math.log(2) * 0.1 / 0.6))
    table = (tmp_path / "out" / "emm.md").read_text()
    assert "| none | 6 (interpolated: 8) | 6 (interpolated: 7) |" in table and "40.0% (11.8% to 76.9%)" in table
    assert (tmp_path / "out" / "emm.png").stat().st_size > 10_000
    kept = sorted(folder.name for folder in study.measured("none", 12).iterdir() if folder.is_dir())
    assert kept == ["step-12"]  # images of the last model only
    number = len(here)
    assert number == 8 and run(path) == 0 and len(here) == number


def test_a_model_is_compared_with_what_it_was_trained_on(tmp_path, here, monkeypatch):
    configurations = {"none": {"mitigation": "none", "deduplicate": "exact", "unet": TINY}}
    twice = write_folder(tmp_path / "twice", 12, copies=(0,), size=16)
    study = Study(write_study(tmp_path, twice, configurations=configurations, sizes=[6], epochs=1, snapshots=1))
    monkeypatch.setattr(emm, "generate", Planted(study, lambda size, step: 5))
    assert run(study.path) == 0
    (record,) = json.loads((study.measured("none", 6) / "ratios.json").read_text())
    assert record["num_train"] == 5 and record["memorization_ratio"] == 1  # not 0 for a copy of what is there twice
    given = study.values("none", 6)
    assert study.measured("none", 6).name == f"measured-{short_hash([study.generate, 5, 1, {'deduplicate': 'exact'}])}"
    monkeypatch.setattr(study, "values", lambda *_: given | {"deduplicate": None})
    assert study.measured("none", 6).name == f"measured-{short_hash([study.generate, 5, 1])}"  # as it was before


def test_a_model_that_failed_is_named_and_tried_again(noise, tmp_path, here, monkeypatch):
    study = Study(write_study(tmp_path, noise, sizes=[6], epochs=1, snapshots=1))
    monkeypatch.setattr(emm, "generate", Planted(study, lambda size, step: 5))
    trained = Processes.call
    with monkeypatch.context() as patch:
        patch.setattr(
            Processes, "call", lambda *about: "exit 1: no room" if "unique" in str(about[1]) else trained(*about)
        )
        assert run(study.path) == 1
    text = (tmp_path / "out" / "emm.md").read_text()
    assert "- ours, 6 images: no result: training: exit 1: no room" in text and "| ours | – | – |" in text
    number = len(here)
    assert run(study.path) == 0 and len(here) == number + 2  # trained and measured, only this one


def test_runs_differ_in_what_the_study_says(noise, tmp_path):
    study = Study(write_study(tmp_path, noise))
    none, ours = study.flags("none", 12), study.flags("ours", 12)
    assert none["max_train_steps"] == ours["max_train_steps"] == 12  # 4 epochs of 3 batches, at 6 images of 2
    assert study.flags("none", 6)["max_train_steps"] == 8 and none["steps_per_round"] == 6
    assert study.flags("none", 6)["steps_per_round"] == 4 and "steps_per_round" not in ours
    assert (ours["num_classes"], study.flags("ours", 6)["num_classes"]) == (12, 6)
    assert none["save_rounds"] and none["train_data_dir"].endswith("size-12")
    assert Study(write_study(tmp_path, noise, epochs=None, steps=10)).flags("none", 12)["max_train_steps"] == 10
    # A recipe has its own length, and rounds; of these the study keeps the rounds.
    recipe = {"config": "cifar10_iet_agc", "unet": {"dropout": 0}}
    flags = Study(write_study(tmp_path, noise, configurations={"a": recipe})).flags("a", 12)
    assert flags["max_train_steps"] == 12 and "steps_per_round" not in flags
    command = study.training_command("none", 12)
    assert "--resume_from_checkpoint=latest" in command and "--script=unconditional" in command
    (config,) = (word.split("=")[1] for word in command if word.startswith("--model_config_name_or_path"))
    assert json.loads(Path(config).read_text())["block_out_channels"] == [8, 8]
    # Another architecture, seed or source is another run; another number of images only another measurement.
    assert study.folder("none", 12) != study.folder("ours", 12)
    for changes, same in (({"seed": 1}, False), ({"train": str(tmp_path)}, False), ({"num_images": 6}, True)):
        other = Study(write_study(tmp_path, noise, **changes))
        assert (other.folder("none", 12) == study.folder("none", 12)) is same
        assert other.measured("none", 12) != study.measured("none", 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [3]}, "unknown key 'size'; did you mean 'sizes'"),
        ({"steps": 4}, "give either epochs or steps"),
        ({"sizes": [1, 5]}, "sizes: .* at least 2 training images"),
        ({"sizes": 5}, "sizes: should hold a list"),
        ({"threshold": 1.5}, "threshold 1.5: must be over 0"),
        ({"num_images": 0}, "num_images 0: must be at least 1"),
        ({"generate": {"mitigation": "rt"}}, "generate .*: unknown key 'mitigation'"),
        ({"generate": {"negative_prompt": "a"}}, "generate: `negative_prompt` a: "),
        ({"configurations": {}}, "configurations: there are none"),
        ({"configurations": {"a": {"mitigaton": "none"}}}, "configurations a: unknown key 'mitigaton'"),
        ({"configurations": {"a": {"seed": 3}}}, "configurations a: unknown key 'seed'"),
        ({"configurations": {"a": {"image_column": "b"}}}, "configurations a: unknown key 'image_column'"),
        (
            {"configurations": {"a": {"class_labels": "random"}}},
            "configurations a: `class_labels` random: say how many",
        ),
        ({"configurations": {"a": {"unet": {"widths": 3}}}}, "configurations a: unet: unknown key 'widths'"),
        ({"configurations": {"a": {"config": "{recipe}"}}}, "configurations a: `max_train_samples` 5: a study has"),
        ({"common": {}, "configurations": {"a": {"unet": {"dropout": 0}}}}, "configurations a: unet: options are"),
    ],
)
def test_a_wrong_study_is_named_before_anything_runs(noise, tmp_path, changes, message):
    (tmp_path / "recipe.yaml").write_text("max_train_samples: 5\n")
    changes = json.loads(json.dumps(changes).replace("{recipe}", str(tmp_path / "recipe.yaml")))
    with pytest.raises(UsageError, match=message):
        Study(write_study(tmp_path, noise, **changes))


def test_a_size_that_there_is_not_is_named_before_anything_runs(noise, tmp_path, here):
    with pytest.raises(UsageError, match="sizes 18: needs 6 images of class 1, and there are 5"):
        run(write_study(tmp_path, noise, sizes=[6, 18]))
    assert not here


def test_the_shipped_study_is_valid():
    study = Study("emm_cifar10")
    assert study.threshold == 0.9 and study.num_images == 10_000 and study.epochs == 40_000
    assert (
        study.unets["half as wide"]["block_out_channels"] == [128] * 3 != study.unets["no labels"]["block_out_channels"]
    )
    assert study.flags("unique labels", 20_000)["num_classes"] == 20_000
    assert len({study.folder(name, 1000) for name in study.configurations}) == len(study.configurations)
    assert all(small <= large for (_, small), (_, large) in itertools.pairwise(study.cells))


def test_images_without_a_class_are_refused(tmp_path, here):
    folder = write_folder(tmp_path / "images", 6)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | ({"label": None} if number == 2 else {}) for number, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="`label_column` label: some rows have no class"):
        run(write_study(tmp_path, folder))
    assert not here
