"""What a model with adapters was trained on: what all of them record together, not only one of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapters import base_of_run, find_adapter
from .features import file_keys
from .record import TrainingRecord, TrainingSet, recorded_training, training_set, whole_set


@dataclass(frozen=True)
class Part:
    """A model or an adapter that records its training.

    Attributes:
        name: as it was given; place: where the record is.
    """

    name: str
    place: str | Path
    record: TrainingRecord


def parts_of(model: str | Path | None, lora: Sequence[str] = ()) -> tuple[list[Part], list[str]]:
    """What of a model and its adapters records its training, of a LoRA run also its base if that is a folder; and the
    adapters that do not. Raises ``UsageError``.
    """
    places: dict[str, str | Path] = {}
    if model is not None:
        base = base_of_run(model)
        places |= {base: base} if base is not None and Path(base).is_dir() else {}
        places[str(model)] = model
    places |= {given: find_adapter(given).file.parent for given in lora}
    records = {name: recorded_training(place) for name, place in places.items()}
    parts = [Part(name, places[name], record) for name, record in records.items() if record is not None]
    return parts, [name for name in dict.fromkeys(lora) if records[name] is None]


def recorded_folders(model: str | Path | None, lora: Sequence[str] = ()) -> list[str]:
    """The folders of the images that a model on this machine and its adapters were trained on, or were given to
    measure.
    """
    parts, _ = parts_of(model if model is not None and Path(model).is_dir() else None, lora)
    found = [[*part.record.places.values(), part.record.heldout_dir] for part in parts]
    return [folder for folders in found for folder in folders if folder]


def training_of_all(
    model: str | Path | None, lora: Sequence[str] = (), source: str | None = None, **given: str | None
) -> TrainingSet:
    """The images that a model and its adapters were trained on.

    Where they were trained on different images, ``source`` should hold all of these, and all that it holds is compared.
    Without it the images of one of them are, with a warning for each of the others whose images are not among these.

    Args:
        lora: adapters, see ``adapters.find_adapter``.
        source: a folder or dataset; None: what is recorded.
        given: ``image_column`` and the like, as of ``record.training_set``.

    Raises:
        UsageError: see ``record.training_set``.
    """
    parts, silent = parts_of(model, lora)
    sets = {_identity(part.record): part for part in parts}
    if not sets:
        return training_set(model, source, **given)
    if len(sets) == 1 and not silent:
        return _as_shown(training_set(parts[-1].place, source, **given), parts)
    if source is not None:
        notes = [f"{name} does not record whether it was trained on these images" for name in silent]
        return _as_shown(_all_of(source, parts, notes, given), [] if silent else parts)
    found, lacking = _best([*sets.values()], given)
    compared = f"only {found.images.source} is compared with, and only its captions are drawn"
    warnings = [f"{part.name} records that it was trained on {part.record.described}" for part in lacking]
    warnings += [f"{name} does not record what it was trained on" for name in silent]
    remedy = "Give `train` a folder or dataset that holds the images of all of them."
    told = [f"{warning}, but {compared}: copies of others are not found. {remedy}" for warning in warnings]
    found = replace(found, warnings=(*found.warnings, *told), heldout=None)  # others may have been trained on those
    return _as_shown(found, [] if silent else parts)


def _best(parts: list[Part], given: dict[str, str | None]) -> tuple[TrainingSet, list[Part]]:
    """The images of the part among which those of all others are; if there is none, of the last one. And the parts
    whose images are not among them.
    """
    tried = []
    for part in reversed(parts):
        found = training_set(part.place, None, **given)
        keys = set(file_keys(found.images).values())
        tried.append((found, [one for one in parts if one is not part and not _among(keys, one.record)]))
        if not tried[-1][1]:
            return tried[-1]
    return tried[0]


def _all_of(source: str, parts: list[Part], notes: list[str], given: dict[str, str | None]) -> TrainingSet:
    """All images of ``source``, with a warning for each part whose images are not among them, or may not be."""
    images = whole_set(parts[-1].record, source, **given)
    keys, warnings = set(file_keys(images).values()), []
    for part in parts:
        if not (among := _among(keys, part.record)):
            said = (
                f"Whether {source} holds these is not recorded." if among is None else f"{source} lacks some of these."
            )
            warnings.append(f"{part.name} records that it was trained on {part.record.described}. {said}")
    return TrainingSet(images, parts[-1].record, tuple(warnings), tuple(notes))


def _among(keys: set[bytes], record: TrainingRecord) -> bool | None:
    """Whether these hashes of files are those of all files that the record has hashes of, which are 2,000 of a large
    training set; None: it has none.
    """
    return record.marks <= keys if record.marks else None


def _identity(record: TrainingRecord) -> Any:
    """Equal for records of the same images; of earlier versions, for the same place and selection."""
    chosen = record.selection
    drawn = chosen if chosen.max_train_samples or chosen.heldout_share else chosen.deduplicate
    return record.settings.get("images_hash") or (record.source, *sorted(record.places.items()), drawn)


def _as_shown(found: TrainingSet, parts: Sequence[Part]) -> TrainingSet:
    """With a record that does not know how images were cropped and mirrored, unless all these parts say the same."""
    if found.record is None or len({part.record.views for part in parts}) == 1:
        return found
    unknown = dict.fromkeys(("center_crop", "random_flip"))
    return replace(found, record=replace(found.record, settings=found.record.settings | unknown))
