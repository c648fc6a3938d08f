"""Scores say copy of copies, and reports render whatever there is."""

import importlib.util
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image, ImageOps
from scoring import PIXEL, scored

from ietagc_diffusers import __version__
from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.metrics import KINDS, METRICS, Kind, Measured, Metric
from ietagc_diffusers.eval.metrics.base import mean
from ietagc_diffusers.eval.metrics.clip_score import ClipScore
from ietagc_diffusers.eval.metrics.intervals import wilson_interval
from ietagc_diffusers.eval.metrics.plausibility import number_of_flat
from ietagc_diffusers.eval.report import Scored, write_report
from ietagc_diffusers.eval.score import Protocol, Tools, load_scores, score
from ietagc_diffusers.eval.verdict import TOO_FAR, Limits, judge
from ietagc_diffusers.sscd import pixel_descriptor

KEYS = {
    "sim_score", "sim_score_ci95", "sim_mean", "copy_rate", "train_train_sim_score", "clip_score", "fid",
    "memorized_quantity", "memorization_ratio", "num_generated", "num_train", "protocol", "reasons",
}  # fmt: skip


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
