"""The copy threshold of a descriptor on pictures of one's own kind: the similarity to the nearest training image that
at most a given share of innocent images exceed.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ietagc_diffusers import __version__
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.sscd import Descriptor

from .features import Extractor, embed
from .image_sets import ImageSet
from .neighbours import most_similar
from .vectors import Several
from .views import ALL_VIEWS, Views, Whole, best_of

NEAR_DUPLICATE = 0.95  # training images that are more alike are taken for one picture in two versions
MOST_COMPARED = 10_000  # training images that are compared with all others: enough for the last percent


@dataclass(frozen=True)
class Calibration:
    """A copy threshold, and what it was measured on.

    Attributes:
        copy_similarity: the threshold, from -1 to 1.
        false_positives: the share of innocent images, from 0 to 1, that may exceed it.
        num_innocent, num_over: innocent images, and those of them that do exceed it.
        innocent: their source; None is the training images, each compared with the others.
        num_near_duplicates: images with a similarity over ``NEAR_DUPLICATE`` to a training image. Among the training
            images they are left out of ``num_innocent``.
        train: source of the training images; num_train, num_train_duplicates: how many different ones there are, and
            exact duplicates beside them.
        descriptor: the identity of the descriptor.
        version: of this software.
    """

    copy_similarity: float
    false_positives: float
    num_innocent: int
    num_over: int
    innocent: str | None
    num_near_duplicates: int
    train: str
    num_train: int
    num_train_duplicates: int
    descriptor: dict
    version: str = __version__

    @property
    def sentence(self) -> str:
        """The result in one line."""
        if self.innocent is None:
            images = f"{self.num_innocent} training images, each compared with the others,"
            apart = f"; {self.num_near_duplicates} near duplicates (over {NEAR_DUPLICATE}) were left out"
        else:
            images = f"{self.num_innocent} innocent images"
            apart = f"; {self.num_near_duplicates} of them are over {NEAR_DUPLICATE}: are they copies?"
        return (
            f"Copy similarity {self.copy_similarity:.4f} ({self.descriptor['descriptor']}): {self.num_over} of "
            f"{images} exceed it{apart if self.num_near_duplicates else ''}"
        )


def calibrate(
    descriptor: Descriptor,
    training: ImageSet,
    innocent: ImageSet | None = None,
    false_positives: float = 0.01,
    cache: Path | None = None,
    views: Views | None = ALL_VIEWS,
) -> Calibration:
    """Measure the copy threshold of a descriptor, with the comparison that an audit makes.

    Args:
        training: the images that a model is trained on.
        innocent: images of the same kind that are known to be no copies of them, such as other pictures of the same
            captions. None: the training images themselves, each compared with the others.
        false_positives: share of innocent images that may exceed the threshold, more than 0 and less than 1.
        cache: folder where features are kept.
        views: what training may show of an image, by default all; None: whole images are compared.

    Raises:
        UsageError: there are too few innocent images for this share, or no image can be used.
    """
    if not 0 < false_positives < 1:
        raise UsageError(f"`false_positives` {false_positives}: must be more than 0 and less than 1")

    whole: dict[str, Extractor] = {"views": Whole(descriptor)}
    of_training = views.of_training(descriptor) if views else whole
    known = embed(training.files(), of_training, cache, desc="Describing training images")
    distinct = known.distinct()
    shown = distinct.several["views"]
    if innocent is None:
        similarity = _among_themselves(shown, descriptor.device)
    else:
        of_others = views.of_others(descriptor) if views else whole
        others = embed(innocent.files(), of_others, cache, desc="Describing innocent images")
        search = partial(most_similar, references=shown.vectors, device=descriptor.device)
        similarity = best_of(search, others.both_ways())[0]
    near = similarity > NEAR_DUPLICATE
    kept = similarity if innocent is not None else similarity[~near]
    if len(kept) * false_positives < 1:
        setting, images = ("train", training) if innocent is None else ("innocent", innocent)
        raise UsageError(
            f"`{setting}` {images.source}: {len(kept)} images are too few for `false_positives` "
            f"{false_positives:g}: at least {1 / false_positives:.0f} are needed"
        )
    threshold = threshold_over(kept, false_positives)
    return Calibration(
        copy_similarity=threshold,
        false_positives=false_positives,
        num_innocent=len(kept),
        num_over=int((kept > threshold).sum()),
        innocent=None if innocent is None else innocent.source,
        num_near_duplicates=int(near.sum()),
        train=training.source,
        num_train=len(distinct.kept),
        num_train_duplicates=len(known.kept) - len(distinct.kept),
        descriptor=descriptor.identity,
    )


def threshold_over(values: torch.Tensor, share: float) -> float:
    """The lowest of the values (N,) that at most this share of them exceed."""
    return values.sort(descending=True).values[int(share * len(values))].item()


def _among_themselves(shown: Several, device: str) -> torch.Tensor:
    """Similarity of each image, or of a seeded draw of many, to its nearest other one: (N,)."""
    queries = shown.middle()
    if len(queries) < 2:
        return queries.new_empty(0)
    rows = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:MOST_COMPARED]
    return most_similar(queries[rows], shown.vectors, groups=(rows, shown.owners), device=device)[0][:, 0]
