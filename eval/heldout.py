"""Held-out images: read as the training images are, and none of them trained on."""

from collections.abc import Sequence

from ietagc_diffusers.errors import UsageError

from .features import file_keys
from .image_sets import ImageSet, load_images
from .record import COLUMNS, TrainingSet

NAMED = 3  # pictures that a message names


def load_other_images(
    source: str,
    setting: str,
    training: TrainingSet,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
) -> ImageSet:
    """Images that were not trained on, held out or for reference, read as training reads its ``heldout_dir``: like the
    training images, but all of them, and from the columns ``image`` and ``text`` where those of the training set are
    missing.

    Args:
        setting: the setting that names the source, for messages.
        image_column, ...: None: what the model records, or else the default.

    Raises:
        UsageError: there is no such source or no image in it.
    """
    settings = {} if training.record is None else training.record.settings

    def column(name: str, given: str | None) -> str | None:
        return given or settings.get(name) or COLUMNS.get(name)

    images = load_images(
        source,
        setting,
        str(column("image_column", image_column)),
        str(column("caption_column", caption_column)),
        column("label_column", label_column),
        caption_lines=settings.get("caption_lines") or "whole",
        or_default=True,
    )
    return images.decoded_like(training.images)


def check_held_out_files(heldout: ImageSet, training: ImageSet) -> None:
    """Raise ``UsageError`` if files of held-out pictures are also files of the training set, whatever their names."""
    known = set(file_keys(training).values())
    check_none_shared(heldout, [name for name, key in file_keys(heldout).items() if key in known])


def check_none_shared(heldout: ImageSet, shared: Sequence[str]) -> None:
    """Raise ``UsageError`` if some of the held-out pictures, ``shared`` by name, are also among the training images."""
    if shared:
        raise UsageError(
            f"`heldout` {heldout.source}: {len(shared)} of its {len(set(heldout.names))} pictures are also among the "
            f"training images ({named(shared)}); give pictures that were not trained on"
        )


def named(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    return ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])
