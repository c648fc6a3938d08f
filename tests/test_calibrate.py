"""A copy threshold is what at most a share of innocent images exceed, and says what it was measured on."""

import json
import shutil

import numpy as np
import pytest
import shown
import torch
from conftest import write_folder
from PIL import Image

from ietagc_diffusers import __version__
from ietagc_diffusers.cli import main
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.calibrate import calibrate, threshold_over
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.sscd import pixel_descriptor


def loaded(folder):
    return load_images(folder, "folder")


def similarities(images, training, shown_of=shown.both_ways):
    """By brute force: of each image to whatever may be shown of all training images, (N, M)."""
    ours, theirs = ([x.image(row) for row in range(len(x))] for x in (images, training))
    return np.array(
        [[shown.similarity(shown_of(image), other, pixel_descriptor(), 20 / 16) for other in theirs] for image in ours]
    )


def middle_view(picture):
    views = shown.crops(picture, 20 / 16)
    return [views[len(views) // 2]]


@pytest.fixture(scope="module")
def innocent(tmp_path_factory):
    return loaded(write_folder(tmp_path_factory.mktemp("calibrate") / "innocent", 40, seed=9))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.29, 0.5])
def test_at_most_the_share_exceeds_the_threshold_and_no_lower_value_would_do(share):
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    threshold = threshold_over(values, share)
    assert (values > threshold).sum() <= share * 300
    lower = values[values < threshold].max()
    assert (values > lower).sum() > share * 300 - 1


def test_innocent_images_are_compared_with_the_training_images(pictures, innocent):
    result = calibrate(pixel_descriptor(), loaded(pictures), innocent, false_positives=0.1)
    nearest = np.sort(similarities(innocent, loaded(pictures)).max(axis=1))
    assert result.copy_similarity == pytest.approx(nearest[-5], abs=1e-5) and result.num_over == 4
    assert (result.num_innocent, result.num_near_duplicates, result.innocent) == (40, 0, innocent.source)
    assert (result.num_train, result.num_train_duplicates) == (22, 2) and result.descriptor["descriptor"] == "pixel"


def test_copies_among_innocent_images_count_and_are_told(pictures):
    result = calibrate(pixel_descriptor(), loaded(pictures), loaded(pictures), false_positives=0.1)
    assert result.copy_similarity == pytest.approx(1, abs=1e-5) and result.num_near_duplicates == 24
    assert "24 of them are over 0.95: are they copies?" in result.sentence


def test_without_them_training_images_are_compared_with_each_other_and_near_duplicates_left_out(tmp_path):
    folder = write_folder(tmp_path / "train", 30, copies=(0, 1, 2), seed=4)
    expected = similarities(loaded(folder), loaded(folder), middle_view)
    np.fill_diagonal(expected, -1)
    different = np.array([name.endswith("_0.png") for name in loaded(folder).names])
    nearest = np.sort(expected[different][:, different].max(axis=1))
    result = calibrate(pixel_descriptor(), loaded(folder), false_positives=0.1)
    assert result.copy_similarity == pytest.approx(nearest[-4], abs=1e-5)
    assert (result.num_train, result.num_train_duplicates, result.num_near_duplicates) == (30, 3, 0)
    assert result.innocent is None and "training images, each compared with the others," in result.sentence
    brighter = np.asarray(Image.open(folder / "005_0.png")).clip(0, 250) + 5
    Image.fromarray(brighter.astype(np.uint8)).save(folder / "extra.png")
    result = calibrate(pixel_descriptor(), loaded(folder), false_positives=0.1)
    assert (result.num_innocent, result.num_near_duplicates) == (29, 2)
    assert result.copy_similarity < 0.95 and "2 near duplicates (over 0.95) were left out" in result.sentence


def test_too_few_images_and_no_share_are_refused(pictures, innocent):
    with pytest.raises(UsageError, match=r"40 images are too few for `false_positives` 0\.01: at least 100"):
        calibrate(pixel_descriptor(), loaded(pictures), innocent)
    with pytest.raises(UsageError, match=r"`train` .*22 images are too few"):
        calibrate(pixel_descriptor(), loaded(pictures))
    for share in (0, 1, float("nan")):
        with pytest.raises(UsageError, match="`false_positives`"):
            calibrate(pixel_descriptor(), loaded(pictures), innocent, share)


def test_the_command_writes_a_threshold_that_score_takes(pictures, innocent, tmp_path, capsys):
    path = tmp_path / "deep" / "threshold.json"
    flags = ["--train", str(pictures), "--descriptor", "pixel", "--feature_cache", "none", "--device", "cpu"]
    command = ["calibrate", *flags, "--innocent", innocent.source, "--output", str(path)]
    assert main([*command, "--false_positives", "0.1"]) == 0
    result = json.loads(path.read_text())
    assert result["version"] == __version__ and result["descriptor"] == pixel_descriptor().identity
    assert capsys.readouterr().out.startswith(f"Copy similarity {result['copy_similarity']:.4f} (pixel): 4 of 40 ")
    shutil.copytree(innocent.source, tmp_path / "drawn")
    flags += ["--generated", str(tmp_path / "drawn"), "--output", str(tmp_path / "s")]
    assert main(["score", *flags, "--copy_similarity", str(result["copy_similarity"])]) == 0
    assert json.loads((tmp_path / "s" / "scores.json").read_text())["copy_rate"] == 4 / 40
    assert main([*command, "--false_positives", "2"]) == 2
    assert "--false_positives 2.0: must be" in capsys.readouterr().err
