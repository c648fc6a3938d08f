"""Local copies: an object or a logo of a training image in another scene. Crops of the images are compared instead of
whole images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ietagc_diffusers.sscd import Descriptor

from ..features import Extractor
from ..neighbours import most_similar
from ..protocol import Protocol
from .base import ImageSets, Kind, Measured, Metric, mean, missing
from .similarity import is_copy, sim_score

FLAT = 8 / 255  # a crop whose pixels deviate less shows a wall or the sky and is similar to every other one
INNOCENT_PERCENTILE = 99.9
ALWAYS_A_COPY = 0.999

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
    """Extractor of a grid of overlapping square crops: uint8 (N, 3, H, W) -> float32 (N, P * P * D).

    Args:
        descriptor: describes each crop.
        grid: P: crops along each side.
        share: side of a crop as a share of the image's small edge.

    The vector of a flat crop is zero, which is similar to nothing.
    """

    descriptor: Descriptor
    grid: int = 3
    share: float = 0.5

    @property
    def identity(self) -> dict:
        return {"patches": [self.grid, self.share], "flat": FLAT, "of": self.descriptor.identity}

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """See ``crop_boxes``."""
        return crop_boxes(height, width, self.grid, self.share)

    def crops(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of images (N, P * P * D) as vectors of their crops (N * P * P, D)."""
        return vectors.view(len(vectors) * self.grid**2, -1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        vectors = []
        for top, left, side in self.boxes(*images.shape[2:]):
            crops = images[:, :, top : top + side, left : left + side]
            flat = (crops.float() / 255).std(dim=(2, 3)).amax(dim=1) < FLAT
            vectors.append(torch.where(flat[:, None], 0.0, self.descriptor(crops)))
        return torch.stack(vectors, dim=1).flatten(1)


def crop_boxes(height: int, width: int, grid: int, share: float) -> list[tuple[int, int, int]]:
    """(top, left, side) of each crop of an image in pixels, row by row."""
    side = max(1, round(share * min(height, width)))
    places = [torch.linspace(0, edge - side, grid).round().int().tolist() for edge in (height, width)]
    return [(top, left, side) for top in places[0] for left in places[1]]


def most_similar_crops(
    generated: torch.Tensor, training: torch.Tensor, patches: PatchDescriptor, same: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each image the most similar pair of its crops and the training images' crops.

    Args:
        generated: (N, P * P * D), training: (M, P * P * D) from ``PatchDescriptor`` ``patches``.
        same: both are the training set; an image's own crops are not its neighbours.
        options: of ``most_similar``.

    Returns:
        Similarity (N,), the training image (N,), the crop of the generated image (N,) and of the training image (N,).
    """
    crops = patches.grid**2
    queries, references = patches.crops(generated), patches.crops(training)
    groups = None
    if same:
        images = torch.arange(len(training)).repeat_interleave(crops)
        groups = images, images
    similarity, nearest = most_similar(queries, references, groups=groups, **options)
    best = similarity.view(-1, crops).max(dim=1)
    chosen = nearest.view(-1, crops).gather(1, best.indices[:, None])[:, 0]
    return best.values, chosen // crops, best.indices, chosen % crops


class Patches(Kind):
    """Similarity of the crops of generated images to those of training images."""

    metrics = (PATCH_SIM_SCORE, PATCH_COPY_RATE, TRAINING_PATCH_SIM_SCORE, TRAINING_PATCH_COPY_RATE)

    def __init__(self, protocol: Protocol, descriptor: Descriptor) -> None:
        super().__init__(protocol, descriptor)
        self.patches = PatchDescriptor(descriptor) if protocol.patches else None

    @property
    def extractors(self) -> dict[str, Extractor]:
        return {} if self.patches is None else {"patches": self.patches}

    def measure(self, sets: ImageSets) -> Measured:
        if self.patches is None:
            return missing(self.metrics, "not asked for: set `patches`", protocol={"patches": None})
        generated, training = (x.features["patches"] for x in (sets.generated, sets.training))
        search = self.protocol.search_options
        similarity, nearest, crop, training_crop = most_similar_crops(generated, training, self.patches, **search)
        copy_threshold, among = self._among_training(sets.distinct_training.features["patches"], self.patches)
        copies = is_copy(similarity, copy_threshold)
        scores = PATCH_SIM_SCORE.of(similarity) | PATCH_COPY_RATE.of(copies)
        measured = Measured(
            scores | {"patch_copy_similarity": copy_threshold},
            columns={
                "patch_similarity": similarity.tolist(),
                "patch_nearest": [sets.training.images.names[i] for i in nearest],
                "patch": crop.tolist(),
                "patch_of_nearest": training_crop.tolist(),
            },
            protocol={"patches": [self.patches.grid, self.patches.share]},
        )
        return measured | self._searched(generated, training, similarity, copy_threshold) | among

    def _searched(
        self, generated: torch.Tensor, training: torch.Tensor, similarity: torch.Tensor, copy_threshold: float
    ) -> Measured:
        patches = self.patches
        assert patches is not None

        def exact(some: torch.Tensor) -> torch.Tensor:
            return most_similar_crops(generated[some], training, patches, **self.protocol.exact_search)[0]

        return self.searched("patches", similarity, exact, copy_threshold)

    def _among_training(self, training: torch.Tensor, patches: PatchDescriptor) -> tuple[float, Measured]:
        """The similarity over which a crop is a copy, and the scores of different training images among themselves.

        Crops of unrelated images are more similar than the images are: a copy must also exceed nearly all of the
        training set's own. An exact copy is always one, whatever rounding does to its similarity.
        """
        own = (TRAINING_PATCH_SIM_SCORE, TRAINING_PATCH_COPY_RATE)
        copy_threshold = self.protocol.copy_threshold(self.descriptor)
        if len(training) < 2:
            return copy_threshold, missing(own, "needs two different training images")
        search = self.protocol.search_options
        among = most_similar_crops(training, training, patches, same=True, **search)[0]
        usual = np.percentile(among.double().numpy(), INNOCENT_PERCENTILE)
        copy_threshold = min(max(copy_threshold, float(usual)), ALWAYS_A_COPY)
        repeated = "crops of training images repeat one another: only exact local copies count as copies"
        notes = (repeated,) if copy_threshold == ALWAYS_A_COPY else ()
        scores = TRAINING_PATCH_SIM_SCORE.of(among) | TRAINING_PATCH_COPY_RATE.of(is_copy(among, copy_threshold))
        return copy_threshold, Measured(scores, notes=notes)
