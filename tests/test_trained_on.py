"""A model with adapters is compared with what all of them were trained on, or it is said what is left out."""

import json
import shutil
from argparse import Namespace

import pytest
import yaml
from conftest import train_flags, train_here, write_folder
from PIL import Image

from ietagc_diffusers import RunFolder, UsageError
from ietagc_diffusers.cli import common, main
from ietagc_diffusers.eval.trained_on import training_of_all

LORA = ("--mitigation=none", "--lora_rank=1", "--max_train_steps=1", "--report_to=none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of pictures: of two kinds, and of both together."""
    place = tmp_path_factory.mktemp("sets")
    first, second = write_folder(place / "first", 6, seed=1), write_folder(place / "second", 5, seed=2)
    both = shutil.copytree(first, place / "both")
    lines = [json.loads(line) for line in (first / "metadata.jsonl").read_text().splitlines()]
    for line in map(json.loads, (second / "metadata.jsonl").read_text().splitlines()):
        shutil.copy(second / line["file_name"], both / f"second_{line['file_name']}")
        lines.append(line | {"file_name": f"second_{line['file_name']}"})
    (both / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return first, second, both


@pytest.fixture(scope="module")
def adapters(base, folders, tmp_path_factory):
    """A LoRA of each, of which only the second saw mirror images."""
    place, views = tmp_path_factory.mktemp("adapters"), ([], ["--random_flip"], [])
    runs = [
        train_here([*train_flags(base, folder, *LORA), *more], place / folder.name)
        for folder, more in zip(folders, views, strict=True)
    ]
    return [str(run) for run in runs]


def test_adapters_of_other_images_are_not_compared_with_one_set_in_silence(base, folders, adapters):
    first, second, _ = adapters
    found = training_of_all(base, [first, f"{second}:0.5"])
    assert found.images.source == str(folders[1]) and found.record.views == (None, None)
    (warning,) = found.warnings
    assert warning.startswith(
        f"{first} records that it was trained on first (6 rows), but only {folders[1]} is compared"
    )
    assert "Give `train` a folder or dataset that holds the images of all of them." in warning
    found = training_of_all(first, [second])  # a model's own record counts as well
    assert warning in found.warnings and found.images.source == str(folders[1])


def test_images_that_hold_those_of_all_are_compared_without_a_doubt(base, folders, adapters):
    first, second, both = adapters
    for lora in ([first, second, both], [both, first], [first, f"{first}:0.5"]):
        found = training_of_all(base, lora)
        assert len(found.images) == (11 if both in lora else 6) and not found.warnings
    found = training_of_all(base, [first, second], str(folders[2]))
    assert len(found.images) == 11 and not found.warnings
    found = training_of_all(base, [first, second], str(folders[0]))
    assert found.warnings == (
        f"{second} records that it was trained on second (5 rows). {folders[0]} lacks some of these.",
    )


def test_a_file_without_a_record_beside_a_model_with_one_is_told(folders, adapters, tmp_path):
    first, style = adapters[0], tmp_path / "style.safetensors"
    style.write_bytes(b"")
    found = training_of_all(first, [str(style)])
    assert len(found.images) == 6 and f"{style} does not record what it was trained on, but only" in found.warnings[0]
    found = training_of_all(first, [str(style)], str(folders[2]))
    assert len(found.images) == 11 and not found.warnings and "whether it was trained on these" in found.notes[0]
    with pytest.raises(UsageError, match="does not record what it was trained on; give the training images"):
        training_of_all(None, [str(style)])


def test_a_record_that_comes_without_its_rows_is_believed_only_of_the_same_images(base, folders, adapters, tmp_path):
    bare = RunFolder(shutil.copytree(adapters[0], tmp_path / "bare"))
    bare.training_rows_file.unlink()
    assert not training_of_all(base, [adapters[0], str(bare.path)]).warnings
    (warning,) = training_of_all(base, [str(bare.path), adapters[1]], str(folders[2])).warnings
    assert f"Whether {folders[2]} holds these is not recorded." in warning


def test_a_lora_of_a_run_is_also_of_what_its_base_was_trained_on(base, folders, adapters, tmp_path):
    tuned, lora = shutil.copytree(base, tmp_path / "tuned"), shutil.copytree(adapters[1], tmp_path / "lora")
    shutil.copytree(RunFolder(adapters[0]).records, RunFolder(tuned).records)
    config = RunFolder(lora).config() | {"pretrained_model_name_or_path": str(tuned)}
    RunFolder(lora).config_file.write_text(yaml.safe_dump(config))
    (warning,) = training_of_all(lora).warnings
    assert warning == training_of_all(tuned, [str(lora)]).warnings[0] and warning.startswith(str(tuned))


def test_the_audit_says_which_images_it_leaves_out(base, folders, adapters, tmp_path, capsys):
    words = ["audit", "--model", base, "--lora", adapters[0], "--lora", adapters[1], "--num_images", 4, "--strict"]
    words += ["--num_inference_steps", 1, "--descriptor", "pixel", "--feature_cache", "none", "--device", "cpu"]
    words += ["--max_copy_rate", 0.9]
    assert main([*map(str, words), "--output", str(tmp_path / "one")]) == 4
    said = capsys.readouterr()
    assert said.err.count("warning: ") == 1 and "Give --train a folder" in said.err and "Give --train" in said.out
    assert "only" in json.loads((tmp_path / "one" / "verdict.json").read_text())["sentence"]
    assert main([*map(str, words), "--train", str(folders[2]), "--output", str(tmp_path / "both")]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err and "trained on first" not in said.out
    assert json.loads((tmp_path / "both" / "scores.json").read_text())["num_train"] == 11


def test_captions_of_an_adapter_are_drawn_and_none_of_its_images_is_written_into(
    base, folders, adapters, tmp_path, capsys
):
    words = ["generate", "--model", str(base), "--lora", adapters[0], "--lora", adapters[1], "--num_images", "2"]
    words += ["--num_inference_steps", "1", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "drawn")]) == 0
    assert Image.open(tmp_path / "drawn" / "000000.png").size == (16, 16)
    capsys.readouterr()
    assert main([*words, "--output", str(folders[0] / "drawn")]) == 2  # not the images that captions are drawn of
    assert f"would get into {folders[0]}, which the model was trained on" in capsys.readouterr().err
    args = Namespace(output=str(folders[1] / "out"), model=str(base), lora=[adapters[1]], prompts=None)
    with pytest.raises(UsageError, match="would get into"):
        common.check_apart(args, "prompts")
