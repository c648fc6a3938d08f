"""Effective model memorization (Gu et al., 2025): the largest training set that a model still memorizes, from
memorization ratios at several sizes; as numbers, a table and a picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import COLOURS, GREY, as_label

STATISTICS = {"max": "maximum over snapshots", "last": "last model"}


@dataclass(frozen=True)
class Ratio:
    """The memorization ratio of a model: the share of its images that are memorized, and the 95% interval."""

    value: float
    low: float
    high: float
    step: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Ratio":
        """From an entry of emm.json."""
        low, high = record["memorization_ratio_ci95"]
        return cls(record["memorization_ratio"], low, high, record["step"])

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def of_snapshots(snapshots: Sequence[Ratio], statistic: str) -> Ratio:
    """Of the ratios of a run's models, in their order: the largest (``max``), or the ``last``."""
    return snapshots[-1] if statistic == "last" else max(snapshots, key=lambda ratio: ratio.value)


@dataclass(frozen=True)
class Capacity:
    """Effective model memorization, by the sizes that were measured.

    size: the largest at which, and at all smaller ones, the ratio is at least the threshold; None if it is not at the
    smallest. below: the next size, where it is not; None if there is none. interpolated: between them, linearly in
    the logarithm of the size; None without both.
    """

    size: int | None
    below: int | None
    interpolated: float | None

    def __str__(self) -> str:
        if self.size is None:
            return f"under {self.below:,}"
        if self.below is None:
            return f"at least {self.size:,}"
        return f"{self.size:,} (interpolated: {self.interpolated:,.0f})"


def capacity(ratios: dict[int, float], threshold: float) -> Capacity:
    """Effective model memorization of memorization ratios by training-set size; at least one size."""
    reached = None
    for size, ratio in sorted(ratios.items()):
        if ratio >= threshold:
            reached = size
            continue
        if reached is None:
            return Capacity(None, size, None)
        share = (ratios[reached] - threshold) / (ratios[reached] - ratio)
        return Capacity(reached, size, math.exp(math.log(reached) + share * math.log(size / reached)))
    return Capacity(reached, None, None)


Curves = dict[str, dict[int, list[Ratio]]]  # {configuration: {size: ratios of the run's models, in their order}}


def markdown(curves: Curves, threshold: float, notes: Sequence[str] = ()) -> str:
    """The capacities and the ratios behind them, as Markdown."""
    lines = [
        "Effective model memorization: the largest training set that a model still memorizes. At this size and all "
        f"smaller ones at least {100 * threshold:g}% of the images that it draws are memorized: their distance to the "
        "nearest training image is under 1/3 of that to the second nearest.",
        "",
        "| configuration | " + " | ".join(STATISTICS.values()) + " |",
        "|---|" + "---|" * len(STATISTICS),
    ]
    for name, sizes in curves.items():
        cells = [str(capacity(_values(sizes, statistic), threshold)) if sizes else "–" for statistic in STATISTICS]
        lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    measured = sorted({size for sizes in curves.values() for size in sizes})
    for statistic, title in STATISTICS.items():
        lines += ["", f"Memorization ratio, {title}, with 95% intervals over the images (Wilson):", ""]
        lines += ["| images | " + " | ".join(map(_cell, curves)) + " |", "|---|" + "---|" * len(curves)]
        for size in measured:
            cells = [str(of_snapshots(sizes[size], statistic)) if size in sizes else "–" for sizes in curves.values()]
            lines.append(f"| {size:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _values(sizes: dict[int, list[Ratio]], statistic: str) -> dict[int, float]:
    return {size: of_snapshots(snapshots, statistic).value for size, snapshots in sizes.items()}


def _cell(name: str) -> str:
    return name.replace("|", "\\|")


def picture(curves: Curves, threshold: float) -> Figure:
    """The ratio against the size, a curve for each configuration, with intervals; a panel for each statistic."""
    figure, panels = plt.subplots(1, len(STATISTICS), figsize=(11, 4.4), sharey=True, squeeze=False)
    for axes, (statistic, title) in zip(panels[0], STATISTICS.items(), strict=True):
        _plot(axes, curves, statistic, threshold)
        axes.set_title(title)
    panels[0, 0].set_ylabel("memorization ratio")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def _plot(axes: Axes, curves: Curves, statistic: str, threshold: float) -> None:
    for number, (name, sizes) in enumerate(curves.items()):
        if not sizes:
            continue
        colour = COLOURS[number % len(COLOURS)]
        found = [of_snapshots(snapshots, statistic) for snapshots in sizes.values()]
        values = [ratio.value for ratio in found]
        errors = [[r.value - r.low for r in found], [r.high - r.value for r in found]]
        axes.errorbar(
            list(sizes), values, errors, color=colour, marker="o", markersize=4, capsize=3, label=as_label(name)
        )
    axes.axhline(threshold, color=GREY, linestyle=":", label=f"threshold {100 * threshold:g}%")
    measured = sorted({size for sizes in curves.values() for size in sizes})
    axes.set_xscale("log")
    axes.set_xticks(measured, [f"{size:,}" for size in measured], rotation=45, minor=False)
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("training images")
    axes.grid(alpha=0.25)
