"""Nested parts of a training set, of growing size."""

from pathlib import Path
from shutil import rmtree

import numpy as np
from datasets import Dataset

from ietagc_diffusers.data import ImageSettings, load_training_rows
from ietagc_diffusers.data.rows import label_values
from ietagc_diffusers.data.sources import SAMPLE_ID, stored_column
from ietagc_diffusers.errors import UsageError


def first_of_each(labels: np.ndarray | None, num_rows: int, size: int) -> np.ndarray:
    """The first ``size`` / C rows of each of C classes, as Gu et al. have them, or the first ``size`` rows.

    Where C does not divide the size, the first classes have one row more. Smaller subsets are parts of larger ones.

    Args:
        labels: the class of each row (num_rows,), or None.

    Returns:
        Numbers of rows (size,), ascending.

    Raises:
        UsageError: there are not so many rows, in all or of a class.
    """
    if labels is None:
        if size > num_rows:
            raise UsageError(f"sizes {size}: the training set has {num_rows} images")
        return np.arange(size)
    classes = np.unique(labels)
    chosen = []
    for number, label in enumerate(classes):
        wanted, rows = size // len(classes) + (number < size % len(classes)), np.flatnonzero(labels == label)
        if wanted > len(rows):
            raise UsageError(f"sizes {size}: needs {wanted} images of class {label}, and there are {len(rows)}")
        chosen.append(rows[:wanted])
    return np.sort(np.concatenate(chosen))


def source_rows(settings: ImageSettings) -> tuple[Dataset, np.ndarray | None]:
    """The rows of a training set, and their classes if there is a ``label_column``. Raises ``UsageError``."""
    rows = load_training_rows(settings)
    labels = label_values(rows, settings.label_column)
    if labels is not None and stored_column(rows, str(settings.label_column)).null_count:
        raise UsageError(f"`label_column` {settings.label_column}: some rows have no class")
    return rows, labels


def write_subset(rows: Dataset, chosen: np.ndarray, folder: Path) -> None:
    """Write rows as a dataset with images inside, numbered from 0; an interruption leaves nothing under its name."""
    part = folder.with_name(folder.name + ".part")
    rmtree(part, ignore_errors=True)
    rows.select(chosen).remove_columns(SAMPLE_ID).save_to_disk(part)
    part.replace(folder)
