"""Local copies: an object or a logo of a training image in another scene. Crops of the images are compared instead of
whole images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ietagc_diffusers.sscd import Descriptor

from ..features import Embedded, Extractor
from ..neighbours import most_similar
from ..protocol import Protocol
from ..vectors import Several
from ..views import places
from .base import ImageSets, Kind, Measured, Metric, mean, missing
from .similarity import is_copy, sim_score

FLAT = 8 / 255  # a crop whose pixels deviate less shows a wall or the sky and is similar to every other one
# The threshold of a crop: what so many percent of the training images stay under among the others, apart from the two
# that are most similar, and no more than HIGHEST (measured: docs/evaluation.md).
INNOCENT_PERCENTILE = 99.9
HIGHEST = 0.98
BACKGROUND_SAMPLES = 1000  # training images whose crops are compared with those of all others

PATCH_SIM_SCORE = Metric("patch_sim_score", "patch Sim Score", sim_score, "bootstrap", detail="local copies")
PATCH_COPY_RATE = Metric(
    "patch_copy_rate", "patch copy rate", mean, "wilson", digits=1, percent=True, detail="local copies"
)
TRAINING_PATCH_SIM_SCORE = Metric(
    "train_train_patch_sim_score", "patch Sim Score of training images among themselves", sim_score, lower=None
)
TRAINING_PATCH_COPY_RATE = Metric(
    "train_train_patch_copy_rate",
    "patch copy rate of training images among themselves",
    mean,
    lower=None,
    digits=1,
    percent=True,
)


@dataclass(frozen=True)
class PatchDescriptor:
    """Extractor of a grid of overlapping square crops: uint8 (N, 3, H, W) -> float32 (N, P, D).

    Args:
        descriptor: describes each crop.
        grid: crops along the small edge; along the other one, as many as lie at most as far apart.
        share: side of a crop as a share of the image's small edge.

    The vector of a flat crop is zero, which is similar to nothing.
    """

    descriptor: Descriptor
    grid: int = 3
    share: float = 0.5

    @property
    def identity(self) -> dict:
        return {"crop_grid": [self.grid, self.share], "flat": FLAT, "of": self.descriptor.identity}

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """See ``crop_boxes``."""
        return crop_boxes(height, width, self.grid, self.share)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        vectors = []
        for top, left, side in self.boxes(*images.shape[2:]):
            crops = images[:, :, top : top + side, left : left + side]
            flat = (crops.float() / 255).std(dim=(2, 3)).amax(dim=1) < FLAT
            vectors.append(torch.where(flat[:, None], 0.0, self.descriptor(crops)))
        return torch.stack(vectors, dim=1)


def crop_boxes(height: int, width: int, grid: int, share: float) -> list[tuple[int, int, int]]:
    """(top, left, side) of each crop of an image in pixels, row by row."""
    small = min(height, width)
    side = max(1, round(share * small))
    spacing = max(1, (small - side) / max(1, grid - 1))
    tops, lefts = (places(edge, side, spacing) for edge in (height, width))
    return [(top, left, side) for top in tops for left in lefts]


def mirrored_crop(crop: int, height: int, width: int, grid: int, share: float) -> int:
    """Where in the mirror image, or from there in the image, a crop lies: another index into ``crop_boxes``."""
    boxes = crop_boxes(height, width, grid, share)
    columns = len({left for _, left, _ in boxes})
    row, column = divmod(crop, columns)
    return row * columns + columns - 1 - column


def most_similar_crops(
    generated: Several, training: Several, groups: tuple[torch.Tensor, torch.Tensor] | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each image the most similar pair of its crops and the training images' crops.

    Args:
        generated: crops of N images, training: of M images, from a ``PatchDescriptor``.
        groups: (N,) and (M,) integers; images of an image's own group are not compared with it.
        options: of ``most_similar``.

    Returns:
        Similarity (N,), the training image (N,), the crop of the generated image (N,) and of the training image (N,).
    """
    of_crops = groups and (groups[0][generated.owners], groups[1][training.owners])
    found, rows = (x[:, 0] for x in most_similar(generated.vectors, training.vectors, groups=of_crops, **options))
    best = generated.best(found)
    owners = training.owners[rows[best]]
    return found[best], owners, best - generated.starts, rows[best] - training.starts[owners]


class Patches(Kind):
    """Similarity of the crops of generated images to those of training images."""

    metrics = (PATCH_SIM_SCORE, PATCH_COPY_RATE, TRAINING_PATCH_SIM_SCORE, TRAINING_PATCH_COPY_RATE)
    mirrors = True

    def __init__(self, protocol: Protocol, descriptor: Descriptor) -> None:
        super().__init__(protocol, descriptor)
        self.patches = PatchDescriptor(descriptor) if protocol.patches else None

    @property
    def extractors(self) -> dict[str, Extractor]:
        return {} if self.patches is None else {"patches": self.patches}

    def measure(self, sets: ImageSets) -> Measured:
        if self.patches is None:
            return missing(self.metrics, "not asked for: set `patches`", protocol={"patches": None})
        grid = [self.patches.grid, self.patches.share]
        similarity, nearest, crop, training_crop = self._both_ways(sets, grid)
        copy_threshold, among = self._among_training(sets.training)
        copies = is_copy(similarity, copy_threshold)
        prompts = sets.prompts
        scores = PATCH_SIM_SCORE.of(similarity, groups=prompts) | PATCH_COPY_RATE.of(copies, groups=prompts)
        measured = Measured(
            scores | {"patch_copy_similarity": copy_threshold},
            columns={
                "patch_similarity": similarity.tolist(),
                "patch_nearest": [sets.training.images.names[i] for i in nearest],
                "patch": crop.tolist(),
                "patch_of_nearest": training_crop.tolist(),
            },
            protocol={"patches": grid},
        )
        return measured | self._searched(sets, copy_threshold) | among

    def _both_ways(self, sets: ImageSets, grid: list) -> tuple[torch.Tensor, ...]:
        """What ``most_similar_crops`` finds, of the mirror images too if training may have mirrored."""
        training, search = sets.training.several["patches"], self.protocol.search_options
        found = most_similar_crops(sets.generated.several["patches"], training, **search)
        mirrored = sets.generated.several.get("patches_mirrored")
        if mirrored is None:
            return found
        similarity, nearest, crop, training_crop = found
        other = most_similar_crops(mirrored, training, **search)
        sizes = sets.generated.features["size"].int().tolist()
        for row in (other[0] > similarity).nonzero()[:, 0].tolist():
            similarity[row], nearest[row], training_crop[row] = other[0][row], other[1][row], other[3][row]
            crop[row] = mirrored_crop(int(other[2][row]), *sizes[row], *grid)
        return similarity, nearest, crop, training_crop

    def _searched(self, sets: ImageSets, copy_threshold: float) -> Measured:
        """How well the crops were found, of images as they are."""
        generated, training = sets.generated.several["patches"], sets.training.several["patches"]

        def search(some: torch.Tensor, options: dict) -> torch.Tensor:
            return most_similar_crops(generated.select(some.tolist()), training, **options)[0]

        if self.protocol.index == "exact":
            return Measured(searches={"patches": "exact"})
        best = search(torch.arange(len(sets.generated.kept)), self.protocol.search_options)
        return self.searched("patches", best, lambda some: search(some, self.protocol.exact_search), copy_threshold)

    def _among_training(self, training: Embedded) -> tuple[float, Measured]:
        """The similarity over which a crop is a copy, and the scores of different training images among themselves.

        Crops of unrelated images are more similar than the images are: a copy must also exceed nearly all that training
        images, other than near duplicates, have among themselves. A few pictures that share an object do not raise the
        threshold, and nothing raises it over ``HIGHEST``.
        """
        own = (TRAINING_PATCH_SIM_SCORE, TRAINING_PATCH_COPY_RATE)
        copy_threshold = self.protocol.copy_threshold(self.descriptor)
        groups = training.content_groups()
        if len(groups.unique()) < 2:
            return copy_threshold, missing(own, "needs two different training images")
        rows = torch.arange(len(groups))
        if len(rows) > BACKGROUND_SAMPLES:
            rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:BACKGROUND_SAMPLES]
        crops, search = training.several["patches"], self.protocol.search_options
        among = most_similar_crops(crops.select(rows.tolist()), crops, (groups[rows], groups), **search)[0]
        whole = training.several["views"].last()
        similar_as_a_whole = most_similar(whole[rows], whole, groups=(groups[rows], groups), **search)[0][:, 0]
        usual = among[similar_as_a_whole <= copy_threshold].sort().values[:-2]
        if len(usual):
            usual_highest = float(np.percentile(usual.double().numpy(), INNOCENT_PERCENTILE))
            copy_threshold = max(copy_threshold, min(usual_highest, HIGHEST))
        scores = TRAINING_PATCH_SIM_SCORE.of(among) | TRAINING_PATCH_COPY_RATE.of(is_copy(among, copy_threshold))
        said = (
            f"a crop counts as copied over a similarity of {copy_threshold:.3f}, which {INNOCENT_PERCENTILE}% of the "
            f"training images stay under among themselves (at most {HIGHEST} is asked for)"
        )
        return copy_threshold, Measured(scores, notes=(said,))
