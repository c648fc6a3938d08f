"""Whatever a training set looks like, training and audit read the same rows, captions and pixels of it."""

import io
import json
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from ietagc_diffusers import UsageError
from ietagc_diffusers.data import Captions, DataSettings, decode, load_training_rows
from ietagc_diffusers.data.decoder import BadImage, damage, to_rgb
from ietagc_diffusers.data.listing import is_outside, split_of, split_of_file
from ietagc_diffusers.eval.image_sets import training_images, training_settings


def picture(seed=0, mode="RGB", size=(6, 5)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 4), np.uint8)).convert(mode)


def encoded(seed=0):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


def put(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / name, "png")
    return folder


def read(source, **options):
    """The captions and the images of a set, once training and audit have been seen to agree on them."""
    settings = training_settings(source, seed=1, on_bad_sample="skip", **options)
    rows = load_training_rows(settings, Captions("text", None, None) if "text" in _columns(settings) else None)
    images = training_images(settings)
    assert len(images) == len(rows) and [row["sample_id"] for row in images.rows] == list(rows["sample_id"])
    captions = list(rows["text"]) if "text" in rows.column_names else [None] * len(rows)
    assert images.texts == [one[0] if isinstance(one, list) else one for one in captions]
    for row in range(len(rows)):
        try:
            trained = decode(rows, "image", row, settings.alpha)
        except UsageError:
            with pytest.raises(BadImage):
                images.image(row)
        else:
            assert trained.mode == "RGB" and images.image(row).size == trained.size
            assert images.image(row).tobytes() == trained.tobytes()
    return captions, images


def _columns(settings):
    return load_training_rows(settings).column_names


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [("b.png", "1984"), ("a.png", "None"), ("b.png", "2024-01-02")]
JSON_ROWS = [{"file_name": name, "text": text} for name, text in ROWS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", lines(*JSON_ROWS)),
        ("metadata.jsonl", "\n" + lines(*JSON_ROWS).replace("\n", "\r\n\r\n")),
        ("metadata.jsonl", lines(*JSON_ROWS).encode("utf-8-sig")),
        ("metadata.jsonl", lines(*JSON_ROWS).encode("utf-16")),
        ("metadata.jsonl", json.dumps(JSON_ROWS, indent=1)),
        ("metadata.jsonl", lines(*JSON_ROWS).replace('"1984"', "1984")),
        ("metadata.json", json.dumps(JSON_ROWS)),
        ("Metadata.JSONL", lines(*JSON_ROWS)),
        ("captions.jsonl", lines(*JSON_ROWS)),
        ("metadata.csv", "file_name,text\nb.png,1984\na.png,None\nb.png,2024-01-02\n"),
        ("metadata.csv", "text;file_name\n1984;b.png\n\nNone;a.png\n2024-01-02;b.png\n".encode("utf-16")),
        ("metadata.tsv", "file_name\ttext\nb.png\t1984\na.png\tNone\nb.png\t2024-01-02\n"),
    ],
)
def test_metadata_is_read_as_it_is_written(tmp_path, name, content):
    put(tmp_path, "a.png", "b.png", "z.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    captions, images = read(tmp_path)
    assert captions == [text for _, text in ROWS] and images.names == [name for name, _ in ROWS]
    assert ["z.png", "has no row in the metadata"] in images.skipped


def test_captions_by_name_and_parquet_metadata(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "captions.json").write_text(json.dumps({"b.png": "one", "a.png": ["two", "three"]}))
    assert read(tmp_path)[0] == [["one"], ["two", "three"]]
    pq.write_table(pa.table({"file_name": ["b.png", "a.png"], "text": ["x", None]}), tmp_path / "metadata.parquet")
    assert read(tmp_path)[0] == ["x", None]  # the name that `datasets` knows comes first


def test_rows_name_files_in_folders_and_in_any_spelling(tmp_path):
    odd = ["sub/a b.png", "sub/100%.png", "sub/[1]*?.png", "sub/#é.png", "deep/er/X.PNG", "deep/more.png"]
    put(tmp_path, *odd)
    names = ["sub\\a b.png", "./sub/100%.png", "sub/x/../[1]*?.png", "sub/#e\u0301.png", "deep/er/X.PNG"]
    (tmp_path / "metadata.jsonl").write_text(lines(*({"file_name": name, "text": name} for name in names)))
    (tmp_path / "deep" / "metadata.csv").write_text("file_name,text\nmore.png,deep\nmore.png,\n")
    captions, images = read(tmp_path)
    assert images.names == [*odd[:5], odd[5], odd[5]] and captions == [*names, "deep", None]
    assert [row["sample_id"] for row in images.rows] == list(range(7))


@pytest.mark.parametrize("names", [["b/x.png", "a.b/x.png", "a/y.JPG", "a/.z.png", "__a/z.png"], ["b.png", "a/b.png"]])
def test_folders_without_metadata_have_the_order_and_the_labels_of_datasets(tmp_path, names):
    folder = put(tmp_path / "set", *names)
    theirs = load_dataset("imagefolder", data_files={"train": f"{folder}/**"}, cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    rows = load_training_rows(training_settings(folder))
    assert ("label" in theirs.column_names) == (len(names) > 2)
    for column in theirs.column_names:
        assert rows.features[column] == theirs.features[column] and list(rows[column]) == list(theirs[column])


def test_links_hidden_files_and_names_that_are_no_text(tmp_path, caplog):
    outside = put(tmp_path / "elsewhere", "x.png")
    folder = put(tmp_path / "set", "a.png", ".hidden.png", ".cache/b.png", "__MACOSX/c.png", "B.JPEG")
    (folder / "linked").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded())
    _, images = read(folder)
    assert images.names == ["B.JPEG", "a.png", "linked/x.png"]
    assert {name for name, _ in images.skipped} == {"gone.png", "caf\\udce9.png"}
    assert "2 files (caf\\udce9.png, gone.png) left out" in caplog.text


def test_text_files_beside_images_are_captions(tmp_path, caplog):
    put(tmp_path, "10_cat/a.png", "10_cat/b.png", "10_cat/c.png", "10_cat/d.png")
    for name, content in {"a": b"\xef\xbb\xbfone,\r\ntwo\r\n", "b": b" \n", "c": b"three"}.items():
        (tmp_path / "10_cat" / f"{name}.{'caption' if name == 'c' else 'txt'}").write_bytes(content)
    assert read(tmp_path)[0] == ["one,\ntwo", None, "three", None]
    assert "repeats in the names of folders (10_cat) are not applied" in caplog.text
    assert read(tmp_path, caption_lines="first")[0] == ["one,", None, "three", None]
    assert read(tmp_path, caption_lines="each")[0] == [["one,", "two"], None, ["three"], None]
    with pytest.raises(UsageError, match=r"row 1 has no caption in column 'text' \(10_cat/b.png\)"):
        load_training_rows(training_settings(tmp_path), Captions("text", None, None))


@pytest.mark.parametrize("others", [["test/c.png"], ["val2017/c.png", "Test_Set/d.png"], ["a/validation/c.png"]])
@pytest.mark.parametrize("trained", [["train/a.png", "train/b.png"], ["a.png", "cats/b.png"]])
def test_held_out_folders_are_kept_apart(tmp_path, caplog, others, trained):
    put(tmp_path, *trained, *others)
    assert read(tmp_path)[1].names == trained
    assert "kept apart" in caplog.text
    split = split_of(others[0])
    assert read(tmp_path, dataset_split=split)[1].names == others[:1]
    every = [{"file_name": name, "text": name} for name in (*others, *trained)]
    (tmp_path / "metadata.jsonl").write_text(lines(*every, {"file_name": "gone.png", "text": "x"}))
    captions, images = read(tmp_path)
    assert captions == [*trained, "x"] and images.rows[0]["sample_id"] == len(others)


def test_a_set_without_its_split_is_an_error_that_names_those_there_are(tmp_path):
    put(tmp_path, "test/a.png")
    with pytest.raises(UsageError, match="no images to train on, only test"):
        load_training_rows(training_settings(tmp_path))
    with pytest.raises(UsageError, match=r"`dataset_split` validation: no folder .*its splits: test"):
        load_training_rows(training_settings(tmp_path, dataset_split="validation"))


def test_what_a_path_says_of_its_split():
    for name in ("train/a.png", "x/training_set/a.png", "train2017/a.png", "Images-Train/a/b.png"):
        assert split_of(name) == "train"
    for name in ("a.png", "attest/a.png", "10_test/a.png", "testament/a.png", "evaluations of art/a.png"):
        assert split_of(name) is None
    assert (
        split_of_file("data/test-00000-of-00002.parquet") == "test" and split_of_file("my-val.parquet") == "validation"
    )
    assert split_of_file("contest.parquet") is None and split_of_file("0000.parquet") is None


RAW = [encoded(0), encoded(1), encoded(2)]
TEXTS = ["a", "1984", None]
STRUCT = [{"bytes": raw, "path": None} for raw in RAW]
IMAGES = {
    "image": pa.array(STRUCT, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    "struct": pa.array(STRUCT, pa.struct([("bytes", pa.large_binary()), ("path", pa.null())])),
    "bytes only": pa.array([{"bytes": raw} for raw in RAW]),
    "binary": pa.array(RAW),
    "large binary": pa.array(RAW, pa.large_binary()),
    "binary view": pa.array(RAW, pa.binary_view()),
    "numbers": pa.array([list(raw) for raw in RAW], pa.list_(pa.uint8())),
    "large numbers": pa.array([list(raw) for raw in RAW], pa.large_list(pa.uint8())),
    "paths": pa.array(["p/0.png", "p/1.png", "p/2.png"]),
    "dictionary": pa.array(["p/0.png", "p/1.png", "p/2.png"]).dictionary_encode(),
    "path only": pa.array([{"path": f"p/{n}.png"} for n in range(3)]),
}
LISTS = [["a", "b"], ["1984", "c"], None]
CAPTIONS = {
    "string": pa.array(TEXTS),
    "large": pa.array(TEXTS, pa.large_string()),
    "view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "binary": pa.array([b"a", b"1984", None]),
    "list": pa.array(LISTS),
    "large list": pa.array(LISTS, pa.large_list(pa.large_string())),
    "fixed list": pa.array(LISTS, pa.list_(pa.string(), 2)),
    "list of views": pa.array(LISTS, pa.list_(pa.string_view())),
    "list of bytes": pa.array([[b"a", b"b"], [b"1984", b"c"], None]),
}


@pytest.mark.parametrize(
    ("images", "texts"), [*((kind, "string") for kind in IMAGES), *(("image", kind) for kind in CAPTIONS)]
)
def test_every_type_in_which_parquet_stores_images_and_texts(tmp_path, images, texts, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "set[1]"
    (data / "p").mkdir(parents=True)
    if "path" in images or images == "dictionary":
        for number, raw in enumerate(RAW):
            (data / "p" / f"{number}.data").write_bytes(raw)
    column = IMAGES[images]
    if "path" in images or images == "dictionary":
        values = [value["path"] if isinstance(value, dict) else value for value in column.to_pylist()]
        values = [value.replace(".png", ".data") for value in values]
        kind = column.type
        column = pa.array([{"path": v} for v in values] if images == "path only" else values)
        column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column
    pq.write_table(pa.table({"image": column, "text": CAPTIONS[texts]}), data / "train-0.parquet")
    pq.write_table(pa.table({"image": IMAGES["binary"], "text": TEXTS}), data / "test-0.parquet")
    captions, found = read(data, cache_dir=str(tmp_path / "cache"))
    assert captions == (LISTS if "list" in texts else TEXTS)
    assert [found.encoded(row) for row in range(3)] == RAW


def test_a_changed_parquet_file_is_read_again_whatever_its_time(tmp_path):
    path = tmp_path / "set" / "0.parquet"
    path.parent.mkdir()
    cache = {"cache_dir": str(tmp_path / "cache")}
    pq.write_table(pa.table({"image": RAW, "text": ["old", "a", "b"]}), path)
    time = os.stat(path).st_mtime_ns
    assert read(path.parent, **cache)[0][0] == "old"
    pq.write_table(pa.table({"image": RAW, "text": ["new", "a", "b"]}), path)
    os.utime(path, ns=(time, time))
    assert read(path.parent, **cache)[0][0] == "new"


def test_splits_of_a_saved_set(tmp_path):
    rows = [{"image": {"bytes": raw, "path": None}, "text": text} for raw, text in zip(RAW, "abc", strict=True)]
    saved = Dataset.from_list(rows, features=Features({"image": ImageFeature(), "text": Value("string")}))
    DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(str(tmp_path / "set"))
    assert read(tmp_path / "set")[0] == ["a", "b", "c"]
    assert read(tmp_path / "set", dataset_split="test")[0] == ["c"]
    with pytest.raises(UsageError, match="has no 'x' split, only train, test"):
        training_images(training_settings(tmp_path / "set", dataset_split="x"))


def test_some_rows_of_a_set_keep_their_names_and_numbers(tmp_path):
    put(tmp_path, *(f"{n}.png" for n in range(9)))
    (tmp_path / "metadata.jsonl").write_text(lines(*({"file_name": f"{n}.png", "text": str(n)} for n in range(9))))
    captions, images = read(tmp_path, max_train_samples=4)
    assert len(set(captions)) == 4 and [f"{text}.png" for text in captions] == images.names
    assert [row["sample_id"] for row in images.rows] == [int(text) for text in captions]


@pytest.mark.parametrize("alpha", ["white", "official"])
def test_images_of_every_mode_and_size_are_one_picture_for_both(tmp_path, alpha):
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"):
        image = picture(1).convert("L").convert(mode) if mode in ("I;16", "I", "F", "1") else None
        image = image or (picture(1, "RGBA").quantize() if mode == "PA" else _of(mode))
        image.save(tmp_path / f"{mode.replace(';', '_')}.tiff" if mode != "PA" else tmp_path / "PA.png")
    picture(2).save(tmp_path / "keyed.png", transparency=(0, 0, 0))
    picture(2, size=(1, 1)).save(tmp_path / "dot.png")
    picture(2, size=(1, 90)).save(tmp_path / "strip.png")
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture(3).save(tmp_path / f"turned{turn}.jpg", exif=exif)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    _, images = read(tmp_path, alpha=alpha)
    assert len(images) == 13 + 3 + 8 + 1


def _of(mode):
    if mode == "LAB":
        return Image.merge("LAB", picture(1).split())
    return picture(1, "RGBA").convert(mode)


def test_transparent_parts_are_white_or_the_colour_under_them():
    clear = Image.new("RGBA", (2, 2), (9, 8, 7, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(clear, "official").getpixel((0, 0)) == (9, 8, 7)
    for image in (picture(), picture(0, "L"), picture(0, "CMYK")):
        assert to_rgb(image).tobytes() == to_rgb(image, "official").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp"])
def test_a_cut_file_shows_at_its_ends_and_a_whole_one_does_not(kind):
    buffer = io.BytesIO()
    picture(0, size=(40, 40)).save(buffer, kind)
    whole = buffer.getvalue()

    def fears(content):
        return damage(content[:32], content[-64:], len(content))

    assert fears(whole) is False and fears(whole[: len(whole) // 2]) is True
    assert damage(b"II*\0" + bytes(28), bytes(64), 100) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.jsonl",
            '{"filename": "a.png", "text": "x"}',
            "has no file_name, only filename, text: rename filename",
        ),
        ("metadata.csv", "a.png,a cat\n", "metadata.csv is not read as metadata: it has no rows"),
        ("metadata.csv", "a.png,a cat\nb.png,b\n", "has no file_name.*its first line should name the columns"),
        ("metadata.csv", "file_name,text\na.png,a cat, sitting\n", "row 1 has more fields"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png"}\n{"file_name":}',
            "metadata.jsonl does not parse: line 2 is not JSON",
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}', "not a column .*; is it caption?"),
        ("metadata.txt", "x", "not a column .*metadata.txt is not read as metadata: rename it"),
        ("meta.jsonl", '{"file_name": "a.png"}', "meta.jsonl is not read as metadata: rename it"),
        ("captions.csv", "url,title\nx,y\n", "captions.csv is not read as metadata: .*has no file_name"),
        ("notes.md", "x", "captions come from a metadata.jsonl in the folder, or from a .txt file"),
    ],
)
def test_near_misses_say_what_would_do(tmp_path, name, content, message):
    put(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_training_rows(DataSettings(train_data_dir=str(tmp_path)), Captions("text", None, None))


def test_names_that_lead_out_of_the_folder():
    for name in ("../a.png", "/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "file:///a.png", "https://x/a.png"):
        assert is_outside(name)
    assert not any(map(is_outside, ("a.png", "x/../a.png", "..a.png", "a:b.png")))


def test_archives_and_images_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "set.zip").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no images in this folder, but set.zip: unpack it"):
        load_training_rows(DataSettings(train_data_dir=str(tmp_path)))
    put(tmp_path, "a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        load_training_rows(DataSettings(train_data_dir=str(tmp_path)))
    assert "1 file (b.heic) of a format that is not read" in caplog.text
