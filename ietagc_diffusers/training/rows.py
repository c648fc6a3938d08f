"""Which rows a run is trained on, and which it only measures."""

from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset

from ..data.conditions import Condition
from ..data.hashes import default_cache, described, near_clusters, pixel_hashes
from ..data.rows import first_rows, held_out, load_and_exclude, load_other_rows
from ..data.sources import SAMPLE_ID, stored_column
from ..errors import UsageError
from .processes import main_first, of_main
from .settings import RunSettings

logger = get_logger(__name__)


class Rows(NamedTuple):
    """training: what is trained on; groups: their groups of duplicates (N,), or None; heldout: what is only measured,
    or None; left_out: sample ids of what is neither, but may be like the training images: rows that were excluded, and
    near duplicates.
    """

    training: Dataset
    groups: np.ndarray | None
    heldout: Dataset | None
    left_out: np.ndarray


def load_rows(settings: RunSettings, condition: Condition, accelerator: Accelerator) -> Rows:
    """The rows of a run: de-duplicated, and some of them held out, on request. No image is on both sides."""
    rows, left_out = main_first(accelerator, lambda: load_and_exclude(settings, condition))
    heldout = None
    if settings.heldout_dir is not None:
        heldout = main_first(accelerator, lambda: load_other_rows(settings, "heldout_dir", condition))
    if len(left_out):
        logger.info(f"{len(left_out)} rows are excluded")
    if not (settings.deduplicate or settings.group_duplicates or settings.heldout_share):
        return Rows(rows, None, heldout, left_out)
    if settings.deduplicate == "near":
        hashes, kept = _near_duplicates(rows, settings, accelerator)
        left_out = np.concatenate([left_out, np.delete(stored_column(rows, SAMPLE_ID).to_numpy(), kept)])
        rows, hashes = rows.select(kept), hashes[kept]
    else:
        column, bad = settings.image_column, settings.replaces_bad_samples
        hashes = of_main(accelerator, lambda: pixel_hashes(rows, column, default_cache(), bad, alpha=settings.alpha))
        logger.info(f"{len(rows)} rows show {len(np.unique(hashes))} different images")
    if settings.deduplicate == "exact":
        first = first_rows(hashes)
        rows, hashes = rows.select(first), hashes[first]
    if settings.heldout_share:
        held = held_out(hashes, settings.heldout_share, settings.seed)
        rows, heldout, hashes = rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held)), hashes[~held]
        logger.info(f"{len(heldout)} rows are held out, {len(rows)} are trained on")
    num_images = len(np.unique(hashes))
    why = [f"`{name}`" for name in ("deduplicate", "heldout_share") if getattr(settings, name)]
    if why and len(rows) < settings.method.num_parts:
        raise UsageError(
            f"`num_shards` {settings.method.num_shards}: more than the {num_images} different images that "
            f"{' and '.join(why)} left"
        )
    return Rows(rows, hashes if settings.group_duplicates and num_images < len(rows) else None, heldout, left_out)


def _near_duplicates(rows: Dataset, settings: RunSettings, accelerator: Accelerator) -> tuple[np.ndarray, np.ndarray]:
    """Pixel hashes (N,), and the numbers of the rows that are kept of the clusters of near duplicates, ascending.

    The similarity becomes a setting, so that it is recorded, and the same when the run is resumed.
    """
    column, alpha = settings.image_column, settings.alpha

    def compute():
        found = described(rows, column, default_cache(), settings.replaces_bad_samples, alpha=alpha)
        clusters, similarity = near_clusters(rows, column, found, settings.deduplicate_similarity, alpha)
        return found.hashes, clusters.is_kept, similarity

    hashes, is_kept, settings.deduplicate_similarity = of_main(accelerator, compute)
    kept = np.flatnonzero(is_kept)
    kept = kept[first_rows(hashes[kept])]  # images of a single colour are similar to nothing
    logger.info(
        f"{len(rows)} rows: {len(kept)} are kept, {len(rows) - len(kept)} are near duplicates of these (similarity "
        f"over {settings.deduplicate_similarity:g}), {len(rows) - len(np.unique(hashes))} of them exact ones"
    )
    return hashes, kept
