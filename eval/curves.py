"""Runs as curves of held-out loss (quality) over the gap to the training loss (memorization), compared at equal gap and
at equal held-out loss.

Plain training stopped at any point is the control that every claim must beat.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class LevelBucket:
    """Mean losses of a model at the noise levels from ``level_from`` on and below ``level_to``.

    gap: as in ``FrontPoint``, of these levels; gap_error: its standard error over images and their noise.
    train_count, heldout_count: of how many losses these are the means. What has no losses is nan.
    """

    level_from: int
    level_to: int
    train_loss: float
    heldout_loss: float
    gap: float
    gap_error: float
    train_count: int
    heldout_count: int

    @property
    def relative_gap(self) -> float:
        """The gap as a share of the held-out loss."""
        return self.gap / self.heldout_loss

    @property
    def relative_gap_error(self) -> float:
        """The gap's standard error as a share of the held-out loss."""
        return self.gap_error / self.heldout_loss


@dataclass(frozen=True)
class FrontPoint:
    """A model on the front: mean losses over the training images and over held-out images.

    gap: held-out minus training loss, less the base model's, which shows no memorization, only that one of the two sets
    is more difficult: a run starts at gap 0. replicate: which of the run's seeds, from 0. sampled: scores of images
    that the model drew, if it drew any. levels: the same by noise level, if that was wanted.
    """

    run: str
    step: int
    train_loss: float
    heldout_loss: float
    gap: float
    replicate: int = 0
    sampled: dict[str, Any] = field(default_factory=dict)
    levels: tuple[LevelBucket, ...] = ()


Coordinate = Callable[[FrontPoint], float]


def crossing(points: Iterable[FrontPoint], x: Coordinate, y: Coordinate, value: float) -> float | None:
    """``y`` of one run where its ``x`` first reaches ``value``, linearly between its points; None if it never does."""
    points = sorted(points, key=lambda p: p.step)
    for before, after in pairwise(points):
        low, high = x(before), x(after)
        if min(low, high) <= value <= max(low, high):
            share = (value - low) / (high - low) if high != low else 1.0
            return y(before) + share * (y(after) - y(before))
    return None


def _gap(point: FrontPoint) -> float:
    return point.gap


def _heldout(point: FrontPoint) -> float:
    return point.heldout_loss


def at_gap(points: Iterable[FrontPoint], gap: float) -> float | None:
    """Held-out loss of one run where it first reaches ``gap``, or None."""
    return crossing(points, _gap, _heldout, gap)


def at_loss(points: Iterable[FrontPoint], loss: float) -> float | None:
    """Gap of one run where its held-out loss first reaches ``loss``, or None."""
    return crossing(points, _heldout, _gap, loss)


def by_run(points: Iterable[FrontPoint]) -> dict[str, list[FrontPoint]]:
    """{run: its points}, of all its seeds."""
    runs: dict[str, list[FrontPoint]] = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    return runs


def replicates(points: Iterable[FrontPoint]) -> list[list[FrontPoint]]:
    """The points of one run, seed by seed."""
    seeds: dict[int, list[FrontPoint]] = {}
    for point in points:
        seeds.setdefault(point.replicate, []).append(point)
    return list(seeds.values())


Finder = Callable[[list[FrontPoint], float], float | None]  # at_gap or at_loss


def over_seeds(points: Iterable[FrontPoint], find: Finder, value: float) -> list[float] | None:
    """``find(points of a seed, value)`` of each seed of a run, or None if some seed has none."""
    found = [find(seed, value) for seed in replicates(points)]
    reached = [value for value in found if value is not None]
    return reached if len(reached) == len(found) else None


@dataclass(frozen=True)
class Comparison:
    """A run against the control: differences of the means over seeds, where below zero is better.

    at_gap: {gap: held-out loss minus the control's}; at_loss: {held-out loss: gap minus the control's}.
    """

    run: str
    at_gap: dict[float, float]
    at_loss: dict[float, float]


def compare(points: list[FrontPoint], control: str, steps: int = 8) -> list[Comparison]:
    """Each run against the run ``control``, at up to ``steps`` gaps and as many held-out losses that both reach."""
    runs = by_run(points)
    plain = runs[control]
    comparisons = []
    for name, run in runs.items():
        if name == control:
            continue
        seeds = [seed for group in (run, plain) for seed in replicates(group)]
        widest = min(max(p.gap for p in seed) for seed in seeds)
        lowest = max(min(p.heldout_loss for p in seed) for seed in seeds)
        start = min(p.heldout_loss for p in plain if p.step == 0)
        gaps = [widest * (i + 1) / steps for i in range(steps)] if widest > 0 else []
        losses = [lowest + (start - lowest) * i / (2 * steps) for i in range(steps)] if lowest < start else []
        comparisons.append(
            Comparison(name, differences(run, plain, at_gap, gaps), differences(run, plain, at_loss, losses))
        )
    return comparisons


def differences(
    run: list[FrontPoint], control: list[FrontPoint], find: Finder, values: Iterable[float]
) -> dict[float, float]:
    """{value: the run's mean of ``find`` over its seeds, minus the control's}, at those values that both reach."""
    found = {}
    for value in values:
        ours, theirs = over_seeds(run, find, value), over_seeds(control, find, value)
        if ours is not None and theirs is not None:
            found[value] = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    return found


def table(points: list[FrontPoint], control: str, sampled: dict[str, str]) -> str:
    """Each run against the control, in Markdown.

    Args:
        sampled: {score in ``FrontPoint.sampled``: its title} to compare at equal Fréchet distance, if models drew.
    """
    lines = [f"Differences to `{control}`; below zero is better.", ""]
    lines += ["| run | held-out loss at equal gap | gap at equal held-out loss |", "|---|---|---|"]
    for comparison in compare(points, control):
        cells = [_range(comparison.at_gap, "gap"), _range(comparison.at_loss, "loss")]
        lines.append(f"| {comparison.run} | {cells[0]} | {cells[1]} |")
    if points[0].sampled:
        titles = " | ".join(f"{title} at equal Fréchet distance" for title in sampled.values())
        lines += ["", f"| run | {titles} |", "|---|" + "---|" * len(sampled)]
        runs = by_run(points)
        for name in runs:
            if name != control:
                cells = [_at_equal_frechet(runs[name], runs[control], key) for key in sampled]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(found: dict[float, float], axis: str) -> str:
    """Mean and range of {place on the axis: difference}."""
    if not found:
        return f"they share no {axis}"
    values = list(found.values())
    below = sum(value < 0 for value in values)
    return (
        f"{sum(values) / len(values):+.4f} ({min(values):+.4f} to {max(values):+.4f}), "
        f"below at {below} of {len(values)} from {min(found):.4f} to {max(found):.4f}"
    )


def with_scores(points: Iterable[FrontPoint], *keys: str) -> list[FrontPoint]:
    """The points whose sampled images have all of these scores: one that cannot be computed is None."""
    return [point for point in points if all(point.sampled.get(key) is not None for key in keys)]


def _at_equal_frechet(run: list[FrontPoint], control: list[FrontPoint], key: str) -> str:
    """The last model of each seed against the control where that first reaches the same Fréchet distance."""
    ours, theirs = (replicates(with_scores(points, key, "frechet")) for points in (run, control))
    if not ours or not theirs:
        return "not measured"
    found = []
    for last in (seed[-1] for seed in ours):
        for seed in theirs:
            value = crossing(seed, lambda p: p.sampled["frechet"], lambda p: p.sampled[key], last.sampled["frechet"])
            if value is not None:
                found.append(last.sampled[key] - value)
    return f"{sum(found) / len(found):+.4f}" if found else "never equal"
