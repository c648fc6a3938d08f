"""The demo's page: one HTML file with the front, the table, the histograms and the pictures."""

import base64
import html
import io
import json
from pathlib import Path
from string import Template

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from demo.measure import IMAGES_PER_CAPTION, NUM_IMAGES, flat, score, similarities, to_image
from eval.front import FrontPoint, at_gap, by_run, write_csv
from eval.memorized_quantity import THRESHOLDS, l2_ratio
from eval.neighbours import most_similar, nearest_l2
from sscd import pixel_descriptor

CONTROL, METHOD = "none", "iet-agc+"
GAPS = (0.01, 0.0125, 0.015, 0.0175, 0.02, 0.03, 0.04)
COLOURS = {CONTROL: "#333333", METHOD: "#c1272d"}
SHEET = 16  # captions shown

TEMPLATE = Path(__file__).with_suffix(".html")


def _read(path):
    return json.loads(Path(path).read_text())


def _front(arms):
    return [FrontPoint(**point) for run_dir in arms.values() for point in _read(run_dir / "front.json")]


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


def _scored(folder, pictures, sampled, arms):
    """Rows of the table: references first, then runs. {name: scores}."""
    rows = {
        "fresh pictures of the captions": score(
            pictures, torch.cat([pictures.fresh(100 + i) for i in range(IMAGES_PER_CAPTION)])
        ),
        "the training pictures": score(pictures, torch.cat([pictures.training] * IMAGES_PER_CAPTION)),
    }
    return rows | {name: _read(arms[name] / "scores.json") for name in sampled}


COLUMNS = {
    "Sim Score": lambda s: f"{s['sim_score']:.3f}",
    "copies": lambda s: f"{s['copy_rate']:.1%}",
    "of duplicated": lambda s: f"{s['copy_rate_duplicated']:.1%}",
    "of single": lambda s: f"{s['copy_rate_single']:.1%}",
    "MQ 0.4": lambda s: f"{s['memorized_quantity']['0.4']:.1%}",
    "MQ 0.5": lambda s: f"{s['memorized_quantity']['0.5']:.1%}",
    "MQ 0.6": lambda s: f"{s['memorized_quantity']['0.6']:.1%}",
    "Fréchet pixel-8": lambda s: f"{s['frechet_pixel_8']:.2f}",
}


def table(folder, sampled, arms):
    """The numbers for the screen."""
    lines = [f"{'':34}" + "".join(f"{title:>17}" for title in COLUMNS)]
    scores = _read(folder / "scores.json")
    for name, numbers in scores.items():
        lines.append(f"{name:34}" + "".join(f"{show(numbers):>17}" for show in COLUMNS.values()))
    lines += [
        "",
        "Held-out loss at equal gap (lower is better)",
        f"{'':34}" + "".join(f"{gap:>9g}" for gap in GAPS) + "   lowest",
    ]
    points = _front(arms)
    for name, losses, lowest in front_table(points):
        shown = "".join(f"{'-' if loss is None else format(loss, '.4f'):>9}" for loss in losses)
        lines.append(f"{name:34}{shown}{lowest:>9.4f}")
    return "\n".join([*lines, "", reading(points)])


def _plot_front(axes, points):
    runs = by_run(points)
    others = iter(plt.get_cmap("tab10").colors)
    for name, run in runs.items():
        main = name in COLOURS
        axes.plot(
            [p.gap for p in run],
            [p.heldout_loss for p in run],
            marker="o",
            markersize=4 if main else 2,
            linewidth=2.2 if main else 1,
            color=COLOURS.get(name) or next(others),
            label=name,
            zorder=3 if main else 2,
        )
    lowest = min(p.heldout_loss for p in points)
    axes.set_ylim(lowest - 0.002, lowest + 0.024)
    axes.set_xlim(0, max(p.gap for p in points if p.heldout_loss < lowest + 0.024) + 0.003)
    axes.set_xlabel("gap between held-out and training loss, from the base on  (memorization →)")
    axes.set_ylabel("held-out loss  (← quality)")
    axes.grid(alpha=0.25)
    if len(runs) > 3:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    else:
        axes.legend(fontsize=8)


def _plot_histograms(axes, groups):
    bins = np.linspace(0.2, 1, 60)
    for name, values, colour, style in groups:
        axes.hist(
            values, bins=bins, density=True, histtype="step", linewidth=1.8, color=colour, linestyle=style, label=name
        )
    axes.set_xlabel("similarity to the nearest training picture (descriptor: pixel)")
    axes.set_ylabel("density")
    axes.legend(fontsize=8, loc="upper left")


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _inline(png):
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _picture(tensor):
    buffer = io.BytesIO()
    to_image(tensor).save(buffer, format="png")
    return _inline(buffer.getvalue())


def _most_copied(pictures, images):
    """Rows of ``images`` with the lowest l2 ratio, one for each training image, and those training images."""
    ratios = l2_ratio(flat(images), flat(pictures.training))
    nearest = nearest_l2(flat(images), flat(pictures.training))[1][:, 0].tolist()
    chosen = {}
    for row in ratios.argsort().tolist():
        chosen.setdefault(nearest[row], row)
    return list(chosen.values())[:SHEET], list(chosen)[:SHEET]


def _sheet(pictures, images, rows, nearest):
    """HTML cells: a training picture, and what both models drew for the same caption and seed."""
    ratios = {name: l2_ratio(flat(x[rows]), flat(pictures.training)).tolist() for name, x in images.items()}
    cells = []
    for number, (row, training) in enumerate(zip(rows, nearest, strict=True)):
        shown = [(pictures.training[training], "training", "")]
        for name in (CONTROL, METHOD):
            ratio = ratios[name][number]
            shown.append((images[name][row], f"{name} {ratio:.2f}", "copied" if ratio <= THRESHOLDS[0] else ""))
        trio = "".join(
            f'<div><img src="{_picture(picture)}" class="{kind}" alt="{label}">{label}</div>'
            for picture, label, kind in shown
        )
        caption = html.escape(pictures.captions[row % NUM_IMAGES])
        cells.append(f'<div class="cell"><div class="trio">{trio}</div><p>{caption}</p></div>')
    return "".join(cells)


def _rows(header, rows):
    """HTML table rows."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "".join(f"<tr>{line}</tr>" for line in lines)


def _readme_figure(pictures, points, images, chosen, nearest):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), gridspec_kw={"width_ratios": [1, 1.25]})
    _plot_front(left, [point for point in points if point.run in COLOURS])
    rows = [pictures.training[nearest], images[CONTROL][chosen], images[METHOD][chosen]]
    strip = torch.cat([torch.cat(list(row[:10]), dim=2) for row in rows], dim=1)
    right.imshow(strip.permute(1, 2, 0).numpy())
    right.set_yticks([16, 48, 80], ["training", CONTROL, METHOD])
    right.set_xticks([])
    right.set_title("where plain training copies most", fontsize=10)
    return _png(figure)


def write(folder, pictures, arms, sampled):
    """Write index.html, front.csv, scores.json and figure.png into ``folder``. Returns the page's path."""
    points = _front(arms)
    write_csv(points, folder / "front.csv")
    scores = _scored(folder, pictures, sampled, arms)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
    images = {name: torch.from_numpy(np.load(arms[name] / "generated.npy")) for name in sampled}
    values = {name: similarities(pictures, x)[0] for name, x in images.items()}
    threshold = scores[CONTROL]["copy_threshold"]

    figure, axes = plt.subplots(figsize=(8, 4.6))
    _plot_front(axes, points)
    front_png = _png(figure)
    descriptors = pixel_descriptor(pictures.training)
    background, _ = most_similar(descriptors, descriptors, exclude_self=True)
    groups = [(name, v.numpy(), COLOURS[name], "-") for name, v in values.items()]
    groups += [
        ("training against training", background.numpy(), "#888888", ":"),
        ("fresh pictures", similarities(pictures, pictures.reference)[0].numpy(), "#2a7f3f", "--"),
    ]
    figure, axes = plt.subplots(figsize=(8, 3.2))
    _plot_histograms(axes, groups)
    axes.axvline(threshold, color="#888888", linewidth=0.8)
    histogram_png = _png(figure)
    chosen, nearest = _most_copied(pictures, images[CONTROL])
    (folder / "figure.png").write_bytes(_readme_figure(pictures, points, images, chosen, nearest))

    texts = {
        "num_images": NUM_IMAGES,
        "num_generated": scores[CONTROL]["num_generated"],
        "copied": " and ".join(
            f"{name} copied {s['copy_rate']:.1%} ({s['copy_rate_duplicated']:.1%} where the picture was duplicated)"
            for name in (CONTROL, METHOD)
            if (s := scores[name])
        ),
        "reading": reading(points),
        "threshold": f"{threshold:.3f}",
        "front": _inline(front_png),
        "histogram": _inline(histogram_png),
        "gap_rows": _rows(
            ["held-out loss at gap", *(f"{gap:g}" for gap in GAPS), "lowest"],
            [
                [name, *("–" if loss is None else f"{loss:.4f}" for loss in losses), f"{lowest:.4f}"]
                for name, losses, lowest in front_table(points)
            ],
        ),
        "score_rows": _rows(
            ["drawn for training captions", *COLUMNS],
            [[name, *(show(numbers) for show in COLUMNS.values())] for name, numbers in scores.items()],
        ),
        "sheet": _sheet(pictures, images, chosen, nearest),
    }
    page = Template(TEMPLATE.read_text()).substitute(texts)
    path = folder / "index.html"
    path.write_text(page)
    return path
