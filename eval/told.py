"""What the models of a run are told of an image besides the image: its caption, its class, or nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ietagc_diffusers.data import ClassLabels
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.errors import UsageError

from .image_sets import ImageSet
from .pipelines import num_classes

HELD_OUT = 2**40  # beyond the number of any training row, so that labels drawn for held-out images are other draws
Values = list[tuple[int, Any]]  # (index, what is told) of the images of which there is something to tell


def _nothing(images: ImageSet) -> Values:
    return [(index, None) for index in range(len(images))]


@dataclass(frozen=True)
class Told:
    """What models are told of an image.

    Args:
        of_training, of_heldout: find it for the images of such a set.
        needed: what images have to have, for messages.
    """

    of_training: Callable[[ImageSet], Values]
    of_heldout: Callable[[ImageSet], Values]
    needed: str = ""


CAPTIONS = Told(ImageSet.captions, ImageSet.captions, " with captions (a metadata.jsonl with text)")
NOTHING = Told(_nothing, _nothing)


def told_by(config: dict[str, Any], model: str | Path) -> Told:
    """What the models of a run are told.

    A run with ``random`` labels drew them independently of the images; labels of held-out images are drawn in the same
    way, so that both sets show the same relation of images and labels except where a label was learned by heart. With
    ``unique`` labels a held-out image has no class: under that of a training image its loss would say nothing.

    Args:
        config: the settings of the run.
        model: a pipeline of its kind, for the number of classes.
    """
    if "class_labels" not in config:
        return CAPTIONS
    classes = num_classes(model)
    if classes is None:
        return NOTHING
    labels = ClassLabels(config["class_labels"], classes, config.get("label_column"), config.get("seed"))
    return Told(lambda images: _labels(labels, images, "train"), lambda images: _of_heldout(labels, images))


def _labels(labels: ClassLabels, images: ImageSet, setting: str) -> Values:
    (column,) = labels.columns
    found = []
    for index, row in enumerate(images.rows):
        try:
            found.append((index, labels.read({column: row.get(column)})))
        except UsageError as error:
            raise UsageError(f"`{setting}` {images.source}: {images.names[index]} {error}") from error
    return found


def _of_heldout(labels: ClassLabels, images: ImageSet) -> Values:
    if labels.kind == "unique":
        raise UsageError(
            f"`heldout` {images.source}: the run was trained with `class_labels` unique, each image as a class of its "
            "own, so that a held-out image has no class and its loss cannot be compared"
        )
    if labels.kind == "random":
        return [(index, labels.read({SAMPLE_ID: HELD_OUT + index})) for index in range(len(images))]
    return _labels(labels, images, "heldout")
