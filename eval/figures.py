"""The paper's figures from what runs and scores left behind."""

import io
import itertools

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .front import at_gap, by_run, over_seeds, replicates

GREY = "#888888"  # readable on white and on black
VIEW = 0.024  # of held-out loss above the lowest: what lies higher is still the base model, or ruined
COLOURS = ("#c1272d", "#1f6fb2", "#2a9d4f", "#b07aa1", "#e08214", "#17a2a2", "#8c6d31", "#d45087")


def inline_svg(plot, size):
    """SVG of ``plot(axes)`` for an HTML page, in colours for light and dark."""
    style = {
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


def png(figure, path=None):
    """Save a figure to ``path``, or return its bytes."""
    buffer = io.BytesIO()
    figure.savefig(path or buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def plot_similarities(axes, scored):
    """Fig. 6: histograms of the similarity to the nearest training image, and of training images among themselves."""
    groups = [
        (model.name, model.nearest["similarity"], COLOURS[i % len(COLOURS)], "-") for i, model in enumerate(scored)
    ]
    background = [value for value in scored[0].background["similarity"] if value is not None]
    groups.append(("training images among themselves", background, GREY, ":"))
    values = np.concatenate([group[1] for group in groups])
    bins = np.linspace(min(values.min(), 0.0), max(values.max(), 1.0), 60)
    for name, group, colour, line in groups:
        if len(group):
            axes.hist(
                group, bins, density=True, histtype="step", linewidth=1.8, color=colour, linestyle=line, label=name
            )
    axes.axvline(scored[0].scores["protocol"]["copy_similarity"], color=GREY, linewidth=0.8)
    axes.set_xlabel("similarity to the nearest training image")
    axes.set_ylabel("density")
    axes.legend(fontsize=8, loc="upper left")


def _colours(points, control, given):
    """{run: colour}: those given, grey for the control, then one after another of those that are left."""
    chosen = {control: GREY} | (given or {})
    others = itertools.cycle([colour for colour in COLOURS if colour not in chosen.values()])
    return {name: chosen.get(name) or next(others) for name in by_run(points)}


def plot_front(axes, points, control=None, colours=None):
    """Held-out loss against the gap along each run: the mean of its seeds, and their range at equal gap as a band."""
    colours = _colours(points, control, colours)
    lowest = min(p.heldout_loss for p in points)
    for name, run in by_run(points).items():
        colour = colours[name]
        seeds = replicates(run)
        for seed in seeds:
            line = (
                {"linewidth": 2, "marker": "o", "markersize": 3.5}
                if len(seeds) == 1
                else {"linewidth": 0.6, "alpha": 0.5}
            )
            label = name if len(seeds) == 1 else None
            axes.plot([p.gap for p in seed], [p.heldout_loss for p in seed], color=colour, label=label, **line)
        if len(seeds) > 1:
            gaps = np.linspace(0, min(max(p.gap for p in seed) for seed in seeds), 100)
            found = [(gap, losses) for gap in gaps if (losses := over_seeds(run, at_gap, gap)) is not None]
            x, low, mean, high = zip(*((gap, min(v), sum(v) / len(v), max(v)) for gap, v in found), strict=True)
            axes.plot(x, mean, color=colour, linewidth=2, label=f"{name} ({len(seeds)} seeds)")
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    near = [p for p in points if p.heldout_loss < lowest + VIEW]
    axes.set_ylim(lowest - VIEW / 12, lowest + VIEW)
    axes.set_xlim(0, max(p.gap for p in near) * 1.08 + 1e-4)
    axes.set_xlabel("gap between held-out and training loss, from the base on (memorization →)")
    axes.set_ylabel("held-out loss (← quality)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, **({} if len(by_run(points)) < 4 else {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}))


def plot_sampled(axes, points, key, label, control=None, colours=None):
    """What was sampled along each run: the mean of ``key`` over its seeds, and their range as a band, against the
    Frechet distance; as far as the shortest seed goes.
    """
    colours = _colours(points, control, colours)
    for name, run in by_run(points).items():
        colour, seeds = colours[name], replicates(run)
        length = min(map(len, seeds))
        x, y = (np.array([[p.sampled[k] for p in seed[:length]] for seed in seeds], float) for k in (key, "frechet"))
        run_label = name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds)"
        axes.plot(x.mean(axis=0), y.mean(axis=0), marker="o", markersize=3.5, color=colour, label=run_label)
        if len(seeds) > 1:
            axes.fill_betweenx(y.mean(axis=0), x.min(axis=0), x.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel(f"{label} (memorization →)")
    axes.set_ylabel("Fréchet distance (← quality)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
