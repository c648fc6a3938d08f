"""All numbers of a folder of generated images against the training set, each with its protocol. One that cannot be
computed is null, with the reason.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ietagc_diffusers import __version__
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_json
from ietagc_diffusers.sscd import Descriptor
from ietagc_diffusers.sscd.descriptor import SSCD_EDGE

from .drawing import drawing_of
from .features import Embedded, Extractor, Pixels, Size, embed
from .heldout import check_none_shared
from .image_sets import ImageSet, load_again, unusable
from .metrics import ImageSets, Measured
from .protocol import Protocol
from .tools import Tools
from .views import small_views

__all__ = [
    "BACKGROUND",
    "NEAREST",
    "SCORES",
    "Protocol",
    "Tables",
    "Tools",
    "different_versions",
    "images_of",
    "load_scores",
    "score",
]

SCORES, NEAREST, BACKGROUND = "scores.json", "nearest.parquet", "background.parquet"
LARGEST_L2_EDGE = 64
INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Tables:
    """What ``compare`` finds.

    Args:
        scores: the content of ``scores.json``.
        nearest: columns, of a row for each generated image: the nearest training image.
        background: columns, of a row for each training image: its nearest other one.
    """

    scores: dict[str, Any]
    nearest: dict[str, Any]
    background: dict[str, Any]

    def columns(self) -> tuple[dict[str, list], dict[str, list]]:
        """``nearest`` and ``background`` as ``load_scores`` reads them."""
        return pa.table(self.nearest).to_pydict(), pa.table(self.background).to_pydict()

    def save(self, output: str | Path) -> None:
        """Write ``scores.json``, ``nearest.parquet`` and ``background.parquet`` into the folder ``output``."""
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(self.nearest), output / NEAREST)
        pq.write_table(pa.table(self.background), output / BACKGROUND)
        write_json(output / SCORES, self.scores)


def score(
    generated: ImageSet,
    training: ImageSet,
    output: str | Path,
    tools: Tools,
    cache: str | Path | None = None,
    reference: ImageSet | None = None,
    about: dict[str, Any] | None = None,
    heldout: ImageSet | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare images with the training set and write what was found into the folder ``output``; returns the scores.
    See ``compare`` and ``Tables.save``.
    """
    found = compare(generated, training, tools, cache, reference, about, heldout, notes)
    found.save(output)
    return found.scores


def compare(
    generated: ImageSet,
    training: ImageSet,
    tools: Tools,
    cache: str | Path | None = None,
    reference: ImageSet | None = None,
    about: dict[str, Any] | None = None,
    heldout: ImageSet | None = None,
    notes: Sequence[str] = (),
) -> Tables:
    """Compare images with the training set.

    Args:
        generated, training: the two sets of images.
        tools: ``Tools(Protocol(...))``.
        cache: folder of cached features.
        reference: images that the Fréchet distance is measured to; None: the training set.
        about: what else to record: JSON values.
        heldout: pictures of the same kind as the training images that were not trained on. They are compared like the
            generated ones, and say which similarities are usual without copying.
        notes: what else to keep in mind when reading the scores.

    Raises:
        UsageError: a set without a usable image, or held-out files that are also training files.
    """
    num_rows = len(generated) + len(training)
    generated, training = generated.files(), training.files()
    # What a model was trained on shows in what it draws: other sets are decoded like the training images.
    reference, heldout = (None if one is None else one.decoded_like(training) for one in (reference, heldout))
    sets = _describe(generated, training, reference, heldout, tools, cache)
    about_images = _about_images(sets, num_repeated_rows=num_rows - len(generated) - len(training))
    about_images |= _too_small(sets, tools.descriptor)
    measured = functools.reduce(operator.or_, (kind.measure(sets) for kind in tools.kinds), about_images)
    scores = _record(sets, measured, tools) | (about or {})
    scores["notes"] = [*notes, *scores["notes"]]
    return Tables(scores, _metadata_columns(sets.generated.images) | measured.columns, measured.background)


def load_scores(folder: str | Path) -> tuple[dict[str, Any], dict[str, list], dict[str, list]]:
    """(scores, nearest, background) that ``score`` wrote into a folder; the tables as dicts of lists.

    Raises:
        UsageError: a file is missing or broken.
    """
    folder = Path(folder)
    scores = read_json(folder / SCORES)
    try:
        tables = [pq.read_table(folder / name).to_pydict() for name in (NEAREST, BACKGROUND)]
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{folder}: {error}; the command `score` writes the files that are needed") from error
    return scores, *tables


def different_versions(scores: Iterable[dict[str, Any]]) -> str:
    """Words on the versions of this software that computed the scores; empty if it was one."""
    found = sorted({x["protocol"].get("version") or x.get("version") or "an unknown one" for x in scores})
    if len(found) < 2:
        return ""
    return f"different versions of this software ({', '.join(found)}), which may measure differently: score them again"


def images_of(scores: dict[str, Any], side: str) -> ImageSet:
    """The images of a side, ``generated`` or ``train``, loaded again."""
    recorded = scores.get("columns", {}).get(side, {})
    columns = {"text_column" if name == "caption_column" else name: value for name, value in recorded.items()}
    return load_again(scores[side], "scores", columns)


def _describe(
    generated: ImageSet,
    training: ImageSet,
    reference: ImageSet | None,
    heldout: ImageSet | None,
    tools: Tools,
    cache: str | Path | None,
) -> ImageSets:
    """Compute the features of all images."""
    protocol = tools.protocol
    describe = functools.partial(embed, cache=cache, batch_size=protocol.batch_size)
    pixels = Pixels(protocol.pixels or common_edge(generated, describe))
    extractors = tools.extractors(pixels)
    small = {} if heldout is None else small_views()
    of_training = extractors | tools.training_extractors(pixels)
    if heldout is not None:
        of_training["small_views"] = small["small_views"]
    training_features = describe(training, of_training, desc="Describing training images")
    generated_features = describe(
        generated, extractors | tools.generated_extractors, desc="Describing generated images"
    )
    distinct_features = training_features.distinct()
    searched_features = distinct_features if protocol.distinct else training_features
    reference_features, reference_name = searched_features, "train"
    if reference is not None:
        reference_name = reference.source
        if tools.reference_extractors:
            reference_features = describe(
                reference.files(), tools.reference_extractors, desc="Describing reference images"
            )
    heldout_features = None
    if heldout is not None:
        as_training = tools.training_extractors(pixels)["views"]  # what training would have shown of them
        described: dict[str, Extractor] = {"pixels": pixels, **tools.queries, **small, "as_training": as_training}
        heldout_features = describe(heldout.files(), described, desc="Describing held-out pictures").distinct()
        files = set(training_features.keys)
        names = zip(heldout_features.images.names, heldout_features.keys, strict=True)
        check_none_shared(heldout_features.images, [name for name, file in names if file in files])
    return ImageSets(
        generated=generated_features,
        all_training=training_features,
        distinct_training=distinct_features,
        training=searched_features,
        reference=reference_features,
        reference_name=reference_name,
        pixels=pixels.size,
        heldout=heldout_features,
    )


def common_edge(images: ImageSet, describe: Callable[..., Embedded]) -> int:
    """The small edge that most images have, at most 64; of two equally frequent ones the smaller."""
    sizes = describe(images, {"size": Size()}, desc="Measuring generated images").features["size"]
    edges, counts = sizes.amin(dim=1).clamp(max=LARGEST_L2_EDGE).int().unique(return_counts=True)
    return int(edges[counts.argmax()])


def _about_images(sets: ImageSets, num_repeated_rows: int) -> Measured:
    """How many images there are of each sort, with notes on those that bear on the scores."""
    num_prompts, num_generated = len(np.unique(sets.prompts)), len(sets.generated.kept)
    num_duplicates = len(sets.all_training.kept) - len(sets.distinct_training.kept)
    num_small = [int((x.features["size"].amin(dim=1) < sets.pixels).sum()) for x in (sets.generated, sets.all_training)]
    notes = []
    if num_repeated_rows:
        notes.append(f"{num_repeated_rows} rows name an image file that another row names: the file counts once")
    if any(num_small):
        notes.append(
            f"{num_small[0]} generated and {num_small[1]} training images are smaller than the {sets.pixels} pixels at "
            "which l2 is measured: they are enlarged"
        )
    if num_duplicates and sets.training is sets.all_training:
        notes.append(
            f"{num_duplicates} training images are exact duplicates of others: a copy of one has two equally near "
            "neighbours, which Gu's ratio misses, and they raise the Sim Score of training images among themselves; "
            "with `distinct` each image counts once"
        )
    if num_prompts < num_generated:
        notes.append(
            f"{num_generated} images of {num_prompts} prompts: images of one prompt are not independent, and the "
            "intervals count each prompt once"
        )
    num_files = {
        side: len(features.kept) + len(unusable(features.skipped))
        for side, features in (("generated", sets.generated), ("train", sets.all_training))
    }
    counts = {
        "num_generated": num_generated,
        "num_prompts": num_prompts,
        "num_train": len(sets.training.kept),
        "num_train_duplicates": num_duplicates,
        "num_files": num_files,
        "train_hash": sets.all_training.content(),
    }
    return Measured(counts, notes=tuple(notes))


def _too_small(sets: ImageSets, descriptor: Descriptor) -> Measured:
    """A note where most images of a side are smaller than the descriptor needs."""
    if not descriptor.sscd:
        return Measured()
    sides = {"generated": sets.generated, "training": sets.all_training}
    edges = {name: x.features["size"].amin(dim=1) for name, x in sides.items()}
    small = [name for name, edge in edges.items() if (edge <= SSCD_EDGE).double().mean() > 0.5]
    if not small:
        return Measured({"too_small_for_descriptor": False})
    text = (
        f"most {' and '.join(small)} images have at most {SSCD_EDGE} pixels on their small edge: of such images "
        f"{descriptor.name} misses many copies, so compare their pixels too: `descriptor` pixel, and MQ"
    )
    return Measured({"too_small_for_descriptor": True}, notes=(text,))


def _record(sets: ImageSets, measured: Measured, tools: Tools) -> dict[str, Any]:
    """The content of ``scores.json``."""
    generated, training = sets.generated.images, sets.training.images
    protocol = {
        "name": tools.protocol_name,
        **tools.descriptor.identity,
        "searches": measured.searches,
        **measured.protocol,
        "views": tools.views and tools.views.record,
        "distinct": tools.protocol.distinct,
        "version": __version__,
    }
    drawing = drawing_of(generated.source, len(generated))
    known: dict[str, Any] = {} if drawing is None else {"drawing": drawing}
    if sets.heldout is not None:
        known["heldout"] = _location(sets.heldout.images)
    return (
        known
        | measured.scores
        | {
            "protocol": protocol,
            "recall": measured.recall,
            "version": __version__,
            "generated": _location(generated),
            "train": _location(training),
            "columns": {"generated": _columns(generated), "train": _columns(training)},
            "skipped": {"generated": sets.generated.skipped, "train": sets.training.skipped},
            "reasons": measured.reasons,
            "notes": list(measured.notes),
        }
    )


def _columns(images: ImageSet) -> dict[str, Any]:
    """The columns of images and captions, by the names of their flags; ``images_of`` reads them."""
    return {"caption_column" if key == "text_column" else key: column for key, column in images.columns.items()}


def _location(images: ImageSet) -> str:
    """Where the images are: an absolute path, or a dataset's name."""
    return str(Path(images.source).resolve()) if Path(images.source).exists() else images.source


def _metadata_columns(images: ImageSet) -> dict[str, Any]:
    """File name, prompt, seed and, if there are any, label of each image; values of another type than expected, from
    other tools, are null.
    """

    def column(key, kind):
        values = [row.get(key) for row in images.rows]
        return [value if type(value) is kind and (kind is str or value in INT64) else None for value in values]

    labels = column("label", int)
    return {
        **({"label": pa.array(labels, pa.int64())} if any(label is not None for label in labels) else {}),
        "file_name": images.names,
        "text": pa.array(images.texts, pa.string()),
        "seed": pa.array(column("seed", int), pa.int64()),
        "mitigation": pa.array(column("mitigation", str), pa.string()),
        "sample_id": pa.array(column("sample_id", int), pa.int64()),
    }
