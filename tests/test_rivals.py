"""Rival mitigations in training: each alone and with the method, on any layout, and where they may be interrupted."""

import json

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import launch, train_flags, train_here, unet_bytes, write_folder
from safetensors.torch import load_file

from ietagc_diffusers import UsageError

# A short run in which every part of the method acts: 2 shards, 3 rounds, skips, augmentations, moves.
METHOD = [
    "--num_shards=2", "--steps_per_round=3", "--max_train_steps=18", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--use_ema",
]  # fmt: skip
NONE = ["--mitigation=none", "--max_train_steps=9"]
WEN = "--wen_threshold=0.08"  # some of the tiny model's magnitudes are below it
ALL = [
    WEN, "--embedding_noise=0.1", "--caption_mitigation=cwr", "--caption_mitigation_probability=0.5",
    "--pixel_noise=0.1", "--noisy_data_sigma=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Pictures with three captions each."""
    folder = write_folder(tmp_path_factory.mktemp("data") / "captioned", 14)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"captions": [row["text"], f"{row['text']} of noise", "noise"]} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def without(base, captioned, tmp_path_factory):
    """The weights of runs without a rival."""
    folder = tmp_path_factory.mktemp("without")
    runs = {name: train_flags(base, captioned, *flags) for name, flags in (("none", NONE), ("method", METHOD))}
    return [unet_bytes(train_here(flags, folder / name)) for name, flags in runs.items()]


def last_round(folder):
    return json.loads((folder / "ietagc" / "rounds.jsonl").read_text().splitlines()[-1])


def counts(folder):
    return pq.read_table(folder / "ietagc" / "skip_counts.parquet")


@pytest.mark.parametrize(
    ("method", "rival"),
    [
        (NONE, [WEN]),
        (NONE, ["--embedding_noise=0.1"]),
        (NONE, ["--caption_mitigation=mc", "--caption_column=captions"]),
        (NONE, ["--caption_mitigation=rc", "--caption_mitigation_probability=0.5"]),
        pytest.param(
            METHOD, ["--caption_mitigation=rt", "--caption_mitigation_probability=0.5"], marks=pytest.mark.slow
        ),
        (NONE, ["--caption_mitigation=cwr", "--caption_mitigation_probability=0.5", "--dataloader_num_workers=2"]),
        (METHOD, ["--noisy_data_sigma=1"]),
        (METHOD, ALL),
    ],
    ids=lambda flags: flags[0].strip("-"),
)
def test_every_rival_acts_and_a_stopped_run_goes_on_bit_for_bit(base, captioned, without, tmp_path, method, rival):
    flags = train_flags(base, captioned, *method, *rival)
    whole = train_here(flags, tmp_path / "whole")
    assert unet_bytes(whole) not in without
    train_here(flags, tmp_path / "cut", stop_at=7)
    train_here([*flags, "--resume_from_checkpoint=latest"], tmp_path / "cut")
    assert unet_bytes(tmp_path / "cut") == unet_bytes(whole)
    assert counts(tmp_path / "cut").equals(counts(whole))


def test_mc_is_what_a_column_of_lists_does_by_itself(base, captioned, tmp_path):
    flags = train_flags(base, captioned, *NONE, "--caption_column=captions")
    plain, mc = train_here(flags, tmp_path / "plain"), train_here([*flags, "--caption_mitigation=mc"], tmp_path / "mc")
    assert unet_bytes(plain) == unet_bytes(mc)


def test_what_the_filter_skips_is_counted_and_logged(base, captioned, tmp_path):
    flags = train_flags(base, captioned, *NONE)
    row = last_round(train_here([*flags, WEN, "--steps_per_round=9"], tmp_path / "wen"))
    assert 0 < row["skip_rate"] < 1 and row["augment_rate"] == 0
    table = counts(tmp_path / "wen").to_pydict()
    assert sum(table["skips"]) == pytest.approx(row["skip_rate"] * sum(table["visits"]))
    row = last_round(train_here([*flags, "--wen_threshold=1e-9", "--steps_per_round=9"], tmp_path / "all"))
    assert row["skip_rate"] == 1 and row["loss"] > 0


def test_config_repeats_the_run_and_a_resumed_one_of_other_rivals_is_refused(base, captioned, tmp_path):
    flags = train_flags(base, captioned, *METHOD)
    first = train_here([*flags, *ALL], tmp_path / "first", stop_at=4)
    path = first / "ietagc" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    names = ("wen_threshold", "embedding_noise", "caption_mitigation", "caption_mitigation_probability")
    assert [config[name] for name in names] == [0.08, 0.1, "cwr", 0.5]
    with pytest.raises(UsageError) as error:
        train_here([*flags, "--caption_mitigation=rt", "--resume_from_checkpoint=latest"], first)
    for difference in (
        "wen_threshold was 0.08, is None",
        "embedding_noise was 0.1, is None",
        "caption_mitigation was 'cwr', is 'rt'",
        "caption_mitigation_probability was 0.5, is 0.1",
    ):
        assert difference in str(error.value)
    train_here([f"--config={path}", "--resume_from_checkpoint=latest"], first)
    whole = train_here([*flags, *ALL], tmp_path / "whole")
    assert unet_bytes(first) == unet_bytes(whole)


def test_a_column_of_strings_is_not_several_captions(base, pictures, tmp_path):
    with pytest.raises(UsageError, match="`caption_column` text holds strings: name a column of lists"):
        train_here(train_flags(base, pictures, "--caption_mitigation=mc"), tmp_path)


def test_two_processes_equal_one(base, captioned, tmp_path):
    flags = train_flags(base, captioned, *METHOD, *ALL)
    one = train_here(flags, tmp_path / "one")
    launch(flags, tmp_path / "two", processes=2)
    assert unet_bytes(tmp_path / "two") == unet_bytes(one)
    assert counts(tmp_path / "two").equals(counts(one))


def test_a_process_whose_samples_are_all_filtered_goes_on_with_its_group(base, captioned, tmp_path):
    """Two processes of one sample each on one shard: as one process with two, up to rounding."""
    flags = train_flags(base, captioned, *NONE, *ALL, "--steps_per_round=9")
    one = train_here([*flags, "--train_batch_size=2"], tmp_path / "one")
    launch([*flags, "--train_batch_size=1"], tmp_path / "two", processes=2)
    first, second = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (one, tmp_path / "two")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=2e-4)
    assert counts(tmp_path / "two").equals(counts(one))
    assert 0 < last_round(one)["skip_rate"] < 1
