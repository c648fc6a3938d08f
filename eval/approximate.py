"""Candidates for nearest neighbours from an inverted file of FAISS, which looks at the lists nearest to each query only.

How many it finds depends on the vectors, so it is measured: lists are added until the nearest neighbours of a sample of
the queries are among the candidates.
"""

import torch
from tqdm.auto import tqdm

from .neighbours import QUERY_CHUNK, Search

PROBES = 64  # lists to begin with
POINTS = 39  # training points for each list, the fewest without a warning of FAISS
ADDED = 50_000  # vectors that are converted at a time
SAMPLE = 200
WANTED = 0.99  # share of the sample's nearest neighbours


def sample(number: int) -> torch.Tensor:
    """Up to 200 indices of ``number``, evenly spread, from the first on: on them the lists are chosen."""
    return torch.arange(0, number, max(1, -(-number // SAMPLE)))


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
