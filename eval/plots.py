"""Plots: curves of runs, histograms of similarity, and figures as files or parts of a page."""

import io
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import FrontPoint, at_gap, by_run, over_seeds, replicates, with_scores
from .levels import profile

if TYPE_CHECKING:
    from .report import Scored

Colours = dict[str, str]  # {run: colour}

GREY = "#888888"  # readable on white and on black
VIEW = (
    6  # loss that is shown, in medians of the models' distances to their run's best: early and ruined models lie above
)
COLOURS = ("#c1272d", "#1f6fb2", "#2a9d4f", "#b07aa1", "#e08214", "#17a2a2", "#8c6d31", "#d45087")
STYLES = ("-", "--", ":")  # of lines that share a colour, where runs are more than colours


def inline_svg(plot: Callable[[Axes], None], size: tuple[float, float]) -> str:
    """SVG of ``plot(axes)`` for an HTML page, readable on light and on dark. ``size``: in inches."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ietagc",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.framealpha": 0,
        "font.family": "sans-serif",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=size)
        plot(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def as_label(name: str) -> str:
    """A name as matplotlib shows it: signs of a formula as they are, and no underscore first, which hides a label."""
    text = " ".join(name.split()).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def png(figure: Figure, path: Path) -> None:
    """Write a figure to a file and close it."""
    figure.savefig(path, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def plot_similarities(axes: Axes, scored: "list[Scored]") -> None:
    """Fig. 6: histograms of the similarity to the nearest training image, and of training images among themselves."""
    groups = [
        (model.name, model.nearest["similarity"], COLOURS[i % len(COLOURS)], "-") for i, model in enumerate(scored)
    ]
    background = [value for value in scored[0].background["similarity"] if value is not None]
    groups.append(("training images among themselves", background, GREY, ":"))
    values = np.concatenate([group[1] for group in groups])
    bins = np.linspace(min(values.min(), 0.0), max(values.max(), 1.0), 60).tolist()
    for name, group, colour, line in groups:
        if len(group):
            axes.hist(
                group,
                bins,
                density=True,
                histtype="step",
                linewidth=1.8,
                color=colour,
                linestyle=line,
                label=as_label(name),
            )
    axes.axvline(scored[0].scores["protocol"]["copy_similarity"], color=GREY, linewidth=0.8)
    axes.set_xlabel("similarity to the nearest training image")
    axes.set_ylabel("density")
    axes.legend(fontsize=8, loc="upper left")


def _colours(points: list[FrontPoint], control: str | None, given: Colours | None) -> Colours:
    """The given colours, grey for the control, and the remaining colours in turn for the other runs."""
    chosen = {control: GREY} | (given or {})
    others = itertools.cycle([colour for colour in COLOURS if colour not in chosen.values()])
    return {name: chosen.get(name) or next(others) for name in by_run(points)}


def _looks(points: list[FrontPoint], control: str | None, given: Colours | None = None) -> dict[str, tuple[str, str]]:
    """Colour and line style of each run: runs of one colour differ in style."""
    looks: dict[str, tuple[str, str]] = {}
    used: list[str] = []
    for name, colour in _colours(points, control, given).items():
        looks[name] = colour, STYLES[used.count(colour) % len(STYLES)]
        used.append(colour)
    return looks


def plot_front(
    axes: Axes, points: list[FrontPoint], control: str | None = None, colours: Colours | None = None
) -> None:
    """Held-out loss against the gap along each run: the mean of its seeds, and their range at equal gap as a band."""
    looks = _looks(points, control, colours)
    for name, run in by_run(points).items():
        colour, style = looks[name]
        seeds = replicates(run)
        for seed in seeds:
            line: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.5, "linestyle": style}
            if len(seeds) == 1:
                line |= {"linewidth": 2, "alpha": 1, "marker": "o", "markersize": 3.5}
                line["markerfacecolor"] = colour if style == STYLES[0] else "white"
            label = as_label(name) if len(seeds) == 1 else None
            axes.plot([p.gap for p in seed], [p.heldout_loss for p in seed], color=colour, label=label, **line)
        if len(seeds) > 1:
            gaps = np.linspace(0, min(max(p.gap for p in seed) for seed in seeds), 100)
            found = [(gap, losses) for gap in gaps if (losses := over_seeds(run, at_gap, gap)) is not None]
            x, low, mean, high = zip(*((gap, min(v), sum(v) / len(v), max(v)) for gap, v in found), strict=True)
            axes.plot(
                x, mean, color=colour, linewidth=2, linestyle=style, label=as_label(f"{name} ({len(seeds)} seeds)")
            )
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    _show_the_best(axes, points)
    axes.set_xlabel("held-out minus training loss, change since the base (memorization →)")
    axes.set_ylabel("held-out loss (← quality)")
    axes.grid(alpha=0.25)
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    axes.legend(fontsize=8, **(beside if len(looks) > 3 else {}))


def _show_the_best(axes: Axes, points: list[FrontPoint]) -> None:
    """Set limits that show every seed's best model and cut off steep beginnings and ruined ends."""
    finite = [p for p in points if math.isfinite(p.heldout_loss + p.gap)]
    seeds = [seed for run in by_run(finite).values() for seed in replicates(run)]
    best = [min(p.heldout_loss for p in seed) for seed in seeds]
    trained = [p.heldout_loss - least for seed, least in zip(seeds, best, strict=True) for p in seed if p.step > 0]
    above = [value for value in trained if value > 0]
    room = VIEW * statistics.median(above) if above else max(best) - min(best) or math.inf
    low, high = min(best), min(max(best) + room, max(p.heldout_loss for p in finite))
    gaps = [0.0, *(p.gap for p in finite if p.heldout_loss <= high)]
    edge = (high - low) / 12 or 1e-4
    axes.set_ylim(low - edge, high + edge)
    left, right = min(gaps), max(gaps)
    edge = (right - left) / 12 or 1e-4
    axes.set_xlim(left - edge * (left < 0), right + edge)
    axes.locator_params(axis="x", nbins=7)  # small gaps have long numbers


def plot_sampled(
    axes: Axes,
    points: list[FrontPoint],
    key: str,
    label: str,
    control: str | None = None,
    colours: Colours | None = None,
) -> None:
    """Fréchet distance against the score ``key`` along each run: the mean of its seeds, and their range as a band, at
    the steps that they share. Seeds that share no step are drawn one by one. Models without one of both numbers are
    left out.
    """
    colours = _colours(points, control, colours)
    measured = with_scores(points, key, "frechet")
    for name, run in by_run(measured).items():
        colour, seeds = colours[name], replicates(run)
        run_label: str | None = as_label(name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds)")
        for group in _at_equal_steps(seeds):
            x, y = (np.array([[p.sampled[k] for p in seed] for seed in group], float) for k in (key, "frechet"))
            axes.plot(x.mean(axis=0), y.mean(axis=0), marker="o", markersize=3.5, color=colour, label=run_label)
            if len(group) > 1:
                axes.fill_betweenx(y.mean(axis=0), x.min(axis=0), x.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            run_label = None
    axes.set_xlabel(f"{label} (memorization →)")
    axes.set_ylabel("Fréchet distance (← quality)")
    axes.grid(alpha=0.25)
    if measured:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)


def plot_levels(axes: Axes, points: list[FrontPoint], field: str, gap: float | None, control: str) -> None:
    """A field of ``LevelBucket`` at each noise level, of the last models of runs, or where they first reach a mean gap:
    the mean of a run's seeds, and their range as a band; of a single seed the standard error is the band.
    """
    centres = [(bucket.level_from + bucket.level_to) / 2 for bucket in points[0].levels]
    looks = _looks(points, control)
    for name, run in by_run(points).items():
        (colour, style), seeds = looks[name], replicates(run)
        found = np.array([profile(seed, field, gap) for seed in seeds])
        mean, low, high = found.mean(axis=0), found.min(axis=0), found.max(axis=0)
        label = name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds)"
        if len(seeds) == 1:
            error = np.array(profile(seeds[0], f"{field}_error", gap))
            low, high = mean - error, mean + error
        line: dict[str, Any] = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3}
        axes.plot(centres, mean, label=as_label(label), **line)
        axes.fill_between(centres, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(points[0].levels[0].level_from, points[0].levels[-1].level_to)
    axes.grid(alpha=0.25)


def plot_growth(axes: Axes, run: list[FrontPoint], field: str) -> Any:
    """A field of ``LevelBucket`` along the steps of a run, in colour: each model's from the step after the model before
    it. The mean of seeds at the steps that they share, or the first seed if they share none.

    Returns:
        What a colour bar is made of.
    """
    group = _at_equal_steps(replicates(run))[0]
    steps = [point.step for point in group[0]]
    edges = [bucket.level_from for bucket in run[0].levels] + [run[0].levels[-1].level_to]
    found = [[[getattr(bucket, field) for bucket in point.levels] for point in seed[1:]] for seed in group]
    values = np.mean(found, axis=0).T
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0) or 1.0
    axes.set_xlabel("step")
    return axes.pcolormesh(steps, edges, values, cmap="RdBu_r", vmin=-largest, vmax=largest)


def _at_equal_steps(seeds: list[list[FrontPoint]]) -> list[list[list[FrontPoint]]]:
    """Groups of seeds whose points are averaged: all of them, at the steps that they share, or each by itself if they
    share only the base.
    """
    shared = set.intersection(*({p.step for p in seed} for seed in seeds))
    if shared <= {0}:
        return [[seed] for seed in seeds]
    return [[[p for p in seed if p.step in shared] for seed in seeds]]
