"""The report: one HTML file about scored models."""

import html
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from pages import check_page
from PIL import Image
from scoring import PIXEL, scored

from ietagc_diffusers.cli import main
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.report import Scored, write_report
from ietagc_diffusers.eval.score import Protocol, Tools, load_scores, score


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


def test_names_with_signs_of_a_formula_or_a_leading_underscore_are_shown_as_they_are(training, fresh, tmp_path):
    scored(fresh, training, tmp_path / "s")
    for name in ("price_$5_$6", "_hidden", "$\\frac$", "a\nb"):
        page = write_report([Scored.load(tmp_path / "s", name)], tmp_path / "r.html").read_text()
        svg = html.unescape(re.search(r"(?s)<svg.*?</svg>", page)[0])
        assert " ".join(name.split()) in svg and "could not be drawn" not in page
