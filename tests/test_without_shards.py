"""Averaging without sharding: each proxy trains on all data, in its own order."""

import pyarrow.parquet as pq
import pytest
from conftest import train_flags, train_here, unet_bytes

from ietagc_diffusers import UsageError

FLAGS = ["--mitigation=iet-agc", "--num_shards=2", "--no-shard_data", "--skip_threshold=0.9", "--report_to=none"]
FLAGS += ["--bank_buckets=2", "--max_train_steps=12", "--steps_per_round=3"]


def counts(folder):
    return pq.read_table(folder / "ietagc" / "skip_counts.parquet").to_pydict()


@pytest.fixture(scope="module")
def whole(base, pictures, tmp_path_factory):
    return train_here(train_flags(base, pictures, *FLAGS), tmp_path_factory.mktemp("whole") / "out")


def test_proxies_see_all_samples(whole):
    """24 samples, and each of two proxies visits 24 of them in two rounds, an epoch of its own."""
    table = counts(whole)
    assert table["visits"] == [2] * 24
    assert table["shard"] == [-1] * 24


def test_their_orders_differ(base, pictures, tmp_path):
    flags = train_flags(base, pictures, *FLAGS, "--max_train_steps=6")
    visits = counts(train_here(flags, tmp_path / "out"))["visits"]
    assert sum(visits) == 24 and {0, 1, 2} == set(visits)  # half an epoch each: with shards every sample is seen once


def test_a_stopped_run_goes_on_bit_for_bit(base, pictures, whole, tmp_path):
    flags = train_flags(base, pictures, *FLAGS, "--resume_from_checkpoint=latest")
    train_here(flags, tmp_path / "cut", stop_at=8)
    cut = train_here(flags, tmp_path / "cut")
    assert unet_bytes(cut) == unet_bytes(whole) and counts(cut) == counts(whole)


def test_a_run_with_shards_is_not_resumed_without(base, pictures, tmp_path):
    train_here(train_flags(base, pictures, *FLAGS), tmp_path / "out", stop_at=4)
    flags = [flag for flag in FLAGS if "shard_data" not in flag] + ["--resume_from_checkpoint=latest"]
    with pytest.raises(UsageError, match="shard_data was False, is True"):
        train_here(train_flags(base, pictures, *flags), tmp_path / "out")


@pytest.mark.parametrize("flag", ["save_shards", "group_duplicates"])
def test_what_needs_shards_is_refused(base, pictures, tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        train_here(train_flags(base, pictures, *FLAGS, f"--{flag}"), tmp_path / "out")
    assert f"--{flag}: without --shard_data there are no shards" in capsys.readouterr().err
