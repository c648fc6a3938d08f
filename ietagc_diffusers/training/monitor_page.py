"""The monitor's page: curves along the training, the gap by noise level, and the latest drawn images, in one HTML file
that loads nothing.
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

REFRESH = 30  # seconds, while the run goes on
BLUE, RED, GREY = "#2a6fbb", "#c43b3b", "#8a8a8a"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em } svg, img { width: 100%; height: auto }
.say { background: #f3f5f8; padding: .8em 1em; border-left: 4px solid #2a6fbb }"""


def page(
    rows: Sequence[dict[str, Any]],
    title: str,
    advice: str,
    total_steps: int,
    ended: bool,
    sheet: Path | None = None,
) -> str:
    """The page of measurements, at least one: rows of monitor.jsonl. ``sheet``: the latest one, if there is any."""
    last = rows[-1]
    done = f"ended at step {last['global_step']}" if ended else f"step {last['global_step']} of {total_steps}"
    refresh = "" if ended else f'<meta http-equiv="refresh" content="{REFRESH}">'
    measured, drawn, averaged = (
        [row for row in rows if row.get(key) is not None] for key in ("heldout_loss", "copy_rate", "disagreement")
    )
    sections = [
        *([_of_losses(measured)] if measured else []),
        *([_of_copies(drawn)] if drawn else []),
        *([_of_disagreement(averaged)] if averaged else []),
        *([_picture(sheet, last["global_step"])] if sheet is not None and sheet.is_file() else []),
    ]
    said = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(advice))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}: {done}</h1>
<p class="say">{said}</p>
<p>Each training image has been seen {last["visits_per_image"]:.1f} times on average.</p>
{"".join(sections)}</body></html>
"""


def _of_losses(rows):
    return f"""<h2>Loss of training and of held-out images, on the same noise</h2>
{_svg(_losses(rows))}
<h2>Gap</h2>
<p>Held-out minus training loss, less the base model's, with the 95% interval over the images. Above zero the model
knows its training images better than others like them.</p>
{_svg(_gap(rows))}
<h2>Gap by noise level, at the last measurement</h2>
{_svg(_levels(rows[-1]["levels"]))}
"""


def _of_copies(rows):
    last = rows[-1]
    base = last["base_copy_rate"]
    of_base = "" if base is None else f" The dotted line is the base model's share, {base:.1%}."
    return f"""<h2>Copies among drawn images</h2>
<p>The share of {last["num_images"]} images, drawn for what the model is told of training images and always from the
same noise, whose similarity to a training image by {html.escape(last["descriptor"])} is over
{last["copy_similarity"]:g}, with its 95% interval.{of_base}</p>
{_svg(_copy_rate(rows))}
<h2>Sim Score</h2>
<p>The 95th percentile of the similarity of these images to the nearest training image, with its 95% interval. The grey
line is the similarity over which an image counts as a copy.</p>
{_svg(_sim_score(rows))}
"""


def _picture(sheet, step):
    data = io.BytesIO()
    Image.open(sheet).convert("RGB").save(data, "jpeg", quality=85)
    code = base64.b64encode(data.getvalue()).decode()
    return f"""<h2>Drawn images at step {step}, each beside its nearest training image</h2>
<p>The most similar first; copies are framed.</p>
<img src="data:image/jpeg;base64,{code}" alt="pairs of a drawn and a training image">
"""


def _of_disagreement(rows):
    return f"""<h2>Disagreement of the proxies before they are averaged</h2>
<p>How far they are from their mean, beside how far the mean came in the round. At the square root of K - 1 their
updates have nothing in common; above it they undo one another.</p>
{_svg(_disagreement(rows))}
"""


def _svg(figure):
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _axes(label, below="step"):
    from matplotlib.figure import Figure  # takes half a second, which runs without a page need not wait for

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


def _with_interval(rows, key, label, colour):
    figure, axes = _axes(label)
    steps = [row["global_step"] for row in rows]
    low, high = zip(*(row[f"{key}_ci95"] for row in rows), strict=True)
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, [row[key] for row in rows], color=colour, marker="o", markersize=3)
    return figure, axes


def _gap(rows):
    figure, axes = _with_interval(rows, "gap", "gap", RED)
    axes.axhline(0, color=GREY, linewidth=1)
    return figure


def _copy_rate(rows):
    figure, axes = _with_interval(rows, "copy_rate", "copy rate", RED)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if rows[-1]["base_copy_rate"] is not None:
        axes.axhline(rows[-1]["base_copy_rate"], color=GREY, linewidth=1, linestyle=":")
    return figure


def _sim_score(rows):
    figure, axes = _with_interval(rows, "sim_score", "similarity", BLUE)
    axes.axhline(rows[-1]["copy_similarity"], color=GREY, linewidth=1)
    return figure


def _disagreement(rows):
    figure, axes = _axes("disagreement")
    steps, values = zip(*((row["global_step"], row["disagreement"]) for row in rows), strict=True)
    axes.plot(steps, values, color=BLUE, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    return figure


def _levels(levels):
    figure, axes = _axes("gap", "noise level, from the least noise")
    places = range(len(levels))
    axes.bar(places, [level["gap"] for level in levels], color=RED, width=0.8)
    axes.set_xticks(places, [f"{level['from']}-{level['to']}" for level in levels], fontsize=8)
    axes.axhline(0, color=GREY, linewidth=1)
    return figure
