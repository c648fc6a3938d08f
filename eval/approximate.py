"""Candidates for nearest neighbours from an inverted file of FAISS, which looks only at the lists nearest to a query.

How many it finds depends on the vectors, so it is measured: lists are added until the nearest neighbours of a sample of
the queries are among the candidates, and what was found is compared with an exact search (``recall``).
"""

from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from .neighbours import QUERY_CHUNK, Search

PROBES = 64  # lists to begin with
POINTS = 39  # training points for each list, the fewest without a warning of FAISS
ADDED = 50_000  # vectors that are converted at a time
SAMPLE = 200
WANTED = 0.99  # share of the sample's nearest neighbours


def sample(number: int, start: int = 0) -> torch.Tensor:
    """Up to 200 indices of ``number``, evenly spread, from ``start`` on."""
    step = max(1, -(-number // SAMPLE))
    return torch.arange(start % step, number, step)


def recall(
    best: torch.Tensor, exact: Callable[[torch.Tensor], torch.Tensor], copy_threshold: float | None = None
) -> dict[str, Any]:
    """How much a search found, by exact searches for a sample of its queries.

    The sample has others than those for which the lists were chosen, where there are more queries than 200.

    Args:
        best: (N,) the similarity or the distance of each query's nearest neighbour that was found.
        exact: the same by an exact search, for (n,) indices of queries.
        copy_threshold: the similarity above which a neighbour is a copy.

    Returns:
        ``queries``: how many; ``nearest``: share of them whose nearest neighbour was found; ``copies``: share of the
        copies among them that were found, None where there are none.
    """
    some = sample(len(best), start=1)
    found, right = best[some].double(), exact(some).double()
    nearest = torch.isclose(found, right, rtol=1e-4, atol=1e-6).double().mean()
    over = torch.inf if copy_threshold is None else copy_threshold
    copies = right > over
    found_copies = round((found > over)[copies].double().mean().item(), 4) if copies.any() else None
    return {"queries": len(some), "nearest": round(nearest.item(), 4), "copies": found_copies}


def describe(found: dict[str, Any]) -> str:
    """What ``recall`` returned, in words."""
    copies = "" if found["copies"] is None else f", and {found['copies']:.1%} of the copies among them"
    return f"it found the nearest training image of {found['nearest']:.1%} of {found['queries']} images{copies}"


def candidates(search: Search) -> torch.Tensor:
    """The nearest rows of each query that FAISS finds, enough for ``search.k`` owners: (N, C) indices.

    Without a centre the vectors must have unit length: then the nearest are the most similar. Queries whose lists hold
    too few rows are searched for exactly.
    """
    import faiss

    references, dim = search.references, search.references.shape[1]
    lists = max(1, min(int(4 * len(references) ** 0.5), len(references) // POINTS))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dim), dim, lists)
    points = torch.linspace(0, len(references) - 1, min(len(references), POINTS * lists)).long()
    index.train(search.floats(references[points]).cpu().numpy())
    for chunk in tqdm(references.split(ADDED), desc="FAISS index", leave=False):
        index.add(search.floats(chunk).cpu().numpy())
    index.nprobe = min(lists, PROBES)
    k = min(len(references), search.rows_of(len(references)))

    def find(queries: torch.Tensor) -> torch.Tensor:
        blocks = (search.floats(block).cpu().numpy() for block in queries.split(QUERY_CHUNK))
        return torch.cat([torch.from_numpy(index.search(block, k)[1]) for block in blocks])

    some = sample(len(search.queries))
    nearest = search.best(search.queries[some])[0][:, 0]
    apart = search.squared_distances(some, nearest)
    while index.nprobe < lists:
        found = find(search.queries[some])[:, 0].clamp(min=0)
        # By distance: of equal vectors any will do.
        if (search.squared_distances(some, found) <= apart * 1.0001).double().mean() >= WANTED:
            break
        index.nprobe = min(lists, 2 * index.nprobe)
    rows = find(search.queries)
    short = (rows < 0).any(dim=1)
    if short.any():
        exact = search.best(search.queries[short])[0]
        rows[short] = torch.cat([exact, exact[:, -1:].expand(-1, k - search.k)], dim=1)
    return rows
