"""Near duplicates: a descriptor that needs no network, a threshold measured on the images themselves, and clusters."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

VERSION = 1  # of the descriptor's vectors; a change makes caches of them stale
EDGE = 64  # pixels, to which an image is shrunk before its frequencies are taken
LUMA, CHROMA = 10, 6  # frequencies of each direction that are kept of brightness and of the two colour differences
FLAT = 1e-3  # grey levels: an image whose frequencies are all weaker has nothing to compare

SAMPLED = 300  # images whose altered versions are looked at
COMPARED = 2000  # images that are compared with all others to learn how similar different images are
MISSED = 0.05  # share of the images that may be less similar to an altered version than the threshold
FALSE = 0.001  # share of the different images that may be more similar than it; of fewer than 1,000 images it is one
LOWEST = 0.5  # no threshold is lower, however weak the descriptor is on these images
CROPPED, DARKER, BRIGHTER, QUALITY = 0.05, 0.8, 1.2, 50  # of the altered versions: a share of each side, factors, JPEG
ROWS, COLUMNS = 1024, 16384  # of a block of similarities: 64 MB


class Vectors(NamedTuple):
    """Of N images the descriptor's vectors of unit length, float32 (N, D), of each as it is and mirrored."""

    plain: torch.Tensor
    mirrored: torch.Tensor


@cache
def _cosines() -> torch.Tensor:
    """The orthonormal DCT-II of ``EDGE`` values, its lowest frequencies: float64 (LUMA, EDGE)."""
    places, frequencies = torch.arange(EDGE, dtype=torch.float64), torch.arange(LUMA, dtype=torch.float64)
    waves = torch.cos(torch.pi * frequencies[:, None] * (2 * places + 1) / (2 * EDGE)) * (2 / EDGE) ** 0.5
    waves[0] /= 2**0.5
    return waves


@cache
def _frequencies() -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of the descriptor's values: the length of its frequency, float64 (D,), and -1 where a mirror image has
    the opposite value, float32 (D,).
    """
    lengths, signs = [], []
    for number in (LUMA, CHROMA, CHROMA):
        steps = torch.arange(number, dtype=torch.float64)
        lengths.append(torch.hypot(steps[:, None], steps).flatten()[1:])
        signs.append((1 - 2 * (steps % 2)).expand(number, number).flatten()[1:])
    return torch.cat(lengths), torch.cat(signs).float()


def low_frequencies(images: torch.Tensor) -> torch.Tensor:
    """The descriptor: what the image is like from afar, without its mean colour. Needs no network.

    The lowest frequencies (DCT-II) of brightness and colour. Natural images have amplitudes that fall with the
    frequency: each is multiplied by its frequency, and its root is taken, so that no few of them decide.

    Args:
        images: uint8 (N, 3, H, W).

    Returns:
        float32 (N, D), of unit length, which float16 and ``of_half`` keep; 0, which is similar to nothing, for images
        of a single colour.
    """
    red, green, blue = images.float().unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    small = F.interpolate(torch.stack([luma, blue - luma, red - luma], 1), (EDGE, EDGE), mode="area").double()
    waves = _cosines()
    found = waves @ small @ waves.T
    kept = (found[:, 0], found[:, 1, :CHROMA, :CHROMA], found[:, 2, :CHROMA, :CHROMA])
    values = torch.cat([each.flatten(1)[:, 1:] for each in kept], dim=1)
    values = torch.where(values.abs() < FLAT, 0, values) * _frequencies()[0]
    return of_half(F.normalize(values.sign() * values.abs().sqrt(), dim=1).half())


def of_half(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (N, D) of unit length that were kept as float16."""
    return F.normalize(vectors.float(), dim=1)


def both_ways(vectors: torch.Tensor) -> Vectors:
    """With the vectors of the mirror images, for those of ``low_frequencies``: odd frequencies along x are opposite."""
    return Vectors(vectors, vectors * _frequencies()[1])


def altered(image: Image.Image, draw: np.random.Generator) -> list[Image.Image]:
    """Versions of an RGB image that are still the same picture: 5% of its height and width cut off at a drawn place, as
    a JPEG of quality 50 of half the size, and 20% darker and brighter.
    """
    width, height = image.size
    across, down = round(width * CROPPED), round(height * CROPPED)
    left, top = int(draw.integers(across + 1)), int(draw.integers(down + 1))
    buffer = io.BytesIO()
    image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=QUALITY
    )
    return [
        image.crop((left, top, left + width - across, top + height - down)),
        Image.open(buffer).convert("RGB"),
        *(ImageEnhance.Brightness(image).enhance(factor) for factor in (DARKER, BRIGHTER)),
    ]


def drawn(number: int, most: int) -> list[int]:
    """At most so many of ``number`` images, the same every time, ascending."""
    return sorted(np.random.default_rng(0).permutation(number)[:most].tolist())


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it was made of.

    Attributes:
        threshold: two images that are more similar are near duplicates; four decimals.
        altered: the least similarity of an image to its ``altered`` versions: what 95% of the images have at least.
        altered_median: what half of them have.
        different: what the nearest other image has at most, if it is another picture: see ``limit_of_different``; -1 of
            a single image.
        worst: the least similarity to its altered versions, of each image that was looked at.
        nearest: the similarity to the nearest other image, of each that was compared.
    """

    threshold: float
    altered: float
    altered_median: float
    different: float
    worst: np.ndarray = field(repr=False, compare=False)
    nearest: np.ndarray = field(repr=False, compare=False)

    @property
    def weak(self) -> bool:
        """Whether the descriptor cannot tell altered versions of these images from different ones."""
        return self.altered_median < max(LOWEST, self.different)


def calibrate(
    vectors: Vectors, image: Callable[[int], Image.Image], describe: Callable[[Image.Image], torch.Tensor]
) -> Calibration:
    """The threshold for a set of images: halfway between different images and altered versions of one image.

    Where the two overlap, it is the limit of different images, so that few of these are lost; but never more than half
    of the altered versions have, so that duplicates are found in a set that consists of them. Images whose nearest
    other one is as similar as an altered version may be duplicates, and are no different images, unless they are most
    of the set.

    Args:
        vectors: of all N images.
        image: the RGB image of a number.
        describe: an RGB image -> its vector (D,).
    """
    usable = vectors.plain.any(dim=1).nonzero()[:, 0]  # the others are of a single colour, or broken
    if not len(usable):
        return Calibration(1.0, 1.0, 1.0, -1.0, np.empty(0), np.empty(0))
    worst = []
    for row in usable[drawn(len(usable), SAMPLED)].tolist():
        versions = altered(image(row), np.random.default_rng(row))
        worst.append(min(float(describe(version) @ vectors.plain[row]) for version in versions))
    low, median = (float(np.quantile(worst, share)) for share in (MISSED, 0.5))
    nearest = nearest_others(vectors, usable[drawn(len(usable), COMPARED)]).numpy()
    rest = nearest[nearest < low]  # the others may have a duplicate
    different = limit_of_different(rest if 2 * len(rest) >= len(nearest) else nearest)
    between = min(max(different, (low + different) / 2), median)
    threshold = round(min(max(between, LOWEST), 1.0), 4)
    return Calibration(threshold, low, median, different, np.array(worst), nearest)


def limit_of_different(nearest: np.ndarray) -> float:
    """What the similarity to the nearest other image exceeds in one of N images (from 1,000 images on in 0.1% of them)
    where all are different pictures.

    The highest of many similarities follows the law of extremes (Gumbel), whatever the images are. Its place and width
    are read from the lower half of the values, their 10% and 50% quantiles, where duplicates change little.

    Args:
        nearest: (N,) of each image.
    """
    if not np.isfinite(nearest).all():
        return -1.0
    low, median = np.quantile(nearest, [0.1, 0.5])
    share = 1 - max(FALSE, 1 / len(nearest))
    limit = median + (median - low) * (_gumbel(share) - _gumbel(0.5)) / (_gumbel(0.5) - _gumbel(0.1))
    return min(float(limit), 1.0)


def _gumbel(share: float) -> float:
    """The quantile of the standard Gumbel law."""
    return -math.log(-math.log(share))


def nearest_others(vectors: Vectors, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The similarity of each image (or of those of ``rows``) to the nearest other one, mirrored or not: float32 (N,);
    -inf for a single image.
    """
    chosen = torch.arange(len(vectors.plain)) if rows is None else rows
    found = torch.full((len(chosen),), -torch.inf)
    for some, into in zip(chosen.split(ROWS), found.split(ROWS), strict=True):
        for start in range(0, len(vectors.plain), COLUMNS):
            there = slice(start, start + COLUMNS)
            similarity = _similarity(vectors.plain[some], Vectors(vectors.plain[there], vectors.mirrored[there]))
            inside = (some >= start) & (some < start + COLUMNS)
            similarity[inside.nonzero()[:, 0], some[inside] - start] = -torch.inf
            torch.maximum(into, similarity.amax(dim=1), out=into)
    return found


def _similarity(queries: torch.Tensor, others: Vectors) -> torch.Tensor:
    """(A, D) and B images -> (A, B), in [-1, 1]."""
    return torch.maximum(queries @ others.plain.T, queries @ others.mirrored.T).clamp_(-1, 1)


class Clusters(NamedTuple):
    """Which images stand for which.

    kept: of each image the number of the one that is kept for it, its own if it is kept itself, int64 (N,).
    similarity: to the kept image, float32 (N,); 1 for the kept ones.
    """

    kept: np.ndarray
    similarity: np.ndarray

    @property
    def is_kept(self) -> np.ndarray:
        return self.kept == np.arange(len(self.kept))

    @property
    def sizes(self) -> np.ndarray:
        """Of each image the number of images of its cluster, int64 (N,)."""
        return np.bincount(self.kept, minlength=len(self.kept))[self.kept]


def cluster(vectors: Vectors, threshold: float, order: Sequence[int] | np.ndarray | None = None) -> Clusters:
    """Clusters of near duplicates, each of one image that is kept and those that it stands for.

    The images are gone through by preference. One that is more similar than the threshold to an image that was kept
    before is left out, and belongs to the most similar of these; any other is kept. So each image that is left out is
    itself similar to the one that is kept for it, and no two that are kept are near duplicates. Links are not followed
    further (single linkage): in a chain of pictures of which each is similar to the next, such as the frames of a film,
    the ends are different pictures, and all but one would be lost.

    Work is N times the number of kept images; memory, beside the vectors and a copy of the kept ones, is a block.

    Args:
        order: the numbers of the images, those first that are rather kept; by default as they come.
    """
    number = len(vectors.plain)
    places = torch.arange(number) if order is None else torch.as_tensor(np.asarray(order))
    kept, similarity = np.arange(number), np.ones(number, dtype=np.float32)
    leaders = torch.empty(0, dtype=torch.long)
    for some in places.split(ROWS):
        best, which = np.full(len(some), -np.inf, dtype=np.float32), np.full(len(some), -1)
        for others in leaders.split(COLUMNS) if len(leaders) else ():
            near = _similarity(vectors.plain[some], _of(vectors, others)).max(dim=1)
            nearer = near.values.numpy() > best
            best[nearer], which[nearer] = near.values.numpy()[nearer], others[near.indices].numpy()[nearer]
        inside, numbers, new = _similarity(vectors.plain[some], _of(vectors, some)).numpy(), some.numpy(), []
        for row in range(len(some)):
            if best[row] > threshold:
                kept[numbers[row]], similarity[numbers[row]] = which[row], best[row]
                continue
            new.append(row)
            nearer = inside[row + 1 :, row] > best[row + 1 :]
            best[row + 1 :][nearer], which[row + 1 :][nearer] = inside[row + 1 :, row][nearer], numbers[row]
        leaders = torch.cat([leaders, some[new]])
    return Clusters(kept, similarity)


def _of(vectors: Vectors, rows: torch.Tensor) -> Vectors:
    return Vectors(vectors.plain[rows], vectors.mirrored[rows])


def largest_first(sizes: np.ndarray) -> np.ndarray:
    """The numbers of the images by size, (N, 2) in pixels, the largest first; of the same size as they come."""
    return np.argsort(-sizes.astype(np.int64).prod(axis=1), kind="stable")
