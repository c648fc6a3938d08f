"""All numbers of a folder of generated images against the training set, each with its protocol. One that cannot be
computed is null, with the reason.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ietagc_diffusers import __version__
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_json
from ietagc_diffusers.sscd import Descriptor, load_descriptor

from .features import Embedded, Extractor, Pixels, SmallEdge, embed, first_of_each
from .image_sets import ImageSet, load_images, unusable
from .metrics import KINDS, ImageSets, Kind, Measured
from .protocol import Protocol

__all__ = ["BACKGROUND", "NEAREST", "SCORES", "Protocol", "Tools", "images_of", "load_scores", "score"]

SCORES, NEAREST, BACKGROUND = "scores.json", "nearest.parquet", "background.parquet"
LARGEST_L2_EDGE = 64
INT64 = range(-(2**63), 2**63)


@dataclass
class Tools:
    """A protocol with its models loaded: the descriptor, and the kinds of metrics that use it.

    Raises:
        UsageError, DescriptorError: a model that is unknown or cannot be loaded.
    """

    protocol: Protocol
    descriptor: Descriptor = field(init=False)
    kinds: list[Kind] = field(init=False)

    def __post_init__(self) -> None:
        self.descriptor = load_descriptor(self.protocol.descriptor, self.protocol.name, self.protocol.device)
        self.kinds = [kind(self.protocol, self.descriptor) for kind in KINDS]

    @property
    def protocol_name(self) -> str | None:
        """The name of the protocol; None with the descriptor ``pixel``, which has no protocols."""
        return None if self.descriptor.name == "pixel" else self.protocol.resolved_name

    def extractors(self, pixels: Pixels) -> dict[str, Extractor]:
        """What is computed of every image of both sets."""
        always: dict[str, Extractor] = {"descriptor": self.descriptor, "pixels": pixels, "edge": SmallEdge()}
        return always | _merged(kind.extractors for kind in self.kinds)

    @property
    def generated_extractors(self) -> dict[str, Extractor]:
        """What is computed of generated images only."""
        return _merged(kind.generated_extractors for kind in self.kinds)

    @property
    def reference_extractors(self) -> dict[str, Extractor]:
        """What is computed of the images that the Fréchet distance is measured to."""
        return _merged(kind.extractors for kind in self.kinds if kind.uses_reference)


def _merged(dicts: Iterable[dict[str, Extractor]]) -> dict[str, Extractor]:
    return functools.reduce(operator.or_, dicts, {})


def score(
    generated: ImageSet,
    training: ImageSet,
    output: str | Path,
    tools: Tools,
    cache: str | Path | None = None,
    reference: ImageSet | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare images with the training set. Writes ``scores.json``, ``nearest.parquet`` (a row for each generated
    image) and ``background.parquet`` (a row for each training image: its nearest other one) into the folder ``output``.

    Args:
        generated, training: the two sets of images.
        tools: ``Tools(Protocol(...))``.
        cache: folder of cached features.
        reference: images that the Fréchet distance is measured to; None: the training set.
        about: what else to record: JSON values.

    Returns:
        The scores.

    Raises:
        UsageError: a set without a usable image.
    """
    num_rows = len(generated) + len(training)
    generated, training = generated.files(), training.files()
    sets = _describe(generated, training, reference, tools, cache)
    about_images = _about_images(sets, num_repeated_rows=num_rows - len(generated) - len(training))
    measured = functools.reduce(operator.or_, (kind.measure(sets) for kind in tools.kinds), about_images)
    scores = _record(sets, measured, tools) | (about or {})
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(_metadata_columns(sets.generated.images) | measured.columns), output / NEAREST)
    pq.write_table(pa.table(measured.background), output / BACKGROUND)
    write_json(output / SCORES, scores)
    return scores


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


def images_of(scores: dict[str, Any], side: str) -> ImageSet:
    """The images of a side, ``generated`` or ``train``, loaded again."""
    columns = scores.get("columns", {}).get(side, {})
    image_column, text_column = columns.get("image_column", "image"), columns.get("caption_column", "text")
    return load_images(scores[side], "scores", image_column, text_column)


def _describe(
    generated: ImageSet, training: ImageSet, reference: ImageSet | None, tools: Tools, cache: str | Path | None
) -> ImageSets:
    """Compute the features of all images."""
    protocol = tools.protocol
    describe = functools.partial(embed, cache=cache, batch_size=protocol.batch_size)
    pixels = Pixels(protocol.pixels or _common_edge(generated, describe))
    extractors = tools.extractors(pixels)
    training_features = describe(training, extractors, desc="Describing training images")
    generated_features = describe(
        generated, extractors | tools.generated_extractors, desc="Describing generated images"
    )
    distinct_features = training_features.select(first_of_each(training_features.features))
    searched_features = distinct_features if protocol.distinct else training_features
    reference_features, reference_name = searched_features, "train"
    if reference is not None:
        reference_name = reference.source
        if tools.reference_extractors:
            reference_features = describe(
                reference.files(), tools.reference_extractors, desc="Describing reference images"
            )
    return ImageSets(
        generated=generated_features,
        all_training=training_features,
        distinct_training=distinct_features,
        training=searched_features,
        reference=reference_features,
        reference_name=reference_name,
        pixels=pixels.size,
    )


def _common_edge(images: ImageSet, describe: Callable[..., Embedded]) -> int:
    """The small edge that most images have, at most 64; of two equally frequent ones the smaller."""
    edges = describe(images, {"edge": SmallEdge()}, desc="Measuring generated images").features["edge"]
    sizes, counts = edges.clamp(max=LARGEST_L2_EDGE).int().unique(return_counts=True)
    return int(sizes[counts.argmax()])


def _about_images(sets: ImageSets, num_repeated_rows: int) -> Measured:
    """How many images there are of each sort, with notes on those that bear on the scores."""
    num_one_colour = _num_of_one_colour(sets.generated)
    num_duplicates = len(sets.all_training.kept) - len(sets.distinct_training.kept)
    num_small = [int((x.features["edge"] < sets.pixels).sum()) for x in (sets.generated, sets.all_training)]
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
    if num_one_colour:
        notes.append(f"{num_one_colour} generated images are a single flat colour, typical of a broken model")
    num_files = {
        side: len(features.kept) + len(unusable(features.skipped))
        for side, features in (("generated", sets.generated), ("train", sets.all_training))
    }
    counts = {
        "num_generated": len(sets.generated.kept),
        "num_of_one_colour": num_one_colour,
        "num_train": len(sets.training.kept),
        "num_train_duplicates": num_duplicates,
        "num_files": num_files,
        "train_hash": sets.all_training.content(),
    }
    return Measured(counts, notes=tuple(notes))


def _num_of_one_colour(images: Embedded) -> int:
    pixels = images.features["pixels"]
    return int((pixels.amax(dim=1) == pixels.amin(dim=1)).sum())


def _record(sets: ImageSets, measured: Measured, tools: Tools) -> dict[str, Any]:
    """The content of ``scores.json``."""
    generated, training = sets.generated.images, sets.training.images
    protocol = {
        "name": tools.protocol_name,
        **tools.descriptor.identity,
        "searches": measured.searches,
        **measured.protocol,
        "distinct": tools.protocol.distinct,
    }
    return measured.scores | {
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


def _columns(images: ImageSet) -> dict[str, str]:
    """The columns of images and captions, by the names of their flags; ``images_of`` reads them."""
    names = {"image_column": "image_column", "text_column": "caption_column"}
    return {names[key]: column for key, column in images.columns.items()}


def _location(images: ImageSet) -> str:
    """Where the images are: an absolute path, or a dataset's name."""
    return str(Path(images.source).resolve()) if Path(images.source).exists() else images.source


def _metadata_columns(images: ImageSet) -> dict[str, Any]:
    """File name, prompt and seed of each image; values of another type than expected, from other tools, are null."""

    def column(key, kind):
        values = [row.get(key) for row in images.rows]
        return [value if type(value) is kind and (kind is str or value in INT64) else None for value in values]

    return {
        "file_name": images.names,
        "text": pa.array(images.texts, pa.string()),
        "seed": pa.array(column("seed", int), pa.int64()),
        "mitigation": pa.array(column("mitigation", str), pa.string()),
        "sample_id": pa.array(column("sample_id", int), pa.int64()),
    }
