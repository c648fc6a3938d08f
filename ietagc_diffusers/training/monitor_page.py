"""The monitor's page: curves along the training and the gap by noise level, in one HTML file that loads nothing."""

import html
import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

REFRESH = 30  # seconds, while the run goes on
BLUE, RED, GREY = "#2a6fbb", "#c43b3b", "#8a8a8a"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em } svg { width: 100%; height: auto }
.say { background: #f3f5f8; padding: .8em 1em; border-left: 4px solid #2a6fbb }"""


def page(rows: Sequence[dict[str, Any]], title: str, advice: str, total_steps: int, ended: bool) -> str:
    """The page of measurements (``Meter.measurement``, with ``global_step`` and ``visits_per_image``), at least one."""
    last = rows[-1]
    done = f"ended at step {last['global_step']}" if ended else f"step {last['global_step']} of {total_steps}"
    refresh = "" if ended else f'<meta http-equiv="refresh" content="{REFRESH}">'
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}: {done}</h1>
<p class="say">{html.escape(advice)}</p>
<p>Each training image has been seen {last["visits_per_image"]:.1f} times on average.</p>
<h2>Loss of training and of held-out images, on the same noise</h2>
{_svg(_losses(rows))}
<h2>Gap</h2>
<p>Held-out minus training loss, less the base model's, with the 95% interval over the images. Above zero the model
knows its training images better than others like them.</p>
{_svg(_gap(rows))}
<h2>Gap by noise level, at the last measurement</h2>
{_svg(_levels(last["levels"]))}
</body></html>
"""


def _svg(figure):
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _axes(label, below="step"):
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=below, ylabel=label)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _losses(rows):
    figure, axes = _axes("loss")
    steps = [row["global_step"] for row in rows]
    for name, key, colour in (("training", "train_loss", BLUE), ("held out", "heldout_loss", RED)):
        axes.plot(steps, [row[key] for row in rows], color=colour, marker="o", markersize=3, label=name)
    axes.legend(frameon=False)
    return figure


def _gap(rows):
    figure, axes = _axes("gap")
    steps = [row["global_step"] for row in rows]
    low, high = zip(*(row["gap_ci95"] for row in rows), strict=True)
    axes.fill_between(steps, low, high, color=RED, alpha=0.15, linewidth=0)
    axes.plot(steps, [row["gap"] for row in rows], color=RED, marker="o", markersize=3)
    axes.axhline(0, color=GREY, linewidth=1)
    return figure


def _levels(levels):
    figure, axes = _axes("gap", "noise level, from the least noise")
    places = range(len(levels))
    axes.bar(places, [level["gap"] for level in levels], color=RED, width=0.8)
    axes.set_xticks(places, [f"{level['from']}-{level['to']}" for level in levels], fontsize=8)
    axes.axhline(0, color=GREY, linewidth=1)
    return figure
