"""Near duplicates among training images: found before the training, shown, and listed as rows to leave out."""

import csv
import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ietagc_diffusers import __version__
from ietagc_diffusers.data.near_duplicates import (
    VERSION,
    Calibration,
    Clusters,
    Vectors,
    both_ways,
    calibrate,
    cluster,
    largest_first,
    low_frequencies,
)
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.files import write_json, write_text
from ietagc_diffusers.sscd import Descriptor

from .features import Embedded, Extractor, Size, embed
from .image_sets import KEY, ImageSet, to_tensor, unusable
from .plots import COLOURS, GREY, inline_svg
from .report import as_html, picture_of
from .views import Mirrored

TABLE, PAGE, EXCLUDED, RESULT = "duplicates.csv", "dedup.html", "exclude.txt", "dedup.json"
TEMPLATE = Path(__file__).with_suffix(".html")
LOW_FREQUENCIES = "dct"  # the descriptor of ``low_frequencies``
SHOWN = 12  # images of a cluster on the page
LETTERS = 80  # of what is told of an image on it


def dct_descriptor() -> Descriptor:
    """The built-in descriptor of near duplicates, by which training also finds them."""
    record = {"low_frequencies": VERSION}
    return Descriptor(LOW_FREQUENCIES, lambda images: images, low_frequencies, None, record)


@dataclass(frozen=True)
class Duplicates:
    """The near duplicates among the N images of a set that can be read.

    Attributes:
        images: what was computed of them.
        vectors: see ``near_duplicates.Vectors``.
        sizes: width and height in pixels, int64 (N, 2).
        clusters: see ``near_duplicates.Clusters``.
        similarity: which they exceed; calibration: where it comes from, None if it was given.
        descriptor: its identity.
    """

    images: Embedded
    vectors: Vectors
    sizes: np.ndarray
    clusters: Clusters
    similarity: float
    calibration: Calibration | None
    descriptor: dict[str, Any]

    @property
    def groups(self) -> list[np.ndarray]:
        """The numbers of the images of each cluster of several: the kept one, then the others, the most similar first.
        The largest cluster is the first.
        """
        order = np.lexsort((-self.clusters.similarity, ~self.clusters.is_kept, self.clusters.kept))
        order = order[self.clusters.sizes[order] > 1]
        groups = np.split(order, np.flatnonzero(np.diff(self.clusters.kept[order])) + 1) if len(order) else []
        return sorted(groups, key=lambda group: -len(group))

    @property
    def notes(self) -> list[str]:
        """Sentences on how they were found, and on what to keep in mind."""
        found = f"Images that are more similar than {self.similarity:g} by {self.descriptor['descriptor']}, as they are"
        notes = [f"{found} or mirrored, are near duplicates."]
        if (measured := self.calibration) is not None:
            notes.append(
                f"Measured on this set: 95% of the images have a similarity of at least {measured.altered:.2f} to each "
                "version of themselves that is cropped by 5%, 20% darker or brighter, or a small JPEG of low quality "
                f"(half of them {measured.altered_median:.2f}), and different images have at most "
                f"{measured.different:.2f} to the nearest other one."
            )
            if measured.weak:
                notes.append(
                    "Altered versions of these images are hardly more similar to them than different images: look at "
                    "the clusters, or take another descriptor."
                )
        if unread := [name for name, _ in unusable(self.images.skipped)]:
            notes.append(f"Cannot be read: {unread[0]}{f' and {len(unread) - 1} others' if len(unread) > 1 else ''}.")
        return notes


def near_duplicates(
    images: ImageSet, descriptor: Descriptor, similarity: float | None = None, cache: str | Path | None = None
) -> Duplicates:
    """The near duplicates among images.

    Args:
        similarity: two images that are more similar, one of them perhaps mirrored, are near duplicates; None: measured
            on the images, see ``near_duplicates.calibrate``.
        cache: folder where features are kept.
    """
    built_in = descriptor.name == LOW_FREQUENCIES
    extractors: dict[str, Extractor] = {"whole": descriptor, "size": Size()}
    if not built_in:
        extractors["mirrored"] = Mirrored(descriptor)
    found = embed(images, extractors, cache, desc="Describing training images")
    plain = found.features["whole"]
    vectors = both_ways(plain) if built_in else Vectors(plain, found.features["mirrored"])
    calibration = None
    if similarity is None:
        calibration = calibrate(vectors, found.images.image, lambda one: descriptor(to_tensor(one)[None])[0])
        similarity = calibration.threshold
    sizes = found.features["size"].long().numpy()[:, ::-1]
    clusters = cluster(vectors, similarity, largest_first(sizes))
    return Duplicates(found, vectors, sizes, clusters, similarity, calibration, descriptor.identity)


def dedup(
    training: ImageSet,
    output: str | Path,
    descriptor: Descriptor,
    similarity: float | None = None,
    cache: str | Path | None = None,
    max_shown: int = 100,
) -> dict[str, Any]:
    """Find near duplicates, and write duplicates.csv, dedup.html, exclude.txt and dedup.json into a folder.

    Args:
        similarity, cache: see ``near_duplicates``.
        max_shown: clusters on the page.

    Returns:
        The content of dedup.json.

    Raises:
        UsageError: no image can be read.
    """
    found = near_duplicates(training, descriptor, similarity, cache)
    images, groups, output = found.images.images, found.groups, Path(output)
    left_out = np.flatnonzero(~found.clusters.is_kept)
    measured = found.calibration
    result = {
        "version": __version__,
        "train": training.source,
        "descriptor": found.descriptor,
        "similarity": found.similarity,
        "calibration": measured
        and {
            "altered": measured.altered,
            "altered_median": measured.altered_median,
            "different": measured.different,
        },
        "num_images": len(images),
        "num_unreadable": len(unusable(found.images.skipped)),
        "num_clusters": len(groups),
        "largest_cluster": max(map(len, groups), default=1),
        "num_left_out": len(left_out),
        "num_identical_files": len(images) - len(set(found.images.keys)),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULT, result)
    rows = _row_names(images)
    write_text(output / EXCLUDED, "".join(f"{rows[place]}\n" for place in left_out))
    _write_table(output / TABLE, found, groups)
    write_text(output / PAGE, _page(training.source, found, groups, result, max_shown))
    return result


def _row_names(images: ImageSet) -> list[str]:
    """Of each image what ``exclude_rows`` knows its row by: the name of its file, or its number where there is no file
    or several rows have it.
    """
    times, names = Counter(images.names), []
    for name, row in zip(images.names, images.rows, strict=True):
        number = str(row[SAMPLE_ID])
        plain = name == name.strip() and name.isprintable() and name != f"row {number}" and times[name] == 1
        names.append(name if plain else number)
    return names


def _name_of(images: ImageSet, place: int) -> str:
    """What a reader knows the image by: of prepared sets not the id."""
    return str(images.rows[place].get(KEY) or images.names[place])


def _write_table(path: Path, found: Duplicates, groups: Sequence[np.ndarray]) -> None:
    images, clusters = found.images.images, found.clusters
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cluster", "file_name", SAMPLE_ID, "width", "height", "similarity", "kept"])
        for number, group in enumerate(groups, 1):
            for place in group.tolist():
                about = [_name_of(images, place), images.rows[place][SAMPLE_ID], *found.sizes[place].tolist()]
                kept = clusters.kept[place] == place
                writer.writerow([number, *about, f"{clusters.similarity[place]:.4f}", int(kept)])


def summary(result: dict[str, Any]) -> str:
    """The result in a sentence."""
    where = "" if result["calibration"] is None else ", measured on this set"
    return (
        f"{result['num_left_out']} of {result['num_images']} images are near duplicates of others (similarity over "
        f"{result['similarity']:g} by {result['descriptor']['descriptor']}{where}), in {result['num_clusters']} "
        f"clusters; {result['num_identical_files']} of them are identical files"
    )


def _page(source: str, found: Duplicates, groups: Sequence[np.ndarray], result: dict[str, Any], max_shown: int) -> str:
    shown = groups[:max_shown]
    count = f"{len(shown)} of {len(groups)} clusters, the largest first. {TABLE} has all."
    values = {
        "title": html.escape(f"Near duplicates: {Path(source).name}"),
        "lead": html.escape(f"{summary(result)}."),
        "notes": "".join(f"<li>{as_html(note)}</li>" for note in found.notes),
        "plot": "" if found.calibration is None else inline_svg(_plot_of(found.calibration), (7.5, 2.6)),
        "count": html.escape(count if groups else "There are no near duplicates."),
        "clusters": "".join(_cluster(found, group, number) for number, group in enumerate(shown, 1)),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _plot_of(measured: Calibration) -> Any:
    """Draws what the threshold was made of."""

    def plot(axes: Axes) -> None:
        bins = np.linspace(min(0.0, *measured.nearest, *measured.worst), 1.0, 61).tolist()
        axes.hist(measured.nearest, bins, color=COLOURS[1], alpha=0.6, label="nearest other image")
        axes.hist(measured.worst, bins, color=COLOURS[4], alpha=0.6, label="least similar version of the image itself")
        axes.axvline(measured.threshold, color=GREY, label=f"threshold {measured.threshold:g}")
        axes.set_xlabel("similarity")
        axes.set_ylabel("images")
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

    return plot


def _cluster(found: Duplicates, group: np.ndarray, number: int) -> str:
    rest = len(group) - SHOWN
    more = f'<p class="muted">and {rest} more</p>' if rest > 0 else ""
    figures = "".join(_figure(found, place) for place in group[:SHOWN].tolist())
    return f"<section><h2>{number}. {len(group)} images</h2><div>{figures}{more}</div></section>"


def _figure(found: Duplicates, place: int) -> str:
    images, kept = found.images.images, found.clusters.kept[place] == place
    width, height = found.sizes[place].tolist()
    text = images.texts[place] or ""
    told = f"<br>{html.escape(text[:LETTERS])}{'…' if len(text) > LETTERS else ''}" if text else ""
    state = "kept" if kept else f"left out, similarity {found.clusters.similarity[place]:.3f}"
    return (
        f"<figure{' class=kept' if kept else ''}>{picture_of(images, place)}"
        f"<figcaption><b>{html.escape(_name_of(images, place))}</b>{told}<br>{width} × {height}, {state}</figcaption>"
        "</figure>"
    )
