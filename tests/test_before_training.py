"""What is known to fail is refused before training; whatever ends a run leaves its work."""

import json
import logging
import os

import pytest
import torch
from conftest import launch, train_flags, train_here, unet_bytes, write_folder
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ietagc_diffusers import RunFolder, StableDiffusion, UsageError, testing
from ietagc_diffusers.training.callbacks.faults import Ended

PLAIN = ["--mitigation=none", "--max_train_steps=4"]


def spoil(base, folder, part, **changes):
    """A copy of a base with another configuration of one part."""
    pipeline = testing.random_pipeline(["a red picture"])
    if part == "unet":
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, **changes)
    pipeline.save_pretrained(folder)
    if part == "tokenizer":
        path = folder / "tokenizer" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "the UNet takes latents of 9 channels, the VAE makes 4"),
        ("unet", {"cross_attention_dim": 24}, "the UNet takes embeddings of width 24, the text encoder makes 16"),
        ("tokenizer", {"model_max_length": 10**30}, "set it to that"),
    ],
)
def test_parts_that_do_not_fit_are_named(base, pictures, tmp_path, part, changes, message):
    wrong = spoil(base, tmp_path / "base", part, **changes)
    with pytest.raises(UsageError, match=f"`pretrained_model_name_or_path` .*{message}"):
        train_here(train_flags(wrong, pictures, *PLAIN), tmp_path / "out")


def test_a_base_whose_pipeline_cannot_be_assembled_is_refused_before_the_first_step(base, pictures, tmp_path):
    folder = tmp_path / "base"
    testing.random_pipeline(["a red picture"]).save_pretrained(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(UsageError, match=r"has no model_index\.json"):
        train_here(train_flags(folder, pictures, *PLAIN), tmp_path / "out")
    assert not RunFolder(tmp_path / "out").rounds()


def test_half_precision_files_only_are_named_with_their_variant(base, pictures, tmp_path):
    testing.random_pipeline(["a red picture"]).save_pretrained(tmp_path / "base", variant="fp16")
    with pytest.raises(UsageError, match="set `variant` to fp16"):
        train_here(train_flags(tmp_path / "base", pictures, *PLAIN), tmp_path / "out")


def test_the_trained_weights_are_written_before_all_else(base, pictures, tmp_path, monkeypatch):
    def outage(self):
        if (tmp_path / "unet" / "config.json").exists():
            raise OSError("the Hub is away")
        return assemble(self)

    assemble = StableDiffusion.pipeline
    monkeypatch.setattr(StableDiffusion, "pipeline", outage)
    with pytest.raises(Ended, match="the trained pipeline could not be written: the Hub is away"):
        train_here(train_flags(base, pictures, *PLAIN), tmp_path)
    trained = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    start = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert not RunFolder(tmp_path).is_finished


def test_a_bad_image_met_in_training_ends_it_with_a_checkpoint(base, tmp_path):
    folder = write_folder(tmp_path / "pictures", 12)
    whole = (folder / "003_0.png").read_bytes()
    half = len(whole) // 2
    (folder / "003_0.png").write_bytes(whole[:half] + bytes(100) + whole[half + 100 :])  # whole at both ends
    flags = train_flags(base, folder, "--mitigation=iet-agc", "--num_shards=2", "--max_train_steps=60")
    with pytest.raises(UsageError, match=r"^row 3 \(.*003_0.png\).*does not decode.*`on_bad_sample` to skip"):
        train_here(flags, tmp_path / "out")
    run = RunFolder(tmp_path / "out")
    assert len(run.checkpoints()) == 1
    resumed = [*flags, "--resume_from_checkpoint=latest"]
    assert RunFolder(train_here([*resumed, "--on_bad_sample=skip"], run.path)).is_finished
    (folder / "003_0.png").write_bytes(whole)  # repaired: another training set
    with pytest.raises(UsageError, match=r"data was .*start a new run in another folder"):
        train_here(resumed, run.path)


def test_deduplication_passes_over_images_that_are_to_be_skipped(base, tmp_path):
    folder = write_folder(tmp_path / "pictures", 10, copies=(0, 1))
    (folder / "005_0.png").write_bytes(b"not an image")
    flags = train_flags(base, folder, "--mitigation=iet-agc", "--num_shards=2", "--max_train_steps=8")
    out = train_here([*flags, "--deduplicate=exact", "--on_bad_sample=skip"], tmp_path / "out")
    lines = RunFolder(out).bad_samples_file.read_text().splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == [7]  # two of the first five have a second row


def test_too_few_different_images_say_that_deduplication_left_them(base, tmp_path):
    folder = write_folder(tmp_path / "pictures", 1, copies=(0,))
    with pytest.raises(UsageError, match="`num_shards` 2: more than the 1 different images that `deduplicate` left"):
        train_here(train_flags(base, folder, "--num_shards=2", "--deduplicate=exact"), tmp_path / "out")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_launches_that_are_not_trained_here_are_refused(
    base, pictures, tmp_path, monkeypatch, variable, value, message
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message):
        train_here(train_flags(base, pictures, *PLAIN), tmp_path)


def test_accumulation_that_accelerate_was_configured_for_is_taken(base, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    out = train_here(train_flags(base, pictures, *PLAIN), tmp_path)
    assert RunFolder(out).config()["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(("tracker", "message"), [("paper", "must be one of"), ("aim", "is not installed")])
def test_trackers_that_are_not_there_are_refused(base, pictures, tmp_path, tracker, message):
    with pytest.raises(UsageError, match=f"`report_to` {tracker}: {message}"):
        train_here(train_flags(base, pictures, *PLAIN, f"--report_to={tracker}"), tmp_path)


def scalars(folder):
    tags = {}
    for path in folder.rglob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            tags.setdefault(tag, []).extend(event.step for event in events.Scalars(tag))
    return tags


def validation_pixels(folder):
    """How many pixels of validation images the tracker has, which puts those of a step into one picture."""
    found = 0
    for path in folder.rglob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        found += sum(event.width * event.height for tag in events.Tags()["images"] for event in events.Images(tag))
    return found


def test_as_many_validation_images_as_asked_for_are_drawn(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *PLAIN, "--validation_prompts", "a cat", "a dog")
    out = train_here([*flags, "--num_validation_images=3"], tmp_path / "some")
    assert validation_pixels(out) == 2 * 3 * 16 * 16
    none = train_here([*flags, "--num_validation_images=0"], tmp_path / "none")
    assert validation_pixels(none) == 0 and unet_bytes(none) == unet_bytes(out)


@pytest.mark.parametrize("flags", [PLAIN, ["--num_shards=2", "--steps_per_round=1", "--max_train_steps=4"]])
def test_the_loss_of_each_batch_is_logged_under_the_files_of_its_images(base, pictures, tmp_path, flags):
    out = train_here(train_flags(base, pictures, *flags, "--debug_loss"), tmp_path)
    logged = scalars(out / "logs")
    files = {tag.removeprefix("loss_for_"): steps for tag, steps in logged.items() if tag.startswith("loss_for_")}
    assert set(files) < {path.name for path in pictures.glob("*.png")}
    assert sorted(step for steps in files.values() for step in steps) == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_attention_for_npus_is_refused_without_one(base, pictures, tmp_path):
    with pytest.raises(
        UsageError, match="`enable_npu_flash_attention`: needs an Ascend NPU with the package torch_npu"
    ):
        train_here(train_flags(base, pictures, *PLAIN, "--enable_npu_flash_attention"), tmp_path)


def test_a_run_without_a_tracker_runs(base, pictures, tmp_path):
    out = train_here(train_flags(base, pictures, *PLAIN, "--report_to=none", "--validation_prompts=a cat"), tmp_path)
    assert RunFolder(out).is_finished and not (out / "logs").exists()


def test_a_run_shorter_than_the_log_s_interval_is_logged(base, pictures, tmp_path):
    out = train_here(
        train_flags(base, pictures, "--num_shards=2", "--steps_per_round=3", "--max_train_steps=12"), tmp_path
    )
    assert scalars(out / "logs")["train_loss"] == [3, 6, 9, 12]


def test_clipping_at_0_is_off(base, pictures, tmp_path):
    plain = train_flags(base, pictures, *PLAIN)
    off, high = (train_here([*plain, f"--max_grad_norm={norm}"], tmp_path / norm) for norm in ("0", "1e30"))
    first, second = (load_file(out / "unet" / "diffusion_pytorch_model.safetensors") for out in (off, high))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_smaller_than_a_batch_are_told(base, pictures, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train_here(
            train_flags(base, pictures, "--num_shards=8", "--steps_per_round=1", "--max_train_steps=8"), tmp_path
        )
    assert "The smallest of 8 shards has 3 samples, a batch 4" in caplog.text


def test_what_a_run_writes_never_becomes_its_training_data(base, tmp_path):
    folder = write_folder(tmp_path / "pictures", 4)
    with pytest.raises(UsageError, match=r"`output_dir` .*: lies in `train_data_dir`"):
        train_here(train_flags(base, folder, *PLAIN), folder / "out")


def test_an_upload_that_cannot_work_is_refused_before_training(base, pictures, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from ietagc_diffusers.hub import Patience

    def away(self, **options):
        raise ConnectionError("refused")

    monkeypatch.setattr(HfApi, "create_repo", away)
    monkeypatch.setattr(Patience, "__call__", lambda self, ask: ask())
    with pytest.raises(UsageError, match="`push_to_hub` me/model: the repository cannot be created: refused"):
        train_here(train_flags(base, pictures, *PLAIN, "--push_to_hub", "--hub_model_id=me/model"), tmp_path)


def test_abbreviated_flags_are_taken_as_by_the_official_script(base, pictures, tmp_path):
    done = launch([*train_flags(base, pictures, "--mitigation=none", "--max_train_st=2"), "--report=none"], tmp_path)
    assert done.returncode == 0 and not os.path.exists(tmp_path / "logs")


def test_half_precision_of_accelerators_is_refused_on_the_cpu(base, pictures, tmp_path):
    with pytest.raises(UsageError, match="`mixed_precision` fp16: needs an accelerator"):
        train_here(train_flags(base, pictures, *PLAIN, "--mixed_precision=fp16"), tmp_path)


def test_a_finished_run_without_a_checkpoint_is_not_begun_again_by_latest(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *PLAIN)
    train_here(flags, tmp_path)
    with pytest.raises(UsageError, match="holds a finished run without a checkpoint"):
        train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path)
