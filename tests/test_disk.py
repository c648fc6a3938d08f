"""The disk of a run: nothing written twice, room looked at, one run a folder, and the arithmetic of it all."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from conftest import SCRIPT, environment, launch, train_flags, train_here, unet_bytes

from ietagc_diffusers import RunFolder, UsageError, checkpoint
from ietagc_diffusers.checkpoint import ownership, writing
from ietagc_diffusers.training.callbacks import Ended, rounds
from ietagc_diffusers.training.cost import Cost, checkpoint_steps
from ietagc_diffusers.training.rounds import Rounds
from ietagc_diffusers.training.weights import Weights

METHOD = ["--num_shards=3", "--steps_per_round=4", "--max_train_steps=24", "--use_ema", "--checkpointing_steps=3"]


@pytest.fixture(scope="module")
def flags(base, pictures):
    return train_flags(base, pictures, *METHOD)


@pytest.fixture(scope="module")
def on_host(flags, tmp_path_factory):
    return train_here([*flags, "--proxy_state=host"], tmp_path_factory.mktemp("runs") / "host")


@pytest.fixture(scope="module")
def on_disk(flags, tmp_path_factory):
    return train_here([*flags, "--proxy_state=disk"], tmp_path_factory.mktemp("runs") / "disk")


def test_where_proxies_wait_does_not_show(flags, on_host, on_disk, tmp_path):
    assert unet_bytes(on_host) == unet_bytes(on_disk)
    train_here([*flags, "--proxy_state=disk"], tmp_path, stop_at=10)
    assert not (tmp_path / "ietagc" / "waiting").exists()
    train_here([*flags, "--proxy_state=host", "--resume_from_checkpoint=latest"], tmp_path, stop_at=19)
    train_here([*flags, "--proxy_state=disk", "--resume_from_checkpoint=latest"], tmp_path)
    assert unet_bytes(tmp_path) == unet_bytes(on_host)


@pytest.mark.slow
def test_averaged_moments_depend_on_no_layout(flags, on_host, tmp_path):
    flags = [*flags, "--optimizer_state=average"]
    whole = train_here(flags, tmp_path / "whole")
    assert unet_bytes(whole) != unet_bytes(on_host)
    train_here([*flags, "--proxy_state=disk"], tmp_path / "cut", stop_at=17)
    launch([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut", processes=3)
    assert unet_bytes(tmp_path / "cut") == unet_bytes(whole)


@pytest.mark.parametrize("run", ["on_host", "on_disk"])
def test_proxies_that_have_not_moved_are_linked(run, request):
    """Steps 0 to 11 are the first round: at 6 and 9 shard 0 waits, and shard 1 and then shard 2 are in training."""
    folder = request.getfixturevalue(run)

    def file(step, name):
        return (folder / f"checkpoint-{step}" / name).stat().st_ino

    for name in ("unet/diffusion_pytorch_model.safetensors", "ietagc/optimizer-0.safetensors"):
        assert file(6, name) == file(9, name)
    assert file(6, "ietagc/optimizer-1.safetensors") != file(9, "ietagc/optimizer-1.safetensors")
    assert file(9, "unet/diffusion_pytorch_model.safetensors") != file(12, "unet/diffusion_pytorch_model.safetensors")
    assert all(checkpoint.damage(path) is None for path in RunFolder(folder).checkpoints())


@pytest.mark.parametrize(
    "kind", [pytest.param("keep", marks=pytest.mark.slow), "average", pytest.param("reset", marks=pytest.mark.slow)]
)
def test_the_arithmetic_is_that_of_real_checkpoints(flags, tmp_path, kind, base):
    train_here([*flags, f"--optimizer_state={kind}"], tmp_path)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    parameters = sum(t.numel() for t in checkpoint.writing.TensorFile(weights).values())
    cost, rounds = Cost(parameters, num_shards=3, ema=True, optimizer_state=kind), Rounds(3, 8, 4)
    for step in checkpoint_steps(rounds, 3):
        large = ("unet*/*.safetensors", *(f"ietagc/{name}*.safetensors" for name in LARGE))
        paths = [path for pattern in large for path in (tmp_path / f"checkpoint-{step}").glob(pattern)]
        content = sum(t.nbytes for path in paths for t in checkpoint.writing.TensorFile(path).values())
        assert content == sum(cost.files(rounds, step).values()), step
    inodes = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("checkpoint-*/**/*.safetensors")}
    together = writing_total(cost, rounds)
    assert sum(inodes.values()) == pytest.approx(together, rel=0.25)  # headers are a fifth of so small a model


LARGE = ("optimizer-", "mean-", "weights-", "moments")


def writing_total(cost, rounds):
    files = {}
    for step in checkpoint_steps(rounds, 3):
        files |= cost.files(rounds, step)
    return sum(files.values())


def test_the_cost_at_real_size_is_bounded():
    sizes = {"parameters": 865_910_724, "ema": True, "frozen": 10**9}
    four, ten = (Cost(num_shards=k, on_disk=True, **sizes) for k in (4, 10))
    assert four.host < 32e9 and ten.host <= 1.3 * four.host
    rounds = Rounds(4, 4000, 2000)
    official = four.sets + four.moments
    assert sum(four.files(rounds, rounds.steps_before(1)).values()) <= 2.5 * official
    reset = [Cost(num_shards=k, optimizer_state="reset", **sizes) for k in (4, 10)]
    most = [cost.checkpoint(Rounds(cost.num_shards, 4000, 2000), 500) for cost in reset]
    assert most[0] <= 2.5 * official and most[1] == most[0]


Usage = namedtuple("Usage", "total used free")


def test_a_checkpoint_without_room_is_left_out_with_numbers(flags, on_host, tmp_path, monkeypatch, caplog):
    taken = []

    def usage(path):
        taken.append(path)
        return Usage(10**9, 0, 10**9 if len(list(tmp_path.glob("checkpoint-*"))) < 2 else 100_000)

    monkeypatch.setattr(writing.shutil, "disk_usage", usage)
    train_here([*flags, "--max_train_steps=24"], tmp_path, stop_at=10)
    assert taken and [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-3", "checkpoint-6"]
    assert re.search(r"No checkpoint at step 9: it needs 0\.00\d+ GB, .* has 0\.0001 GB left", caplog.text)


def test_records_that_a_full_disk_refuses_come_with_the_next_round(flags, on_host, tmp_path, monkeypatch, caplog):
    write, calls = rounds.write_text, []

    def full(path, text):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(rounds, "write_text", full)
    folder = train_here(flags, tmp_path / "out")
    assert unet_bytes(folder) == unet_bytes(on_host)
    assert "The record of the rounds could not be written" in caplog.text and "training continues" in caplog.text
    assert len(RunFolder(folder).rounds()) == len(RunFolder(on_host).rounds()) == len(calls) - 1


def test_checkpoints_over_the_limit_make_room_first(flags, tmp_path, monkeypatch, caplog):
    def usage(path):
        return Usage(10**9, 0, 10**9 if len(list(tmp_path.glob("checkpoint-*"))) < 2 else 100_000)

    monkeypatch.setattr(writing.shutil, "disk_usage", usage)
    train_here([*flags, "--checkpoints_total_limit=2"], tmp_path, stop_at=10)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    assert "Removing checkpoint-3 to make room for checkpoint-9" in caplog.text


def test_the_trained_pipeline_has_its_room(flags, tmp_path, monkeypatch, caplog):
    """Older checkpoints go for it, named; the newest stays, and is named where that does not suffice."""
    room = {"enough from": 2}

    def usage(path):
        left = len(list(tmp_path.glob("checkpoint-*")))
        return Usage(10**9, 0, 10**9 if left <= room["enough from"] or not finished() else 1000)

    def finished():
        return (tmp_path / "ietagc" / "skip_counts.parquet").exists()

    monkeypatch.setattr(writing.shutil, "disk_usage", usage)
    train_here(flags, tmp_path)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-21", "checkpoint-24"]
    assert "Removing checkpoint-3 to make room for the trained pipeline" in caplog.text
    room["enough from"] = 0
    with pytest.raises(Ended, match=r"`output_dir` .*needs 0\.000.* GB.*`resume_from_checkpoint` checkpoint-24"):
        train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-24"]


def test_a_disk_without_room_for_the_pipeline_is_refused_before_the_first_step(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: Usage(10**9, 0, 1000))
    with pytest.raises(UsageError, match=r"`output_dir` .*: the trained pipeline needs .* GB, the disk has 1e-06 GB"):
        train_here(flags, tmp_path)


def test_no_checkpoint_of_weights_that_are_not_finite(flags, tmp_path, monkeypatch, caplog):
    add = Weights.add_to_mean

    def spoilt(self, shard):
        if next(iter(self.means.values())).count == 1:
            next(iter(self.live()["unet"].values())).view(-1)[3] = float("nan")
        add(self, shard)

    monkeypatch.setattr(Weights, "add_to_mean", spoilt)
    with pytest.raises(Ended):
        train_here([*flags, "--max_nonfinite=2"], tmp_path)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-3", "checkpoint-6"]
    assert "is not finite. Earlier ones are untouched" in caplog.text
    assert not (tmp_path / "model_index.json").exists()


def test_another_runs_folder_is_set_aside(flags, on_host, tmp_path, caplog):
    train_here([*flags, "--seed=6", "--save_rounds", "--max_train_steps=12"], tmp_path)
    other = unet_bytes(tmp_path)
    train_here([*flags, "--checkpoints_total_limit=1"], tmp_path)
    assert unet_bytes(tmp_path) == unet_bytes(on_host)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-24"]
    aside = tmp_path / "earlier-run-1"
    assert f"held another run: its checkpoints, records and pipeline are now in {aside}" in caplog.text
    assert unet_bytes(aside) == other and len(RunFolder(aside).checkpoints()) == 4
    assert (aside / "rounds" / "round-0001").is_dir() and RunFolder(aside).config()["seed"] == 6
    assert not (tmp_path / "rounds").exists()


def test_the_same_run_begun_again_keeps_its_folder(flags, on_host, tmp_path):
    train_here(flags, tmp_path, stop_at=7)
    train_here([*flags, "--checkpoints_total_limit=2"], tmp_path)
    assert not (tmp_path / "earlier-run-1").exists() and unet_bytes(tmp_path) == unet_bytes(on_host)


def test_latest_and_retention_see_this_run_only(flags, tmp_path):
    """A checkpoint with a higher step that was put into the folder from elsewhere."""
    train_here([*flags, "--seed=6"], tmp_path / "other", stop_at=9)
    train_here(flags, tmp_path / "run", stop_at=7)
    (tmp_path / "other" / "checkpoint-9").rename(tmp_path / "run" / "checkpoint-9")
    run = RunFolder(tmp_path / "run")
    assert checkpoint.find("latest", run).name == "checkpoint-7"
    assert not ownership.owns(run, tmp_path / "run" / "checkpoint-9")
    more = ["--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"]
    train_here([*flags, *more], tmp_path / "run", stop_at=8)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-8", "checkpoint-9"]


def test_a_checkpoint_just_written_is_not_the_one_removed(flags, tmp_path):
    """Resumed from an earlier checkpoint of the same run, those beyond it go before the new ones."""
    train_here(flags, tmp_path, stop_at=19)
    more = ["--resume_from_checkpoint=checkpoint-6", "--checkpoints_total_limit=1"]
    train_here([*flags, *more], tmp_path, stop_at=10)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-10"]


def test_nothing_usable_is_never_a_new_run(flags, tmp_path):
    train_here(flags, tmp_path, stop_at=4)
    for path in tmp_path.glob("checkpoint-*/ietagc/manifest.json"):
        path.unlink()
    with pytest.raises(UsageError, match=r"latest: no checkpoint in .* can be used .*checkpoint-4: its manifest"):
        train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path)


def test_a_signal_to_the_whole_group_with_data_workers(base, pictures, tmp_path):
    """As launchers and terminals send it. While a proxy waits it has no workers: 2 of them, not 6."""
    flags = train_flags(base, pictures, "--num_shards=3", "--max_train_steps=100000", "--steps_per_round=5")
    flags += ["--dataloader_num_workers=2", f"--output_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    rounds = tmp_path / "ietagc" / "rounds.jsonl"
    while time.monotonic() < deadline and not (rounds.exists() and len(rounds.read_text().splitlines()) > 1):
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    workers = [line for line in children.stdout.splitlines() if "train_text_to_image" in line]
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-2000:]
    assert len(workers) <= 2
    (saved,) = RunFolder(tmp_path).checkpoints()
    assert checkpoint.damage(saved) is None and f"checkpoint {saved.name}" in output


def test_processes_ask_one_another_by_the_clock(monkeypatch):
    from ietagc_diffusers.training.callbacks import signals

    class Two:
        num_processes, is_main = 2, True
        asked = 0

        def agree(self, numbers):
            self.asked += 1
            return numbers

    Run = namedtuple("Run", "layout")
    for seconds, wanted in ((10.0, 20), (1.0, 7), (0.001, 2)):
        now = [0.0]
        monkeypatch.setattr(signals.time, "monotonic", lambda now=now: now[0])
        callback, run = signals.Signals(None, 10, print), Run(Two())
        for _ in range(20):
            now[0] += seconds
            assert not callback.should_stop(run)
        assert run.layout.asked == wanted
        callback._receive(signal.SIGTERM, None)
        assert any(callback.should_stop(run) for _ in range(10))


def test_records_say_which_run_it_is(on_host):
    recorded = json.loads((on_host / "ietagc" / "run.json").read_text())
    assert [ownership.about(path)["fingerprint"] in recorded for path in RunFolder(on_host).checkpoints()] == [True] * 8
    assert len(recorded) == 1
