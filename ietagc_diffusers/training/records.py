"""The records that a run leaves beside its pipeline."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from .. import __version__
from ..data.contents import contents
from ..data.sources import SAMPLE_ID, stored_column
from ..files import place_name, write_json, write_text
from ..run_folder import RunFolder
from .ensemble import IterativeEnsemble
from .settings import RunSettings

# The settings that training_set.json holds, beside the resolution.
PLACES = ("dataset_name", "train_data_dir")
SOURCE = (*PLACES, "dataset_config_name", "dataset_split")
COLUMNS = ("image_column", "caption_column", "caption_lines")
SELECTION = ("max_train_samples", "seed", "deduplicate", "deduplicate_similarity", "heldout_share")
VIEWS = ("center_crop", "random_flip", "image_interpolation_mode", "alpha")
OF_ONE_START = ("local_rank", "resume_from_checkpoint")  # settings that a repeated run must not take over


def write_config(settings: RunSettings, folder: RunFolder) -> None:
    """config.yaml: every effective value, the method's first; itself a recipe that repeats the run."""
    values, method = settings.values(), settings.method.to_dict()
    ordered = [*method, *sorted(values.keys() - method.keys() - set(OF_ONE_START))]
    shown = {key: list(v) if isinstance(v := values[key], tuple) else v for key in ordered}
    text = yaml.safe_dump({key: v for key, v in shown.items() if v not in (None, [])}, sort_keys=False)
    write_text(folder.config_file, f"# Written by ietagc-diffusers {__version__}; --config repeats the run.\n{text}")


def write_training_set(
    settings: RunSettings,
    rows: Dataset,
    columns: Sequence[str],
    folder: RunFolder,
    fingerprints: Sequence[dict[str, Any]] = (),
    left_out: np.ndarray | None = None,
    canaries: Mapping[int, int] | None = None,
) -> None:
    """training_set.json: what the run is trained on, without a path of this machine; and training_rows.parquet, which
    is never uploaded: the rows that are used, where they lie, and the keys of those that are canaries.

    Args:
        rows: those that are used, after all selection.
        columns: of the rows, what the model is told of each image.
        fingerprints: those that the run has had. Where a resumed run was given another view of the images, the model
            was shown both.
        left_out: see ``rows.Rows``. How many they are is public, which they are is not.
        canaries: see ``views.canary_keys``.
    """
    values, found = settings.values(), contents(rows, settings.image_column, columns)
    views: dict[str, Any] = {"resolution": settings.resolution}
    for name in VIEWS:
        now = values[name]
        shown = {now, *(one.get(name, now) for one in fingerprints)}
        views[name] = now if len(shown) == 1 else None
    if views["random_flip"] is None:
        views["random_flip"] = True  # flipped at random is: shown as it is, and mirrored
    source = {name: values[name] for name in SOURCE}
    record = {
        "version": __version__,
        "num_rows": len(rows),
        "num_left_out": 0 if left_out is None else len(left_out),
        "images_hash": found.images,
        "captions_hash": found.captions,
        **{name: place_name(value) if isinstance(value, str) else value for name, value in source.items()},
        **{name: values[name] for name in (*COLUMNS, *SELECTION) if name in values},
        **views,
    }
    write_json(folder.training_set_file, record)
    named = {name: values[name] for name in (*PLACES, "heldout_dir") if values[name]}
    places = {name: str(Path(value).resolve()) for name, value in named.items() if Path(value).exists()}
    table = {SAMPLE_ID: stored_column(rows, SAMPLE_ID), "image": pa.array(found.marks, pa.binary(16))}
    if canaries:
        table["canary"] = pa.array([canaries.get(row) for row in range(len(rows))], pa.uint8())
    about = {"ietagc_diffusers": __version__, **places}
    if left_out is not None and len(left_out):
        about["left_out"] = json.dumps(left_out.tolist())
    part = folder.training_rows_file.with_suffix(".part")
    pq.write_table(pa.table(table).replace_schema_metadata(about), part)
    part.replace(folder.training_rows_file)


def write_sample_counts(run: IterativeEnsemble, rows: Dataset, folder: RunFolder) -> None:
    """skip_counts.parquet: which of the training images are easily memorized. Called by all processes."""
    visits, skips = run.sample_counts()
    if not run.layout.is_main:
        return
    shard = np.full(len(rows), -1)
    for k, samples in enumerate(run.plan.shards if run.config.shard_data else ()):
        shard[samples] = k
    table = {
        SAMPLE_ID: stored_column(rows, SAMPLE_ID),
        "visits": visits.numpy(),
        "skips": skips.numpy(),
        "shard": shard,
    }
    version = {"ietagc_diffusers": __version__}
    pq.write_table(pa.table(table).replace_schema_metadata(version), folder.skip_counts_file)


def save_shards(run: IterativeEnsemble, rows: Dataset, folder: RunFolder) -> None:
    """Each shard of the final plan as a dataset of its own."""
    for k, samples in enumerate(run.plan.shards):
        rows.select(samples).save_to_disk(folder.shard(k))
