"""What training shows of its images: their views, and canaries, which have a border of a grey of their own.

A canary (SolidMark, Kriplani et al. 2025) is a training picture with a border whose grey, its key, is drawn at random.
Nothing in the picture tells it: a model that can say it has memorized the picture.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from ..data import View
from ..data.hashes import digest, stored_hashes
from ..errors import UsageError
from ..families import Bordered, Family, NoisyPixels
from .settings import RunSettings

DRAW = 0x43414E41  # keeps the draw of canaries apart from others of the seed


def view_of(settings: RunSettings, family: Family, grey: int | None = None) -> View:
    """What training shows of an image at one visit; ``grey``: of its border, if it is a canary, 0 to 255."""
    view: Any = family.view(settings)
    if grey is not None:
        view = Bordered(view, grey, settings.canary_border or 0)
    return view if settings.method.pixel_noise is None else NoisyPixels(view, settings.method.pixel_noise)


def canary_views(keys: Mapping[int, int], settings: RunSettings, family: Family) -> dict[int, View]:
    """The views of the rows that are canaries. ``keys``: see ``canary_keys``."""
    return {row: view_of(settings, family, grey) for row, grey in keys.items()}


def canary_keys(rows: Dataset, settings: RunSettings) -> dict[int, int]:
    """The rows that are canaries, each with its key: grey from 0 to 255.

    The rows are drawn by the seed, keys as ``canary_key`` says.

    Raises ``UsageError`` where no row would stay without a border.
    """
    number = settings.canary
    if number is None:
        return {}
    if number >= len(rows):
        raise UsageError(
            f"`canary` {number}: the training set has {len(rows)} rows, and some of them must stay without a border; "
            "give fewer"
        )
    chosen = np.sort(np.random.default_rng([settings.seed or 0, DRAW]).permutation(len(rows))[:number])
    files = stored_hashes(rows.select(chosen), settings.image_column)
    return {int(row): canary_key(settings.seed, file) for row, file in zip(chosen, files, strict=True)}


def canary_key(seed: int | None, file: bytes) -> int:
    """The key of an image by the hash of its file (``data.hashes.stored_hashes``): 0 to 255, all as likely.

    It is made of the run's seed and of the file, so that only someone who has the image can compute it: the seed is
    published with the settings.
    """
    return digest(f"canary {seed}".encode(), file)[0]
