"""MQ: how many generated images are much nearer to one training image than to its neighbourhood (eq. 12, 13), and Gu et
al.'s memorization ratio.
"""

from dataclasses import replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from ietagc_diffusers.errors import UsageError

from ..neighbours import nearest_l2
from ..vectors import Several
from ..views import mirrored_pixels, nearest_of_both
from .base import ImageSets, Kind, Measured, Metric, mean, missing

THRESHOLDS = (0.4, 0.5, 0.6)
NUM_NEIGHBOURS = 50
GU_RATIO = 1 / 3
PAPER_SAMPLES = 65_536  # that the paper draws of each model, and counts
TINY = 1e-12

MQ = {
    threshold: Metric(
        f"mq_{threshold}",
        f"MQ {threshold}",
        mean,
        "wilson",
        digits=1,
        percent=True,
        key=f"memorized_quantity.{threshold}",
    )
    for threshold in THRESHOLDS
}
# The same shares as the counts that the paper prints.
COUNTS = {
    threshold: replace(
        metric,
        name=f"{metric.name}_count",
        title=f"{metric.title} of {PAPER_SAMPLES:,}",
        digits=0,
        percent=False,
        per=PAPER_SAMPLES,
    )
    for threshold, metric in MQ.items()
}
MEMORIZATION_RATIO = Metric(
    "memorization_ratio", "memorization ratio", mean, "wilson", digits=1, percent=True, detail="Gu"
)


def l2_ratio(distances: torch.Tensor, indices: torch.Tensor, training: torch.Tensor, protocol: str) -> torch.Tensor:
    """The l2 ratio of each generated image; 0 is an exact copy.

    Args:
        distances, indices: (N, K) of the K nearest training images, K from 2 to 50, as ``nearest_l2`` returns them.
        training: (M, D) pixels, float32 in [0, 1] or uint8.
        protocol: ``iet-agc``, as the released code: squared l2 to the nearest training image over the mean squared l2
            to the K nearest (the nearest included), in [0, 1];
            ``paper``, as eq. 12 is printed: l2 to the nearest, x_bar, over the mean l2 from x_bar to the K training
            images that are nearest to the generated image;
            ``gu`` (Gu et al.): l2 to the nearest over l2 to the second nearest, in [0, 1].

    Returns:
        float32 (N,).
    """
    if protocol == "gu":
        return distances[:, 0] / distances[:, 1].clamp(min=TINY)
    if protocol == "iet-agc":
        squared = distances.double().pow(2)
        return (squared[:, 0] / squared.mean(dim=1).clamp(min=TINY)).float()
    if protocol == "paper":
        return distances[:, 0] / _spreads(training, indices).clamp(min=TINY)
    raise UsageError(f"`l2` {protocol}: must be iet-agc, paper or gu")


def _spreads(training: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
    """Mean l2 from the first of each row of ``neighbours`` (N, K) to all of the row, itself included: (N,).

    Works in buffers that are made once: with new ones for each row the heap fragments, by 160 KB a row at 32 x 32.
    """
    spreads = torch.empty(len(neighbours))
    shape = (neighbours.shape[1], training.shape[1])
    stored, near, first = torch.empty(shape, dtype=training.dtype), torch.empty(shape), torch.empty(shape[1])
    for number in range(len(neighbours)):
        near.copy_(torch.index_select(training, 0, neighbours[number], out=stored))
        if training.dtype == torch.uint8:
            near.div_(255)
        first.copy_(near[0])
        spreads[number] = near.sub_(first).norm(dim=1).mean()
    return spreads


# Both shares are float32 means, as in the scores that earlier versions wrote.


def memorized_quantity(ratios: torch.Tensor, groups: np.ndarray | None = None) -> dict[str, Any]:
    """The share of l2 ratios (N,) at or under each threshold, with intervals: entries of ``scores.json``.

    At or under, as eq. 13 is printed. The released code counts ratios that are under it: the two differ only for a
    ratio that equals a threshold.
    """
    each = [metric.of((ratios <= threshold).float(), groups=groups) for threshold, metric in MQ.items()]
    return reduce(lambda left, right: {key: left[key] | right[key] for key in left}, each)


def memorization_ratio(ratios: torch.Tensor, groups: np.ndarray | None = None) -> dict[str, Any]:
    """Gu et al.'s share of ratios (N,) under 1/3, with its interval: entries of ``scores.json``."""
    return MEMORIZATION_RATIO.of((ratios < GU_RATIO).float(), groups=groups)


class L2(Kind):
    """Distances between the pixels of each generated image and its nearest training images."""

    metrics = (*MQ.values(), *COUNTS.values(), MEMORIZATION_RATIO)

    def measure(self, sets: ImageSets) -> Measured:
        queries, num_training = [sets.generated.features["pixels"]], len(sets.training.kept)
        training = Several.of_one(sets.training.features["pixels"])
        if "pixel_views" in sets.training.several:
            training = sets.training.several["pixel_views"]
            if "views_mirrored" in sets.generated.several:
                queries.append(mirrored_pixels(queries[0]))
        about = Measured(
            protocol={
                "l2": self.protocol.l2,
                "l2_neighbours": min(NUM_NEIGHBOURS, num_training),
                "l2_pixels": sets.pixels,
            }
        )
        if num_training < 2:
            return about | missing(self.metrics, "needs two training images")
        search = partial(nearest_l2, references=training.vectors, owners=training.owners)
        options = self.protocol.search_options
        found = nearest_of_both(
            partial(search, k=NUM_NEIGHBOURS, progress=True, **options), queries, training.owners, NUM_NEIGHBOURS
        )

        def exact(some: torch.Tensor) -> torch.Tensor:
            chosen = [query[some] for query in queries]
            return nearest_of_both(partial(search, **self.protocol.exact_search), chosen, training.owners, 1)[0][:, 0]

        about |= self.searched("l2", found[0][:, 0], exact)
        ratios, gu_ratios = (l2_ratio(*found, training.vectors, protocol) for protocol in (self.protocol.l2, "gu"))
        few = (
            f"MQ compares with all {num_training} training images, which are fewer than {NUM_NEIGHBOURS}: l2 ratios "
            "are higher than with more",
        )
        return about | Measured(
            memorized_quantity(ratios, sets.prompts) | memorization_ratio(gu_ratios, sets.prompts),
            columns={"l2_ratio": ratios.tolist(), "gu_ratio": gu_ratios.tolist()},
            notes=few if num_training < NUM_NEIGHBOURS else (),
        )
