"""Similarity of whole images to the nearest training image: Sim Score (eq. 14), mean, and copy rate."""

import numpy as np
import torch

from ..neighbours import most_similar
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
        generated, training = (x.features["descriptor"] for x in (sets.generated, sets.training))
        names = sets.training.images.names
        copy_threshold = self.protocol.copy_threshold(self.descriptor)
        similarity, nearest = (x[:, 0] for x in most_similar(generated, training, **self.protocol.search_options))
        copies = is_copy(similarity, copy_threshold)
        scores = SIM_SCORE.of(similarity) | SIM_MEAN.of(similarity) | COPY_RATE.of(copies)

        def exact(some: torch.Tensor) -> torch.Tensor:
            return most_similar(generated[some], training, **self.protocol.exact_search)[0][:, 0]

        measured = Measured(
            scores | NUM_COPIED.of(nearest[copies.bool()]),
            columns={
                "similarity": similarity.tolist(),
                "nearest": [names[i] for i in nearest],
                "copy": copies.bool().tolist(),
            },
            protocol={"copy_similarity": copy_threshold, "neighbours": self.protocol.index},
        )
        searched = self.searched("descriptor", similarity, exact, copy_threshold)
        return measured | searched | self._background(training, names)

    def _background(self, training: torch.Tensor, names: list[str]) -> Measured:
        """The similarity of each training image to its nearest other one."""
        if len(training) < 2:
            unknown = {"file_name": names, "similarity": [None], "nearest": [None]}
            return missing([TRAINING_SIM_SCORE], "needs two training images", background=unknown)
        notes: tuple[str, ...] = ()
        rows = groups = torch.arange(len(training))
        if len(rows) > BACKGROUND_SAMPLES:
            generator = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(rows), generator=generator)[:BACKGROUND_SAMPLES].sort().values
            notes = (
                "the similarity of training images to one another was measured on a random sample of "
                f"{BACKGROUND_SAMPLES:,} of them",
            )
        found = most_similar(training[rows], training, groups=(rows, groups), **self.protocol.search_options)
        similarity, nearest = (x[:, 0] for x in found)
        background = {
            "file_name": [names[i] for i in rows],
            "similarity": similarity.tolist(),
            "nearest": [names[i] for i in nearest],
        }
        return Measured(TRAINING_SIM_SCORE.of(similarity), background=background, notes=notes)
