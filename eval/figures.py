"""The paper's figures from what runs and scores left behind."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

GREY = "#888888"  # readable on white and on black
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
    """Fig. 6: histograms of the similarity to the nearest training image, and of the training images among themselves."""
    groups = [(model.name, model.nearest["similarity"], COLOURS[i % len(COLOURS)], "-") for i, model in enumerate(scored)]
    background = [value for value in scored[0].background["similarity"] if value is not None]
    groups.append(("training images among themselves", background, GREY, ":"))
    values = np.concatenate([group[1] for group in groups])
    bins = np.linspace(min(values.min(), 0.0), max(values.max(), 1.0), 60)
    for name, group, colour, line in groups:
        if len(group):
            axes.hist(group, bins, density=True, histtype="step", linewidth=1.8, color=colour, linestyle=line, label=name)
    axes.axvline(scored[0].scores["protocol"]["copy_similarity"], color=GREY, linewidth=0.8)
    axes.set_xlabel("similarity to the nearest training image")
    axes.set_ylabel("density")
    axes.legend(fontsize=8, loc="upper left")
