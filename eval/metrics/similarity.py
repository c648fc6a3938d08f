"""Similarity of whole images to the nearest training image: Sim Score (eq. 14), mean, and copy rate; and the same of
training images and of held-out pictures, which say what is usual without copying.
"""

import functools
from typing import Any

import numpy as np
import torch

from ..features import Embedded
from ..neighbours import most_similar
from ..views import best_of
from .base import ImageSets, Kind, Measured, Metric, Values, mean, missing
from .intervals import as_float64, difference

SIM_PERCENTILE = 95
BACKGROUND_SAMPLES = 10_000
NEAR_DUPLICATE = 0.95  # held-out pictures more similar to a training image show the same picture
# So do those whose thumbnails are more similar. SSCD gives a smaller or recompressed version only 0.7 to 0.9, and
# enough of these among the held-out pictures would make copies look usual.
SAME_THUMBNAIL = 0.98


def sim_score(similarities: Values | list) -> float:
    """The 95th percentile of similarities (N,) to the nearest training image."""
    return float(np.percentile(as_float64(similarities), SIM_PERCENTILE))


def is_copy(similarities: torch.Tensor, copy_threshold: float) -> torch.Tensor:
    """Whether each similarity (N,) is over the threshold: float64 (N,), 1 or 0."""
    return (similarities.double() > copy_threshold).double()


def above_chance(hits: Values, chance: Values) -> float:
    """How much more often there are hits (N,) than by chance (): 0 where there are as many, 1 where all are hits."""
    return (mean(hits) - float(chance)) / (1 - float(chance))


def prefers_training(to_training: torch.Tensor, to_heldout: torch.Tensor) -> torch.Tensor:
    """Whether the nearest of all training and held-out images is a training image: float64 (N,), 1, 0, or for equally
    near ones a half.

    With N training and M held-out images of the same kind, that is so with probability N / (N + M) for an image that
    has nothing to do with the training. An image that simple pictures resemble by chance resembles those of both sets,
    so that, unlike a copy rate, this does not depend on how simple they are.

    Args:
        to_training, to_heldout: similarity to the nearest of each set, (N,) each.
    """
    return (to_training > to_heldout).double() + (to_training == to_heldout).double() / 2


def number_of_different(indices: torch.Tensor) -> int:
    """How many different ones there are among indices (N,)."""
    return len(indices.unique())


SIM_SCORE = Metric("sim_score", "Sim Score", sim_score, "bootstrap", detail="95th percentile")
SIM_MEAN = Metric("sim_mean", "mean similarity", mean, "bootstrap")
COPY_RATE = Metric("copy_rate", "copy rate", mean, "wilson", digits=1, percent=True)
NUM_COPIED = Metric("num_copied_train", "training images that were copied", number_of_different, digits=0)
TRAINING_SIM_SCORE = Metric(
    "train_train_sim_score", "Sim Score of training images among themselves", sim_score, lower=None
)
TRAINING_COPY_RATE = Metric(
    "train_train_copy_rate",
    "copy rate of training images among themselves",
    mean,
    "wilson",
    lower=None,
    digits=1,
    percent=True,
)
HELDOUT_SIM_SCORE = Metric("heldout_sim_score", "Sim Score of held-out pictures", sim_score, "bootstrap", lower=None)
HELDOUT_COPY_RATE = Metric(
    "heldout_copy_rate", "copy rate of held-out pictures", mean, "wilson", lower=None, digits=1, percent=True
)
EXCESS_COPY_RATE = Metric(
    "excess_copy_rate",
    "copy rate minus that of held-out pictures",
    difference,
    "newcombe",
    lower=None,
    digits=1,
    percent=True,
)
TRAINING_PREFERENCE = Metric(
    "training_preference",
    "preference for training over held-out pictures",
    above_chance,
    "above_chance",
    digits=1,
    percent=True,
)
OF_HELDOUT = (HELDOUT_SIM_SCORE, HELDOUT_COPY_RATE, EXCESS_COPY_RATE, TRAINING_PREFERENCE)


class Similarity(Kind):
    """Similarity of each generated image to the nearest training image, and of training images to one another."""

    metrics = (SIM_SCORE, SIM_MEAN, COPY_RATE, NUM_COPIED, TRAINING_SIM_SCORE, TRAINING_COPY_RATE, *OF_HELDOUT)

    def measure(self, sets: ImageSets) -> Measured:
        names, prompts = sets.training.images.names, sets.prompts
        copy_threshold = self.protocol.copy_threshold(self.descriptor)
        similarity, nearest = self._nearest(sets.generated, sets.training)
        copies = self._copies(similarity)
        scores = SIM_SCORE.of(similarity, groups=prompts) | SIM_MEAN.of(similarity, groups=prompts)
        scores |= COPY_RATE.of(copies, groups=prompts) | NUM_COPIED.of(nearest[copies.bool()])

        def exact(some: torch.Tensor) -> torch.Tensor:
            chosen = sets.generated.select(some.tolist())
            return self._nearest(chosen, sets.training, **self.protocol.exact_search)[0]

        measured = Measured(
            scores,
            columns={
                "similarity": similarity.tolist(),
                "nearest": [names[i] for i in nearest],
                "copy": copies.bool().tolist(),
            },
            protocol={"copy_similarity": copy_threshold, "neighbours": self.protocol.index},
        )
        searched = self.searched("descriptor", similarity, exact, copy_threshold)
        return measured | searched | self._background(sets) | self._heldout(sets, similarity)

    def _nearest(
        self, images: Embedded, training: Embedded, views: str = "views", **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The similarity (N,) of each image to the nearest training image, and the number (N,) of that image.

        ``views``: the name of what is searched; ``options``: of the search, if not the protocol's.
        """
        shown = training.several[views]
        options = options or self.protocol.search_options
        search = functools.partial(most_similar, references=shown.vectors, **options)
        similarity, rows = best_of(search, images.both_ways())
        return similarity, shown.owners[rows]

    def _copies(self, similarity: torch.Tensor) -> torch.Tensor:
        return is_copy(similarity, self.protocol.copy_threshold(self.descriptor))

    def _heldout(self, sets: ImageSets, of_generated: torch.Tensor) -> Measured:
        """The scores of held-out pictures, compared like the generated images, whose similarities to the nearest
        training image are ``of_generated`` (N,).

        A picture that is in the training set in another version is not held out, and would make copies look usual.
        """
        if sets.heldout is None:
            return missing(OF_HELDOUT, "there are no held-out pictures: set `heldout`", {"num_heldout": 0})
        similarity, _ = self._nearest(sets.heldout, sets.training)
        near = (similarity > NEAR_DUPLICATE) | self._same_thumbnail(sets.heldout, sets.training)
        kept = similarity[~(near | _same_pixels(sets.heldout, sets.training))]
        num_near = len(similarity) - len(kept)
        counts = {"num_heldout": len(kept), "num_heldout_near_duplicates": num_near}
        notes = (
            f"{num_near} of {len(similarity)} held-out pictures have a similarity over {NEAR_DUPLICATE} to a training "
            "image, the same thumbnail or the same pixels at the size for l2: they are taken for other versions of it "
            "and left out",
        )
        if not len(kept):
            return missing(OF_HELDOUT, "all held-out pictures are also in the training set", counts, notes=notes)
        usual = self._copies(kept)
        scores = HELDOUT_SIM_SCORE.of(kept) | HELDOUT_COPY_RATE.of(usual)
        scores |= EXCESS_COPY_RATE.of(self._copies(of_generated), usual, groups=sets.prompts)
        # With all held-out pictures: without those that resemble training images, these would seem preferred.
        to_heldout, _ = self._nearest(sets.generated, sets.heldout, "as_training")
        num_training = len(sets.distinct_training.kept)
        chance = torch.tensor(num_training / (num_training + len(similarity)), dtype=torch.float64)
        scores |= TRAINING_PREFERENCE.of(prefers_training(of_generated, to_heldout), chance, groups=sets.prompts)
        return Measured(scores | counts, notes=notes if num_near else ())

    def _same_thumbnail(self, heldout: Embedded, training: Embedded) -> torch.Tensor:
        """Whether each picture (N,), as it is or mirrored, has the thumbnail of a training image."""
        references = training.several["small_views"].vectors
        search = functools.partial(most_similar, references=references, **self.protocol.exact_search)
        ways = [heldout.several[name] for name in ("small_views", "small_views_mirrored")]
        return best_of(search, ways)[0] > SAME_THUMBNAIL

    def _background(self, sets: ImageSets) -> Measured:
        """The similarity of each training image to its nearest other one; the rate counts duplicates once."""
        background = self._among(sets.training)
        if background is None:
            names = sets.training.images.names
            unknown = {"file_name": names, "similarity": [None], "nearest": [None]}
            own = [TRAINING_SIM_SCORE, TRAINING_COPY_RATE]
            return missing(own, "needs two training images", background=unknown)
        rows, similarity, nearest = background
        names = sets.training.images.names
        notes: tuple[str, ...] = ()
        if len(rows) < len(names):
            notes = (
                "the similarity of training images to one another was measured on a random sample of "
                f"{BACKGROUND_SAMPLES:,} of them",
            )
        measured = Measured(
            TRAINING_SIM_SCORE.of(similarity),
            background={
                "file_name": [names[i] for i in rows],
                "similarity": similarity.tolist(),
                "nearest": [names[i] for i in nearest],
            },
            notes=notes,
        )
        same = len(sets.distinct_training.kept) == len(sets.training.kept)
        distinct = background if same else self._among(sets.distinct_training)
        if distinct is None:
            return measured | missing([TRAINING_COPY_RATE], "needs two different training images")
        return measured | Measured(TRAINING_COPY_RATE.of(self._copies(distinct[1])))

    def _among(self, training: Embedded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(rows, similarity, nearest), each (N,): of every training image, or of 10,000 drawn at random, the nearest
        other one to its middle view. None if there is no other one.
        """
        shown = training.several["views"]
        if len(training.kept) < 2:
            return None
        rows = torch.arange(len(training.kept))
        if len(rows) > BACKGROUND_SAMPLES:
            generator = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(rows), generator=generator)[:BACKGROUND_SAMPLES].sort().values
        middle, options = shown.middle()[rows], self.protocol.search_options
        similarity, found = most_similar(middle, shown.vectors, groups=(rows, shown.owners), **options)
        return rows, similarity[:, 0], shown.owners[found[:, 0]]


def _same_pixels(heldout: Embedded, training: Embedded) -> torch.Tensor:
    """Whether each picture (N,) at the size for l2 is exactly a training image; of blank ones nothing else says so."""
    known = {row.tobytes() for row in training.features["pixels"].numpy()}
    return torch.tensor([row.tobytes() in known for row in heldout.features["pixels"].numpy()])
