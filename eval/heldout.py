"""Images that models are compared on: training images that all of them were trained on, and held-out images, read as
these are, that none was trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

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


def check_none_shared(heldout: ImageSet, shared: Sequence[str], model: str | None = None) -> None:
    """Raise ``UsageError`` if some of the held-out pictures, ``shared`` by name, are also among the training images.

    ``model``: whose they are, if there are several models.
    """
    if shared:
        whose, nobody = ("", "") if model is None else (f" of {model}", " by any of the models")
        raise UsageError(
            f"`heldout` {heldout.source}: {len(shared)} of its {len(set(heldout.names))} pictures are also among the "
            f"training images{whose} ({named(shared)}); give pictures that were not trained on{nobody}"
        )


def in_common(sets: Mapping[str, TrainingSet], heldout: ImageSet) -> TrainingSet:
    """The first of the sets, with only those of its images that all the models were trained on, and a warning that says
    so if these are not all of them.

    Args:
        sets: what each model was trained on, by the models' names.
        heldout: images that none of them may have been trained on.

    Raises:
        UsageError: naming the models, where one was trained on held-out images, or all of them on fewer than two.
    """
    first, training = next(iter(sets.items()))
    own, held = file_keys(training.images), file_keys(heldout)
    lacking: dict[str, set[str]] = {}
    for name, one in sets.items():
        known = set((own if one is training else file_keys(one.images)).values())
        shared = [picture for picture, key in held.items() if key in known]
        if shared and heldout is training.heldout:
            raise UsageError(
                f"`heldout`: {len(shared)} of the {len(held)} pictures that {first} held out are among the training "
                f"images of {name} ({named(shared)}), since a `heldout_share` is another one with another `seed` or "
                "selection; give pictures that neither was trained on, and train runs that are to be compared with "
                "one `heldout_dir`"
            )
        check_none_shared(heldout, shared, name)
        lacking[name] = {picture for picture, key in own.items() if key not in known}
    dropped = set().union(*lacking.values())
    if not dropped:
        return training
    left = len(own) - len(dropped)
    if left < 2:
        raise UsageError(
            f"`train`: {', '.join(sets)} have {left} training images in common, so that what they memorize cannot be "
            "compared; give models that were trained on the same images"
        )
    numbers = ", ".join(f"{name} not on {len(some)} of them" for name, some in lacking.items() if some)
    warning = f"{first} was trained on {len(own)} images, {numbers}: models are compared on the {left} that all know."
    kept = [index for index, picture in enumerate(training.images.names) if picture not in dropped]
    return replace(training, images=training.images.select(kept), warnings=(*training.warnings, warning))


def named(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    return ", ".join([*names[:NAMED], *(["..."] if len(names) > NAMED else [])])
