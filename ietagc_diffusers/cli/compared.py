"""Images that commands compare with the training images, or models on."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import common

if TYPE_CHECKING:
    from ietagc_diffusers.eval.image_sets import ImageSet
    from ietagc_diffusers.eval.record import TrainingSet


def other_images(
    args: Namespace, setting: str, training: "TrainingSet", label_column: str | None = None
) -> "ImageSet | None":
    """The images of ``--heldout`` or ``--reference``, read as the training images are; None if there are none."""
    from ietagc_diffusers.eval.heldout import load_other_images

    source = getattr(args, setting)
    columns = args.image_column, args.caption_column, label_column
    return load_other_images(source, setting, training, *columns) if source else None


def heldout_or_left_out(args: Namespace, training: "TrainingSet", label_column: str | None = None) -> "ImageSet":
    """The images of ``--heldout``, or those that the run held out, or was given to measure."""
    if not args.heldout and training.heldout is None and training.record is not None:
        args.heldout = training.record.heldout_dir
    given = other_images(args, "heldout", training, label_column)
    if given is not None:
        return given
    if training.heldout is None:
        raise UsageError("`heldout`: the run held no images out; give images that were not trained on")
    return training.heldout


def in_common(
    args: Namespace,
    training: "TrainingSet",
    heldout: "ImageSet",
    models: Mapping[str, str | Path],
    label_column: str | None = None,
) -> "TrainingSet":
    """``training``, of the first of the models, with only the images that all of those were trained on that record it,
    and a line on the console if these are fewer. Raises ``UsageError`` if one was trained on held-out images.
    """
    from ietagc_diffusers.eval.heldout import in_common
    from ietagc_diffusers.eval.record import recorded_training

    first, *others = models
    sets, said = {first: training}, {*training.warnings}
    for name in others:
        record = recorded_training(models[name])
        if record is None or (training.record is not None and record.has_images_of(training.record)):
            continue
        try:
            sets[name] = common.read_training_set(args, models[name], label_column)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        common.warn(args, (f"{name}: {warning}" for warning in sets[name].warnings if warning not in said))
        said |= {*sets[name].warnings}
    found = training if len(sets) == 1 else in_common(sets, heldout)
    common.warn(args, found.warnings[len(training.warnings) :])
    return found
