"""The records that a run leaves beside its pipeline."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from .. import __version__
from ..data.sources import SAMPLE_ID, stored_column
from ..files import write_text
from ..run_folder import RunFolder
from .ensemble import IterativeEnsemble
from .settings import TrainingSettings

OF_ONE_START = ("local_rank", "resume_from_checkpoint")  # settings that a repeated run must not take over


def write_config(settings: TrainingSettings, folder: RunFolder) -> None:
    """config.yaml: every effective value, the method's first; itself a recipe that repeats the run."""
    values, method = settings.values(), settings.method.to_dict()
    ordered = [*method, *sorted(values.keys() - method.keys() - set(OF_ONE_START))]
    shown = {key: list(v) if isinstance(v := values[key], tuple) else v for key in ordered}
    text = yaml.safe_dump({key: v for key, v in shown.items() if v not in (None, [])}, sort_keys=False)
    write_text(folder.config_file, f"# Written by ietagc-diffusers {__version__}; --config repeats the run.\n{text}")


def write_sample_counts(run: IterativeEnsemble, rows: Dataset, folder: RunFolder) -> None:
    """skip_counts.parquet: which of the training images are easily memorized. Called by all processes."""
    visits, skips = run.sample_counts()
    if not run.layout.is_main:
        return
    shard = np.full(len(rows), -1)
    for k, samples in enumerate(run.plan.shards):
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
