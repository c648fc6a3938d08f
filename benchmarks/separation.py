"""How well a loss, by itself or over a reference's loss, tells noisy samples of images that a model has seen from those
of images that it has not. Shared by benchmarks.cheaper_reference and benchmarks.scratch_reference.

Scores are logarithms of losses or of ratios, float64 (draws, images), low where an image was seen. Each draw is at one
noise level for all images, so that scores are compared within a draw: what the memory bank does for each timestep.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ietagc_diffusers.eval.image_sets import ImageSet
from ietagc_diffusers.eval.losses import shown, weights_hash
from ietagc_diffusers.eval.roc import roc_auc
from ietagc_diffusers.families import family_of
from ietagc_diffusers.training.fixed_losses import FixedLosses


class Scores(NamedTuple):
    """Of images that the model has seen, and of others: (draws, N) and (draws, M)."""

    seen: np.ndarray
    unseen: np.ndarray

    def over(self, reference: "Scores") -> "Scores":
        """The logarithm of the ratio to a reference's losses on the same noise."""
        return Scores(self.seen - reference.seen, self.unseen - reference.unseen)

    def of_seen(self, rows: Sequence[int]) -> "Scores":
        """Those of some of the seen images, and of all others."""
        return Scores(self.seen[:, rows], self.unseen)


def auc(scores: Scores) -> np.ndarray:
    """Of each draw the probability that a seen image scores lower than an unseen one: (draws,)."""
    labels = np.repeat([True, False], [scores.seen.shape[1], scores.unseen.shape[1]])
    return np.array([roc_auc(-np.concatenate(draw), labels) for draw in zip(*scores, strict=True)])


def auc_error(scores: Scores, repetitions: int = 100) -> float:
    """Standard error of the mean AUC over draws, by a bootstrap over the images of both sets."""
    rng = np.random.default_rng(0)
    columns = [values.shape[1] for values in scores]
    means = [
        auc(Scores(*(v[:, rng.integers(n, size=n)] for v, n in zip(scores, columns, strict=True)))).mean()
        for _ in range(repetitions)
    ]
    return float(np.std(means))


def skipped(scores: Scores, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are skipped if a share ``rate`` of the seen ones is in each draw: bool, like the scores."""
    threshold = np.quantile(scores.seen, rate, axis=1, keepdims=True)
    return scores.seen < threshold, scores.unseen < threshold


class Meter:
    """Scores of the denoisers in folders, under fixed noise; kept in a folder, so that a second call reads them.

    Args:
        base: a pipeline of the same kind.
        seen, unseen: images with captions.
        levels: a noise level for each draw.
        output: where scores are kept.
        seed: of the noise.
    """

    def __init__(
        self, base: str, seen: ImageSet, unseen: ImageSet, levels: Sequence[int], output: Path, resolution: int, seed=0
    ):
        self.family: Any = family_of(base).load_frozen(base)
        self.sets = [
            FixedLosses(self.family, *shown(images, resolution, len(images)), len(levels), seed, levels=levels)
            for images in (seen, unseen)
        ]
        self.output = output
        conditions = [base, *([images.source, images.names] for images in (seen, unseen)), list(levels), seed]
        self.conditions = hashlib.blake2b(json.dumps(conditions).encode(), digest_size=8).hexdigest()
        output.mkdir(parents=True, exist_ok=True)

    def __call__(self, folder: Path) -> Scores:
        """Of the denoiser in a folder."""
        path = self.output / f"{self.conditions}-{weights_hash(folder)}.npz"
        if not path.exists():
            denoiser = self.family.load_denoiser(folder).eval()
            seen, unseen = (fixed.by_draw(denoiser).double().log().numpy() for fixed in self.sets)
            np.savez(path, seen=seen, unseen=unseen)
        with np.load(path) as found:
            return Scores(found["seen"], found["unseen"])


def middles(parts: int, num_levels: int = 1000) -> list[int]:
    """The middles of equal parts of the noise levels."""
    return [round((part + 0.5) * num_levels / parts) for part in range(parts)]
