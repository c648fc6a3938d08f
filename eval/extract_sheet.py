"""A picture of training images beside what was drawn of them."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .plots import COLOURS, GREY

# Of a training image: the name of each picture, the picture, its similarity and whether it is a copy.
Shown = list[tuple[str, Image.Image, float | None, bool]]
COLUMNS = 2  # training images side by side
EDGE = 1.15  # of a picture, in inches


def sheet(title: str, rows: list[Shown]) -> Figure:
    """Training images, two side by side, each followed by the nearest pictures; of copies the similarity is red."""
    columns = min(COLUMNS, len(rows))
    pictures, lines = len(rows[0]), -(-len(rows) // columns)
    gaps = [1.0] * pictures + [0.25]
    widths = (gaps * columns)[:-1]
    figure, axes = plt.subplots(
        lines,
        len(widths),
        figsize=(EDGE * sum(widths), EDGE * 1.25 * lines + 0.5),
        gridspec_kw={"width_ratios": widths},
        squeeze=False,
    )
    for cell in axes.flat:
        cell.axis("off")
    for number, shown in enumerate(rows):
        line, column = divmod(number, columns)
        for place, (name, picture, similarity, copy) in enumerate(shown):
            cell = axes[line, column * (pictures + 1) + place]
            cell.imshow(np.asarray(picture), interpolation="nearest")
            text = name if similarity is None else f"{name} {similarity:.2f}"
            cell.set_title(text, fontsize=8, color=COLOURS[0] if copy else GREY, pad=3)
    figure.suptitle(title, fontsize=10, y=0.995, va="top")
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.62 / figure.get_figheight(), wspace=0.05, hspace=0.25
    )
    return figure
