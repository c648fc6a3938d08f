"""Scores say copy of copies, and reports render whatever there is."""

import html
import html.parser
import importlib.util
import json
import math
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_folder
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from ietagc_diffusers import __version__
from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.metrics import KINDS, METRICS, Kind, Measured, Metric, similarity
from ietagc_diffusers.eval.metrics.base import mean
from ietagc_diffusers.eval.metrics.clip_score import ClipScore
from ietagc_diffusers.eval.metrics.intervals import wilson_interval
from ietagc_diffusers.eval.metrics.plausibility import number_of_flat
from ietagc_diffusers.eval.report import Scored, write_report
from ietagc_diffusers.eval.score import Protocol, Tools, load_scores, score
from ietagc_diffusers.eval.verdict import TOO_FAR, Limits, judge
from ietagc_diffusers.sscd import pixel_descriptor

PIXEL = Protocol(descriptor="pixel", batch_size=5)
KEYS = {
    "sim_score", "sim_score_ci95", "sim_mean", "copy_rate", "train_train_sim_score", "clip_score", "fid",
    "memorized_quantity", "memorization_ratio", "num_generated", "num_train", "protocol", "reasons",
}  # fmt: skip


def scored(generated, training, output, protocol=PIXEL, **options):
    images = [load_images(folder, "x") for folder in (generated, training)]
    return score(*images, output, Tools(protocol), **options)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("score") / "training", 60, copies=(0, 1, 2))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("score") / "fresh", 12, seed=9)


class Sharpness(Kind):
    """Mean difference of neighbouring pixels in the generated images."""

    metrics = (Metric("sharpness", "sharpness", mean, "bootstrap", lower=False, digits=1),)

    def measure(self, sets):
        side = sets.pixels
        pixels = sets.generated.features["pixels"].float().view(-1, 3, side, side)
        values = pixels.diff(dim=3).abs().mean(dim=(1, 2, 3))
        return Measured(self.metrics[0].of(values), columns={"sharpness": values.tolist()})


def test_a_metric_is_one_class_and_one_registration(training, fresh, tmp_path, monkeypatch):
    monkeypatch.setattr("ietagc_diffusers.eval.tools.KINDS", [*KINDS, Sharpness])
    monkeypatch.setitem(METRICS, "sharpness", Sharpness.metrics[0])
    scores = scored(fresh, training, tmp_path / "s")
    low, high = scores["sharpness_ci95"]
    assert low < scores["sharpness"] < high and len(load_scores(tmp_path / "s")[1]["sharpness"]) == 12
    assert "<td>sharpness ↑</td>" in write_report([Scored.load(tmp_path / "s")], tmp_path / "r.html").read_text()


def test_the_training_set_itself_is_all_copies(training, tmp_path):
    scores = scored(training, training, tmp_path)
    assert scores["sim_score"] == pytest.approx(1) and scores["copy_rate"] == 1 and scores["num_copied_train"] >= 60
    assert scores["memorized_quantity"] == {"0.4": 1, "0.5": 1, "0.6": 1}
    assert scores["frechet_distance"] < 1e-6
    assert scores["num_train"] == 63 and scores["num_train_duplicates"] == 3


def test_fresh_images_are_no_copies_and_every_metric_has_a_value_or_a_reason(training, fresh, tmp_path):
    scores = scored(fresh, training, tmp_path)
    assert scores["copy_rate"] == 0 and scores["memorized_quantity"]["0.4"] == 0
    assert scores.keys() >= KEYS and scores["version"] == __version__
    for key, value in scores.items():
        assert value is not None or scores["reasons"].get(key.removesuffix("_ci95")), key
    assert scores["sim_score_ci95"][0] <= scores["sim_score"] <= scores["sim_score_ci95"][1]
    assert scores == load_scores(tmp_path)[0]
    _, nearest, background = load_scores(tmp_path)
    assert len(nearest["file_name"]) == 12 and len(background["file_name"]) == 63


def test_the_background_leaves_out_the_image_itself(training, fresh, tmp_path):
    scored(fresh, training, tmp_path)
    _, _, background = load_scores(tmp_path)
    similarity = dict(zip(background["file_name"], background["similarity"], strict=True))
    assert similarity["000_0.png"] == pytest.approx(1) and similarity["010_0.png"] < 0.9


def test_duplicates_hide_copies_from_the_gu_ratio_unless_they_count_once(training, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in (0, 1, 2, 30):
        image = Image.open(training / f"{number:03d}_0.png")
        Image.fromarray((np.asarray(image) * 0.98).astype(np.uint8)).save(copies / f"{number}.png")
    hidden = scored(copies, training, tmp_path / "a")
    assert hidden["memorization_ratio"] == 0.25 and any("`distinct`" in note for note in hidden["notes"])
    distinct = scored(copies, training, tmp_path / "b", Protocol(descriptor="pixel", distinct=True))
    assert distinct["memorization_ratio"] == 1 and distinct["num_train"] == 60


class Blobs(torch.nn.Module):
    """A small convolutional descriptor: an average of local features, which crops and turns move little."""

    def __init__(self, stride=4):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 512, 5, stride=stride)

    def forward(self, images):
        return torch.relu(self.conv(images)).mean(dim=(2, 3)) - 0.35


def test_a_rotated_cropped_or_recompressed_copy_is_nearer_than_any_other_image(tmp_path):
    torch.manual_seed(0)
    torch.jit.script(Blobs()).save(str(tmp_path / "blobs.torchscript.pt"))
    folder, copies = tmp_path / "training", tmp_path / "copies"
    folder.mkdir(), copies.mkdir()
    for number in range(12):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((300, 280), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02d}.png")
        image.rotate(10, expand=False).save(copies / f"{number:02d}-rotated.png")
        image.crop((20, 20, 280, 260)).save(copies / f"{number:02d}-cropped.png")
        image.save(copies / f"{number:02d}-recompressed.jpg", quality=15)
        ImageOps.autocontrast(image).save(copies / f"{number:02d}-contrast.png")
    scored(
        copies,
        folder,
        tmp_path / "scores",
        Protocol(name="sscd-288", descriptor=str(tmp_path / "blobs.torchscript.pt"), copy_similarity=0.9),
    )
    scores, nearest, _ = load_scores(tmp_path / "scores")
    right = [a[:2] == b[:2] for a, b in zip(nearest["file_name"], nearest["nearest"], strict=True)]
    assert np.mean(right) > 0.95
    assert scores["protocol"]["descriptor"] == "blobs" and len(scores["protocol"]["sha256"]) == 64


def test_few_training_images_are_told(fresh, tmp_path):
    one = write_folder(tmp_path / "one", 1)
    scores = scored(fresh, one, tmp_path / "s1")
    assert scores["train_train_sim_score"] is None and "two training images" in scores["reasons"]["memorized_quantity"]
    few = scored(fresh, write_folder(tmp_path / "few", 5), tmp_path / "s5")
    assert any("fewer than 50" in note for note in few["notes"])


def test_what_cannot_be_read_is_left_out_and_named(fresh, training, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(fresh, folder)
    (folder / "000_0.png").write_bytes((folder / "000_0.png").read_bytes()[:60])
    scores = scored(folder, training, tmp_path / "scores")
    assert scores["num_generated"] == 11 and scores["skipped"]["generated"][0][0] == "000_0.png"


def test_copies_are_local_copies_however_many_duplicates_there_are(training, tmp_path):
    """Duplicates bring the training set's own crops to similarity 1, which no copy could exceed."""
    twice = tmp_path / "twice"
    shutil.copytree(training, twice)
    for path in sorted(training.glob("*_0.png"))[:20]:
        shutil.copy(path, twice / f"again-{path.name}")
    scores = scored(training, twice, tmp_path / "s", Protocol(descriptor="pixel", patches=True))
    assert scores["patch_copy_rate"] == 1 and scores["patch_copy_similarity"] < 1


def test_odd_metadata_costs_no_scores(fresh, training, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(fresh, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0] |= {"seed": "three", "mitigation": 4, "sample_id": [1], "text": "half \ud83d"}
    rows[1] |= {"seed": 3, "mitigation": "\ud83d"}
    rows[2] |= {"seed": 2**63, "sample_id": -(2**70)}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(folder / "000_0.png", os.fsencode(folder) + b"/caf\xe9.png")
    scores = scored(folder, training, tmp_path / "s")
    _, nearest, _ = load_scores(tmp_path / "s")
    assert nearest["seed"][:3] == [None, 3, None] and scores["num_generated"] == 12
    assert scores["skipped"]["generated"] == [["caf\\udce9.png", "has a name that is not text"]]


def test_the_size_for_l2_is_that_of_most_generated_images_whatever_else_lies_there(training, tmp_path):
    sizes = write_folder(tmp_path / "sizes", 3, size=40)
    Image.new("RGB", (12, 30), "red").save(sizes / "000-small.png")
    for number in range(5):
        Image.new("RGB", (4, 4)).save(sizes / f"broken-{number}.png")
        (sizes / f"broken-{number}.png").write_bytes((sizes / f"broken-{number}.png").read_bytes()[:45])
    scores = scored(sizes, training, tmp_path / "s")
    assert scores["protocol"]["l2_pixels"] == 40 and len(scores["skipped"]["generated"]) == 5
    assert any("1 generated and 63 training images are smaller than the 40 pixels" in x for x in scores["notes"])


def test_large_images_of_any_sizes_are_compared_at_64_pixels(training, tmp_path):
    (tmp_path / "large").mkdir()
    for size in (12, 70, 80, 90):
        Image.new("RGB", (size, size + 1)).save(tmp_path / "large" / f"{size}.png")
    assert scored(tmp_path / "large", training, tmp_path / "s")["protocol"]["l2_pixels"] == 64


def test_rows_that_name_one_file_are_one_training_image(training, fresh, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(fresh, again)
    rows = [json.loads(line) for line in (again / "metadata.jsonl").read_text().splitlines()]
    (again / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    scores, once = scored(training, again, tmp_path / "a"), scored(training, fresh, tmp_path / "b")
    assert scores["num_train"] == 12 and any("48 rows name" in note for note in scores["notes"])
    assert scores["train_train_sim_score"] == once["train_train_sim_score"] < 0.9
    assert scores["train_hash"] == once["train_hash"]


def test_an_exact_search_is_the_default_and_needs_no_recall(training, fresh, tmp_path):
    scores = scored(fresh, training, tmp_path)
    assert scores["protocol"]["searches"] == {"descriptor": "exact", "l2": "exact"} and scores["recall"] == {}
    assert scores["protocol"]["neighbours"] == "exact" and "FAISS" not in judge(scores, Limits()).sentence


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is optional")
@pytest.mark.parametrize("works", [True, False])
def test_what_a_search_by_faiss_missed_is_measured_and_said(training, tmp_path, monkeypatch, works):
    """All images are copies: a search that misses every neighbour finds none of them."""

    def farthest(search):
        return (
            (search.floats(search.queries) @ search.floats(search.references).T).topk(search.k, largest=False).indices
        )

    if not works:
        monkeypatch.setattr("ietagc_diffusers.eval.approximate.candidates", farthest)
    protocol = Protocol(descriptor="pixel", index="faiss", patches=works)
    scores = scored(training, training, tmp_path, protocol)
    assert scores["protocol"]["searches"].keys() == scores["recall"].keys() >= {"descriptor", "l2"}
    found = scores["recall"]["descriptor"]
    assert found == {"queries": 63, "nearest": float(works), "copies": float(works)}
    sentence = judge(scores, Limits()).sentence
    assert f"(descriptor) is not exact: it found the nearest training image of {works:.1%} of 63 images" in sentence
    assert any("FAISS (l2) is not exact" in note for note in scores["notes"])


def test_a_named_checkpoint_brings_its_protocol(fresh, training, tmp_path, monkeypatch):
    torch.jit.script(Blobs(stride=16)).save(str(tmp_path / "sscd_disc_mixup.torchscript.pt"))
    monkeypatch.setenv("SSCD_HOME", str(tmp_path))
    scores = scored(fresh, training, tmp_path / "s", Protocol(descriptor="sscd_disc_mixup"))
    protocol = scores["protocol"]
    assert (protocol["name"], protocol["preprocess"]) == ("sscd", "sscd-288") and protocol["version"] == __version__
    assert any("generated and training images have at most 64 pixels" in note for note in scores["notes"])
    protocol = scored(
        fresh, training, tmp_path / "t", Protocol("dcr", descriptor=str(tmp_path / "sscd_disc_mixup.torchscript.pt"))
    )["protocol"]
    assert (protocol["name"], protocol["preprocess"]) == ("dcr", "dcr")


def test_local_copies_are_reported_apart(training, fresh, tmp_path):
    scores = scored(fresh, training, tmp_path, Protocol(descriptor="pixel", patches=True))
    assert scores["patch_sim_score"] is not None and scores["copy_rate"] == 0
    assert scores["patch_copy_similarity"] >= scores["train_train_patch_sim_score"] - 1e-9
    assert {"patch_nearest", "patch"} <= load_scores(tmp_path)[1].keys()


def smooth(folder, number, seed):
    """Pictures whose crops resemble one another, as those of photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return folder


def test_innocent_images_hold_no_local_copies(tmp_path):
    known, made = smooth(tmp_path / "training", 200, 0), smooth(tmp_path / "made", 200, 1)
    scores = scored(made, known, tmp_path / "s", Protocol(descriptor="pixel", patches=True, copy_similarity=0.5))
    assert scores["patch_copy_rate"] <= 0.03 and scores["train_train_patch_copy_rate"] <= 0.015
    assert 0.5 < scores["patch_copy_similarity"] < 0.999


def test_warnings_about_clip_are_among_the_notes(training, fresh, tmp_path):
    assert "ViT-B-16-quickgelu:FILE" in scored(fresh, training, tmp_path)["reasons"]["clip_score"]
    tools = Tools(PIXEL)
    clip = next(kind for kind in tools.kinds if isinstance(kind, ClipScore))
    clip.scorer = SimpleNamespace(
        images=pixel_descriptor(), texts=lambda texts: (torch.rand(len(texts), 768), 0), note="a note", record={}
    )
    scores = score(load_images(fresh, "x"), load_images(training, "x"), tmp_path, tools)
    assert "a note" in scores["notes"] and scores["clip_score"] is not None


def test_intervals_hold_their_numbers(training, fresh, tmp_path):
    scores = scored(fresh, training, tmp_path, Protocol(descriptor="pixel", patches=True))
    for key in ("sim_mean", "memorization_ratio", "patch_sim_score"):
        low, high = scores[f"{key}_ci95"]
        assert low <= scores[key] <= high and low < high


def test_the_score_command_keeps_features_and_reads_another_reference(training, fresh, tmp_path, capsys):
    flags = ["--generated", str(fresh), "--train", str(training), "--feature_cache", str(tmp_path / "cache")]
    flags += ["--descriptor", "pixel"]
    assert main(["score", *flags, "--output", str(tmp_path / "a")]) == 0
    kept = {path: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    assert main(["score", *flags, "--output", str(tmp_path / "b"), "--reference", str(fresh)]) == 0
    assert {path: path.stat().st_size for path in (tmp_path / "cache").iterdir()} == kept
    a, b = (json.loads((tmp_path / x / "scores.json").read_text()) for x in "ab")
    assert a["frechet_distance"] > 1e-3 and b["frechet_distance"] < 1e-9
    assert {k for k in a if a[k] != b[k]} == {"frechet_distance", "kernel_distance", "protocol", "notes"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fid", "inceptoin"], "--fid inceptoin"),
        (["--descriptor", "sscd"], "neither a known name nor a file"),
        (["--protocol", "drc"], "protocol drc"),
        (["--clip", "ViT-Q:openai"], "--clip ViT-Q:openai"),
        (["--max_memory", "0"], "--max_memory 0"),
        (["--max_memory", "inf"], "--max_memory inf"),
        (["--pixels", "1"], "--pixels 1: must be at least 2"),
        (["--output", __file__], "is a file; give a folder"),
        (["--output", f"{__file__}/scores"], "is a file; give a folder"),
        (["--reference", "nowhere"], "--reference nowhere"),
    ],
)
def test_wrong_use_of_score_names_the_flag(training, fresh, tmp_path, capsys, flags, message):
    common = ["--generated", str(fresh), "--train", str(training), "--output", str(tmp_path), "--feature_cache", "none"]
    assert main(["score", *common, *flags]) == 2
    assert message in capsys.readouterr().err


class Checker(html.parser.HTMLParser):
    """Counts open elements and collects addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.bad = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href") and value]
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)


def check_page(path):
    """The page's data. Asserts that it is well-formed and asks nothing of the network."""
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(re.sub(r"(?s)<svg.*?</svg>|<p>(?=<noscript>)", "", text))
    assert not checker.bad
    assert not [a for a in checker.addresses if not a.startswith(("data:", "#"))]
    outside = re.findall(r"https?://[^\s\"'<)]+", re.sub(r"(?s)<svg.*?</svg>", "", text))
    assert not outside
    return json.loads(re.search(r'(?s)<script type="application/json" id="data">(.*?)</script>', text)[1])


def test_a_report_of_one_model(training, fresh, tmp_path):
    scored(fresh, training, tmp_path / "s")
    data = check_page(write_report([Scored.load(tmp_path / "s", "mine")], tmp_path / "report.html"))
    assert len(data["pairs"]) == 12 and data["models"] == ["mine"]
    similarity = [pair["similarity"] for pair in data["pairs"]]
    assert similarity == sorted(similarity, reverse=True)
    assert all(image["uri"].startswith("data:image/") for image in data["images"])


def synthetic(folder, number, fresh, training):
    """Scores of ``number`` pairs that show the same few images."""
    scores, nearest, background = load_scores(folder)
    names = [nearest["file_name"][i % 12] for i in range(number)]
    rng = np.random.default_rng(0)
    table = {
        "file_name": names,
        "text": ["<script>alert('x')</script> & \"quotes\" </script>"] * number,
        "seed": list(range(number)),
        "nearest": [nearest["nearest"][i % 12] for i in range(number)],
        "similarity": rng.random(number).tolist(),
        "copy": [False] * number,
        "l2_ratio": [math.nan] * number,
    }
    return Scored("synthetic & <b>", scores, table, background)


@pytest.mark.parametrize("number", [0, 1, 10_000])
def test_reports_render_with_any_number_of_pairs(training, fresh, tmp_path, number):
    scored(fresh, training, tmp_path / "s")
    model = synthetic(tmp_path / "s", number, fresh, training)
    data = check_page(write_report([model], tmp_path / "report.html", max_pairs=10_000))
    assert len(data["pairs"]) == number and len(data["images"]) <= 24
    assert (tmp_path / "report.html").stat().st_size < 6e6


def test_models_stand_side_by_side_for_the_same_prompt_and_seed(training, fresh, tmp_path):
    scored(fresh, training, tmp_path / "s")
    models = [synthetic(tmp_path / "s", 30, fresh, training) for _ in range(2)]
    models[1] = Scored("other", *(getattr(models[1], key) for key in ("scores", "nearest", "background")))
    data = check_page(write_report(models, tmp_path / "report.html"))
    assert len(data["compare"]) == 24 and [cell["model"] for cell in data["compare"][0]["cells"]][1] == "other"


def test_pictures_that_are_gone_leave_a_gap_and_no_error(training, fresh, tmp_path):
    shutil.copytree(fresh, tmp_path / "gone")
    scored(tmp_path / "gone", training, tmp_path / "s")
    shutil.rmtree(tmp_path / "gone")
    check_page(write_report([Scored.load(tmp_path / "s")], tmp_path / "report.html"))


def test_the_report_command_names_what_is_missing(training, fresh, tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing"), "--output", str(tmp_path / "r.html")]) == 2
    assert "scores.json" in capsys.readouterr().err
    scored(fresh, training, tmp_path / "s")
    assert main(["report", str(tmp_path / "s"), "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path}: is a folder; give a file" in capsys.readouterr().err


def test_pairs_that_share_crops_alone_are_shown_with_their_crops(training, tmp_path):
    """One generated image resembles a training image, the other holds a quarter of another one."""
    made = tmp_path / "made"
    made.mkdir()
    near, copied = (Image.open(training / name) for name in ("010_0.png", "011_0.png"))
    image = Image.fromarray(np.random.default_rng(100).integers(0, 256, (20, 23, 3), dtype=np.uint8))
    Image.blend(near, image, 0.3).save(made / "near.png")
    image.paste(copied.crop((0, 0, 10, 10)), (13, 10))
    image.save(made / "part.png")
    scored(made, training, tmp_path / "s", Protocol(descriptor="pixel", patches=True))
    data = check_page(write_report([Scored.load(tmp_path / "s", "mine")], tmp_path / "report.html", max_pairs=1))
    near, part = data["pairs"]
    assert (near["file_name"], near["nearest"]) == ("near.png", "010_0.png")
    assert not part["copy"] and part["patch"]["copy"] and part["patch"]["nearest"] == "011_0.png" != part["nearest"]
    crops = [data["images"][part["patch"][key]] for key in ("image", "training")]
    assert crops[0] == crops[1] and crops[0]["side"] == 10 and "the 1 with the most similar crops" in data["count"]


def test_a_report_finds_images_in_columns_of_other_names_and_counts_those_that_are_gone(fresh, tmp_path):
    rows = [{"picture": {"bytes": path.read_bytes(), "path": None}} for path in sorted(fresh.glob("*.png"))]
    saved = tmp_path / "saved"
    Dataset.from_list(rows, features=Features({"picture": ImageFeature()})).save_to_disk(str(saved))
    gone = tmp_path / "gone"
    shutil.copytree(fresh, gone)
    known = load_images(saved, "train", image_column="picture")
    score(load_images(gone, "generated"), known, tmp_path / "s", Tools(PIXEL))
    model = Scored.load(tmp_path / "s", "mine")
    assert "grey squares" not in write_report([model], tmp_path / "a.html").read_text()
    (gone / "000_0.png").unlink()
    assert "1 pictures can no longer be read" in write_report([model], tmp_path / "b.html").read_text()


def test_models_of_different_training_sets_are_told_apart(training, fresh, tmp_path):
    shutil.copytree(training, tmp_path / "same")
    for name, known in (("a", training), ("b", tmp_path / "same"), ("c", fresh)):
        scored(fresh, known, tmp_path / name)
    a, b, c = (Scored.load(tmp_path / name) for name in "abc")
    same = write_report([a, b], tmp_path / "same.html").read_text()
    assert "12 of a, 12 of b; compared with 63 training images." in same and "different training sets" not in same
    other = write_report([a, c], tmp_path / "other.html").read_text()
    assert "12 of a, compared with 63 training images; 12 of c, compared with 12 training images." in other
    assert "scored against different training sets" in other and "different versions" not in other
    older = {**b.scores, "protocol": {**b.scores["protocol"], "version": "0.1.0"}}
    older = write_report([a, replace(b, scores=older)], tmp_path / "older.html").read_text()
    assert "different versions of this software (0.1.0, " in older and "scored under different protocols" not in older


def test_unknown_protocols_are_refused():
    with pytest.raises(UsageError, match="`fid` x"):
        Protocol(descriptor="pixel", fid="x")
    with pytest.raises(UsageError, match="`l2` gu: must be iet-agc or paper"):
        Protocol(l2="gu")


def test_repeated_prompts_are_counted_once_by_intervals(training, fresh, tmp_path):
    """The rows of ``fresh`` have four captions; each prompt is one observation, and case makes no other prompt."""
    folder = tmp_path / "drawn"
    shutil.copytree(fresh, folder)
    alone = scored(folder, training, tmp_path / "a")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = f"picture {number}" if number < 10 else ""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    distinct = scored(folder, training, tmp_path / "b")
    rows[3]["text"] = "Picture  0"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    near = scored(folder, training, tmp_path / "c")
    assert [s["num_prompts"] for s in (alone, distinct, near)] == [4, 12, 11]
    assert any(note.startswith("12 images of 4 prompts") for note in alone["notes"])
    assert alone["copy_rate_ci95"][1] == pytest.approx(wilson_interval(np.zeros(4))[1])
    assert distinct["copy_rate_ci95"] == wilson_interval(np.zeros(12)) and alone["copy_rate"] == distinct["copy_rate"]
    assert alone["sim_mean"] == distinct["sim_mean"] and alone["sim_mean_ci95"] != distinct["sim_mean_ci95"]


def test_the_training_set_has_a_copy_rate_of_its_own_in_which_duplicates_count_once(training, fresh, tmp_path):
    scores = scored(fresh, training, tmp_path / "s")
    assert scores["train_train_sim_score"] > 0.9 and scores["train_train_copy_rate"] == 0
    shutil.copytree(training, tmp_path / "near")
    image = Image.open(training / "020_0.png")
    Image.fromarray((np.asarray(image) * 0.97).astype(np.uint8)).save(tmp_path / "near" / "darker.png")
    assert scored(fresh, tmp_path / "near", tmp_path / "t")["train_train_copy_rate"] == pytest.approx(2 / 61)


def test_held_out_pictures_are_compared_like_generated_ones(training, fresh, tmp_path):
    """Copies of the model are set against those of pictures that were not trained on."""
    training_images, images = load_images(training, "x"), load_images(training, "x").select(range(4, 14))
    held = write_folder(tmp_path / "held", 9, seed=4)
    soft = Image.open(training / "020_0.png").convert("RGB")
    noise = Image.open(held / "000_0.png").resize(soft.size)
    Image.blend(soft, noise, 0.3).save(held / "000_0.png")
    Image.fromarray((np.asarray(soft) * 0.98).astype(np.uint8)).save(held / "darker.png")
    tools = Tools(PIXEL)
    scores = score(images, training_images, tmp_path / "s", tools, heldout=load_images(held, "heldout"))
    assert scores["num_heldout"] == 9 and scores["num_heldout_near_duplicates"] == 1
    assert scores["heldout_copy_rate"] == pytest.approx(1 / 9) and scores["copy_rate"] == 1
    assert scores["excess_copy_rate"] == pytest.approx(8 / 9)
    assert scores["excess_copy_rate_ci95"][0] < 8 / 9 < scores["excess_copy_rate_ci95"][1] <= 1
    assert scores["heldout_sim_score"] < 0.95 and any("taken for other versions" in x for x in scores["notes"])
    assert scores["training_preference"] == 1  # all are training images
    # The same pictures, in another file format and under another name, are refused.
    Image.open(training / "030_0.png").save(held / "other.bmp")
    with pytest.raises(UsageError, match=r"`heldout`.*: 1 of its 11 pictures are also among the training images"):
        score(images, training_images, tmp_path / "s", tools, heldout=load_images(held, "heldout"))


def test_flat_colours_are_flat_channel_by_channel_and_pictures_are_not():
    size = 32
    flat = torch.tensor([[200, 0, 0], [120, 80, 40], [0, 0, 0]], dtype=torch.uint8)[:, :, None, None]
    flat = flat.repeat(1, 1, size, size)
    noisy = flat + torch.randint(0, 2, flat.shape, dtype=torch.uint8)
    noisy[:, :, 3, 3] = 255  # a stuck pixel
    dot = flat.clone()
    dot[:, :, :3, :3] = 128
    gradient = (torch.arange(size, dtype=torch.uint8) // 3)[None, None, None].expand(1, 3, size, size)
    assert number_of_flat(flat.flatten(1)) == number_of_flat(noisy.flatten(1)) == 3
    assert number_of_flat(dot.flatten(1)) == number_of_flat(gradient.flatten(1)) == 0


def smooth_pictures(folder, number, seed, size=24):
    """Pictures with more in the large than in the small, as photographs have."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(number):
        total = np.zeros((size, size, 3))
        for side in (1, 2, 3, 6):
            layer = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            total += np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC), float) / side
        Image.fromarray((total / 2).clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def test_noise_is_told_from_pictures_of_the_same_kind_and_few_images_from_nothing(tmp_path):
    known, made = smooth_pictures(tmp_path / "known", 80, 0), smooth_pictures(tmp_path / "made", 60, 1)
    noise, few = write_folder(tmp_path / "noise", 60), smooth_pictures(tmp_path / "few", 5, 2)
    found = {
        (a.name, b.name): scored(a, b, tmp_path / "s")["plausibility"]
        for a, b in ((made, known), (noise, known), (few, known), (made, few))
    }
    honest, bad = found["made", "known"], found["noise", "known"]
    assert honest["median_similarity"] > honest["usual_similarity"] > bad["median_similarity"]
    assert honest["distance"] < TOO_FAR < bad["distance"]
    for pair in (("few", "known"), ("made", "few")):
        assert set(found[pair].values()) == {None}
    # A network may find noise similar: pixels tell it, whatever finds the copies.
    torch.jit.script(Blobs()).save(str(tmp_path / "blobs.torchscript.pt"))
    network = Protocol(descriptor=str(tmp_path / "blobs.torchscript.pt"), copy_similarity=0.9)
    assert scored(noise, known, tmp_path / "s", network)["plausibility"] == bad


def test_a_part_of_a_held_out_picture_is_as_near_as_one_of_a_training_image(training, fresh, tmp_path):
    """Both sets are shown as training shows its images: by crops along the long side, and mirrored."""
    wide = write_folder(tmp_path / "wide", 2, size=40, seed=4)
    for path in wide.glob("*.png"):
        Image.open(path).crop((0, 10, 43, 30)).save(path)
    (tmp_path / "drawn").mkdir()
    left = Image.open(wide / "000_0.png").crop((0, 0, 20, 20))
    ImageOps.mirror(left).save(tmp_path / "drawn" / "0.png")
    drawn, training_images = load_images(tmp_path / "drawn", "x"), load_images(training, "x")
    scores = score(drawn, training_images, tmp_path / "s", Tools(PIXEL), heldout=load_images(wide, "heldout"))
    assert scores["num_heldout"] == 2 and scores["training_preference"] == pytest.approx(-60 / 2)
    unlike = load_images(fresh, "x")
    scores = score(unlike, training_images, tmp_path / "t", Tools(PIXEL), heldout=load_images(wide, "heldout"))
    low, high = scores["training_preference_ci95"]
    assert -30 <= low <= scores["training_preference"] <= high <= 1


def test_the_preference_is_zero_by_chance_and_one_for_copies():
    """Of sets that one distribution gives, however unequal in size."""
    generator = torch.Generator().manual_seed(0)
    for num_training, num_heldout in ((200, 200), (300, 20), (20, 300)):
        vectors = torch.nn.functional.normalize(
            torch.randn(4000 + num_training + num_heldout, 8, generator=generator), dim=1
        )
        images, training, heldout = vectors.split([4000, num_training, num_heldout])
        nearest = [(images @ others.T).amax(dim=1) for others in (training, heldout)]
        chance, hits = num_training / (num_training + num_heldout), similarity.prefers_training(*nearest)
        # The sets themselves are random: their share varies as if each of their images were drawn once.
        spread = (hits.std() / 4000**0.5) / (1 - chance)
        spread += (num_training / num_heldout / min(num_training, num_heldout)) ** 0.5
        assert abs(similarity.above_chance(hits, torch.tensor(chance))) < 3 * spread
        nearest = [(training @ others.T).amax(dim=1) for others in (training, heldout)]
        assert similarity.above_chance(similarity.prefers_training(*nearest), torch.tensor(chance)) == pytest.approx(1)
    same = torch.rand(9)
    assert similarity.above_chance(similarity.prefers_training(same, same), torch.tensor(0.5)) == 0


def test_a_single_prompt_has_no_bootstrap_interval(training, fresh, tmp_path):
    """Drawn again and again it would have no width, as if it were sure."""
    images = load_images(fresh, "x")
    images.texts = ["one"] * len(images)
    held = load_images(write_folder(tmp_path / "held", 9, seed=4), "heldout")
    scores = score(images, load_images(training, "x"), tmp_path / "s", Tools(PIXEL), heldout=held)
    assert scores["num_prompts"] == 1 and scores["sim_score_ci95"] is None and scores["sim_mean_ci95"] is None
    low, high = scores["training_preference_ci95"]
    assert high - low > 1 and low <= scores["training_preference"] <= high
    write_report([Scored.load(tmp_path / "s", "model")], tmp_path / "r.html")


def test_names_with_signs_of_a_formula_or_a_leading_underscore_are_shown_as_they_are(training, fresh, tmp_path):
    scored(fresh, training, tmp_path / "s")
    for name in ("price_$5_$6", "_hidden", "$\\frac$", "a\nb"):
        page = write_report([Scored.load(tmp_path / "s", name)], tmp_path / "r.html").read_text()
        svg = html.unescape(re.search(r"(?s)<svg.*?</svg>", page)[0])
        assert " ".join(name.split()) in svg and "could not be drawn" not in page


def test_held_out_versions_of_training_images_are_left_out_though_the_descriptor_sees_others(
    training, fresh, tmp_path, monkeypatch
):
    """To SSCD a smaller version is less similar than a near duplicate, and would make copies look usual."""
    monkeypatch.setattr(similarity, "NEAR_DUPLICATE", 2)
    held = write_folder(tmp_path / "held", 9, seed=4)
    picture = Image.open(training / "020_0.png").convert("RGB")
    ImageOps.mirror(picture).save(held / "mirrored.jpg", quality=90, subsampling=0)
    sets = load_images(fresh, "x"), load_images(training, "x")
    scores = score(*sets, tmp_path / "s", Tools(PIXEL), heldout=load_images(held, "heldout"))
    assert scores["num_heldout"] == 9 and scores["num_heldout_near_duplicates"] == 1
