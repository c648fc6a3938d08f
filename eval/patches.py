"""Local copies: an object or a logo of a training image in another scene. Crops of the images are compared instead of
the whole.
"""

from dataclasses import dataclass

import numpy as np
import torch
from ietagc_diffusers.sscd import Descriptor

from .neighbours import most_similar
from .similarity import bootstrap_interval, copy_rate, share_interval, sim_score

FLAT = 8 / 255  # a crop whose pixels deviate less shows a wall or the sky: similar to every other
INNOCENT_PERCENTILE = 99.9
ALWAYS_A_COPY = 0.999


@dataclass(frozen=True)
class PatchDescriptor:
    """Extractor of a grid of overlapping square crops: uint8 (N, 3, H, W) -> float32 (N, P * P * D).

    Args:
        descriptor: describes each crop.
        grid: P: crops along each side.
        share: side of a crop as a share of the image's small edge.

    The vector of a flat crop is zero: similar to nothing.
    """

    descriptor: Descriptor
    grid: int = 3
    share: float = 0.5

    @property
    def identity(self):
        return {"patches": [self.grid, self.share], "flat": FLAT, "of": self.descriptor.identity}

    def boxes(self, height, width):
        return crop_boxes(height, width, self.grid, self.share)

    def crops(self, vectors):
        """The vectors of images (N, P * P * D) as those of their crops (N * P * P, D)."""
        return vectors.view(len(vectors) * self.grid**2, -1)

    def __call__(self, images):
        vectors = []
        for top, left, side in self.boxes(*images.shape[2:]):
            crops = images[:, :, top : top + side, left : left + side]
            flat = (crops.float() / 255).std(dim=(2, 3)).amax(dim=1) < FLAT
            vectors.append(torch.where(flat[:, None], 0.0, self.descriptor(crops)))
        return torch.stack(vectors, dim=1).flatten(1)


def crop_boxes(height, width, grid, share):
    """(top, left, side) of each crop of an image, row by row."""
    side = max(1, round(share * min(height, width)))
    places = [torch.linspace(0, edge - side, grid).round().int().tolist() for edge in (height, width)]
    return [(top, left, side) for top in places[0] for left in places[1]]


def most_similar_crops(generated, training, patches, same=False, **options):
    """For each image the most similar pair of its crops and the training images' crops.

    Args:
        generated: (N, P * P * D), training: (M, P * P * D) from ``PatchDescriptor`` ``patches``.
        same: both are the training set: crops of an image are no neighbours of its own.
        options: of ``most_similar``.

    Returns:
        Similarity (N,), the training image (N,), the crop of the generation (N,) and that of the training image (N,).
    """
    crops = patches.grid**2
    queries, references = patches.crops(generated), patches.crops(training)
    groups = None
    if same:
        groups = tuple(torch.arange(len(x)).repeat_interleave(crops) for x in (generated, training))
    similarity, nearest = most_similar(queries, references, groups=groups, **options)
    best = similarity.view(-1, crops).max(dim=1)
    chosen = nearest.view(-1, crops).gather(1, best.indices[:, None])[:, 0]
    return best.values, chosen // crops, best.indices, chosen % crops


def patch_scores(made, known, distinct, trained, tools, table, reasons, notes):
    """The scores of local copies, and what ``nearest.parquet`` says of them, into ``table``.

    Args:
        made, known, distinct: ``Embedded`` generated, training and different training images; trained: the ``ImageSet``
            of ``known``; tools: ``score.Tools``.
    """
    names = ("patch_sim_score", "patch_copy_rate")
    own = ("train_train_patch_sim_score", "train_train_patch_copy_rate")
    scores = dict.fromkeys((*names, *(f"{name}_ci95" for name in names), *own))
    if tools.patches is None:
        reasons |= dict.fromkeys(scores, "not asked for: give --patches")
        return scores
    ours, theirs, different = (x.features["patches"] for x in (made, known, distinct))
    similarity, nearest, box, their_box = most_similar_crops(ours, theirs, tools.patches, **tools.search())
    table["patch_similarity"] = similarity.tolist()
    table["patch_nearest"] = [trained.names[i] for i in nearest]
    table["patch"], table["patch_of_nearest"] = box.tolist(), their_box.tolist()
    threshold = tools.copy_similarity
    if len(different) < 2:
        reasons |= dict.fromkeys(own, "needs two different training images")
    else:
        among = most_similar_crops(different, different, tools.patches, same=True, **tools.search())[0]
        # Crops of unrelated images are more alike than the images: a copy must also exceed nearly all of the training
        # set's own. An exact copy is always one, whatever rounding makes of its similarity.
        usual = np.percentile(among.double().numpy(), INNOCENT_PERCENTILE)
        threshold = min(max(threshold, float(usual)), ALWAYS_A_COPY)
        if threshold == ALWAYS_A_COPY:
            notes.append("crops of training images repeat one another: only exact local copies count as copies")
        scores["train_train_patch_sim_score"] = sim_score(among)
        scores["train_train_patch_copy_rate"] = copy_rate(among, threshold)
    return scores | {
        "patch_sim_score": sim_score(similarity),
        "patch_sim_score_ci95": bootstrap_interval(similarity, sim_score),
        "patch_copy_similarity": threshold,
        "patch_copy_rate": copy_rate(similarity, threshold),
        "patch_copy_rate_ci95": share_interval(similarity > threshold),
    }
