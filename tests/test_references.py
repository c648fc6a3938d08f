"""The studies of references for calibrated control, and of models of disjoint halves."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import write_folder
from diffusers import UNet2DConditionModel

from benchmarks import cheaper_reference as cheaper
from benchmarks import halves, scratch_reference, separation
from benchmarks.separation import Scores
from ietagc_diffusers.eval.image_sets import load_images


def noisy_scores(seen=60, unseen=50, draws=20, shift=0.5, seed=0):
    """Scores (draws, N) and (draws, M) that are lower by ``shift`` where an image was seen, in images that differ."""
    rng = np.random.default_rng(seed)
    both = [rng.normal(size=(1, number)) + 0.3 * rng.normal(size=(draws, number)) for number in (seen, unseen)]
    return Scores(both[0] - shift, both[1])


def test_the_auc_counts_pairs_within_each_draw():
    scores = noisy_scores(seen=7, unseen=5, draws=3)
    pairs = [[a < b for a, b in itertools.product(*draw)] for draw in zip(*scores, strict=True)]
    assert separation.auc(scores) == pytest.approx(np.mean(pairs, axis=1))
    levels = np.array([[3.0], [0.0], [-2.0]])  # what differs between draws says nothing of an image
    assert separation.auc(Scores(*(v + levels for v in scores))) == pytest.approx(separation.auc(scores))


def test_the_skip_rate_is_that_of_the_seen():
    seen, unseen = separation.skipped(noisy_scores(shift=2), 0.4)
    assert seen.mean(axis=1) == pytest.approx(np.full(20, 0.4)) and unseen.mean() < 0.1


def test_a_fit_finds_what_is_the_images_own_however_it_is_made():
    rng = np.random.default_rng(0)
    own, noise = noisy_scores(draws=1), noisy_scores(shift=0.2)
    slope = [0.5 * rng.normal(size=values.shape[1]) for values in own]

    def at(levels, slopes=0):
        """Losses of the base: an image's own, which may depend on the level, and the level's."""
        t = np.array(levels)[:, None] / 1000
        return Scores(*(values + slopes * s * (t - 0.5) + np.sin(9 * t) for values, s in zip(own, slope, strict=True)))

    for ranges, draws in cheaper.FITS:
        fitted = cheaper.shrunk(cheaper.fit(at(cheaper.POOL), ranges, draws), at(cheaper.LEVELS))
        loss = Scores(*(base + more for base, more in zip(at(cheaper.LEVELS), noise, strict=True)))
        exact = loss.over(at(cheaper.LEVELS))
        assert separation.auc(loss.over(fitted)) == pytest.approx(separation.auc(exact))
    # What depends on the level takes several ranges: the error of the fit falls with them.
    errors = []
    for ranges in (1, 5, 20):
        found, true = cheaper.fit(at(cheaper.POOL, 1), ranges, 80 // ranges).seen, at(cheaper.LEVELS, 1).seen
        errors.append(np.std(found - (true - true.mean(axis=1, keepdims=True))))
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0] / 4


def test_a_cascade_that_asks_of_all_is_the_exact_reference():
    first, exact = noisy_scores(), noisy_scores(seed=1)
    full = separation.skipped(exact, cheaper.RATE)
    for found, wanted in zip(cheaper.cascade(first, exact, 1.0), full, strict=True):
        assert (found != wanted).mean() < 0.03  # the largest first score is not below itself
    some = cheaper.cascade(first, exact, 0.5)
    assert not (some[0] & ~separation.skipped(first, 0.5)[0]).any()
    assert some[0].mean() == pytest.approx(cheaper.RATE, abs=0.02)


def test_the_mean_loss_of_others_is_without_the_left_out():
    proxies = [Scores(np.full((2, 3), np.log(loss)), np.full((2, 1), np.log(loss))) for loss in (1.0, 2.0, 6.0)]
    found = scratch_reference.mean_loss(proxies, 0)
    assert np.exp(found.seen) == pytest.approx(4.0) and np.exp(found.unseen) == pytest.approx(4.0)


def test_the_halves_are_disjoint_and_keep_copies_together(tmp_path):
    pictures = write_folder(tmp_path / "pictures", 6, copies=(2, 3))
    halves.write_halves(pictures, tmp_path)
    names = [load_images(tmp_path / f"half-{half}", "folder").names for half in halves.HALVES]
    assert sorted(itertools.chain(*names)) == sorted(path.name for path in pictures.glob("*.png"))
    assert [{name[:3] for name in half} for half in names] == [{"000", "002", "004"}, {"001", "003", "005"}]
    assert [len(half) for half in names] == [4, 4]


def test_a_model_agrees_with_itself_and_less_with_another(tmp_path, base):
    halves.write_halves(write_folder(tmp_path / "pictures", 6), tmp_path)
    judge = halves.Judge(str(base), tmp_path, write_folder(tmp_path / "heldout", 4, seed=1), resolution=16)
    changed = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = UNet2DConditionModel.from_pretrained(base / "unet")
        for parameter in model.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / f"changed-{seed}")
        changed.append(tmp_path / f"changed-{seed}")
    alike = judge.compare("none", 1, [changed[0]] * 2)
    assert alike.disagreement == 0 and alike.agreement == pytest.approx(1) and alike.gap == pytest.approx(0, abs=1e-6)
    apart, turned = judge.compare("none", 1, changed), judge.compare("none", 1, changed[::-1])
    assert apart.agreement < 0.9 and apart.disagreement > 0 and apart.gap == pytest.approx(-turned.gap, abs=1e-6)
    # |a - b|^2 / 2 = (|a|^2 + |b|^2) / 2 - a.b, where both changes are about equally large
    assert apart.disagreement == pytest.approx(apart.moved * (1 - apart.agreement), rel=0.05)


def test_images_are_compared_by_noise_and_by_half(tmp_path, base):
    halves.write_halves(write_folder(tmp_path / "pictures", 6), tmp_path)
    judge = halves.Judge(str(base), tmp_path, write_folder(tmp_path / "heldout", 4, seed=1), resolution=16)
    number = len(judge.prompts)  # captions of four pictures, two of each half, with two noises
    assert number == 8 and judge.prompts[:4] == judge.prompts[4:]
    alike = [write_folder(tmp_path / name, number, seed=2) for name in ("first", "second")]
    assert judge.of_images(alike)["excess"] > 0.5  # noise pictures: one like itself, and no two others
    own = [tmp_path / f"own-{half}" for half in halves.HALVES]
    for half, folder in enumerate(own):
        folder.mkdir()
        pictures = sorted((tmp_path / f"half-{half}").glob("*.png"))
        for index in range(number):
            shutil.copy(pictures[index % 3], folder / f"{index:06d}.png")
    assert judge.of_images(own)["preferred"] == 1 and judge.of_images(own[::-1])["preferred"] == -1
