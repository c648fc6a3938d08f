"""Held-out images: none of them was trained on."""

from collections.abc import Sequence

from ietagc_diffusers.errors import UsageError

from .features import file_keys
from .image_sets import ImageSet

NAMED = 3  # pictures that a message names


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
