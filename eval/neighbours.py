"""Exact nearest neighbours by chunked matrix products."""

import torch


def nearest_l2(queries, references, k=1, chunk=1024):
    """The k nearest references of each query in l2.

    Candidates come from the expanded square, in which a duplicate's distance can round to more than 0; they are
    measured again exactly.

    Args:
        queries: float32 (N, D); references: float32 (M, D), M >= k.

    Returns:
        Distances (N, k), ascending, and indices (N, k).
    """
    squares = references.pow(2).sum(dim=1)
    distances, indices = [], []
    for block in queries.split(chunk):
        expanded = squares - 2 * block @ references.T  # the query's own square does not change the order
        found = expanded.topk(min(k + 8, len(references)), largest=False).indices
        exact = (block[:, None] - references[found]).norm(dim=2)
        nearest = exact.topk(k, largest=False)
        distances.append(nearest.values)
        indices.append(found.gather(1, nearest.indices))
    return torch.cat(distances), torch.cat(indices)


def most_similar(queries, references, chunk=1024, exclude_self=False):
    """The most similar reference of each query by dot product.

    ``exclude_self``: queries are the references, and none is its own neighbour. Returns similarities (N,) and indices
    (N,).
    """
    values, indices = [], []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ references.T
        if exclude_self:
            rows = torch.arange(len(similarity))
            similarity[rows, rows + start] = -torch.inf
        best = similarity.max(dim=1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), torch.cat(indices)
