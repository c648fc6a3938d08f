"""Whether the generated images can be what the model learned at all: noise resembles no training image, which proves
nothing about copying.
"""

import functools
from typing import Any

import numpy as np
import torch

from ietagc_diffusers.sscd import pixel_descriptor

from ..features import Embedded, Extractor, Pixels
from ..neighbours import most_similar
from ..views import Crops, best_of
from .base import ImageSets, Kind, Measured
from .frechet import frechet_distance

THUMBNAIL = 8  # pixels: enough to tell pictures from noise, and 192 bytes an image
MOST = 10_000  # images of a set that are looked at
# Fewer images on either side say nothing; measured on halves of real sets and on sets of other kinds of pictures, see
# docs/evaluation.md.
ENOUGH_FOR_SIMILARITY, ENOUGH_FOR_DISTANCE = 20, 50
UNUSUAL_PERCENTILE = 1
SAME_PICTURE = 0.95  # training images that are more alike are versions of one picture, to which nothing else is as near
FLAT_RANGE = 8  # grey levels: an image none of whose channels varies more is a single flat colour
FLAT_SHARE = 0.001  # of an image's pixels, darkest and brightest, that may lie outside


class Plausibility(Kind):
    """What a verdict needs to tell pictures from noise: the entry ``plausibility`` of the scores.

    ``num_of_one_colour``: images whose pixels are a single flat colour, within rounding and noise.
    ``median_similarity`` of the generated images' pixels to the nearest training image, and the similarity
    ``usual_similarity`` that 99% of the training images have to their nearest other one.
    ``distance``: Fréchet distance of thumbnails of both sets, in units of the training thumbnails' total variance: a
    model that draws one grey picture has 1 or more. What cannot be said of so few images is null.
    """

    metrics = ()

    @property
    def extractors(self) -> dict[str, Extractor]:
        # Pixels tell noise from pictures, which networks that find copies were never shown: the thresholds are theirs.
        return {"thumbnail": Pixels(THUMBNAIL), "look": Crops(pixel_descriptor(), None)}

    def measure(self, sets: ImageSets) -> Measured:
        training = sets.distinct_training.select(_sample(len(sets.distinct_training.kept)))
        found: dict[str, Any] = self._similarity(sets.generated, training) | {
            "distance": _distance(*(x.features["thumbnail"] for x in (sets.generated, training)))
        }
        num_flat = number_of_flat(sets.generated.features["pixels"])
        notes = (f"{num_flat} generated images are a single flat colour, typical of a broken model",)
        return Measured({"plausibility": found, "num_of_one_colour": num_flat}, notes=notes if num_flat else ())

    def _similarity(self, generated: Embedded, training: Embedded) -> dict[str, float | None]:
        unknown = dict.fromkeys(("median_similarity", "usual_similarity"))
        if min(len(generated.kept), len(training.kept)) < ENOUGH_FOR_SIMILARITY:
            return unknown
        shown, search = training.several["look"], self.protocol.exact_search
        groups = torch.arange(len(training.kept)), shown.owners
        among = most_similar(shown.middle(), shown.vectors, groups=groups, **search)[0][:, 0]
        others = among[among <= SAME_PICTURE].double().numpy()
        if len(others) < ENOUGH_FOR_SIMILARITY:
            return unknown
        compare = functools.partial(most_similar, references=shown.vectors, **search)
        similarity = best_of(compare, [generated.several["look"]])[0]
        usual = float(np.percentile(others, UNUSUAL_PERCENTILE))
        return {"median_similarity": similarity.double().median().item(), "usual_similarity": usual}


def _sample(number: int) -> list[int]:
    """All of ``number`` images, or ``MOST`` of them, drawn at random."""
    chosen = torch.randperm(number, generator=torch.Generator().manual_seed(0))[:MOST]
    return chosen.sort().values.tolist()


def _distance(generated: torch.Tensor, training: torch.Tensor) -> float | None:
    if min(len(generated), len(training)) < ENOUGH_FOR_DISTANCE:
        return None
    first, second = (x.double() / 255 for x in (generated, training))
    variance = second.var(dim=0).sum().item()
    return frechet_distance(first, second) / variance if variance > 0 else None


def number_of_flat(pixels: torch.Tensor) -> int:
    """How many images, uint8 (N, 3 * size * size), are a single flat colour: in each channel nearly all pixels lie
    within ``FLAT_RANGE`` grey levels.
    """
    number = 0
    for chunk in pixels.view(len(pixels), 3, -1).split(256):
        outside = int(FLAT_SHARE * chunk.shape[2])
        values = chunk.sort(dim=2).values.int()
        spread = values[..., values.shape[2] - 1 - outside] - values[..., outside]
        number += int((spread <= FLAT_RANGE).all(dim=1).sum())
    return number
