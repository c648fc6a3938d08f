"""Similarity of whole images to the nearest training image: Sim Score (eq. 14), mean, and copy rate."""

import functools

import numpy as np
import torch

from ..features import Several
from ..neighbours import most_similar
from ..views import best_of
from .base import ImageSets, Kind, Measured, Metric, Values, mean, missing
from .intervals import as_float64

SIM_PERCENTILE = 95
BACKGROUND_SAMPLES = 10_000


def sim_score(similarities: Values | list) -> float:
    """The 95th percentile of similarities (N,) to the nearest training image."""
    return float(np.percentile(as_float64(similarities), SIM_PERCENTILE))


def is_copy(similarities: torch.Tensor, copy_threshold: float) -> torch.Tensor:
    """Whether each similarity (N,) is over the threshold: float64 (N,), 1 or 0."""
    return (similarities.double() > copy_threshold).double()


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


class Similarity(Kind):
    """Similarity of each generated image to the nearest training image, and of training images to one another."""

    metrics = (SIM_SCORE, SIM_MEAN, COPY_RATE, NUM_COPIED, TRAINING_SIM_SCORE)

    def measure(self, sets: ImageSets) -> Measured:
        names = sets.training.images.names
        training = sets.training.several["views"]
        copy_threshold = self.protocol.copy_threshold(self.descriptor)
        search = functools.partial(most_similar, references=training.vectors, **self.protocol.search_options)
        similarity, rows = best_of(search, sets.generated.both_ways())
        nearest = training.owners[rows]
        copies = is_copy(similarity, copy_threshold)
        scores = SIM_SCORE.of(similarity) | SIM_MEAN.of(similarity) | COPY_RATE.of(copies)
        searched = self.protocol.search(training.vectors)
        return Measured(
            scores | NUM_COPIED.of(nearest[copies.bool()]),
            columns={
                "similarity": similarity.tolist(),
                "nearest": [names[i] for i in nearest],
                "copy": copies.bool().tolist(),
            },
            protocol={"copy_similarity": copy_threshold, "neighbours": searched},
            searches={"descriptor": searched},
        ) | self._background(training, names)

    def _background(self, training: Several, names: list[str]) -> Measured:
        """The similarity of each training image, as its middle view shows it, to the nearest other one."""
        if len(names) < 2:
            unknown = {"file_name": names, "similarity": [None], "nearest": [None]}
            return missing([TRAINING_SIM_SCORE], "needs two training images", background=unknown)
        notes: tuple[str, ...] = ()
        rows = torch.arange(len(names))
        if len(rows) > BACKGROUND_SAMPLES:
            generator = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(rows), generator=generator)[:BACKGROUND_SAMPLES].sort().values
            notes = (
                "the similarity of training images to one another was measured on a random sample of "
                f"{BACKGROUND_SAMPLES:,} of them",
            )
        groups, options = (rows, training.owners), self.protocol.search_options
        found = most_similar(training.middle()[rows], training.vectors, groups=groups, **options)
        similarity, nearest = found[0][:, 0], training.owners[found[1][:, 0]]
        background = {
            "file_name": [names[i] for i in rows],
            "similarity": similarity.tolist(),
            "nearest": [names[i] for i in nearest],
        }
        return Measured(TRAINING_SIM_SCORE.of(similarity), background=background, notes=notes)
