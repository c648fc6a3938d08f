"""Rows keep their ids; bad rows are named; order and randomness are functions of the seed."""

import argparse
import json
import random
from collections import Counter
from copy import copy

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image

from ietagc_diffusers import StrengthRandAugment, UsageError, testing
from ietagc_diffusers.data import loaders
from ietagc_diffusers.data import samples as data
from ietagc_diffusers.training.streams import RandomStreams


def flags(folder, **changes):
    defaults = {
        "dataset_name": None, "dataset_config_name": None, "train_data_dir": str(folder), "image_column": "image",
        "caption_column": "text", "max_train_samples": None, "cache_dir": None, "seed": 3, "on_bad_sample": "error",
    }  # fmt: skip
    return argparse.Namespace(**(defaults | changes))


@pytest.fixture(scope="module")
def tokenizer():
    return testing.build_tokenizer(["a red picture"], num_merges=8)


@pytest.fixture(scope="module")
def samples(pictures, tokenizer):
    rows = data.load_training_rows(flags(pictures))
    transform = data.image_transform(16, center_crop=False, random_flip=True, interpolation="lanczos")
    return data.TrainingSamples(rows, "image", "text", tokenizer, transform)


def test_sample_ids_survive_selection(pictures):
    everything = data.load_training_rows(flags(pictures))
    assert everything[data.SAMPLE_ID] == list(range(24))
    some = data.load_training_rows(flags(pictures, max_train_samples=9))
    assert len(some) == 9 and len(set(some[data.SAMPLE_ID])) == 9
    for row in some:
        assert np.array_equal(row["image"], everything[row[data.SAMPLE_ID]]["image"])


def test_deduplication_keeps_one_row_of_each_image(pictures):
    rows = data.load_training_rows(flags(pictures))
    hashes = data.pixel_hashes(rows, "image")
    assert len(rows) == 24 and len(set(hashes.tolist())) == 22
    kept = data.deduplicate(rows, hashes)
    assert len(kept) == 22
    assert len(set(data.pixel_hashes(kept, "image").tolist())) == 22


def test_parquet_and_arrow_are_read_like_the_folder(pictures, tmp_path):
    rows = data.load_training_rows(flags(pictures))
    (tmp_path / "parquet").mkdir()
    rows.remove_columns(data.SAMPLE_ID).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    again = data.load_training_rows(flags(None, dataset_name=str(tmp_path / "parquet"), train_data_dir=None))
    assert again["text"] == rows["text"]
    assert np.array_equal(again[5]["image"], rows[5]["image"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], "the folder is empty"),
        (lambda f: (f / "metadata.jsonl").unlink(), "--caption_column text: not a column"),
        (lambda f: rewrite(f, 2, text=None), "row 2 has no caption in column 'text'"),
        (lambda f: rewrite(f, 2, file_name="absent.png"), "row 2: its image file"),
    ],
)
def test_bad_folders_are_named_before_training(tmp_path, spoil, message):
    folder = write_folder(tmp_path / "pictures", 4)
    spoil(folder)
    with pytest.raises(UsageError) as error:
        data.load_training_rows(flags(folder))
    assert message in str(error.value)


def rewrite(folder, row, **changes):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[row] |= changes
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_absent_folder_and_wrong_columns_are_named(pictures, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        data.load_training_rows(flags(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--image_column photo: not a column of the dataset, which has image"):
        data.load_training_rows(flags(pictures, image_column="photo"))
    with pytest.raises(UsageError, match="--image_column label: holds"):
        data.load_training_rows(flags(pictures, image_column="label"))
    with pytest.raises(UsageError, match="--caption_column label: should hold strings"):
        data.load_training_rows(flags(pictures, caption_column="label"))


def test_a_saved_shard_is_a_dataset_that_keeps_its_ids(pictures, tmp_path):
    data.load_training_rows(flags(pictures)).select([3, 9]).save_to_disk(tmp_path / "shard")
    rows = data.load_training_rows(flags(None, dataset_name=str(tmp_path / "shard"), train_data_dir=None))
    assert rows[data.SAMPLE_ID] == [3, 9]


def test_seeded_samples_leave_the_device_s_stream_alone(samples, monkeypatch):
    """torch.manual_seed would seed every device with it."""

    def forbidden(seed):
        raise AssertionError("seeds the device")

    monkeypatch.setattr(torch, "manual_seed", forbidden)
    samples.__getitems__([(0, 1), (1, 2)])
    StrengthRandAugment(5)(torch.zeros(1, 3, 16, 16), [5], [1])


def test_an_image_that_does_not_decode_is_named(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "pictures", 5)
    whole = (folder / "003_0.png").read_bytes()
    (folder / "003_0.png").write_bytes(whole[: len(whole) // 2])
    rows = data.load_training_rows(flags(folder))
    transform = data.image_transform(16, True, False, "bilinear")
    samples = data.TrainingSamples(rows, "image", "text", tokenizer, transform)
    with pytest.raises(UsageError, match=r"row 3 \(.*003_0.png\): the image does not decode"):
        samples.__getitems__([1, 3, 4])
    for workers in (0, 2):
        loader = loaders.StreamLoader(samples, 5, workers, RandomStreams())
        with pytest.raises(UsageError, match=r"^row 3 \(.*003_0.png\): the image does not decode.*skip$"):
            loader.next()


def test_bad_rows_are_replaced_from_their_shard(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "pictures", 8)
    (folder / "003_0.png").write_bytes(b"not an image")
    rewrite(folder, 5, text=None)
    rows = data.load_training_rows(flags(folder, on_bad_sample="skip"))
    transform = data.image_transform(16, True, False, "bilinear")
    samples = data.TrainingSamples(rows, "image", "text", tokenizer, transform, skip_bad=True)
    shard = np.array([1, 3, 5, 6])
    both = [loaders.SeededLoader(samples, 4, workers, [3, 0], shard) for workers in (0, 2)]
    for _ in range(4):
        (batch, _), (other, _) = (loader.next() for loader in both)
        assert set(batch["samples"].tolist()) <= {1, 6} and len(batch["samples"]) == 4
        assert {row for row, _ in batch["bad"]} == {3, 5}
        assert_same([batch], [other])
    with pytest.raises(UsageError, match="bad, and so were 1,000 others"):
        samples.of_shard(np.array([3, 5])).__getitems__([(3, 0)])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_any_kind_of_image_becomes_rgb(tmp_path, tokenizer, mode):
    folder = write_folder(tmp_path / "pictures", 2)
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("I;16" if mode == "I;16" else mode, (20, 31)).save(folder / f"odd.{suffix}")
    rewrite(folder, 0, file_name=f"odd.{suffix}")
    rows = data.load_training_rows(flags(folder))
    samples = data.TrainingSamples(rows, "image", "text", tokenizer, data.image_transform(16, True, False, "bilinear"))
    assert samples.__getitems__([0, 1])["pixel_values"].shape == (2, 3, 16, 16)


def test_lists_of_captions_are_drawn_from(pictures, tokenizer, samples):
    rows = data.load_training_rows(flags(pictures))
    several = [["a red picture", "a blue picture", "a green picture"]] * len(rows)
    rows = rows.remove_columns("text").add_column("text", several)
    drawn = data.TrainingSamples(rows, "image", "text", tokenizer, samples.transform)
    tokens = drawn.__getitems__([(0, seed) for seed in range(30)])["input_ids"]
    assert len({tuple(t) for t in tokens.tolist()}) == 3
    assert torch.equal(tokens[:4], drawn.__getitems__([(0, seed) for seed in range(4)])["input_ids"])


def mitigated(samples, name, probability=1.0):
    changed = copy(samples)
    changed.caption_mitigation, changed.caption_mitigation_probability = name, probability
    return changed


def captions_of(samples, seeds, row=0):
    tokens = samples.__getitems__([(row, seed) for seed in seeds])["input_ids"]
    return samples.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def test_caption_mitigations_add_repeat_and_replace(samples):
    original = Counter(["a", "red", "picture"])
    repeated = [Counter(caption.split()) - original for caption in captions_of(mitigated(samples, "cwr"), range(40))]
    assert all(sum(added.values()) == 2 and added.keys() <= original.keys() for added in repeated)
    assert len({tuple(sorted(added.elements())) for added in repeated}) > 3
    drawn = mitigated(samples, "rt")
    for seed in range(40):
        words = drawn._caption("a red picture", random.Random(seed)).split()
        assert len(words) == 5 and not original - Counter(words)
    drawn = mitigated(samples, "rc")
    replaced = {drawn._caption("a red picture", random.Random(seed)) for seed in range(40)}
    assert len(replaced) == 40 and all(len(caption.split()) == 4 for caption in replaced)


@pytest.mark.parametrize("name", ["rc", "rt", "cwr"])
def test_a_caption_mitigation_acts_on_its_share_of_visits_and_on_captions_alone(samples, name):
    keys = [(row % 24, 1000 + row) for row in range(600)]
    plain, off, on, again = (
        s.__getitems__(keys) for s in (samples, mitigated(samples, name, 0.0), *[mitigated(samples, name, 0.1)] * 2)
    )
    assert torch.equal(off["input_ids"], plain["input_ids"]) and torch.equal(on["input_ids"], again["input_ids"])
    assert torch.equal(on["pixel_values"], plain["pixel_values"])
    share = (on["input_ids"] != plain["input_ids"]).any(dim=1).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.04)


def test_without_several_captions_or_a_mitigation_the_process_s_stream_is_left_alone(samples):
    random.seed(4)
    before = random.getstate()
    samples.__getitems__([0, 1, 2])
    assert random.getstate() == before
    drawn = mitigated(samples, "rc", 0.5)
    tokens = [random.seed(4) or drawn.__getitems__(list(range(24)))["input_ids"] for _ in range(2)]
    assert torch.equal(*tokens) and random.getstate() != before


def test_mc_asks_for_several_captions(pictures):
    rows = data.load_training_rows(flags(pictures))
    with pytest.raises(UsageError, match="--caption_column text holds strings: name a column of lists"):
        data.require_several_captions(rows, "text")
    single = rows.add_column("captions", [[caption] for caption in rows["text"]])
    with pytest.raises(UsageError, match="no row of --caption_column captions has more than one"):
        data.require_several_captions(single, "captions")
    several = rows.add_column("captions", [["a"], *[["a", "b"]] * (len(rows) - 1)])
    data.require_several_captions(several, "captions")


def make_loader(samples, workers=0, shard=None, **group):
    shard = np.arange(24) if shard is None else shard
    return loaders.SeededLoader(samples, 5, workers, [3, 0], shard, **group)


def take(loader, batches):
    return [loader.next()[0] for _ in range(batches)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["samples"], b["samples"]) and torch.equal(a["pixel_values"], b["pixel_values"])
        assert a.get("seeds") == b.get("seeds")


def test_seeded_batches_do_not_depend_on_workers_or_on_the_stream(samples):
    torch.manual_seed(0)
    first = take(make_loader(samples), 7)
    torch.manual_seed(1)
    assert_same(first, take(make_loader(samples, workers=2), 7))


def test_batches_are_full_and_each_epoch_sees_each_sample_once(samples):
    loader = make_loader(samples)
    seen = torch.cat([batch["samples"] for batch in take(loader, 24)]).tolist()
    assert len(seen) == 120  # five epochs of 24
    epochs = [seen[start : start + 24] for start in range(0, 120, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_shard_smaller_than_a_batch_fills_it(samples):
    (batch,) = take(make_loader(samples, shard=np.array([3, 8])), 1)
    assert len(batch["samples"]) == 5 and set(batch["samples"].tolist()) == {3, 8}


def test_reading_in_blocks_changes_nothing(samples, monkeypatch):
    whole = take(make_loader(samples), 11)
    monkeypatch.setattr(loaders.SeededLoader, "BLOCK", 3)
    assert_same(whole, take(make_loader(samples), 11))


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6, 11])
def test_seeded_loader_resumes_anywhere(samples, taken):
    whole = make_loader(samples)
    take(whole, taken)
    resumed = make_loader(samples)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert_same(take(whole, 6), take(resumed, 6))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 4, 5, 8])
def test_stream_loader_resumes_anywhere(samples, taken, workers):
    streams = RandomStreams()

    def fresh():
        return loaders.StreamLoader(samples, 5, workers, streams)

    streams.seed([9])
    whole = fresh()
    for _ in range(taken):
        whole.next()
        torch.rand(3)  # the training draws in between
    state, now = whole.state_dict(), streams.get()
    following = take(whole, 6)
    streams.seed([1])
    resumed = fresh()
    resumed.load_state_dict(state)
    streams.set(now)
    assert_same(following, take(resumed, 6))


def test_group_members_share_each_batch(samples):
    single = loaders.SeededLoader(samples, 6, 0, [3, 0], np.arange(24))
    members = [loaders.SeededLoader(samples, 3, 0, [3, 0], np.arange(24), 2, rank) for rank in range(2)]
    for _ in range(5):
        whole, _ = single.next()
        parts = [member.next() for member in members]
        assert torch.equal(whole["samples"], torch.cat([part["samples"] for part, _ in parts]))
        assert torch.equal(whole["pixel_values"], torch.cat([part["pixel_values"] for part, _ in parts]))
        assert all(part["batch_rows"] == len(whole["samples"]) for part, _ in parts)


def test_a_new_shard_starts_a_new_epoch_and_the_same_one_does_not(samples):
    loader = make_loader(samples, shard=np.arange(12))
    take(loader, 1)
    loader.set_samples(np.arange(12))
    assert loader.state_dict() == {"first_epoch": 0, "taken": 1}
    loader.set_samples(np.arange(6, 18))
    assert loader.state_dict() == {"first_epoch": 1, "taken": 0}
    seen = torch.cat([batch["samples"] for batch in take(loader, 12)])
    assert sorted(seen[:12].tolist()) == list(range(6, 18))
