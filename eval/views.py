"""Views: what training may have shown of an image besides the image as a whole.

A random crop shows any part along the long side, and a random flip the mirror image. A model that reproduces what it
was shown draws these, so generated images, as they are and mirrored, are compared with crops of the training images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ietagc_diffusers.sscd import Descriptor, pixel_descriptor

from .features import Extractor
from .vectors import Several

# Distance between neighbouring crops, as a share of the small edge. Pixels of a crop that lies half of this away must
# still be found (docs/evaluation.md has the measurements); networks tolerate larger shifts.
PIXEL_SPACING, NETWORK_SPACING = 1 / 16, 1 / 2


@dataclass(frozen=True)
class Views:
    """What training may have shown of an image.

    Args:
        random_crop: squares anywhere along the long side; otherwise only the one at the centre.
        mirrored: mirror images too.
    """

    random_crop: bool = True
    mirrored: bool = True

    @classmethod
    def of(cls, center_crop: bool | None, random_flip: bool | None) -> "Views":
        """By the settings of the training; None, where one is not known, counts as what shows more."""
        return cls(random_crop=not center_crop, mirrored=random_flip is not False)

    @property
    def record(self) -> dict[str, Any]:
        """For scores."""
        return {"crops": "random" if self.random_crop else "centre", "mirrored": self.mirrored}

    def crops(self, extractor: Extractor, spacing: float, whole: bool = True) -> "Crops":
        """The extractor on what training may have shown of an image, not mirrored."""
        return Crops(extractor, spacing if self.random_crop else None, whole)

    def crops_of_pixels(self, pixels: Extractor) -> "Crops":
        """The same for l2 distances, for which only squares can be compared."""
        return self.crops(pixels, PIXEL_SPACING, whole=False)

    def of_training(self, descriptor: Descriptor) -> dict[str, Extractor]:
        """What is computed of training images."""
        return {"views": self.crops(descriptor, spacing_of(descriptor))}

    def of_others(self, descriptor: Descriptor) -> dict[str, Extractor]:
        """What is computed of images that are compared with them: of the centre and the whole, perhaps mirrored too."""
        crops = Crops(descriptor, None)
        return {"views": crops} | ({"views_mirrored": Mirrored(crops)} if self.mirrored else {})


ALL_VIEWS = Views()
SMALL = 8  # pixels: what is left of a picture that was resized, recompressed or squashed


def small_views() -> dict[str, Extractor]:
    """Thumbnails of an image's centre and of the whole, as it is and mirrored, which tell versions of one picture."""
    crops = Crops(pixel_descriptor(SMALL), None)
    return {"small_views": crops, "small_views_mirrored": Mirrored(crops)}


def spacing_of(descriptor: Descriptor) -> float:
    """How far apart the crops may be that a descriptor is computed of, as a share of the small edge."""
    return PIXEL_SPACING if descriptor.name == "pixel" else NETWORK_SPACING


def places(edge: int, side: int, spacing: float) -> list[int]:
    """Where crops of ``side`` begin along an edge, evenly, from its start to its end, at most ``spacing`` apart; all
    in pixels.
    """
    steps = max(1, -int(-(edge - side) // spacing)) if edge > side else 0
    return torch.linspace(0, edge - side, steps + 1).round().int().tolist()


@dataclass(frozen=True)
class Crops:
    """An extractor on square crops along the long side of an image: uint8 (N, 3, H, W) -> (N, V, D).

    Args:
        extractor: describes a crop by D values.
        spacing: at most between neighbouring crops, as a share of the small edge; None: only the crop at the centre.
        whole: whether an image that is not square is described as a whole too, after the crops; the last vector of an
            image is then that of the whole.
    """

    extractor: Extractor
    spacing: float | None
    whole: bool = True

    @property
    def identity(self) -> dict:
        return {"crops": [self.spacing, self.whole], "of": self.extractor.identity}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        side, long = sorted((height, width))
        centre = [round((long - side) / 2)]  # as torchvision
        starts = centre if self.spacing is None else places(long, side, self.spacing * side)
        wide = width > height
        crops = [images[..., s : s + side] if wide else images[..., s : s + side, :] for s in starts]
        if self.whole and side != long:
            crops.append(images)
        return torch.stack([self.extractor(crop) for crop in crops], dim=1)


@dataclass(frozen=True)
class Whole:
    """An extractor on whole images, as the only view of each: (N, 1, D)."""

    extractor: Extractor

    @property
    def identity(self) -> dict:
        return {"whole": self.extractor.identity}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor(images)[:, None]


@dataclass(frozen=True)
class Mirrored:
    """An extractor on the mirror images."""

    extractor: Extractor

    @property
    def identity(self) -> dict:
        return {"mirrored": self.extractor.identity}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor(images.flip(3))


def mirrored_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """The vectors (N, 3 * S * S) of square images' pixels, as they are of the mirror images."""
    side = round((pixels.shape[1] / 3) ** 0.5)
    return pixels.view(-1, 3, side, side).flip(3).flatten(1)


def best_of(
    search: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], queries: list[Several]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar reference of each image, whichever way round the image is.

    Args:
        search: vectors (N, D) -> similarities and rows (N, 1).
        queries: vectors of M images as they are, and perhaps of their mirror images.

    Returns:
        Similarities (M,) and rows (M,).
    """
    best_similarity, best_rows = [], []
    for query in queries:
        similarity, rows = (found[:, 0] for found in search(query.vectors))
        best = query.best(similarity)
        best_similarity.append(similarity[best])
        best_rows.append(rows[best])
    similarity, way = torch.stack(best_similarity).max(dim=0)
    return similarity, torch.stack(best_rows).gather(0, way[None])[0]


def nearest_of_both(
    search: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    queries: list[torch.Tensor],
    owners: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest training images of each image, whichever way round it is.

    Args:
        search: vectors (N, D) -> distances and rows (N, K), ascending, with the rows of K different images.
        queries: as in ``best_of``.
        owners: (R,), the image that each row is of.

    Returns:
        Distances (N, k), ascending, and rows (N, k) of k different images.
    """
    found = [search(query) for query in queries]
    distances, rows = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    order = distances.argsort(dim=1, stable=True)
    distances, rows = distances.gather(1, order), rows.gather(1, order)
    images = owners[rows]
    earlier = torch.ones(images.shape[1], images.shape[1], dtype=torch.bool).tril(-1)
    for n in range(len(images)):  # an image that was found both ways round counts where it is nearer
        distances[n][((images[n][:, None] == images[n]) & earlier).any(dim=1)] = torch.inf
    nearest = distances.topk(min(k, found[0][0].shape[1]), largest=False)
    return nearest.values, rows.gather(1, nearest.indices)
