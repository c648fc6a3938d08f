"""What a model was trained on, as its run recorded it; and whether the images at hand are those."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ietagc_diffusers.data import DataSettings
from ietagc_diffusers.data.contents import Contents, contents
from ietagc_diffusers.data.hashes import default_cache, described, near_clusters, pixel_hashes
from ietagc_diffusers.data.rows import first_rows, held_out
from ietagc_diffusers.data.sources import SAMPLE_ID, read_source, stored_column
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families.settings import CaptionSettings
from ietagc_diffusers.run_folder import RunFolder

from .image_sets import ImageSet, training_images, training_settings
from .pipelines import pipeline_folder

PLACES = ("dataset_name", "train_data_dir")
CANARY, MARK = "canary", "image"  # columns of the rows that were used: of keys, and of hashes of files
GIVEN = ("image_column", "caption_column", "dataset_config_name", "dataset_split", "label_column")
COLUMNS = {"image_column": "image", "caption_column": "text"}  # with their defaults


@dataclass(kw_only=True)
class _Settings(DataSettings, CaptionSettings):
    """What training is told of its images and their captions."""


class Selection(NamedTuple):
    """Which rows of the training set were used; None: not selected in this way, or not known."""

    max_train_samples: int | None
    seed: int | None
    deduplicate: str | None
    deduplicate_similarity: float | None
    heldout_share: float | None


@dataclass(frozen=True)
class TrainingRecord:
    """What a run recorded of its training set.

    Attributes:
        settings: by name; what is not there, or None, is not known.
        places: ``dataset_name`` and ``train_data_dir`` as they may be read on this machine.
        rows: ``sample_id`` of the rows that were used, in their order, int64 (N,); None if that is not known.
        canaries: {``sample_id``: grey of its border, 0 to 255} of the rows that were canaries, as far as is known.
        left_out: ``sample_id`` of those that were neither trained on nor held out: rows that were excluded, and near
            duplicates; None if that is not known.
        heldout_dir: images that the run was given to measure only, as it named their folder; None: it was given none.
        marks: hashes of the files of the rows that were used, as far as they were read, see ``data.contents``.
    """

    settings: dict[str, Any]
    places: dict[str, str]
    rows: np.ndarray | None = None
    canaries: dict[int, int] = field(default_factory=dict)
    left_out: np.ndarray | None = None
    heldout_dir: str | None = None
    marks: frozenset[bytes] = frozenset()

    @property
    def resolution(self) -> int | None:
        return self.settings.get("resolution")

    @property
    def center_crop(self) -> bool | None:
        return self.settings.get("center_crop")

    @property
    def random_flip(self) -> bool | None:
        return self.settings.get("random_flip")

    @property
    def interpolation(self) -> str | None:
        return self.settings.get("image_interpolation_mode")

    @property
    def alpha(self) -> str | None:
        """How pictures were decoded; earlier versions, which do not say, read as the official script does."""
        return self.settings.get("alpha", "official")

    @property
    def views(self) -> tuple[bool | None, bool | None]:
        """``center_crop`` and ``random_flip``."""
        return self.center_crop, self.random_flip

    @property
    def columns(self) -> dict[str, str]:
        """``image_column`` and ``caption_column``."""
        return {name: self.settings.get(name) or default for name, default in COLUMNS.items()}

    @property
    def selection(self) -> Selection:
        return Selection(*(self.settings.get(name) for name in Selection._fields))

    @property
    def source(self) -> str | None:
        """The name of the training set."""
        names = [Path(value).name if Path(value).is_absolute() else value for value in self._named()]
        return " ".join(names) or None

    def _named(self) -> list[str]:
        names = ("dataset_name", "dataset_config_name", "train_data_dir")
        return [str(self.settings[name]) for name in names if self.settings.get(name)]

    @property
    def num_rows(self) -> int | None:
        return self.settings.get("num_rows")

    def agrees(self, found: Contents) -> bool:
        """Whether these are the images that the model was trained on."""
        return found.images == self.settings.get("images_hash")

    def has_images_of(self, other: "TrainingRecord") -> bool:
        """Whether both models were trained on the same images, by what they record; earlier versions do not say."""
        known = self.settings.get("images_hash")
        return known is not None and known == other.settings.get("images_hash")

    @property
    def described(self) -> str:
        """The training set in words."""
        number = "" if self.num_rows is None else f" ({self.num_rows} rows)"
        return f"{self.source}{number}"


def recorded_training(model: str | Path) -> TrainingRecord | None:
    """What is recorded beside a model of its training set; None if nothing is.

    Models of this package have ``ietagc/training_set.json``; those of its earlier versions only their settings.

    Args:
        model: a run's folder, finished or not, or a Hub id.

    Raises:
        UsageError: the model or its record cannot be read.
    """
    run = RunFolder(model if Path(model).is_dir() else pipeline_folder(model))
    settings = run.training_set()
    if not settings:
        return None
    rows, places, canaries = None, {}, {}
    left_out = None if settings.get("num_left_out") else np.array([], dtype=np.int64)
    heldout_dir, marks = None, frozenset[bytes]()
    if run.config_file.is_file():
        config = run.config()
        places = {name: value for name in PLACES if (value := config.get(name))}
        heldout_dir = config.get("heldout_dir")
    if run.training_rows_file.is_file():
        try:
            table = pq.read_table(run.training_rows_file)
        except (OSError, pa.ArrowInvalid) as error:
            raise UsageError(f"{run.training_rows_file}: cannot be read: {error}") from error
        rows = table[SAMPLE_ID].to_numpy()
        if MARK in table.column_names:
            marks = frozenset(mark for mark in table[MARK].to_pylist() if mark is not None)
        if CANARY in table.column_names:
            keys = zip(rows.tolist(), table[CANARY].to_pylist(), strict=True)
            canaries = {row: grey for row, grey in keys if grey is not None}
        kept = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        places |= {name: kept[name] for name in PLACES if name in kept}
        heldout_dir = kept.get("heldout_dir", heldout_dir)
        if "left_out" in kept:
            left_out = np.array(json.loads(kept["left_out"]), dtype=np.int64)
    return TrainingRecord(settings, places, rows, canaries, left_out, heldout_dir, marks)


@dataclass(frozen=True)
class TrainingSet:
    """The images that a model is compared with.

    Attributes:
        images: those that the model was trained on, where that is known; otherwise all of the given ones.
        record: of the model's training, or None.
        warnings: sentences on images that are not those that the model was trained on, or may not be.
        notes: what else to keep in mind.
        heldout: the images of the same source that a run with ``heldout_share`` left out, and no copy of which it was
            trained on; None for other runs.
    """

    images: ImageSet
    record: TrainingRecord | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    heldout: ImageSet | None = None


def training_set(
    model: str | Path | None,
    source: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str | None = None,
    label_column: str | None = None,
) -> TrainingSet:
    """The images that a model was trained on.

    Args:
        model: a run's folder or a Hub id; None: no model, and so no record.
        source: a folder or dataset; None: what the model records.
        image_column, ...: None: what the model records, or else the default.

    Raises:
        UsageError: no source is given, and none is recorded or it is not on this machine.
    """
    values = image_column, caption_column, dataset_config_name, dataset_split, label_column
    given = dict(zip(GIVEN, values, strict=True))
    record = None if model is None else recorded_training(model)
    if record is None:
        if source is None:
            raise UsageError(f"`train`: {model} does not record what it was trained on; give the training images")
        unknown = () if model is None else (f"{model} does not record whether it was trained on these images",)
        return TrainingSet(_unrecorded(source, given), notes=unknown)
    settings = _settings(record, source, given)
    try:
        rows = read_source(settings, (settings.caption_column,), "train").rows
        images = training_images(settings, "train")
    except UsageError as error:
        if source is None:
            raise UsageError(
                f"`train`: the model records that it was trained on {record.described}, which cannot be read on this "
                f"machine; give the training images ({error})"
            ) from error
        read = record.columns | {"alpha": record.alpha}
        images = _unrecorded(source, read | {key: value for key, value in given.items() if value})
        return TrainingSet(
            images, record, (f"{_trained_on(record)} Whether {source} holds these is unknown: {error}.",)
        )
    found = _compared(record, rows, images, settings, source)
    number = record.settings.get("canary")
    if not number:
        return found
    bordered = (
        f"{number} of the training images were only ever shown with a grey border (canaries), and are as they are here"
    )
    return replace(found, notes=(*found.notes, bordered))


def whole_set(record: TrainingRecord, source: str, **given: str | None) -> ImageSet:
    """All images of ``source``, read as the training that a record is of would read them.

    Args:
        given: ``image_column`` and the like of ``training_set``, in place of what the record says.
    """
    return training_images(_settings(record, source, dict.fromkeys(GIVEN) | given), "train")


def _trained_on(record: TrainingRecord) -> str:
    return f"The model records that it was trained on {record.described}."


def _compared(
    record: TrainingRecord, rows: Dataset, images: ImageSet, settings: _Settings, source: str | None
) -> TrainingSet:
    """The images that were used, of those that were found; with what is to be said of them."""
    if "images_hash" not in record.settings:  # a run of an earlier version
        where = record.places.get("train_data_dir") or record.places.get("dataset_name")
        if source is not None and not _same_place(where, source):
            warning = f"{_trained_on(record)} Whether {source} holds the same images is not recorded."
            return TrainingSet(images, record, (warning,))
        used = next(_selections(record, rows, settings))
        return TrainingSet(images.select(used), record, notes=_of_selection(used, rows, images))
    for used in _selections(record, rows, settings):
        if len(used) != record.num_rows:
            continue
        found = contents(rows.select(used), settings.image_column, (settings.caption_column,))
        if record.agrees(found):
            warnings: tuple[str, ...] = ()
            has_captions = "caption_column" in record.settings  # unlike models without prompts
            if has_captions and found.captions != record.settings.get("captions_hash"):
                warnings = (f"{_trained_on(record)} Its captions were others than those of {images.source}.",)
            notes = _of_selection(used, rows, images)
            return TrainingSet(
                images.select(used), record, warnings, notes, _left_out(record, rows, images, used, settings)
            )
    what = f"The images of {source} are others" if source is not None else f"Since then, {images.source} has changed"
    return TrainingSet(images, record, (f"{_trained_on(record)} {what}: {len(rows)} rows.",))


def _left_out(
    record: TrainingRecord, rows: Dataset, images: ImageSet, used: np.ndarray, settings: _Settings
) -> ImageSet | None:
    """The images that were held out, of those that were found; None also where it is not known which were left out for
    another reason.
    """
    if not record.selection.heldout_share or record.left_out is None:
        return None
    hashes = pixel_hashes(rows, settings.image_column, default_cache(), allow_bad=True, alpha=settings.alpha)
    others = np.isin(stored_column(rows, SAMPLE_ID).to_numpy(), record.left_out)
    return images.select(np.flatnonzero(~np.isin(hashes, hashes[used]) & ~others))


def _of_selection(used: np.ndarray, rows: Dataset, images: ImageSet) -> tuple[str, ...]:
    if len(used) == len(rows):
        return ()
    return (
        f"the model was trained on {len(used)} of the {len(rows)} rows of {images.source}: only these are compared, "
        "and only their captions are drawn",
    )


def _selections(record: TrainingRecord, rows: Dataset, settings: DataSettings) -> Iterator[np.ndarray]:
    """Which of ``rows`` may be those that were used, likeliest first: ascending positions."""
    ids = stored_column(rows, SAMPLE_ID).to_numpy()
    if record.rows is not None and np.isin(record.rows, ids).all():
        yield np.flatnonzero(np.isin(ids, record.rows))
    most, seed, deduplicate, similarity, share = record.selection
    if most is not None or deduplicate or share:
        some, column = rows, settings.image_column
        if most is not None:
            some = some.shuffle(seed=seed).select(range(min(most, len(rows))))
        if deduplicate == "near":
            found = described(some, column, default_cache(), allow_bad=True, alpha=settings.alpha)
            kept = near_clusters(some, column, found, similarity, settings.alpha)[0].is_kept
            some = some.select(np.flatnonzero(kept))
        if deduplicate or share:
            hashes = pixel_hashes(some, column, default_cache(), allow_bad=True, alpha=settings.alpha)
            if deduplicate:
                first = first_rows(hashes)
                some, hashes = some.select(first), hashes[first]
            if share:
                some = some.select(np.flatnonzero(~held_out(hashes, share, seed)))
        yield np.flatnonzero(np.isin(ids, stored_column(some, SAMPLE_ID).to_numpy()))
    yield np.arange(len(rows))


def _same_place(recorded: str | None, source: str) -> bool:
    """Whether a recorded place, of which only the name may be known, may be ``source``."""
    if recorded is None:
        return False
    if Path(recorded).exists() and Path(source).exists():
        return Path(recorded).resolve() == Path(source).resolve()
    return Path(recorded).name == Path(source).resolve().name


def _settings(record: TrainingRecord, source: str | None, given: dict[str, str | None]) -> _Settings:
    """The settings by which training would read the whole set. ``given``: what takes the place of the record."""
    recorded = {key: record.settings.get(key) for key in (*given, "caption_lines")} | {"alpha": record.alpha}
    places: dict[str, str | None] = dict(record.places)
    if source is not None and not any(_same_place(place, source) for place in places.values()):
        places = _places(source)
        recorded |= dict.fromkeys(("dataset_config_name", "dataset_split"))  # of another set
    elif source is not None:
        places = {name: source if _same_place(place, source) else place for name, place in record.places.items()}
    elif not places:
        raise UsageError("`train`: the model does not record where its training images are; give them")
    return _data_settings(places | recorded | {key: value for key, value in given.items() if value is not None})


def _data_settings(values: dict[str, Any]) -> _Settings:
    known = {entry.name for entry in fields(_Settings)}
    # Images that cannot be read are counted and named by those who compare with them.
    return _Settings(
        on_bad_sample="skip", **{key: value for key, value in values.items() if key in known and value is not None}
    )


def _unrecorded(source: str, given: dict[str, Any]) -> ImageSet:
    """Images of which nothing is recorded."""
    return training_images(_data_settings(_places(source) | COLUMNS | {k: v for k, v in given.items() if v}), "train")


def _places(source: str) -> dict[str, str | None]:
    """A source by the setting that training takes it by."""
    settings = training_settings(source)
    return {name: getattr(settings, name) for name in PLACES}
