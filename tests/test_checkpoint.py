"""Checkpoints: whole or not there; damage is seen; a full disk costs the checkpoint alone."""

import errno
import json
import os
import shutil
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch
from conftest import launch, train_flags, train_here, unet_bytes
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from ietagc_diffusers import RunFolder, UsageError, checkpoint, tensor_files
from ietagc_diffusers.checkpoint import flatten, unflatten

METHOD = [
    "--num_shards=2", "--steps_per_round=4", "--max_train_steps=24", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--use_ema", "--checkpointing_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def flags(base, pictures):
    return train_flags(base, pictures, *METHOD)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    return train_here(flags, tmp_path_factory.mktemp("runs") / "whole")


def test_state_survives_flattening():
    state = {"a": [1, 2.5, None, "x", True], 3: {"t": torch.arange(4)}, "e": {}, "i": float("inf"), "u": (1, [2])}
    tensors = {}
    rest = json.loads(json.dumps(flatten(state, tensors)))
    back = unflatten(rest, tensors)
    assert torch.equal(back[3].pop("t"), state[3].pop("t"))
    assert back == state | {"u": [1, [2]]}


def test_models_inside_are_loaded_by_diffusers(whole):
    newest = RunFolder(whole).checkpoints()[-1]
    unet = UNet2DConditionModel.from_pretrained(newest / "unet_ema")
    final = UNet2DConditionModel.from_pretrained(whole / "unet")
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), final.parameters(), strict=True))
    ema = EMAModel.from_pretrained(newest / "unet_ema", UNet2DConditionModel)
    assert ema.optimization_step == 12
    UNet2DConditionModel.from_pretrained(newest / "unet")


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    return train_here(flags, tmp_path_factory.mktemp("runs") / "stopped", stop_at=10)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "ietagc" / "manifest.json").unlink(),
        lambda folder: (folder / "ietagc" / "proxy-1.safetensors").unlink(),
        lambda folder: (folder / "unet" / "config.json").write_text("{}"),
        lambda folder: flip_a_byte(folder / "ietagc" / "proxy-0.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(stopped, tmp_path, harm):
    run = RunFolder(shutil.copytree(stopped, tmp_path / "run"))
    newest, before = reversed(run.checkpoints()[-2:])
    assert (newest.name, before.name) == ("checkpoint-10", "checkpoint-8")
    harm(newest)
    assert checkpoint.find("latest", run) == before
    with pytest.raises(UsageError, match=r"`resume_from_checkpoint` checkpoint-10: .*; 'latest' takes"):
        checkpoint.find("checkpoint-10", run)


def test_a_run_goes_on_from_before_a_damaged_checkpoint(flags, stopped, whole, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    flip_a_byte(folder / "checkpoint-10" / "ietagc" / "proxy-0.safetensors")
    train_here([*flags, "--resume_from_checkpoint=latest"], folder)
    assert unet_bytes(folder) == unet_bytes(whole)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_full_disk_costs_the_checkpoint_alone(flags, whole, tmp_path, monkeypatch, caplog):
    write, calls = tensor_files.write, []

    def full(path, *more, **options):
        calls.append(path)
        if "checkpoint-12" in str(path) and len(calls) % 3 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *more, **options)

    monkeypatch.setattr(tensor_files, "write", full)
    train_here(flags, tmp_path)
    names = [path.name for path in RunFolder(tmp_path).checkpoints()]
    assert names == [f"checkpoint-{step}" for step in (4, 8, 16, 20, 24)]
    assert not list(tmp_path.glob("*.tmp"))
    assert "No checkpoint at step 12" in caplog.text and "No space left" in caplog.text
    assert unet_bytes(tmp_path) == unet_bytes(whole)


def test_another_number_of_processes_goes_on(flags, whole, tmp_path):
    train_here(flags, tmp_path, stop_at=11)
    launch([*flags, "--resume_from_checkpoint=latest"], tmp_path, processes=2)
    assert unet_bytes(tmp_path) == unet_bytes(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_a_word(base, pictures, tmp_path, number):
    flags = train_flags(base, pictures, "--num_shards=2", "--max_train_steps=100000", "--log_every=1")

    def interrupt(process):
        deadline = time.monotonic() + 90
        while not (tmp_path / "ietagc" / "rounds.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        os.kill(process.pid, number)

    done = launch(flags, tmp_path, during=interrupt)
    (saved,) = RunFolder(tmp_path).checkpoints()
    assert checkpoint.damage(saved) is None
    last = done.stdout.strip().splitlines()[-1]
    assert last == f"Stopped at step {saved.name.split('-')[1]}; continue with --resume_from_checkpoint {saved.name}"


def test_groups_of_processes_equal_one_process_with_the_whole_batch(base, pictures, tmp_path):
    """Two processes on one shard: the same run as one process with batches twice as long, up to rounding."""
    common = [
        "--num_shards=1",
        "--max_train_steps=9",
        "--skip_threshold=0.9",
        "--augment_range=1.3",
        "--bank_buckets=2",
    ]
    flags = train_flags(base, pictures, *common, "--lr_scheduler=cosine", "--max_train_samples=21")
    one = train_here([*flags, "--train_batch_size=10"], tmp_path / "one")
    launch([*flags, "--train_batch_size=5"], tmp_path / "two", processes=2)
    first, second = (
        UNet2DConditionModel.from_pretrained(folder / "unet").state_dict() for folder in (one, tmp_path / "two")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=2e-4)
    rows = [
        json.loads((folder / "ietagc" / "rounds.jsonl").read_text().splitlines()[-1])
        for folder in (one, tmp_path / "two")
    ]
    assert rows[0]["skip_rate"] == pytest.approx(rows[1]["skip_rate"], abs=0.05)


def test_groups_of_processes_resume_with_all_their_counts(base, pictures, tmp_path):
    flags = train_flags(
        base, pictures, "--num_shards=1", "--max_train_steps=8", "--skip_threshold=0.9", "--bank_buckets=2"
    )
    flags += ["--augment_range=1", "--steps_per_round=8", "--checkpointing_steps=4"]
    launch(flags, tmp_path / "whole", processes=2)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    launch([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut", processes=2)
    assert unet_bytes(tmp_path / "cut") == unet_bytes(tmp_path / "whole")
    counts = [pq.read_table(tmp_path / name / "ietagc" / "skip_counts.parquet") for name in ("whole", "cut")]
    assert counts[0].equals(counts[1]) and sum(counts[0]["visits"].to_pylist()) == 8 * 2 * 4
    rows = [json.loads((tmp_path / name / "ietagc" / "rounds.jsonl").read_text()) for name in ("whole", "cut")]
    assert rows[0]["skip_rate"] == rows[1]["skip_rate"] and rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)


def test_plain_training_is_not_resumed_in_another_order(base, pictures, tmp_path):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=8")
    train_here(flags, tmp_path, stop_at=4)
    more = ["--resume_from_checkpoint=latest", "--train_batch_size=2"]
    done = launch([*flags, *more], tmp_path, processes=2, check=False)
    assert done.returncode != 0
    assert "sample_order was 'official, 0 data workers', is 'by seed and shard'" in done.stderr


def test_diverged_training_stops_with_advice(base, pictures, tmp_path):
    flags = train_flags(
        base, pictures, "--mitigation=agc", "--max_train_steps=200", "--learning_rate=1e30", "--max_nonfinite=3"
    )
    done = launch(flags, tmp_path, check=False)
    assert done.returncode == 1
    assert "3 steps in a row had losses that are not finite" in done.stderr
    assert "sample_id" in done.stderr and "Traceback" not in done.stderr
