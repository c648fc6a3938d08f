"""Whatever lies in a folder: images of every kind are read right, the rest is counted and named, nothing is lost."""

import io
import json
import sqlite3

import numpy as np
import pytest
import torch
from conftest import write_folder
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.features import FeatureCache, Pixels, embed
from ietagc_diffusers.eval.image_sets import load_images, to_rgb, to_tensor, unusable
from ietagc_diffusers.eval.prompts import caption_prompts, choose, read_labels, read_prompts
from ietagc_diffusers.sscd import Descriptor, pixel_descriptor


def noise(seed=0, size=(20, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_grey_transparent_deep_and_turned_images_become_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    assert abs(np.asarray(to_rgb(Image.fromarray(ramp.astype(np.uint16)))).mean() - 127.5) < 1
    grey = noise().convert("L")
    assert np.array_equal(np.asarray(to_rgb(grey)), np.stack([np.asarray(grey)] * 3, 2))
    clear = noise().convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(to_rgb(clear)) == 255).all()
    palette = noise().convert("P")
    assert to_rgb(palette).mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6
    noise().save(tmp_path / "turned.jpg", exif=turned)
    assert to_rgb(Image.open(tmp_path / "turned.jpg")).size == (20, 30)


@pytest.fixture
def mixed(tmp_path):
    """A folder of good images of several kinds among all sorts of bad ones."""
    folder = tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    noise(1).save(folder / "a.png")
    noise(2, (31, 17)).convert("L").save(folder / "deeper" / "b.jpg")
    noise(3).save(folder / "c.webp")
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "no.png").write_bytes(b"")
    (folder / "text.jpeg").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    Image.new("RGB", (2000, 3)).save(folder / "strip.png")
    (folder / ".hidden.png").write_text("hello")
    rows = [{"file_name": "a.png", "text": "an a"}, {"file_name": "gone.png", "text": "x"}, {"text": "no name"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_mixed_folder_is_read_and_what_is_bad_is_named(mixed):
    images = load_images(mixed, "train")
    made = embed(images, {"pixel": pixel_descriptor()}, batch_size=2)
    assert [images.names[i] for i in made.kept] == ["a.png", "c.webp", "deeper/b.jpg"]
    assert made.features["pixel"].shape == (3, 768)
    bad = dict(made.skipped)
    assert bad.keys() == {
        "cut.png", "no.png", "text.jpeg", "notes.txt", "strip.png", "metadata.jsonl row 2", "metadata.jsonl row 3",
    }  # fmt: skip
    assert "gone.png does not exist" in bad["metadata.jsonl row 2"] and "file_name" in bad["metadata.jsonl row 3"]
    assert "is not an image" in bad["notes.txt"] and "sides differ" in bad["strip.png"]
    assert images.texts[0] == "an a" and images.captions() == [(0, "an a")]


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_should_have_been_an_image_is_told_from_notes(mixed):
    (mixed / "photo.heic").write_text("hello")
    (mixed / "metadata.csv").write_text("file_name,text\nc.webp,other\n")
    images = load_images(mixed, "train")
    assert {"notes.txt", "metadata.csv", "photo.heic"} <= dict(images.skipped).keys()
    assert [name for name, _ in unusable(images.skipped)] == [
        "metadata.jsonl row 2",
        "metadata.jsonl row 3",
        "photo.heic",
    ]
    assert images.texts == ["an a", *[None] * (len(images) - 1)]  # one metadata file a folder


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".jp2", ".ppm"])
def test_whatever_pil_opens_is_an_image_and_no_video_or_document_is(tmp_path, suffix):
    noise().save(tmp_path / f"a{suffix}")
    for other in (".pdf", ".eps", ".mpg", ".h5", ".wmf"):
        (tmp_path / f"b{other}").write_text("no image")
    images = load_images(tmp_path, "train")
    assert images.names == [f"a{suffix}"] and images.image(0).size == (30, 20) and not unusable(images.skipped)


@pytest.mark.parametrize("name", ["a\u00a0b", "at 9.41\u202fAM", "\u3000", "👩\u200d🎨"])
def test_every_name_that_is_text_is_read(tmp_path, name):
    noise().save(tmp_path / f"{name}.png")
    assert load_images(tmp_path, "train").names == [f"{name}.png"]


def test_an_image_is_one_file_however_many_rows_name_it(tmp_path):
    folder = write_folder(tmp_path / "images", 3)
    names = ["001_0.png", "000_0.png", "./001_0.png"]
    write_rows(folder, [{"file_name": name, "text": f"caption {n}"} for n, name in enumerate(names)])
    images = load_images(folder, "train")
    files = images.files()
    assert files.names == ["001_0.png", "000_0.png", "002_0.png"] and files.texts[0] == "caption 0"
    assert [row.get("sample_id") for row in files.rows] == [0, 1, None]
    assert [(p.text, p.sample_id) for p in caption_prompts(images, "train")] == [(f"caption {n}", n) for n in range(3)]


def test_odd_rows_are_named_and_odd_captions_can_be_written(tmp_path):
    folder = write_folder(tmp_path / "images", 2)
    noise().save(tmp_path / "outside.png")
    odd = ["x" * 5000 + ".png", "../outside.png", str(tmp_path / "outside.png"), "\ud800.png", "a\0.png"]
    write_rows(folder, [{"file_name": "000_0.png", "text": "half \ud83d"}, *({"file_name": name} for name in odd)])
    images = load_images(folder, "train")
    assert images.names == ["000_0.png", "001_0.png"] and images.texts[0] == "half ?"
    assert len(images.skipped) == len(odd)
    assert all(len(why) < 300 and why.encode() for _, why in images.skipped)


def test_a_row_may_name_a_file_of_any_suffix_once(tmp_path):
    folder = write_folder(tmp_path / "images", 1)
    noise().save(folder / "good.data", format="png")
    (folder / "notes.txt").write_text("no image")
    write_rows(folder, [{"file_name": name} for name in ("good.data", "notes.txt")])
    made = embed(load_images(folder, "train"), {"pixel": pixel_descriptor()})
    assert len(made.kept) == 2 and [name for name, _ in made.skipped] == ["notes.txt"]


def test_images_of_one_pixel_are_skipped_and_named(tmp_path):
    folder = write_folder(tmp_path / "images", 1)
    Image.new("RGB", (1, 5)).save(folder / "dot.png")
    made = embed(load_images(folder, "train"), {"pixel": pixel_descriptor()})
    assert len(made.kept) == 1 and made.skipped == [["dot.png", "is 1 x 5: too small to compare"]]


def test_rows_are_numbered_as_in_the_training_set(tmp_path):
    folder = write_folder(tmp_path / "images", 5)
    names = ["003_0.png", "001_0.png", "003_0.png", "000_0.png"]
    rows = [{"file_name": name, "text": f"row {number}"} for number, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = load_images(folder, "train")
    trained = load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert images.texts[:4] == trained["text"] == [f"row {number}" for number in range(4)]
    assert [row.get("sample_id") for row in images.rows] == [0, 1, 2, 3, None, None]
    assert images.names[4:] == ["002_0.png", "004_0.png"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "neither a folder nor a dataset"),
        (lambda p: p.mkdir(), "no images in this folder"),
        (lambda p: p.write_text(""), "is a file"),
        (lambda p: (p.mkdir(), (p / "a.png").write_text("x")), "none of its 1 images can be used: a.png"),
        (lambda p: (write_folder(p, 2), (p / "metadata.jsonl").write_text("{")), "does not parse"),
        (lambda p: (write_folder(p, 2), (p / "metadata.jsonl").write_text("[1]")), "every line"),
    ],
)
def test_a_source_without_images_is_an_error(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        embed(load_images(tmp_path / "source", "train"), {"pixel": pixel_descriptor()})


def test_datasets_and_folders_give_the_same_images(pictures, tmp_path):
    folder = load_images(pictures, "train")
    rows = [{"image": {"bytes": folder.encoded(i), "path": None}, "text": folder.texts[i]} for i in range(len(folder))]
    saved = Dataset.from_list(rows, features=Features({"image": ImageFeature(), "text": Value("string")}))
    saved.save_to_disk(str(tmp_path / "disk"))
    (tmp_path / "parquet").mkdir()
    saved.to_parquet(str(tmp_path / "parquet" / "0.parquet"))
    for source in ("disk", "parquet"):
        images = load_images(tmp_path / source, "train")
        assert images.texts == folder.texts and images.rows[3] == {"sample_id": 3}
        assert all(images.image(i).tobytes() == folder.image(i).tobytes() for i in range(len(folder)))
    with pytest.raises(UsageError, match="no column 'picture'"):
        load_images(tmp_path / "disk", "train", image_column="picture")


def test_of_several_splits_that_were_saved_the_training_one_is_read(pictures, tmp_path):
    rows = [{"image": {"bytes": path.read_bytes(), "path": None}} for path in sorted(pictures.glob("*.png"))[:5]]
    saved = Dataset.from_list(rows, features=Features({"image": ImageFeature()}))
    part = saved.select(range(2))
    for name, splits, length in (("a", {"train": saved, "test": part}, 5), ("b", {"test": part}, 2)):
        DatasetDict(splits).save_to_disk(str(tmp_path / name))
        assert len(load_images(tmp_path / name, "train")) == length
    DatasetDict({"x": saved, "y": part}).save_to_disk(str(tmp_path / "c"))
    with pytest.raises(UsageError, match=r"`train` .*no split train.*x, y"):
        load_images(tmp_path / "c", "train")


class Counting:
    """An extractor that counts what it is asked, and fails on demand."""

    def __init__(self, identity="counting", fail_at=None):
        self.identity, self.seen, self.fail_at = {"name": identity}, 0, fail_at

    def __call__(self, images):
        self.seen += len(images)
        if self.fail_at is not None and self.seen > self.fail_at:
            raise RuntimeError("out of memory")
        return images.float().mean(dim=(2, 3))


def test_features_are_computed_once_whatever_happens(pictures, tmp_path):
    images = load_images(pictures, "train")
    with pytest.raises(RuntimeError):
        embed(images, {"x": Counting(fail_at=9)}, tmp_path, batch_size=4)
    again = Counting()
    made = embed(images, {"x": again}, tmp_path, batch_size=4)
    distinct, done = 22, 6  # of 24 files; the first two batches hold two pairs of copies
    assert again.seen == distinct - done
    plain = embed(images, {"x": Counting()})
    assert torch.equal(made.features["x"], plain.features["x"])
    renamed = Counting("another")
    embed(images, {"x": renamed}, tmp_path)
    assert renamed.seen >= distinct


def test_a_changed_file_is_computed_anew(pictures, tmp_path):
    images = load_images(pictures, "train")
    embed(images, {"x": Counting()}, tmp_path)
    changed = load_images(write_folder(tmp_path / "changed", 3, seed=7), "train")
    counting = Counting()
    embed(changed, {"x": counting}, tmp_path)
    assert counting.seen == 3


def test_features_that_are_not_finite_are_skipped_and_named(tmp_path):
    folder = write_folder(tmp_path / "images", 5)
    Image.new("RGB", (20, 20)).save(folder / "black.png")

    def by_brightness(images):
        return images.float() / images.float().amax(dim=(1, 2, 3), keepdim=True)

    descriptor = Descriptor("ratio", by_brightness, lambda x: x.mean(dim=(2, 3)), 0.5)
    made = embed(load_images(folder, "train"), {"descriptor": descriptor}, tmp_path / "cache")
    assert len(made.kept) == 5 and made.skipped == [["black.png", "its descriptor features are not finite"]]


def test_a_damaged_cache_is_begun_anew_and_an_unwritable_one_done_without(tmp_path):
    cache = FeatureCache(tmp_path, {"a": 1})
    cache.put({b"key": np.ones(3, np.float32)})
    cache.connection.close()
    (path,) = tmp_path.glob("*.sqlite")
    path.write_bytes(b"rubbish" * 1000)
    with pytest.warns(UserWarning, match="not cached in this run"):
        assert FeatureCache(tmp_path, {"a": 1}).get([b"key"]) == {}
    assert FeatureCache(tmp_path, {"a": 1}).get([b"key"]) == {} and path.with_suffix(".damaged").exists()
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not cached"):
        FeatureCache(tmp_path / "file" / "cache", {"a": 1}).put({b"key": np.ones(3, np.float32)})


def test_a_cache_damaged_behind_its_head_costs_no_results(pictures, tmp_path):
    images = load_images(pictures, "train")
    wide = Counting()
    wide.__class__ = type("Wide", (Counting,), {"__call__": lambda self, x: x.float().flatten(1)})
    whole = embed(images, {"x": wide}, tmp_path).features["x"]
    (path,) = tmp_path.glob("*.sqlite")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"x" * (len(data) - len(data) // 2)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="not cached in this run"):
        assert torch.equal(embed(images, {"x": wide}, tmp_path).features["x"], whole)


def test_large_photographs_go_through_a_few_at_a_time(tmp_path):
    sizes = []

    class Watching(Counting):
        def __call__(self, images):
            sizes.append(images.shape[0] * images.shape[2] * images.shape[3])
            return super().__call__(images)

    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (3000, 2500), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    made = embed(load_images(tmp_path / "photos", "train"), {"x": Watching()})
    assert len(made.kept) == 5 and max(sizes) <= 16_000_000 and len(sizes) >= 3


def test_the_cache_keeps_bytes_and_floats_apart(tmp_path):
    cache = FeatureCache(tmp_path, {})
    cache.put({b"f": np.arange(3, dtype=np.float32), b"u": np.arange(3, dtype=np.uint8)})
    found = FeatureCache(tmp_path, {}).get([b"f", b"u", b"absent"])
    assert found[b"f"].dtype == np.float32 and found[b"u"].dtype == np.uint8 and len(found) == 2
    with sqlite3.connect(next(tmp_path.glob("*.sqlite"))) as connection:
        assert connection.execute("SELECT text FROM identity").fetchall() == [("{}",)]


def test_pixels_are_the_centre_of_the_image_at_one_size():
    image = to_tensor(noise(5, (8, 12)))[None]
    assert torch.equal(Pixels(8)(image).view(3, 8, 8), image[0, :, :, 2:10])
    assert Pixels(4)(image).shape == (1, 48) and Pixels(4)(image).dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\n\na dog, big\n"),
        ("p.csv", 'id,Caption\n1,a cat\n2,"a dog, big"\n'),
        ("p.csv", ";Caption;URL\n0;a cat;x\n1;a dog, big;y\n"),
        ("p.tsv", "prompt\tseed\na cat\t1\na dog, big\t2\n"),
        ("p.jsonl", '{"caption": "a cat"}\n{"text": "a dog, big"}\n'),
        ("p.json", '["a cat", {"prompt": "a dog, big"}]'),
        ("p.csv", 'prompt\na cat\n"a dog, big"\n'),
        ("p.json", '{"1.png": "a cat", "2.png": ["a dog, big", "a dog"]}'),
        ("P.JSONL", '{"caption": "a cat"}\n{"text": "a dog, big"}\n'),
        ("P.CSV", 'prompt\na cat\n"a dog, big"\n'),
    ],
)
def test_prompts_of_every_kind_of_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert [p.text for p in read_prompts(tmp_path / name)] == ["a cat", "a dog, big"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n", "holds no prompts"),
        ("p.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "row 2.*only txt"),
        ("p.jsonl", "{", "does not parse"),
        ("p.csv", "text\n \n", "row 1"),
        ("p.json", "[3]", "row 1: should be a string"),
        ("p.json", "3", "should be a list or an object of captions by name, is 3"),
        ("p.json", '"a cat"', "should be a list"),
        ("p.json", '{"1.png": "a cat", "2.png": [["a dog"]]}', "2.png: should be a caption or a list"),
        ("p.json", '{"1.png": []}', "1.png: should be a caption"),
        ("p.json", "{}", "holds no prompts"),
        ("p.csv", "prompt\na cat, sitting on a mat\n", "row 1 has more fields"),
        ("p.txt", b"caf\xe9", "does not parse"),
        ("absent.txt", None, "no such file"),
    ],
)
def test_bad_prompts_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("p.csv", "prompt,Memorized\na,True\nb,no\nc,1\nd,0\n", [True, False, True, False]),
        ("p.jsonl", '{"text": "a", "memorized": true}\n{"text": "b", "memorized": 0}\n', [True, False]),
        ("p.csv", "prompt,magnitude,memorized\na,0.5,\nb,0.5,\n", None),
        ("p.txt", "a\nb\n", None),
    ],
)
def test_a_column_memorized_labels_the_prompts(tmp_path, name, text, labels):
    (tmp_path / name).write_text(text)
    assert read_labels(tmp_path / name) == labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [(("1", "", ""), "row 2: memorized is empty"), (("1", "0", "maybe"), "row 3: memorized 'maybe': must be true")],
)
def test_a_row_without_a_label_among_others_is_named(tmp_path, labels, message):
    (tmp_path / "p.csv").write_text("prompt,memorized\n" + "".join(f"a,{label}\n" for label in labels))
    with pytest.raises(UsageError, match=message):
        read_labels(tmp_path / "p.csv")


def test_a_prompt_with_a_line_separator_is_one_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert [p.text for p in read_prompts(tmp_path / "p.jsonl")] == ["a\u2028b"]


def test_captions_are_prompts_with_their_sample(pictures):
    prompts = caption_prompts(load_images(pictures, "train"), "train")
    assert prompts[3].sample_id == 3 and prompts[3].source == "001_1.png" and prompts[3].text == "a green picture"


def test_any_number_of_prompts_is_drawn_evenly():
    prompts = list(range(10))
    assert choose(prompts, 10, 0) == prompts
    few = choose(prompts, 4, 0)
    assert len(set(few)) == 4 and few == sorted(few) and few == choose(prompts, 4, 0)
    assert choose(prompts, 23, 1)[:20] == prompts * 2 and len(choose(prompts, 23, 1)) == 23


def test_encoded_images_stay_as_they_are(pictures):
    images = load_images(pictures, "train")
    assert Image.open(io.BytesIO(images.encoded(0))).size == images.image(0).size
