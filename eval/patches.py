"""Local copies: an object or a logo of a training image in another scene. Crops of the images are compared instead of
the whole.
"""

from dataclasses import dataclass

import torch

from sscd import Descriptor

from .neighbours import most_similar

FLAT = 8 / 255  # a crop whose pixels deviate less shows a wall or the sky: similar to every other


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
        """(top, left, side) of each crop, row by row."""
        side = max(1, round(self.share * min(height, width)))
        places = [torch.linspace(0, edge - side, self.grid).round().int().tolist() for edge in (height, width)]
        return [(top, left, side) for top in places[0] for left in places[1]]

    def __call__(self, images):
        vectors = []
        for top, left, side in self.boxes(*images.shape[2:]):
            crops = images[:, :, top : top + side, left : left + side]
            flat = (crops.float() / 255).std(dim=(2, 3)).amax(dim=1) < FLAT
            vectors.append(torch.where(flat[:, None], 0.0, self.descriptor(crops)))
        return torch.stack(vectors, dim=1).flatten(1)


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
    queries, references = (x.view(len(x) * crops, -1) for x in (generated, training))
    groups = None
    if same:
        groups = tuple(torch.arange(len(x)).repeat_interleave(crops) for x in (generated, training))
    similarity, nearest = most_similar(queries, references, groups=groups, **options)
    best = similarity.view(-1, crops).max(dim=1)
    chosen = nearest.view(-1, crops).gather(1, best.indices[:, None])[:, 0]
    return best.values, chosen // crops, best.indices, chosen % crops
