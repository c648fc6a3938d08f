"""Rows keep their ids; bad rows are named; order and randomness are functions of the seed."""

import json
import random
import re
from collections import Counter
from copy import copy

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image

from ietagc_diffusers import StrengthRandAugment, UsageError, testing
from ietagc_diffusers.data import (
    Captions,
    DataSettings,
    TrainingSamples,
    decode,
    image_transform,
    load_training_rows,
    loaders,
)
from ietagc_diffusers.data.hashes import pixel_hashes
from ietagc_diffusers.data.rows import first_rows
from ietagc_diffusers.data.sources import SAMPLE_ID, stored_column
from ietagc_diffusers.families.parts import Tokenize
from ietagc_diffusers.families.views import Pixels
from ietagc_diffusers.training.streams import RandomStreams


def settings(folder, **changes):
    return DataSettings(**{"train_data_dir": str(folder), "seed": 3, **changes})


def load(folder, caption_column="text", **changes):
    """The rows, with their captions checked."""
    return load_training_rows(settings(folder, **changes), Captions(caption_column, None, None))


def read_as(rows, tokenizer, transform=None, column="text"):
    transform = transform or image_transform(16, True, False, "bilinear")
    tokenize = Tokenize({"input_ids": (tokenizer, tokenizer.model_max_length)})
    return TrainingSamples(rows, "image", Pixels(transform), Captions(column, tokenize, tokenizer))


@pytest.fixture(scope="module")
def tokenizer():
    return testing.build_tokenizer(["a red picture"], num_merges=8)


@pytest.fixture(scope="module")
def samples(pictures, tokenizer):
    rows = load(pictures)
    transform = image_transform(16, center_crop=False, random_flip=True, interpolation="lanczos")
    return read_as(rows, tokenizer, transform)


def test_sample_ids_survive_selection(pictures):
    everything = load(pictures)
    assert everything[SAMPLE_ID] == list(range(24))
    some = load(pictures, max_train_samples=9)
    assert len(some) == 9 and len(set(some[SAMPLE_ID])) == 9
    for row in some:
        assert np.array_equal(row["image"], everything[row[SAMPLE_ID]]["image"])


def test_a_stored_column_is_the_column_whatever_is_selected(pictures):
    rows = load(pictures)
    for some in (rows, rows.shuffle(seed=1), rows.shuffle(seed=1).select(range(3, 20, 2)).filter(lambda row: True)):
        for column in (SAMPLE_ID, "text", "label"):
            assert stored_column(some, column).to_pylist() == list(some[column])


def test_deduplication_keeps_one_row_of_each_image(pictures):
    rows = load(pictures)
    hashes = pixel_hashes(rows, "image")
    assert len(rows) == 24 and len(set(hashes.tolist())) == 22
    kept = rows.select(first_rows(hashes))
    assert len(kept) == 22
    assert len(set(pixel_hashes(kept, "image").tolist())) == 22


def test_parquet_and_arrow_are_read_like_the_folder(pictures, tmp_path):
    rows = load(pictures)
    (tmp_path / "parquet").mkdir()
    rows.remove_columns(SAMPLE_ID).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    again = load(None, dataset_name=str(tmp_path / "parquet"), train_data_dir=None)
    assert again["text"] == rows["text"]
    assert np.array_equal(again[5]["image"], rows[5]["image"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], "the folder is empty"),
        (lambda f: (f / "metadata.jsonl").unlink(), "`caption_column` text: not a column"),
        (lambda f: rewrite(f, 2, text=None), "row 2 has no caption in column 'text'"),
        (lambda f: rewrite(f, 2, file_name="absent.png"), "row 2: its image file"),
        (lambda f: rewrite(f, 2, file_name=None), "row 2: has no image (no file_name"),
        (lambda f: rewrite(f, 2, file_name="../a.png"), "metadata.jsonl row 3: its file ../a.png lies outside"),
        (lambda f: rewrite(f, 2, file_name=str(f / "a.png")), "should be a path relative to the metadata's folder"),
        (lambda f: shorten(f / "002_0.png"), "002_0.png): the image does not decode"),
    ],
)
def test_bad_folders_are_named_before_training(tmp_path, spoil, message):
    folder = write_folder(tmp_path / "pictures", 4)
    spoil(folder)
    with pytest.raises(UsageError) as error:
        load(folder)
    assert message in str(error.value)


def shorten(path):
    path.write_bytes(path.read_bytes()[:300])


def rewrite(folder, row, **changes):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[row] |= changes
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_absent_folder_and_wrong_columns_are_named(pictures, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="`image_column` photo: not a column of the dataset, which has image"):
        load(pictures, image_column="photo")
    with pytest.raises(UsageError, match="`image_column` label: holds"):
        load(pictures, image_column="label")
    with pytest.raises(UsageError, match="`caption_column` label: should hold strings"):
        load(pictures, caption_column="label")


def test_a_saved_shard_is_a_dataset_that_keeps_its_ids(pictures, tmp_path):
    load(pictures).select([3, 9]).save_to_disk(tmp_path / "shard")
    rows = load(None, dataset_name=str(tmp_path / "shard"), train_data_dir=None)
    assert rows[SAMPLE_ID] == [3, 9]


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
    rows = load(folder, on_bad_sample="skip")
    samples = read_as(rows, tokenizer)
    with pytest.raises(UsageError, match=r"row 3 \(.*003_0.png\): the image does not decode"):
        decode(rows, "image", 3)
    for workers in (0, 2):
        batch, _ = loaders.StreamLoader(samples, 5, workers, RandomStreams()).next()
        ((row, reason),) = batch.bad
        assert row == 3 and re.match(r"^row 3 \(.*003_0.png\): the image does not decode", reason)
        assert 3 not in batch.samples.tolist() and len(batch) == 5


def test_bad_rows_are_replaced_from_their_shard(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "pictures", 8)
    (folder / "003_0.png").write_bytes(b"not an image")
    rewrite(folder, 5, text=None)
    rows = load(folder, on_bad_sample="skip")
    samples = read_as(rows, tokenizer)
    shard = np.array([1, 3, 5, 6])
    both = [loaders.SeededLoader(samples, 4, workers, [3, 0], shard) for workers in (0, 2)]
    for _ in range(4):
        (batch, _), (other, _) = (loader.next() for loader in both)
        assert set(batch.samples.tolist()) <= {1, 6} and len(batch.samples) == 4
        assert {row for row, _ in batch.bad} == {3, 5}
        assert_same([batch], [other])
    with pytest.raises(UsageError, match="bad, and so were 1,000 others"):
        samples.of_shard(np.array([3, 5])).__getitems__([(3, 0)])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_any_kind_of_image_becomes_rgb(tmp_path, tokenizer, mode):
    folder = write_folder(tmp_path / "pictures", 2)
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("I;16" if mode == "I;16" else mode, (20, 31)).save(folder / f"odd.{suffix}")
    rewrite(folder, 0, file_name=f"odd.{suffix}")
    rows = load(folder)
    samples = read_as(rows, tokenizer)
    assert samples.__getitems__([0, 1]).images.shape == (2, 3, 16, 16)


def test_lists_of_captions_are_drawn_from(pictures, tokenizer, samples):
    rows = load(pictures)
    several = [["a red picture", "a blue picture", "a green picture"]] * len(rows)
    rows = rows.remove_columns("text").add_column("text", several)
    drawn = read_as(rows, tokenizer)
    tokens = drawn.__getitems__([(0, seed) for seed in range(30)]).inputs["input_ids"]
    assert len({tuple(t) for t in tokens.tolist()}) == 3
    assert torch.equal(tokens[:4], drawn.__getitems__([(0, seed) for seed in range(4)]).inputs["input_ids"])


def mitigated(samples, name, probability=1.0):
    changed = copy(samples)
    changed.condition = copy(samples.condition)
    changed.condition.mitigation, changed.condition.probability = name, probability
    return changed


def captions_of(samples, seeds, row=0):
    tokens = samples.__getitems__([(row, seed) for seed in seeds]).inputs["input_ids"]
    return samples.condition.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def test_caption_mitigations_add_repeat_and_replace(samples):
    original = Counter(["a", "red", "picture"])
    repeated = [Counter(caption.split()) - original for caption in captions_of(mitigated(samples, "cwr"), range(40))]
    assert all(sum(added.values()) == 2 and added.keys() <= original.keys() for added in repeated)
    assert len({tuple(sorted(added.elements())) for added in repeated}) > 3
    drawn = mitigated(samples, "rt")
    for seed in range(40):
        words = drawn.condition.draw("a red picture", random.Random(seed)).split()
        assert len(words) == 5 and not original - Counter(words)
    drawn = mitigated(samples, "rc")
    replaced = {drawn.condition.draw("a red picture", random.Random(seed)) for seed in range(40)}
    assert len(replaced) == 40 and all(len(caption.split()) == 4 for caption in replaced)


@pytest.mark.parametrize("name", ["rc", "rt", "cwr"])
def test_a_caption_mitigation_acts_on_its_share_of_visits_and_on_captions_alone(samples, name):
    keys = [(row % 24, 1000 + row) for row in range(600)]
    plain, off, on, again = (
        s.__getitems__(keys) for s in (samples, mitigated(samples, name, 0.0), *[mitigated(samples, name, 0.1)] * 2)
    )
    assert torch.equal(off.inputs["input_ids"], plain.inputs["input_ids"]) and torch.equal(
        on.inputs["input_ids"], again.inputs["input_ids"]
    )
    assert torch.equal(on.images, plain.images)
    share = (on.inputs["input_ids"] != plain.inputs["input_ids"]).any(dim=1).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.04)


def test_without_several_captions_or_a_mitigation_the_process_s_stream_is_left_alone(samples):
    random.seed(4)
    before = random.getstate()
    samples.__getitems__([0, 1, 2])
    assert random.getstate() == before
    drawn = mitigated(samples, "rc", 0.5)
    tokens = [random.seed(4) or drawn.__getitems__(list(range(24))).inputs["input_ids"] for _ in range(2)]
    assert torch.equal(*tokens) and random.getstate() != before


def test_mc_asks_for_several_captions(pictures):
    rows = load(pictures)

    def check(rows, column):
        Captions(column, None, None, mitigation="mc").check(rows)

    with pytest.raises(UsageError, match="`caption_column` text holds strings: name a column of lists"):
        check(rows, "text")
    single = rows.add_column("captions", [[caption] for caption in rows["text"]])
    with pytest.raises(UsageError, match="no row of `caption_column` captions has more than one"):
        check(single, "captions")
    several = rows.add_column("captions", [["a"], *[["a", "b"]] * (len(rows) - 1)])
    check(several, "captions")


def make_loader(samples, workers=0, shard=None, **group):
    shard = np.arange(24) if shard is None else shard
    return loaders.SeededLoader(samples, 5, workers, [3, 0], shard, **group)


def take(loader, batches):
    return [loader.next()[0] for _ in range(batches)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.samples, b.samples) and torch.equal(a.images, b.images)
        assert a.seeds == b.seeds


def test_seeded_batches_do_not_depend_on_workers_or_on_the_stream(samples):
    torch.manual_seed(0)
    first = take(make_loader(samples), 7)
    torch.manual_seed(1)
    assert_same(first, take(make_loader(samples, workers=2), 7))


def test_batches_are_full_and_each_epoch_sees_each_sample_once(samples):
    loader = make_loader(samples)
    seen = torch.cat([batch.samples for batch in take(loader, 24)]).tolist()
    assert len(seen) == 120  # five epochs of 24
    epochs = [seen[start : start + 24] for start in range(0, 120, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_shard_smaller_than_a_batch_fills_it(samples):
    (batch,) = take(make_loader(samples, shard=np.array([3, 8])), 1)
    assert len(batch.samples) == 5 and set(batch.samples.tolist()) == {3, 8}


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
        assert torch.equal(whole.samples, torch.cat([part.samples for part, _ in parts]))
        assert torch.equal(whole.images, torch.cat([part.images for part, _ in parts]))
        assert all(part.share[1] == len(whole.samples) for part, _ in parts)


def test_a_new_shard_starts_a_new_epoch_and_the_same_one_does_not(samples):
    loader = make_loader(samples, shard=np.arange(12))
    take(loader, 1)
    loader.set_samples(np.arange(12))
    assert loader.state_dict() == {"first_epoch": 0, "taken": 1}
    loader.set_samples(np.arange(6, 18))
    assert loader.state_dict() == {"first_epoch": 1, "taken": 0}
    seen = torch.cat([batch.samples for batch in take(loader, 12)])
    assert sorted(seen[:12].tolist()) == list(range(6, 18))


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
    """Its length is the shard's: drawn again for each block, planning an epoch would take quadratic time."""
    shard = np.arange(5000)
    loader = loaders.SeededLoader(None, 2, 0, [0, 0], shard)
    drawn = []
    new = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or new(seed))
    rows = []
    for taken in range(0, len(shard) // 2, loader.BLOCK):
        loader.taken = taken
        rows += [row for batch in loader._plan() for row, _ in batch]
    assert drawn[:-1] == [[0, 0, 0]] and drawn[-1] == [0, 0, 1]
    assert sorted(rows[: len(shard)]) == shard.tolist()
