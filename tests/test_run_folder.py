"""One module has every path of a run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, train_flags, train_here

from ietagc_diffusers import RunFolder, UsageError


@pytest.fixture(scope="module")
def finished(base, pictures, tmp_path_factory):
    flags = train_flags(base, pictures, "--num_shards=2", "--steps_per_round=2", "--max_train_steps=8", "--use_ema")
    flags += ["--save_rounds", "--save_shards", "--checkpointing_steps=4"]
    return train_here(flags, tmp_path_factory.mktemp("runs") / "finished")


def test_a_run_writes_where_the_run_folder_says(finished):
    run = RunFolder(finished)
    for path in (run.config_file, run.rounds_file, run.skip_counts_file, run.shard(0), run.shard(1), run.round(2)):
        assert path.exists()
    assert run.is_finished and [path.name for path in run.checkpoints()] == ["checkpoint-4", "checkpoint-8"]
    assert run.config()["num_shards"] == 2 and [row["global_step"] for row in run.rounds()] == [4, 8]


def test_saved_models_are_rounds_if_there_are_any_else_moving_averages(finished, tmp_path):
    run = RunFolder(finished)
    assert run.saved_models("unet") == [(4, run.round(1) / "unet"), (8, run.round(2) / "unet")]
    cut = RunFolder(tmp_path)
    for path in run.checkpoints():
        (tmp_path / path.name).symlink_to(path)
    assert cut.saved_models("unet") == [(step, cut.checkpoint(step) / "unet_ema") for step in (4, 8)]
    assert all((folder / "config.json").is_file() for _, folder in cut.saved_models("unet"))


def test_rounds_of_a_branch_that_was_left_are_no_models_of_the_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out", dirs_exist_ok=True)
    folder = RunFolder(tmp_path / "out")
    first = folder.rounds_file.read_text().splitlines(keepends=True)[0]
    folder.rounds_file.write_text(first)
    assert [place.parent.name for _, place in folder.saved_models("unet")] == ["round-0001"]


def test_what_was_half_written_is_removed_and_nothing_else(tmp_path):
    """Of a checkpoint that was being replaced one of the two is left, whenever the process was killed."""
    folder = RunFolder(tmp_path)
    kept = ["checkpoint-4", "checkpoint-9.tmpl", "checkpoint-x.tmp", "rounds/round-0001", "ietagc/best", "unfinished"]
    gone = ["checkpoint-4.old", "checkpoint-7.tmp", "rounds/round-0002.part", "ietagc/best.part", "unfinished.part"]
    for name in [*kept, *gone, "checkpoint-5.old"]:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "what").write_text(name)
    folder.tidy()
    left = {path.parent.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("what")}
    assert left == {name: name for name in kept} | {"checkpoint-5": "checkpoint-5.old"}
    folder.tidy()
    assert len([*tmp_path.rglob("what")]) == len(left)


def test_the_only_checkpoint_stays_where_it_cannot_be_renamed(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError

    (tmp_path / "checkpoint-5.old").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    RunFolder(tmp_path).tidy()
    assert (tmp_path / "checkpoint-5.old").is_dir()


def test_strangers_in_the_folder_are_not_checkpoints(tmp_path):
    for name in ("checkpoint-5.tmp", "checkpoint-x", "checkpoint-12", "checkpoint-3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-3", "checkpoint-12"]


@pytest.mark.parametrize("text", [None, "a: [", "- 1\n"])
def test_a_folder_without_readable_settings_is_named(tmp_path, text):
    run = RunFolder(tmp_path)
    assert run.rounds() == []
    if text is not None:
        run.records.mkdir()
        run.config_file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        run.config()


def test_no_other_module_of_training_or_evaluation_spells_a_path_of_a_run():
    names = re.compile(r'"(rounds\.jsonl|skip_counts\.parquet|bad_samples\.jsonl|rounds|config\.yaml)"')
    allowed = {"run_folder.py"}
    for folder in ("ietagc_diffusers", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name not in allowed and path.parent.name != "checkpoint":
                assert not names.search(path.read_text()), path


def test_what_is_written_names_the_version(finished):
    from ietagc_diffusers import __version__

    run = RunFolder(finished)
    assert __version__ in run.config_file.read_text().splitlines()[0]
    about = json.loads((run.checkpoints()[0] / "ietagc" / "checkpoint.json").read_text())
    assert about["version"] == __version__
