"""A run records what it is trained on, and a model is compared with that."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import train_flags, train_here, write_folder
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from ietagc_diffusers import RunFolder, UsageError
from ietagc_diffusers.cli import main
from ietagc_diffusers.data import contents as module
from ietagc_diffusers.data.contents import contents
from ietagc_diffusers.eval import pipelines
from ietagc_diffusers.eval.generate import trained_resolution
from ietagc_diffusers.eval.pipelines import check_pipeline, pipeline_folder
from ietagc_diffusers.eval.record import recorded_training, training_set
from ietagc_diffusers.hub import contents as contents_of_upload

SELECTED = ("--max_train_samples=12", "--deduplicate=exact")


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    """A run on 12 of the rows, without duplicates."""
    flags = train_flags(base, pictures, "--num_shards=2", "--max_train_steps=4", "--resolution=28", *SELECTED)
    flags += ["--random_flip", "--checkpointing_steps=2"]
    return train_here(flags, tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def copy(run, tmp_path):
    return RunFolder(shutil.copytree(run, tmp_path / "copy"))


def of_the_hub(run):
    """What of a run's records is uploaded."""
    run.training_rows_file.unlink()
    config = run.config()
    run.config_file.write_text(yaml.safe_dump(config | {"train_data_dir": Path(config["train_data_dir"]).name}))
    return run


def rows_of(folder):
    return load_dataset("imagefolder", data_dir=str(folder), split="train")


@pytest.mark.parametrize("read_whole", [2000, 6])
def test_neither_the_order_of_rows_nor_where_they_lie_shows(pictures, tmp_path, monkeypatch, read_whole):
    monkeypatch.setattr(module, "READ_WHOLE", read_whole)
    pictures = shutil.copytree(pictures, tmp_path / "pictures")
    for number, path in enumerate(sorted(pictures.glob("*.png"))):
        path.write_bytes(path.read_bytes() + bytes(number // 2))
    rows = rows_of(pictures)
    inside = [{"bytes": path.read_bytes(), "path": None} for path in sorted(pictures.glob("*.png"))]
    embedded = Dataset.from_dict({"image": inside, "text": rows["text"][:]}).cast_column("image", ImageFeature())
    moved = rows_of(shutil.copytree(pictures, tmp_path / "moved"))
    found = contents(rows, "image", ["text"])
    assert 0 < sum(mark is not None for mark in found.marks) <= read_whole
    for same in (rows.shuffle(seed=1), embedded, moved):
        other = contents(same, "image", ["text"])
        assert (other.images, other.captions) == (found.images, found.captions)


def test_many_files_of_one_size_are_read_in_part(pictures, monkeypatch):
    monkeypatch.setattr(module, "READ_WHOLE", 5)
    rows = rows_of(pictures)
    assert sum(mark is not None for mark in contents(rows, "image").marks) == 5
    assert contents(rows, "image").captions is None


def test_another_image_caption_or_pairing_shows(pictures, tmp_path):
    rows = rows_of(pictures)
    found = contents(rows, "image", ["text"])
    assert contents(rows.select(range(len(rows) - 1)), "image", ["text"]).images != found.images
    texts = rows["text"][:]
    paired = contents(rows.remove_columns("text").add_column("text", texts[::-1]), "image", ["text"])
    assert paired.images == found.images and paired.captions != found.captions
    other = contents(rows_of(write_folder(tmp_path / "other", 22, copies=(0, 1), seed=3)), "image", ["text"])
    assert other.images != found.images
    assert other.captions != found.captions  # the same captions: without the images a guess cannot be checked


def test_the_record_has_no_path_and_the_rows_that_were_used(run, pictures):
    folder, record = RunFolder(run), recorded_training(run)
    assert str(pictures.parent) not in folder.training_set_file.read_text()
    assert record.source == "pictures" and record.resolution == 28 and record.views == (False, True)
    assert record.selection == (12, 5, "exact", None, None) and record.num_rows == len(record.rows) < 13
    assert record.columns == {"image_column": "image", "caption_column": "text"} and record.alpha == "white"
    counts = Dataset.from_parquet(str(folder.skip_counts_file))
    assert list(record.rows) == counts["sample_id"][:]
    assert "ietagc/training_rows.parquet" not in contents_of_upload(folder)


@pytest.mark.parametrize("uploaded", [False, True])
def test_only_the_rows_that_were_used_are_compared(copy, run, pictures, uploaded):
    used = set(recorded_training(run).rows.tolist())
    source = str(pictures) if uploaded else None
    found = training_set(of_the_hub(copy).path if uploaded else run, source)
    assert {row["sample_id"] for row in found.images.rows} == used and not found.warnings
    assert f"{len(used)} of the 24 rows" in found.notes[0]
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    wanted = [(rows[i]["file_name"], rows[i]["text"]) for i in sorted(used)]
    assert list(zip(found.images.names, found.images.texts, strict=True)) == wanted
    assert found.images.encoded(0) == (pictures / wanted[0][0]).read_bytes()


def test_the_rows_that_were_used_may_lie_elsewhere(run, pictures, tmp_path):
    rows = rows_of(pictures).select(sorted(recorded_training(run).rows))
    rows.save_to_disk(tmp_path / "exported")
    found = training_set(run, str(tmp_path / "exported"))
    assert len(found.images) == len(rows) and not found.warnings and not found.notes


def test_images_that_the_model_was_not_trained_on_are_told(copy, run, pictures, tmp_path):
    others = write_folder(tmp_path / "others", 22, seed=3)
    found = training_set(run, str(others))
    assert len(found.images) == 22
    assert found.warnings[0].startswith("The model records that it was trained on pictures (")
    shutil.copytree(pictures, tmp_path / "pictures")
    path = tmp_path / "pictures" / "metadata.jsonl"
    path.write_text(path.read_text().replace("red", "pink"))
    assert "captions were others" in training_set(run, str(tmp_path / "pictures")).warnings[0]
    for image in (tmp_path / "pictures").glob("*.png"):
        image.write_bytes(image.read_bytes() + b"\0")
    found = training_set(run, str(tmp_path / "pictures"))
    assert "are others: 24 rows" in found.warnings[0] and len(found.images) == 24
    text = copy.config_file.read_text()
    copy.config_file.write_text(text.replace(str(pictures), "gone"))
    copy.training_rows_file.unlink()
    with pytest.raises(UsageError, match=r"`train`: the model records .* pictures \(.*cannot be read on this machine"):
        training_set(copy.path)


def test_an_older_run_has_its_settings_only(copy, pictures, tmp_path):
    copy.training_set_file.unlink()
    copy.training_rows_file.unlink()
    record = recorded_training(copy.path)
    assert record.num_rows is None and record.views == (False, True) and record.alpha == "white"
    text = copy.config_file.read_text()
    copy.config_file.write_text(text.replace("alpha: white\n", ""))
    assert recorded_training(copy.path).alpha == "official"  # as it was before there was the setting
    found = training_set(copy.path)
    assert len(found.images) < 13 and not found.warnings
    found = training_set(copy.path, str(write_folder(tmp_path / "others", 5)))
    assert len(found.images) == 5 and "is not recorded" in found.warnings[0]
    copy.config_file.unlink()
    assert recorded_training(copy.path) is None and len(training_set(copy.path, str(pictures)).images) == 24
    with pytest.raises(UsageError, match="does not record what it was trained on"):
        training_set(copy.path)


def test_the_audit_warns_once_and_in_the_verdict(run, tmp_path, capsys):
    flags = ["audit", "--model", str(run), "--num_images", "4", "--num_inference_steps", "1", "--descriptor", "pixel"]
    flags += ["--feature_cache", "none", "--output", str(tmp_path / "own")]
    main(flags)
    said = capsys.readouterr()
    assert "trained on" not in said.out + said.err
    scores = json.loads((tmp_path / "own" / "scores.json").read_text())
    assert scores["num_train"] == recorded_training(run).num_rows and "rows of" in scores["notes"][0]
    drawn = [json.loads(line) for line in (tmp_path / "own" / "images" / "metadata.jsonl").read_text().splitlines()]
    assert {row["sample_id"] for row in drawn} <= set(recorded_training(run).rows.tolist())
    others = write_folder(tmp_path / "others", 6, seed=3)
    main([*flags[:-1], str(tmp_path / "other"), "--train", str(others)])
    said = capsys.readouterr()
    assert said.err.count("warning: The model records that it was trained on") == 1
    assert "was trained on pictures" in said.out and "trained on" in (tmp_path / "other" / "summary.md").read_text()


@pytest.mark.parametrize(
    "command", ["audit --descriptor=pixel", "generate", "detect", "front --heldout=owner/set", "figures"]
)
def test_nothing_is_written_into_the_images_that_a_model_records(run, pictures, tmp_path, capsys, command):
    name, *flags = command.split()
    model = {"front": f"--run=ours={run}", "figures": f"--run={run}"}.get(name, f"--model={run}")
    if name in ("generate", "detect"):
        (tmp_path / "prompts.txt").write_text("a prompt")
        flags.append(f"--prompts={tmp_path / 'prompts.txt'}")
    before = sorted(pictures.rglob("*"))
    assert main([name, model, *flags, f"--output={pictures / 'out'}"]) == 2
    assert f"would get into {pictures}, which the model was trained on" in capsys.readouterr().err
    assert sorted(pictures.rglob("*")) == before


def test_a_resumed_run_keeps_its_record_and_knows_what_was_shown(base, pictures, run, tmp_path):
    flags = train_flags(base, pictures, "--num_shards=2", "--max_train_steps=4", "--resolution=28", *SELECTED)
    flags += ["--random_flip", "--checkpointing_steps=2"]
    out = train_here(flags, tmp_path / "model", stop_at=2)
    before = RunFolder(out).training_set_file.read_text()
    assert before == RunFolder(run).training_set_file.read_text()
    again = [*flags, "--resume_from_checkpoint=latest"]
    train_here([*again, "--center_crop", "--no-random_flip", "--resume_allow", "center_crop", "random_flip"], out)
    record = recorded_training(out)
    assert record.views == (None, True)  # both crops were shown, and mirrored ones
    assert record.num_rows == recorded_training(run).num_rows
    train_here([*flags, "--seed=6"], out)
    moved = RunFolder(out).earlier(1)
    assert recorded_training(moved).views == (None, True) and recorded_training(out).selection.seed == 6


def test_a_stock_pipeline_draws_at_the_resolution_of_the_training(run, base):
    pipeline = DiffusionPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a picture", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (24, 24) and trained_resolution(run) == 24 and trained_resolution(base) is None
    for folder in (run / "unet", RunFolder(run).checkpoint(4) / "unet"):
        assert json.loads((folder / "config.json").read_text())["sample_size"] == 12


def test_a_base_of_diffusers_first_versions_too(base, pictures, tmp_path):
    old = shutil.copytree(base, tmp_path / "old")
    path = old / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "0.6.0"}))
    out = train_here(train_flags(old, pictures, "--mitigation=none", "--max_train_steps=1"), tmp_path / "out")
    assert json.loads((out / "unet" / "config.json").read_text())["sample_size"] == 8


def adapter(folder):
    folder.mkdir()
    save_file({"unet.down.lora_A.weight": torch.zeros(1, 1)}, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda w, run: adapter(w / "lora"),
            "holds a LoRA, not a pipeline; set --model to its base",
        ),
        (lambda w, run: adapter(w / "lora") / "pytorch_lora_weights.safetensors", "is a LoRA, not a pipeline"),
        (lambda w, run: (adapter(w / "l") / "pytorch_lora_weights.safetensors").rename(w / "x.safetensors"), "a LoRA"),
        (lambda w, run: run / "unet" / "diffusion_pytorch_model.safetensors", "is a file, but no whole checkpoint"),
        (lambda w, run: run / "model_index.json", "is a file of a pipeline; give its folder"),
        (lambda w, run: run / "unet", "holds only a UNet2DConditionModel"),
        (lambda w, run: RunFolder(run).checkpoint(4), "is a checkpoint of a training, not a pipeline"),
        (lambda w, run: w, "not the folder of a pipeline"),
    ],
)
def test_what_is_no_pipeline_is_told_with_what_would_do(run, pictures, tmp_path, capsys, make, message):
    model = make(tmp_path, run)
    flags = ["--model", str(model), "--train", str(pictures), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["audit", *flags, "--descriptor", "pixel"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ietagc audit: error: --model {model}: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_told_to_go_on(copy):
    (copy.path / "model_index.json").unlink()
    with pytest.raises(UsageError, match=r"a run that is not finished: continue it with `resume_from_checkpoint`"):
        check_pipeline(copy.path)


@pytest.fixture
def hub(run, tmp_path, monkeypatch):
    """A Hub with the run on it: answers what was asked for."""
    snapshot = tmp_path / "cache" / "models--me--model" / "snapshots" / "0a1b"
    shutil.copytree(run, snapshot, ignore=lambda *_: ["ietagc", "checkpoint-2", "checkpoint-4"])
    asked = []

    def download(repository, name, revision, cache_dir):
        asked.append((repository, name, revision, cache_dir))
        (snapshot / "ietagc").mkdir(exist_ok=True)
        return shutil.copy(run / name, snapshot / name)

    monkeypatch.setattr(DiffusionPipeline, "download", lambda model: str(snapshot))
    monkeypatch.setattr(pipelines, "hf_hub_download", download)
    pipelines._fetch_records.cache_clear()
    yield asked
    pipelines._fetch_records.cache_clear()


def test_the_record_comes_with_a_model_of_the_hub(hub, run, tmp_path):
    assert trained_resolution("me/model") == 24 and recorded_training("me/model").views == (False, True)
    names = ["ietagc/config.yaml", "ietagc/training_set.json"]
    assert hub == [("me/model", name, "0a1b", tmp_path / "cache") for name in names]  # of this revision, and once


@pytest.mark.parametrize(("error", "warns"), [(EntryNotFoundError("no"), 0), (LocalEntryNotFoundError("no"), 1)])
def test_a_record_that_is_not_there_or_not_in_reach_is_unknown(hub, monkeypatch, caplog, error, warns):
    def absent(*_, **options):
        raise error

    monkeypatch.setattr(pipelines, "hf_hub_download", absent)
    assert pipeline_folder("me/model").name == "0a1b" and recorded_training("me/model") is None
    assert trained_resolution("me/model") is None
    assert len([record for record in caplog.records if "cannot be looked up" in record.message]) == warns


@pytest.mark.parametrize("command", [["audit", "--descriptor=pixel"], ["generate"]])
def test_what_is_drawn_does_not_get_into_the_recorded_training_images(run, pictures, capsys, command):
    """The place that the model records is as safe from the output as one that is given."""
    flags = [*command, "--model", str(run), "--num_images=1", "--num_inference_steps=1"]
    assert main([*flags, "--output", str(pictures / "audit")]) == 2
    assert "would get into" in capsys.readouterr().err
    assert not (pictures / "audit").exists()
