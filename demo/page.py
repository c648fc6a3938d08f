"""The demo's page: the report of its models with the front before it, and the README's picture."""

import html
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from demo.pictures import NUM_DUPLICATED, NUM_IMAGES
from ietagc_diffusers.eval.curves import FrontPoint, at_gap, by_run, differences
from ietagc_diffusers.eval.plots import COLOURS, inline_svg, plot_front, png
from ietagc_diffusers.eval.report import Scored, write_report
from ietagc_diffusers.eval.score import images_of

CONTROL, METHOD, FRESH = "none", "iet-agc+", "fresh pictures"
GAPS = (0.01, 0.0125, 0.015, 0.0175, 0.02, 0.03, 0.04)
RUN_COLOURS = dict(zip((CONTROL, METHOD), COLOURS, strict=False))  # as in the report's histogram
STRIP = 6  # captions in the README's picture


def reading(points: list[FrontPoint]) -> str:
    """Numbers of the method against the control, in sentences."""
    runs = by_run(points)
    method, control = runs[METHOD], runs[CONTROL]
    matched = ", ".join(
        f"{value:+.4f} at gap {gap:g}" for gap, value in differences(method, control, at_gap, GAPS).items()
    )
    lowest, last = ([min(p.heldout_loss for p in run), run[-1].gap] for run in (method, control))
    return (
        f"Held-out loss of {METHOD} minus that of plain training stopped at the same gap, where below zero is better: "
        f"{matched}. Lowest held-out loss: {lowest[0]:.4f} against {last[0]:.4f}. Gap after the same number of steps: "
        f"{lowest[1]:.3f} against {last[1]:.3f}."
    )


def copies(scored: list[Scored], num_images: int = NUM_IMAGES, num_duplicated: int = NUM_DUPLICATED) -> str:
    """The share of copies that each model drew, in a sentence.

    ``num_images``: captions, each drawn in its turn, of which the first ``num_duplicated`` are of duplicated pictures.
    """
    shares = []
    for model in scored:
        copied = np.array(model.nearest["copy"])
        duplicated = copied[np.arange(len(copied)) % num_images < num_duplicated]
        shares.append(f"{model.name} {copied.mean():.1%} (of duplicated pictures {duplicated.mean():.1%})")
    return f"Copies: {', '.join(shares)}."


def _table(points: list[FrontPoint]) -> str:
    """HTML table of held-out losses: where each run first reaches each gap, and its lowest."""
    rows = [["held-out loss at gap", *(f"{gap:g}" for gap in GAPS), "lowest"]]
    for name, run in by_run(points).items():
        losses = [*(at_gap(run, gap) for gap in GAPS), min(p.heldout_loss for p in run)]
        rows.append([name, *("–" if loss is None else f"{loss:.4f}" for loss in losses)])
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _intro(points: list[FrontPoint], scored: list[Scored]) -> str:
    """What the demo did, and the front."""
    scores = scored[0].scores
    figure = inline_svg(lambda axes: plot_front(axes, points, CONTROL, RUN_COLOURS), (8, 4.6))
    return f"""
<p>Two models were fine-tuned from one base on {NUM_IMAGES} small pictures, {NUM_DUPLICATED} of which have four rows:
one with plain training, one with IET-AGC+. Each drew {scores["num_generated"]} pictures for the training captions.
{html.escape(copies(scored))} A copy is more similar to a training picture (descriptor: pixel, threshold
{scores["protocol"]["copy_similarity"]:.3f}) than 99% of fresh pictures of the same captions are.</p>
<h2>The front</h2>
<figure>{figure}<figcaption>Each point is a model saved during a run. Plain training stopped at any point is the
control: a method is useful where its curve is below the control's.</figcaption></figure>
<p>{html.escape(reading(points))}</p>
{_table(points)}"""


def _readme_figure(points: list[FrontPoint], scored: list[Scored]) -> plt.Figure:
    """The front beside training pictures and what both models draw where plain training copies most."""
    plain, method = scored[:2]
    chosen = {}
    for row in np.argsort(plain.nearest["l2_ratio"]):
        chosen.setdefault(plain.nearest["nearest"][row], int(row))
    chosen = dict(list(chosen.items())[:STRIP])

    def line(scores, side, names):
        images = images_of(scores, side)
        return np.concatenate([np.asarray(images.image(images.names.index(name))) for name in names], axis=1)

    lines = [line(plain.scores, "train", chosen)]
    for model in (plain, method):
        lines.append(line(model.scores, "generated", [model.nearest["file_name"][row] for row in chosen.values()]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), gridspec_kw={"width_ratios": [1, 1.1]})
    plot_front(left, [point for point in points if point.run in RUN_COLOURS], CONTROL, RUN_COLOURS)
    right.imshow(np.concatenate(lines))
    side = len(lines[0])
    right.set_yticks([side * (i + 0.5) for i in range(3)], ["training", CONTROL, METHOD])
    right.set_xticks([])
    right.set_title("where plain training copies most", fontsize=10)
    return figure


def write(folder: Path, points: list[FrontPoint], scored: list[Scored]) -> Path:
    """Write index.html and figure.png into ``folder``.

    Args:
        points: of all runs on the front.
        scored: plain training, the method, and fresh pictures.

    Returns:
        The page's path.
    """
    png(_readme_figure(points, scored), folder / "figure.png")
    title = "IET-AGC+ against plain training"
    return write_report(scored, folder / "index.html", title=title, intro=_intro(points, scored))
