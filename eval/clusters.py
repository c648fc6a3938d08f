"""Clusters of images that are all similar to one another."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cluster:
    """Some of M images.

    Args:
        members: their numbers, ascending.
        representative: the member whose vector is nearest to the members' mean.
        similarity: the least between two members; 1 for a single one.
    """

    members: list[int]
    representative: int
    similarity: float


def clusters_of(vectors: torch.Tensor, number: int) -> list[Cluster]:
    """``number`` clusters of images by complete linkage, the largest first, then those whose members are most similar.

    The two clusters whose least similar members are most similar are joined until so many are left. So any two members
    of a cluster are at least as similar as its ``similarity``: it is a clique of the graph of such pairs. Takes about
    M² steps, and 4 M² bytes of memory.

    Args:
        vectors: (M, D) of unit length; number: at least 1, of M images at most M clusters are made.
    """
    similar = vectors @ vectors.T
    similar.fill_diagonal_(-torch.inf)
    members = [[image] for image in range(len(vectors))]
    least = [1.0] * len(vectors)
    highest, nearest = similar.max(dim=1)  # of each cluster: its most similar other one
    for _ in range(len(vectors) - number):
        one = int(highest.argmax())
        first, second = sorted((one, int(nearest[one])))
        least[first] = float(similar[first, second])  # what joins two clusters never rises
        members[first] += members[second]
        members[second] = []
        joined = torch.minimum(similar[first], similar[second])
        similar[first], similar[:, first] = joined, joined
        similar[second], similar[:, second] = -torch.inf, -torch.inf
        # A joined cluster is no more similar than its two were: where it is as similar, it is still the most similar.
        touched = (nearest == first) | (nearest == second)
        nearest[touched & (joined == highest)] = first
        changed = touched & (joined != highest)
        changed[[first, second]] = True
        highest[changed], nearest[changed] = similar[changed].max(dim=1)
    found = [
        Cluster(sorted(images), _nearest_to_mean(vectors, sorted(images)), similarity)
        for images, similarity in zip(members, least, strict=True)
        if images
    ]
    return sorted(found, key=lambda one: (-len(one.members), -one.similarity))


def _nearest_to_mean(vectors: torch.Tensor, members: list[int]) -> int:
    own = vectors[members]
    return members[int((own - own.mean(dim=0)).norm(dim=1).argmin())]
