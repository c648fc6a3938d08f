"""Prepared sets: what goes in comes out, whatever the source and its order, and however often it is killed."""

import json
import multiprocessing
import os
import re
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sources
from conftest import train_flags, train_here
from sources import KINDS, files_of, picture, read_rows, some_items, tar_files, write_tar

from ietagc_diffusers.cli import main
from ietagc_diffusers.cli import prepare as command
from ietagc_diffusers.data.settings import CAPTION_LINES
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.image_sets import load_images, load_training_set
from ietagc_diffusers.prepare import FORMATS, Options, Settings, prepare, shards
from ietagc_diffusers.prepare.items import DUPLICATE, NO_CAPTION, SMALL, Item
from ietagc_diffusers.prepare.run import _write
from ietagc_diffusers.prepare.state import State

FORK = multiprocessing.get_context("fork")  # no models are used: a fork is at once where another process starts
SMALL_FILES = Settings(shard_size=0.002, test_share=0.4)  # MB: a few pictures each


def prepared(source, output, settings=None, **options):
    return prepare(source, output, Options(**options), settings, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_captions_come_out_as_they_went_in(tmp_path, kind):
    write, found, lines = KINDS[kind]
    items = some_items(5, several=True)
    report = prepared(write(tmp_path / "source", items), tmp_path / "out", caption_lines=lines)
    rows = read_rows(tmp_path / "out")
    assert report["settings"]["format"] == found
    assert [(row["image"]["bytes"], row["captions"]) for row in rows] == [(image, texts) for _, image, texts in items]
    assert [row["text"] for row in rows] == [texts[0] for _, _, texts in items]
    assert len({row["sample_id"] for row in rows}) == 5 and all(row["sample_id"] >= 0 for row in rows)
    assert [row["image"]["path"].startswith(key) for row, (key, _, _) in zip(rows, items, strict=True)] == [True] * 5
    assert not set(report["left_out"]) - {"a pickle, which could run code, is never read"}
    assert ("a pickle" in str(report["left_out"])) == (kind == "dcr")


def test_evaluation_and_datasets_read_the_set_as_it_is(tmp_path):
    import datasets

    prepared(sources.folder(tmp_path / "source", some_items(20)), tmp_path / "out", SMALL_FILES)
    rows = read_rows(tmp_path / "out")
    kept = {split: [row["image"]["bytes"] for row in rows if row["split"] == split] for split in ("train", "test")}
    assert kept["train"] and kept["test"] and len(rows) == 20
    training, heldout = load_training_set(tmp_path / "out"), load_images(tmp_path / "out" / "test", "heldout")
    for images, split in ((training, "train"), (heldout, "test")):
        assert [images.encoded(index) for index in range(len(images))] == kept[split]
        assert images.texts == [row["text"] for row in rows if row["split"] == split]
    assert [row["sample_id"] for row in training.rows] == [r["sample_id"] for r in rows if r["split"] == "train"]
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(loaded[split]) for split in loaded} == {split: len(kept[split]) for split in kept}
    assert isinstance(loaded["train"].features["image"], datasets.Image)


def test_ids_and_splits_do_not_depend_on_the_files_of_the_source(tmp_path):
    items = some_items(24)
    nameless = [(None, image, captions) for _, image, captions in [*items, *items[:3]]]  # three of them twice

    def of_tars(name, parts):
        for number, part in enumerate(parts):
            write_tar(tmp_path / name / f"{number}.tar", tar_files(part))
        return tmp_path / name

    def of_parquet(name, rows, items):
        (tmp_path / name).mkdir()
        table = pa.table({"image": [image for _, image, _ in items], "captions": [texts for _, _, texts in items]})
        pq.write_table(table, tmp_path / name / "a.parquet", row_group_size=rows)
        return tmp_path / name

    for one, other in (
        (of_tars("one", [items]), of_tars("several", [items[16:], items[:7], items[7:16]])),
        (of_parquet("forward", 30, nameless), of_parquet("backward", 4, nameless[::-1])),
    ):
        found = []
        for source in (one, other):
            prepared(source, source.with_suffix(".out"), SMALL_FILES)
            rows = read_rows(source.with_suffix(".out"))
            found.append({row.pop("sample_id"): row for row in rows})
            assert len(found[-1]) == len(rows)
        assert found[0] == found[1] and len(found[0]) in (24, 27)


def test_a_prepared_set_prepared_again_is_the_same(tmp_path):
    prepared(sources.folder(tmp_path / "source", some_items(6, several=True)), tmp_path / "once")
    prepared(tmp_path / "once", tmp_path / "twice")
    assert files_of(tmp_path / "once" / "train") == files_of(tmp_path / "twice" / "train")


def test_no_copy_of_a_test_image_is_trained_on(tmp_path):
    items = [
        (f"{number}-{kind}", picture(number, kind=kind), [f"{kind} {number}"])
        for kind in ("PNG", "BMP", "TIFF")
        for number in range(60)
    ]
    source = write_tar(tmp_path / "a.tar", tar_files(items))
    prepared(source, tmp_path / "out", Settings(test_share=0.3))
    prepared(source, tmp_path / "other", Settings(test_share=0.3, seed=1))
    rows = read_rows(tmp_path / "out")
    number_of = {
        split: {row["text"].split()[1] for row in rows if row["split"] == split} for split in ("train", "test")
    }
    assert not number_of["train"] & number_of["test"] and len(rows) == 180
    assert 6 <= len(number_of["test"]) <= 30  # of 60, 18 are expected
    assert {row["sample_id"]: row["split"] for row in rows} != {
        row["sample_id"]: row["split"] for row in read_rows(tmp_path / "other")
    }


def test_repeats_of_kohya_are_a_column_and_no_more_rows(tmp_path):
    source = sources.kohya(tmp_path / "source", some_items(3))
    (source / "3_cat").mkdir()
    (source / "3_cat" / "cat.png").write_bytes(picture(99))
    (source / "3_cat" / "cat.caption").write_text("a cat")
    prepared(source, tmp_path / "out")
    assert [(row["text"], row["repeats"]) for row in read_rows(tmp_path / "out")] == [
        *((f"picture {n}, caption 0", 10) for n in range(3)),
        ("a cat", 3),
    ]


def test_what_is_left_out_is_counted_and_named(tmp_path):
    files = [
        ("small.png", picture(1, size=5)), ("small.txt", b"small"),
        ("good.png", picture(2)), ("good.txt", b"good"), ("good.cls", b"7"),
        ("mute.png", picture(3)), ("mute.txt", b" \n"),
        ("good.png", picture(2)), ("good.txt", b"good"),
        ("good.png", picture(4)), ("good.txt", b"good"),
    ]  # fmt: skip
    report = prepared(write_tar(tmp_path / "a.tar", files), tmp_path / "out", Settings(min_side=8))
    assert {why: (about["count"], about["first"]) for why, about in report["left_out"].items()} == {
        SMALL: (1, ["small: 6 x 5"]),
        NO_CAPTION: (1, ["mute"]),
        DUPLICATE: (1, ["good"]),
    }
    rows = read_rows(tmp_path / "out")
    assert [(row["image"]["bytes"], row["label"]) for row in rows] == [(picture(2), 7), (picture(4), None)]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    page = (tmp_path / "out" / "report.md").read_text()
    assert f"| 1 | {NO_CAPTION} | mute |" in page and "| train | 2 | 1 |" in page
    kept = prepared(tmp_path / "a.tar", tmp_path / "all", Settings(without_captions=True))
    assert kept["rows"] == {"train": 4} and NO_CAPTION not in kept["left_out"]


def test_the_main_caption_is_the_one_that_is_asked_for(tmp_path):
    source = sources.dcr(tmp_path / "source", [("a", picture(1), ["og", "blip", "x"]), ("b", picture(2), ["one"])])
    prepared(source, tmp_path / "out", Settings(main_caption=1))
    assert [row["text"] for row in read_rows(tmp_path / "out")] == ["blip", "one"]


def test_captions_of_equal_names_go_by_their_folders(tmp_path):
    source = tmp_path / "source"
    for number, name in enumerate(("a", "b", "c")):
        sources.write_images(source / name, [("0", picture(number), [])])
    captions = {f"/else/{name}/0.png": [f"of {name}"] for name in "ab"} | {"/else/d/1.png": ["of none"]}
    (source / "captions.json").write_text(json.dumps(captions))
    report = prepared(source, tmp_path / "out", captions=str(source / "captions.json"))
    assert [row["text"] for row in read_rows(tmp_path / "out")] == ["of a", "of b"]
    assert report["left_out"][NO_CAPTION]["first"] == ["c/0.png"]  # a and b fit it equally well
    assert report["left_out"]["there is no image"]["first"] == ["1.png"]


def _killed(source, output, event, number):
    """In a process of its own: prepare, and be killed at an event, the time before or after that it happens."""
    count = 0

    def then_die(act, before):
        def acted(*args, **options):
            nonlocal count
            count += 1
            if count == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = act(*args, **options)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return acted

    place, name, before = event
    owner = {"shards": shards.Shards, "state": State, "os": os}[place]
    setattr(owner, name, then_die(getattr(owner, name), before))
    prepared(source, output, SMALL_FILES)


def test_a_killed_preparation_goes_on_as_if_nothing_had_been(tmp_path):
    items = some_items(30)
    for number in range(3):
        write_tar(tmp_path / "source" / f"{number}.tar", tar_files(items[10 * number : 10 * number + 10]))
    whole = prepared(tmp_path / "source", tmp_path / "whole", SMALL_FILES)
    assert whole["files"]["train"] >= 6
    output, kept = tmp_path / "out", set()
    events = [(("shards", "add", True), 2), (("os", "replace", False), 3), (("state", "commit", True), 2),
              (("state", "commit", False), 2)]  # fmt: skip
    for event, number in events:
        process = FORK.Process(target=_killed, args=(tmp_path / "source", output, event, number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = {path: path.stat().st_ino for path in output.rglob("0*.parquet")}
        assert set(now) >= kept
        kept = set(now)
    finished = {path: path.stat().st_ino for path in sorted(kept)[:1]}
    assert prepared(tmp_path / "source", output, SMALL_FILES) == whole
    assert files_of(output) == files_of(tmp_path / "whole")
    assert all(path.stat().st_ino == inode for path, inode in finished.items())  # kept, not written again


class Synthetic:
    """A source of many small items in one unit, none of which is held."""

    columns, units, total, mark = {}, 1, None, "synthetic"

    def __init__(self, number):
        self.number = number
        self.image = picture(0)

    def items(self, unit):
        for number in range(self.number):
            yield Item(str(number), self.image + number.to_bytes(10_000), (f"caption {number}",))


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_BYTES", 50_000)
    monkeypatch.setattr("ietagc_diffusers.prepare.run.AHEAD_BYTES", 50_000)

    def peak(number):
        output = tmp_path / str(number)
        state = State(output / ".prepare" / "state.sqlite", {}, output)
        usual, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
        pa.set_memory_pool(counted)
        tracemalloc.start()
        try:
            _write(Synthetic(number), state, Settings(shard_size=2), output, progress=False)
            found = tracemalloc.get_traced_memory()[1] + counted.max_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(usual)
        state.close()
        assert sum(pq.read_metadata(path).num_rows for path in (output / "train").iterdir()) == number
        return found

    peak(20)  # what is imported on the way
    assert peak(500) < 1.5 * peak(50) < 1e6  # of 5 MB of images, and of 0.5 MB


def test_a_complete_set_is_left_as_it_is_and_another_one_is_not_mixed_in(tmp_path):
    source = sources.folder(tmp_path / "source", some_items(4))
    report = prepared(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepared(source, tmp_path / "out") == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(UsageError, match=r"`output` .*`min_side` was 1, and is 5 now"):
        prepared(source, tmp_path / "out", Settings(min_side=5))
    sources.folder(source, some_items(5))
    with pytest.raises(UsageError, match=r"`output` .*the source is another one or has changed"):
        prepared(source, tmp_path / "out")
    with pytest.raises(UsageError, match=r"`output` .*is not empty"):
        prepared(source, tmp_path)
    with pytest.raises(UsageError, match=r"`output` .*lies in the source"):
        prepared(source, source / "out")


def test_two_preparations_do_not_write_into_one_folder(tmp_path):
    source = sources.folder(tmp_path / "source", some_items(2))
    prepared(source, tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    first = State(tmp_path / "out" / ".prepare" / "state.sqlite", {}, "")
    with pytest.raises(UsageError, match=r"`output` .*another run may be writing"):
        prepared(source, tmp_path / "out")
    first.close()


def test_a_full_disk_is_told_and_the_same_command_continues(tmp_path, monkeypatch, capsys):
    words = [
        "prepare",
        str(write_tar(tmp_path / "a.tar", tar_files(some_items(20)))),
        "--output",
        str(tmp_path / "out"),
    ]
    words.append("--shard_size=0.002")
    replace, room = os.replace, iter([True, True])

    def replace_or_fail(*names):
        if not next(room, False):
            raise OSError(28, "No space left on device")
        replace(*names)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_or_fail)
        assert main(words) == 1
    assert "continues from here" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "train").iterdir())) == 2
    assert main(words) == 0 and len(read_rows(tmp_path / "out")) == 20


def test_wrong_use_is_told_with_the_flag(tmp_path, capsys):
    source = str(sources.folder(tmp_path / "source", some_items(2)))
    for words, message in (
        ([str(tmp_path / "none")], "`source` .*no such folder"),
        ([source, "--test_share", "1"], "--test_share 1.0: must be"),
        ([source, "--captions", source], "--captions .*no such file"),
        ([source, "--caption_column", "x"], "--caption_column x: not a column of the metadata"),
        ([source, "--public"], "--public: is for --push_to_hub"),
        ([source, "--push_to_hub", "my set"], "--push_to_hub my set: is no name"),
    ):
        assert main(["prepare", *words, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert not (tmp_path / "out").exists()
    assert list(FORMATS) == command.FORMATS and list(CAPTION_LINES) == command.CAPTION_LINES


def test_training_starts_from_a_prepared_set(tmp_path, base):
    items = [(key, image, ["a red picture", "a blue picture"]) for key, image, _ in some_items(12)]
    assert main(["prepare", str(sources.dcr(tmp_path / "source", items)), "--output", str(tmp_path / "set")]) == 0
    flags = train_flags(base, tmp_path / "set", "--caption_column=captions", "--caption_mitigation=mc")
    run = train_here([*flags, "--max_train_steps=2", "--num_shards=2"], tmp_path / "run")
    counts = pq.read_table(run / "ietagc" / "skip_counts.parquet")["sample_id"].to_numpy()
    assert np.isin(counts, [row["sample_id"] for row in read_rows(tmp_path / "set")]).all() and len(counts) == 12
    assert Path(run / "model_index.json").is_file()
