"""The front by noise level: parts that make up the whole, what the base subtracts, and what is remembered."""

import base64
import csv
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ietagc_diffusers import testing
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval.curves import FrontPoint, LevelBucket
from ietagc_diffusers.eval.front import Front
from ietagc_diffusers.eval.levels import by_level, edges_of, profile, shared_gap
from ietagc_diffusers.eval.losses import Losses, SavedModel, measure
from ietagc_diffusers.eval.plots import plot_growth, plot_levels
from ietagc_diffusers.training.fixed_losses import FixedLosses

CAPTIONS = ["a red picture", "a blue picture"]


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """Two models that lie ever farther from the base."""
    made = []
    for step in (1, 2):
        folder = tmp_path_factory.mktemp("models") / "unet"
        unet = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS)).denoiser
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05 * step)
        unet.save_pretrained(folder)
        made.append(SavedModel("run", 0, step, folder))
    return made


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (13, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return (pixels[:6], [CAPTIONS[0]] * 6), (pixels[6:], [CAPTIONS[1]] * 7)


def points_of(base, models, sets, memory=None, levels=3):
    losses = Losses(base, *sets, memory=memory, draws=4, levels=levels)
    return losses, [point for point, _ in measure(losses, models)]


@pytest.mark.parametrize(("num_levels", "buckets"), [(1000, 10), (1000, 7), (10, 10), (5, 3), (9, 1)])
def test_buckets_are_equal_parts_of_all_levels(num_levels, buckets):
    edges = edges_of(num_levels, buckets)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1], len(sizes)) == (0, num_levels, buckets) and sizes.max() - sizes.min() <= 1
    assert [sum(level * buckets // num_levels == b for level in range(num_levels)) for b in range(buckets)] == [*sizes]


@pytest.mark.parametrize("buckets", [0, 11])
def test_more_buckets_than_levels_are_refused(buckets):
    with pytest.raises(UsageError, match=f"`levels` {buckets}: must be from 1 to 10"):
        edges_of(10, buckets)


def test_buckets_make_up_the_mean_and_the_base_has_no_gap(base, models, sets):
    _, points = points_of(base, models, sets, levels=7)
    plain = points_of(base, models, sets, levels=1)[1]
    assert [p.levels for p in plain] == [()] * 3
    for point, mean in zip(points, plain, strict=True):
        assert (point.train_loss, point.heldout_loss, point.gap) == (mean.train_loss, mean.heldout_loss, mean.gap)
        for kind, number in (("train", 24), ("heldout", 28)):
            losses, counts = (
                np.array([getattr(b, f"{kind}_{what}") for b in point.levels]) for what in ("loss", "count")
            )
            assert counts.sum() == number and counts.min() > 0
            assert np.average(losses, weights=counts) == pytest.approx(getattr(point, f"{kind}_loss"), rel=1e-5)
    assert [(b.gap, b.gap_error) for b in points[0].levels] == [(0, 0)] * 7
    assert all(b.gap != 0 and b.gap_error > 0 for point in points[1:] for b in point.levels)


def test_a_bucket_has_the_losses_at_its_levels_alone(base, models, sets):
    """Against single losses, each of one image at one draw."""
    losses, points = points_of(base, models, sets)
    bucket = points[-1].levels[1]
    assert (bucket.level_from, bucket.level_to) == (334, 667)
    denoisers = [losses.family.load_denoiser(models[-1].folder), losses.family.load_denoiser(base, "unet")]
    ours, bases = [], []
    for fixed in losses.sets:
        found = [
            [losses.family.objective.losses(denoiser, drawn[row : row + 1]).item() for denoiser in denoisers]
            for _, _, drawn in fixed.drawn()
            for row in range(len(drawn))
            if 334 <= drawn.levels[row] <= 666
        ]
        ours.append([row[0] for row in found])
        bases.append([row[1] for row in found])
    assert (bucket.train_count, bucket.heldout_count) == (len(ours[0]), len(ours[1]))
    assert (bucket.train_loss, bucket.heldout_loss) == pytest.approx([np.mean(values) for values in ours], rel=1e-4)
    changes = [np.subtract(*both) for both in zip(ours, bases, strict=True)]
    assert bucket.gap == pytest.approx(changes[1].mean() - changes[0].mean(), rel=1e-3)
    variance = sum(change.var(ddof=1) / len(change) for change in changes)
    assert bucket.gap_error == pytest.approx(variance**0.5, rel=1e-3)
    assert bucket.relative_gap == bucket.gap / bucket.heldout_loss


def test_what_makes_a_set_difficult_at_a_level_cancels_there():
    """Held-out losses that are higher at some levels from the start show no gap; without a start they do."""
    levels = [torch.tensor([[0, 4, 9, 5]]), torch.tensor([[1, 6, 8, 2]])]
    start = [torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[5.0, 20, 30, 7]])]
    ours = [start[0] - 0.5, start[1] - 0.25]
    low, high = by_level([0, 5, 10], levels, ours, start)
    assert (low.gap, low.gap_error, high.gap, high.gap_error) == (0.25, 0, 0.25, 0)
    assert (low.train_loss, low.heldout_loss) == (1.0, 5.75)
    low, high = by_level([0, 5, 10], levels, ours)
    assert (low.gap, high.gap) == (4.75, 24.75 - 3) and low.gap_error == pytest.approx((0.25 + 1) ** 0.5)


def test_a_bucket_without_losses_has_no_number():
    levels, losses = [torch.tensor([[1]]), torch.tensor([[1]])], [torch.tensor([[2.0]])] * 2
    first, second = by_level([0, 5, 10], levels, losses)
    assert (first.train_loss, first.gap, first.train_count) == (2, 0, 1) and math.isnan(first.gap_error)
    assert math.isnan(second.train_loss) and math.isnan(second.gap) and second.heldout_count == 0


@pytest.fixture
def forwards(monkeypatch):
    calls = []
    by_draw = FixedLosses.by_draw
    monkeypatch.setattr(FixedLosses, "by_draw", lambda self, denoiser: calls.append(1) or by_draw(self, denoiser))
    return calls


def test_any_number_of_levels_is_read_from_what_was_measured_once(base, models, sets, tmp_path, forwards):
    memory = tmp_path / "losses.jsonl"
    _, first = points_of(base, models, sets, memory, levels=1)
    assert len(forwards) == 6
    _, three = points_of(base, models, sets, memory, levels=3)
    _, again = points_of(base, models, sets, memory, levels=5)
    assert len(forwards) == 6 and len(again[1].levels) == 5
    assert three == points_of(base, models, sets)[1]
    assert [p.gap for p in first] == [p.gap for p in three] == [p.gap for p in again]


def test_a_memory_without_levels_serves_the_means_and_is_measured_again_for_levels(
    base, models, sets, tmp_path, forwards
):
    memory = tmp_path / "losses.jsonl"
    wanted = points_of(base, models, sets, memory)[1]
    rows = [json.loads(line) for line in memory.read_text().splitlines()]
    memory.write_text("".join(json.dumps(row[:3]) + "\n" for row in rows))  # as earlier versions wrote it
    forwards.clear()
    means = points_of(base, models, sets, memory, levels=1)[1]
    assert [(p.train_loss, p.heldout_loss, p.gap) for p in means] == [
        (p.train_loss, p.heldout_loss, p.gap) for p in wanted
    ]
    assert not forwards and len(memory.read_text().splitlines()) == 3
    assert points_of(base, models, sets, memory)[1] == wanted and len(forwards) == 6
    assert points_of(base, models, sets, memory)[1] == wanted and len(forwards) == 6


def test_the_draws_in_the_memory_are_those_measured(base, models, sets, tmp_path):
    losses, _ = points_of(base, models[:1], sets, tmp_path / "losses.jsonl")
    row = json.loads((tmp_path / "losses.jsonl").read_text().splitlines()[-1])
    wanted = losses.sets[0].by_draw(losses.family.load_denoiser(models[0].folder)).numpy()
    assert (np.frombuffer(base64.b64decode(row[3]), "<f4").reshape(4, 6) == wanted).all()
    assert row[1] == torch.from_numpy(wanted).mean(dim=0).mean().item()


def of_gaps(run, gaps, replicate=0):
    """A run whose gap in the first of two buckets grows so, and in the second three times as fast."""
    return [
        FrontPoint(run, 10 * step, 1.0, 1.0 + gap, gap, replicate, levels=tuple(
            LevelBucket(5 * i, 5 * i + 5, 1.0, 2.0, gap * part, 0.1, 7, 7) for i, part in enumerate((0.5, 1.5))
        ))
        for step, gap in enumerate(gaps)
    ]  # fmt: skip


def test_profiles_are_of_the_last_model_or_at_an_equal_gap():
    run = of_gaps("a", (0.0, 0.2, 0.6))
    assert profile(run, "gap") == pytest.approx([0.3, 0.9])
    assert profile(run, "gap", 0.4) == pytest.approx([0.2, 0.6])
    assert profile(run, "relative_gap", 0.1) == pytest.approx([0.025, 0.075])
    assert all(math.isnan(value) for value in profile(run, "gap", 0.7))


def test_the_shared_gap_is_the_largest_that_every_seed_reaches():
    runs = [*of_gaps("a", (0.0, 0.6, 0.1)), *of_gaps("b", (0.0, 0.3), 0), *of_gaps("b", (0.0, 0.4, math.nan), 1)]
    assert shared_gap(runs) == 0.3
    assert shared_gap([*runs, *of_gaps("c", (0.0, -0.1))]) == 0


def test_runs_are_drawn_with_their_seeds_and_the_control_along_its_steps():
    control = of_gaps("none", (0.0, 0.2, 0.6))
    points = [*control, *of_gaps("ours", (0.0, 0.2), 0), *of_gaps("ours", (0.0, 0.4), 1)]
    figure, (left, right) = plt.subplots(1, 2)
    plot_levels(left, points, "gap", None, "none")
    drawn = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in left.lines[:2]}
    assert drawn["none"] == ([2.5, 7.5], pytest.approx([0.3, 0.9]))
    assert drawn["ours (2 seeds)"] == ([2.5, 7.5], pytest.approx([0.15, 0.45]))
    bands = [band.get_datalim(left.transData) for band in left.collections]
    assert (bands[0].y0, bands[0].y1) == pytest.approx((0.2, 1.0))  # one standard error about the control
    assert (bands[1].y0, bands[1].y1) == pytest.approx((0.1, 0.6))  # from the lowest seed to the highest
    mesh = plot_growth(right, control, "gap")
    assert mesh.get_array().tolist() == [pytest.approx([0.1, 0.3]), pytest.approx([0.3, 0.9])]
    assert mesh.get_coordinates()[..., 0].tolist() == [[0, 10, 20]] * 3 and mesh.get_clim() == pytest.approx(
        (-0.9, 0.9)
    )
    plt.close(figure)


@pytest.mark.parametrize("gaps", [(0.0, 0.2), (0.0, -0.2), (0.0, math.nan)])
def test_the_table_and_picture_are_written_and_removed(gaps, tmp_path):
    points = [*of_gaps("none", gaps), *of_gaps("_our$", (0.0, 0.1, 0.3))]
    Front(points, "none").write(tmp_path)
    assert (tmp_path / "front_levels.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "front_levels.csv").open()))
    assert [*rows[0]] == [
        "run", "replicate", "step", "level_from", "level_to", "train_loss", "heldout_loss", "gap", "gap_error",
        "train_count", "heldout_count",
    ]  # fmt: skip
    assert [*rows[-1].values()][:5] == ["_our$", "0", "20", "5", "10"] and len(rows) == 10
    assert float(rows[-1]["gap"]) == pytest.approx(0.45) and rows[-1]["train_count"] == "7"
    Front([FrontPoint("none", step, 1.0, 1.0, 0.1 * step) for step in (0, 1)], "none").write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"front.csv", "front.md", "front.png"}


def test_levels_have_the_name_of_what_they_count():
    plain = testing.family_of_pipeline(testing.random_pipeline(CAPTIONS)).objective
    assert plain.level_name == "timestep"
    objective = testing.family_of_pipeline(testing.random_sd3_pipeline(CAPTIONS)).objective
    assert objective.level_name == "noise level (0: most noise)"
