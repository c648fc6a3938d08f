"""What is abnormal is told from images that were never trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import train_flags, train_here, unet_bytes, write_folder
from PIL import Image

from ietagc_diffusers import LossMemoryBank, ThresholdAwareControl, UsageError, WenControl, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.cli import main
from ietagc_diffusers.data import Batch
from ietagc_diffusers.data.hashes import pixel_hashes
from ietagc_diffusers.data.rows import held_out, load_training_rows
from ietagc_diffusers.eval.record import training_set
from ietagc_diffusers.method.thresholds import RunningQuantile
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.heldout import EVERY
from ietagc_diffusers.training.scripts import UnconditionalScript

RUN = ["--mitigation=iet-agc", "--num_shards=2", "--skip_false_rate=0.3", "--bank_buckets=2", "--report_to=none"]
RUN += ["--max_train_steps=16", "--steps_per_round=4"]


@pytest.fixture(scope="module")
def flags(base, pictures, heldout):
    return train_flags(base, pictures, *RUN, f"--heldout_dir={heldout}")


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    return train_here(flags, tmp_path_factory.mktemp("whole") / "out")


class Samples:
    """The same noisy samples at every turn."""

    def __init__(self, drawn):
        self.drawn = drawn

    def measure(self, objective, losses_of):
        return losses_of(self.drawn), self.drawn.levels


@pytest.mark.parametrize("wrap", [lambda control: control, lambda control: WenControl(1e9, control)])
def test_the_threshold_is_the_quantile_of_the_held_out_ratios(wrap):
    family = testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))
    family.objective.unconditional = family.tokenize([""])
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Batch(images, family.tokenize(["a red picture"] * 60))
    torch.manual_seed(0)
    drawn = family.objective.draw(family.objective.encode(batch))
    drawn = family.objective.at_levels(drawn, torch.full((60,), 500))
    bank = LossMemoryBank(1000)
    bank.averages.fill_(2.0)
    bank.visits.fill_(1e6)
    quantile = RunningQuantile(0.25, 1000)
    control = wrap(ThresholdAwareControl(bank, quantile, heldout=Samples(drawn)))
    with torch.no_grad():
        losses = family.objective.losses(family.denoiser, drawn)
    control.step(family.denoiser, family.objective, Batch(images[:4], family.tokenize(["a red picture"] * 4)))
    wanted = np.quantile(losses[-50:] / 2, 0.25)  # as many as are kept, in their order, whatever was trained on
    assert quantile(torch.tensor([500])).item() == pytest.approx(wanted, rel=1e-4)
    assert quantile(torch.tensor([10])).item() == 0
    control.observe(losses / 100, drawn.levels)
    assert quantile(torch.tensor([500])).item() == pytest.approx(wanted, rel=1e-4)


def test_they_change_nothing_that_is_drawn_for_the_training(base, pictures, heldout, tmp_path):
    """At a rate so small that nothing is skipped, the weights are those of a training without them."""
    given = ["--skip_false_rate=1e-9", f"--heldout_dir={heldout}"]
    with_them = train_here(train_flags(base, pictures, *RUN, *given), tmp_path / "with")
    without = train_here(
        train_flags(base, pictures, *RUN, "--skip_false_rate=0", "--skip_threshold=0"), tmp_path / "no"
    )
    assert unet_bytes(with_them) == unet_bytes(without)


def test_nor_does_the_dropout_of_a_model_that_has_some(pictures, heldout, tmp_path):
    unet = testing.random_unconditional_pipeline().unet
    unet.register_to_config(dropout=0.2)
    unet.save_config(tmp_path / "config")
    flags = [f"--model_config_name_or_path={tmp_path / 'config'}", f"--train_data_dir={pictures}", "--resolution=16"]
    flags += ["--train_batch_size=4", "--seed=5", "--mitigation=agc", "--max_train_steps=6", "--report_to=none"]
    given = ["--skip_false_rate=1e-9", f"--heldout_dir={heldout}"]
    with_them = train_here([*flags, *given], tmp_path / "with", kind=UnconditionalScript)
    assert unet_bytes(with_them) == unet_bytes(
        train_here([*flags, "--skip_rate=1e-9"], tmp_path / "no", kind=UnconditionalScript)
    )


def test_a_stopped_run_goes_on_bit_for_bit(flags, whole, tmp_path):
    """Stopped between two held-out batches."""
    flags = [*flags, "--resume_from_checkpoint=latest"]
    train_here(flags, tmp_path / "cut", stop_at=EVERY + 2)
    assert unet_bytes(train_here(flags, tmp_path / "cut")) == unet_bytes(whole)


def test_a_run_goes_on_with_the_same_images_only(flags, heldout, tmp_path):
    train_here(flags, tmp_path / "out", stop_at=2)
    others = write_folder(tmp_path / "others", 10, seed=10)
    moved = [flag.replace(str(heldout), str(others)) for flag in flags]
    with pytest.raises(UsageError, match="heldout_data"):
        train_here([*moved, "--resume_from_checkpoint=latest"], tmp_path / "out")


def test_a_folder_among_the_training_images_is_refused(base, pictures, tmp_path):
    with pytest.raises(UsageError, match=r"`heldout_dir` .* must not lie in one another"):
        train_here(train_flags(base, pictures, *RUN, f"--heldout_dir={pictures}"), tmp_path)


def test_a_folder_of_another_split_beside_the_training_images_is_taken(base, pictures, heldout, tmp_path):
    """As ``ietagc prepare --test_share`` writes it; training does not read it."""
    shutil.copytree(pictures, tmp_path / "set")
    shutil.copytree(heldout, tmp_path / "set" / "test")
    outside = train_here(train_flags(base, pictures, *RUN, f"--heldout_dir={heldout}"), tmp_path / "outside")
    flags = train_flags(base, tmp_path / "set", *RUN, f"--heldout_dir={tmp_path / 'set' / 'test'}")
    assert unet_bytes(train_here(flags, tmp_path / "inside")) == unet_bytes(outside)
    (tmp_path / "set" / "test").rename(tmp_path / "set" / "others")
    with pytest.raises(UsageError, match="must not lie in one another"):
        train_here([*flags, f"--heldout_dir={tmp_path / 'set' / 'others'}"], tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--skip_false_rate=0.05"], "`skip_false_rate` 0.05: is of images that are not trained on"),
        (["--heldout_dir=h"], "`heldout_dir` h: is for `monitor_every`, `monitor_steps` and `skip_false_rate`"),
        (["--heldout_share=0.1"], "`heldout_share` 0.1: is for `monitor_every`, `monitor_steps` and `skip_false_rate`"),
        (
            ["--heldout_dir=h", "--heldout_share=0.1", "--monitor_every=1"],
            "`heldout_dir` and `heldout_share` were both",
        ),
        (["--skip_false_rate=0.05", "--skip_rate=0.1", "--heldout_dir=h"], "`skip_rate` and `skip_false_rate` were"),
    ],
)
def test_flags_that_do_not_go_together(more, message):
    with pytest.raises(UsageError, match=message):
        parse_flags(["--pretrained_model_name_or_path=m", "--train_data_dir=d", *more])


def test_unique_classes_have_no_other_images():
    flags = ["--train_data_dir=d", "--mitigation=agc", "--skip_false_rate=0.1", "--heldout_dir=h"]
    flags += ["--class_labels=unique", "--num_classes=24"]
    with pytest.raises(UsageError, match="`class_labels` unique: each class is a training image"):
        parse_flags(flags, UnconditionalScript)


def test_a_share_is_held_out_with_all_its_rows(base, tmp_path):
    """Training with a share equals training on a folder of the rest."""
    pictures = write_folder(tmp_path / "all", 12, copies=(0, 3, 5), seed=2)
    hashes = pixel_hashes(load_rows_of(pictures), "image")
    held = held_out(hashes, 0.25, 5)
    assert len(set(hashes[held])) == 3 and not set(hashes[held]) & set(hashes[~held])
    rest = tmp_path / "rest"
    shutil.copytree(pictures, rest)
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == len(held) == 15
    (rest / "metadata.jsonl").write_text("".join(line + "\n" for line, out in zip(lines, held, strict=True) if not out))
    more = ["--mitigation=iet-agc", "--num_shards=2", "--max_train_steps=8", "--report_to=none"]
    share = train_here(train_flags(base, pictures, *more, "--heldout_share=0.25", "--monitor_every=9"), tmp_path / "a")
    assert unet_bytes(share) == unet_bytes(train_here(train_flags(base, rest, *more), tmp_path / "b"))
    used = pq.read_table(RunFolder(share).training_rows_file)["sample_id"].to_pylist()
    assert used == np.flatnonzero(~held).tolist()
    # Evaluation compares with the rest too, also of a model that comes without the list of its rows.
    RunFolder(share).training_rows_file.unlink()
    compared = training_set(share, str(pictures))
    assert len(compared.images) == (~held).sum() < len(held) and not compared.warnings
    left_out = {row["file_name"] for row in map(json.loads, lines)} - {row["file_name"] for row in _rows(rest)}
    assert {Path(name).name for name in compared.heldout.names} == left_out


def test_what_is_transparent_does_not_change_what_was_held_out(base, tmp_path):
    """Pictures decode to other pixels by ``alpha``: the draw is found again in those that training saw."""
    pictures, rng = write_folder(tmp_path / "all", 12, copies=(3,), seed=2), np.random.default_rng(1)
    for number in range(0, 12, 2):
        path = pictures / f"{number:03d}_0.png"
        Image.fromarray(rng.integers(0, 256, (20, 23, 4), dtype=np.uint8), "RGBA").save(path)
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=1", "--report_to=none")
    flags += ["--alpha=official", "--deduplicate=exact", "--heldout_share=0.25", "--monitor_every=9"]
    run = train_here(flags, tmp_path / "run")
    used = pq.read_table(RunFolder(run).training_rows_file)["sample_id"].to_pylist()
    before = training_set(run)
    RunFolder(run).training_rows_file.unlink()
    found = training_set(run, str(pictures))
    assert [row["sample_id"] for row in found.images.rows] == used and not found.warnings
    assert len(found.heldout) == 3 and found.heldout.names == before.heldout.names
    assert not set(found.heldout.names) & set(found.images.names)


def test_something_is_left_to_train_on(base, tmp_path):
    pictures = write_folder(tmp_path / "two", 2)
    with pytest.raises(UsageError, match=r"`heldout_share` 0.1: the training set has 2 different images, of which 2"):
        train_here(train_flags(base, pictures, "--heldout_share=0.1", "--monitor_every=1"), tmp_path / "out")


def _rows(folder):
    return map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())


def test_what_a_run_held_out_is_what_it_is_attacked_with(base, pictures, heldout, tmp_path, capsys, monkeypatch):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=2", "--report_to=none", "--save_rounds")
    run = train_here([*flags, "--heldout_share=0.3", "--monitor_every=9"], tmp_path / "share")
    command = ["attack", "--model", str(run), "--attack=loss", "--draws=1", "--output", str(tmp_path / "attack")]
    assert main([*command, "--device=cpu"]) == 0
    result = json.loads((tmp_path / "attack" / "attack.json").read_text())
    assert result["num_heldout"] == len(training_set(run).heldout) > 2
    front = ["front", "--run", f"none={run}", "--draws=1", "--output", str(tmp_path / "front"), "--device=cpu"]
    assert main(front) == 0 and (tmp_path / "front" / "front.csv").exists()
    whole = train_here(flags, tmp_path / "whole")
    assert main([*command[:2], str(whole), *command[3:]]) == 2
    assert "--heldout: the run held no images out; give" in capsys.readouterr().err
    monkeypatch.chdir(heldout.parent)
    given = train_here([*flags, f"--heldout_dir={heldout.name}", "--monitor_every=9"], tmp_path / "given")
    monkeypatch.chdir(tmp_path)  # where the name that the run was given means nothing
    assert main([*command[:2], str(given), *command[3:]]) == 0
    result = json.loads((tmp_path / "attack" / "attack.json").read_text())
    assert result["heldout"] == str(heldout) and result["num_heldout"] == len(load_rows_of(heldout))


def load_rows_of(pictures):
    return load_training_rows(parse_flags(["--pretrained_model_name_or_path=m", f"--train_data_dir={pictures}"]))
