"""The demo's page: the report of its models with the front before it, and the README's picture."""

import html
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from ietagc_diffusers.eval.front import FrontPoint, at_gap, by_run, write_csv
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.plots import COLOURS, inline_svg, plot_front, png
from ietagc_diffusers.eval.report import Scored, table_rows, write_report

from demo.measure import NUM_IMAGES

CONTROL, METHOD, FRESH = "none", "iet-agc+", "fresh pictures"
GAPS = (0.01, 0.0125, 0.015, 0.0175, 0.02, 0.03, 0.04)
RUN_COLOURS = dict(zip((CONTROL, METHOD), COLOURS, strict=False))  # as in the report's histogram
STRIP = 6  # captions in the README's picture


def _front(arms):
    return [FrontPoint(**p) for run_dir in arms.values() for p in json.loads((run_dir / "front.json").read_text())]


def front_table(points):
    """Held-out loss of each run where it reaches each gap, and its lowest: rows of (run, [loss or None], lowest)."""
    return [
        (name, [at_gap(run, gap) for gap in GAPS], min(p.heldout_loss for p in run))
        for name, run in by_run(points).items()
    ]


def reading(points):
    """What the front says of the method against the control, in a sentence of numbers."""
    runs = by_run(points)
    if CONTROL not in runs or METHOD not in runs:
        return ""
    differences = {
        gap: method - control
        for gap in GAPS
        if (control := at_gap(runs[CONTROL], gap)) is not None and (method := at_gap(runs[METHOD], gap)) is not None
    }
    lowest = {name: min(p.heldout_loss for p in runs[name]) for name in (CONTROL, METHOD)}
    last = {name: runs[name][-1].gap for name in (CONTROL, METHOD)}
    matched = ", ".join(f"{value:+.4f} at gap {gap:g}" for gap, value in differences.items())
    return (
        f"Held-out loss of {METHOD} minus that of plain training stopped at the same gap, "
        f"where below zero is better: {matched}. "
        f"Lowest held-out loss: {lowest[METHOD]:.4f} against {lowest[CONTROL]:.4f}. "
        f"Gap after the same number of steps: {last[METHOD]:.3f} against {last[CONTROL]:.3f}."
    )


def load_scored(folder, sampled):
    """The ``Scored`` models of the page: runs first, then pictures that copy nothing."""
    models = {name: run_dir / "scored" for name, run_dir in sampled.items()} | {FRESH: folder / "fresh_scored"}
    return [Scored.load(path, name) for name, path in models.items()]


def table(scored, points):
    """The numbers for the screen."""
    lines = [f"{'':52}" + "".join(f"{model.name:>16}" for model in scored)]
    for title, cells, show in table_rows(scored):
        lines.append(f"{title:52}" + "".join(f"{'-' if value is None else show(value):>16}" for value, _ in cells))
    for title, key in (("copies of duplicated pictures", "copy_rate_duplicated"), ("of others", "copy_rate_single")):
        lines.append(f"{title:52}" + "".join(f"{model.scores[key]:>16.1%}" for model in scored))
    lines += ["", "Held-out loss at equal gap (lower is better)"]
    lines.append(f"{'':34}" + "".join(f"{gap:>9g}" for gap in GAPS) + "   lowest")
    for name, losses, lowest in front_table(points):
        shown = "".join(f"{'-' if loss is None else format(loss, '.4f'):>9}" for loss in losses)
        lines.append(f"{name:34}{shown}{lowest:>9.4f}")
    return "\n".join([*lines, "", reading(points)])


def _rows(header, rows):
    """HTML table rows."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "".join(f"<tr>{line}</tr>" for line in lines)


def _intro(points, scored):
    """The front, before the numbers."""
    copied = " and ".join(
        f"{m.name} copied {m.scores['copy_rate']:.1%} ({m.scores['copy_rate_duplicated']:.1%} where the picture was "
        f"duplicated)"
        for m in scored
        if m.name != FRESH
    )
    threshold = scored[0].scores["protocol"]["copy_similarity"]
    gap_rows = _rows(
        ["held-out loss at gap", *(f"{gap:g}" for gap in GAPS), "lowest"],
        [
            [name, *("–" if loss is None else f"{loss:.4f}" for loss in losses), f"{lowest:.4f}"]
            for name, losses, lowest in front_table(points)
        ],
    )
    figure = inline_svg(lambda axes: plot_front(axes, points, CONTROL, RUN_COLOURS), (8, 4.6))
    number = scored[0].scores["num_generated"]
    return f"""
<p>Two models fine-tuned from one base on {NUM_IMAGES} small pictures, 30 of which have four rows: with plain training
and with IET-AGC+. Of {number} pictures drawn for the training captions, {copied}. A copy is more similar to a training
picture (descriptor: pixel, threshold {threshold:.3f}) than 99% of fresh pictures of the same captions are.</p>
<h2>The front</h2>
<figure>{figure}<figcaption>Each point is a model along a run. Plain training stopped at any point is the control: a
method is worth something where it lies below that curve.</figcaption></figure>
<p>{html.escape(reading(points))}</p>
<div class="scroll"><table>{gap_rows}</table></div>"""


def _readme_figure(folder, points, scored):
    """The front beside training pictures and what both models draw where plain training copies most."""
    plain, method = (next(m for m in scored if m.name == name) for name in (CONTROL, METHOD))
    chosen = {}
    for row in np.argsort(plain.nearest["l2_ratio"]):
        chosen.setdefault(plain.nearest["nearest"][row], int(row))
    names, rows = list(chosen)[:STRIP], list(chosen.values())[:STRIP]
    training = load_images(folder / "pictures", "demo")
    lines = [[training.image(training.names.index(name)) for name in names]]
    for model in (plain, method):
        drawn = load_images(model.scores["generated"], "demo")
        lines.append([drawn.image(drawn.names.index(model.nearest["file_name"][row])) for row in rows])
    strip = np.concatenate([np.concatenate([np.asarray(image) for image in line], axis=1) for line in lines])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), gridspec_kw={"width_ratios": [1, 1.1]})
    plot_front(left, [point for point in points if point.run in RUN_COLOURS], CONTROL, RUN_COLOURS)
    right.imshow(strip)
    side = strip.shape[0] // 3
    right.set_yticks([side * (i + 0.5) for i in range(3)], ["training", CONTROL, METHOD])
    right.set_xticks([])
    right.set_title("where plain training copies most", fontsize=10)
    png(figure, folder / "figure.png")


def write(folder, arms, sampled):
    """Write index.html, front.csv and figure.png into ``folder``.

    Args:
        arms: {run: folder} of all runs on the front; sampled: of those whose pictures were scored.

    Returns:
        The page's path, and the numbers as text.
    """
    points = _front(arms)
    write_csv(points, folder / "front.csv")
    scored = load_scored(folder, sampled)
    _readme_figure(folder, points, scored)
    path = write_report(
        scored, Path(folder) / "index.html", title="IET-AGC+ against plain training", intro=_intro(points, scored)
    )
    return path, table(scored, points)
