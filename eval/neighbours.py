"""Exact nearest neighbours by chunked matrix products, in bounded memory."""

from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

MARGIN = 8  # candidates beyond k: rounding of the expanded square can swap neighbours that are nearly tied
QUERY_CHUNK = 1024
FAISS_FROM = 300_000
FAISS_PROBES = 64
FAISS_POINTS = 39  # training points for each list, the fewest without a warning of FAISS
CACHE = 2**23  # bytes that fit into a core's cache, where measuring is several times as fast
GIB = 2**30

Found = tuple[torch.Tensor, torch.Tensor]


def nearest_l2(
    queries: torch.Tensor,
    references: torch.Tensor,
    k: int = 1,
    max_memory: int = 2 * GIB,
    device: str | torch.device = "cpu",
    index: str = "auto",
    progress: bool = False,
) -> Found:
    """The k nearest references of each query in l2.

    Candidates come from the expanded square ||r||^2 - 2 q.r of vectors centred on the references' mean. There a
    duplicate's distance can still round to more than 0, so candidates are measured again by subtraction.

    Args:
        queries: (N, D), references: (M, D), float32 or uint8; uint8 counts as value / 255.
        k: number of neighbours; with fewer references all of them.
        max_memory: bytes of working memory, in addition to inputs and results.
        index: ``exact``; ``faiss``: candidates from an inverted file in memory, which can miss neighbours; ``auto``:
            FAISS for 300,000 references or more, if it is installed and its copy of them fits into ``max_memory``.
        progress: whether a progress bar is shown.

    Returns:
        Distances float32 (N, k), ascending, and indices (N, k), on the CPU.

    Raises:
        ImportError: ``faiss`` was asked for and is not installed.
    """
    centre = _mean(references, max_memory)

    def exact(queries: torch.Tensor) -> torch.Tensor:
        def offset(chunk):
            return chunk.pow(2).sum(dim=1) / -2  # max of q.r - ||r||^2 / 2 is min of ||q - r||

        return _chunked(queries, references, k + MARGIN, offset, centre, max_memory, device, progress)[0]

    if uses_faiss(index, references, max_memory):
        candidates = _faiss_candidates(queries, references, k + MARGIN, centre, exact)
    else:
        candidates = exact(queries)
    return _measured(queries, references, candidates, k, max_memory, device)


def most_similar(
    queries: torch.Tensor,
    references: torch.Tensor,
    k: int = 1,
    exclude_self: bool = False,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
    max_memory: int = 2 * GIB,
    device: str | torch.device = "cpu",
    index: str = "auto",
) -> Found:
    """The k most similar references of each query by dot product, which for unit vectors is the cosine.

    Args:
        exclude_self: queries are the references, and none is its own neighbour.
        groups: (N,) and (M,) integers; references of a query's own group are not its neighbours. Such a search is
            always exact.

    Other arguments as for ``nearest_l2``.

    Returns:
        Similarities float32 (N, k), descending, and indices (N, k), on the CPU.
    """
    if exclude_self:
        groups = (torch.arange(len(queries)), torch.arange(len(references)))

    def exact(queries: torch.Tensor, mask: Callable | None = None) -> Found:
        return _chunked(queries, references, k, None, None, max_memory, device, False, mask)

    if groups is None and uses_faiss(index, references, max_memory):
        found = _faiss_candidates(queries, references, k, None, lambda left: exact(left)[0])
        return torch.einsum("nd,nkd->nk", queries, references[found]), found

    def mask(scores, rows, columns):
        same = groups[0][rows, None] == groups[1][columns]
        scores.masked_fill_(same.to(scores.device), -torch.inf)

    indices, values = exact(queries, None if groups is None else mask)
    return values, indices


def uses_faiss(index: str, references: torch.Tensor, max_memory: int) -> bool:
    """Whether a search with ``index`` among these references uses FAISS."""
    fits = 4 * references.numel() <= max_memory
    if index == "exact" or (index == "auto" and not (len(references) >= FAISS_FROM and fits)):
        return False
    try:
        import faiss  # noqa: F401
    except ImportError:
        if index == "faiss":
            raise
        return False
    return True


def _floats(
    vectors: torch.Tensor, centre: torch.Tensor | None = None, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """A float32 copy on the device, minus ``centre``; bytes are divided by 255."""
    copy = vectors.to(device, torch.float32, copy=True)
    if vectors.dtype == torch.uint8:
        copy.div_(255)
    return copy if centre is None else copy.sub_(centre.to(device))


def _mean(vectors: torch.Tensor, max_memory: int) -> torch.Tensor:
    rows = max(1, max_memory // (8 * vectors.shape[1]))
    return torch.stack([_floats(chunk).sum(dim=0) for chunk in vectors.split(rows)]).sum(dim=0) / len(vectors)


def _chunk_sizes(num_queries: int, num_references: int, dim: int, max_memory: int) -> tuple[int, int]:
    """How many queries and references are processed at a time. Working memory holds two copies of both (float32, and
    their squares or bytes) and their products, at 4 bytes a value.
    """
    rows = min(QUERY_CHUNK, num_queries, max(1, max_memory // (32 * dim)))
    left = max_memory - 8 * rows * dim
    return rows, max(1, min(num_references, left // (8 * dim + 8 * rows)))


def _chunked(
    queries: torch.Tensor,
    references: torch.Tensor,
    k: int,
    offset: Callable | None,
    centre: torch.Tensor | None,
    max_memory: int,
    device: str | torch.device,
    progress: bool,
    mask: Callable | None = None,
) -> Found:
    """The k references with the highest q.r + offset(r) of each query: indices and scores (N, min(k, M)), best first.

    References are the outer loop, so that each chunk of them is converted once; the best so far of each query are kept.
    """
    k = min(k, len(references))
    rows, columns = _chunk_sizes(len(queries), len(references), queries.shape[1], max_memory)
    best = torch.full((len(queries), k), -torch.inf)
    indices = torch.zeros((len(queries), k), dtype=torch.long)
    total = -(-len(queries) // rows) * -(-len(references) // columns)
    with tqdm(total=total, desc="Nearest neighbours", disable=not progress, leave=False) as bar:
        for first in range(0, len(references), columns):
            there = slice(first, first + columns)
            chunk = _floats(references[there], centre, device)
            added = torch.zeros(len(chunk), device=device) if offset is None else offset(chunk)
            for start in range(0, len(queries), rows):
                here = slice(start, start + rows)
                scores = torch.addmm(added, _floats(queries[here], centre, device), chunk.T)
                if mask is not None:
                    mask(scores, here, there)
                found = scores.topk(min(k, scores.shape[1]), sorted=False)
                values = torch.cat([best[here], found.values.cpu()], dim=1)
                merged = values.topk(k)
                best[here] = merged.values
                indices[here] = torch.cat([indices[here], found.indices.cpu() + first], dim=1).gather(1, merged.indices)
                bar.update()
    return indices, best


def _measured(
    queries: torch.Tensor,
    references: torch.Tensor,
    candidates: torch.Tensor,
    k: int,
    max_memory: int,
    device: str | torch.device,
) -> Found:
    """The k nearest of each query's candidates, measured by subtraction."""
    on_host = torch.device(device).type == "cpu"
    budget = min(max_memory // 4, CACHE) if on_host else max_memory // 4
    rows = max(1, budget // (4 * candidates.shape[1] * queries.shape[1]))
    # Filled in place: small results allocated between large buffers would fragment the heap.
    exact = torch.empty(candidates.shape)
    for start in range(0, len(queries), rows):
        here = slice(start, start + rows)
        near = _floats(references[candidates[here].flatten()], device=device).view(*candidates[here].shape, -1)
        near.sub_(_floats(queries[here], device=device)[:, None])
        exact[here] = torch.linalg.vector_norm(near, dim=2).cpu()
    nearest = exact.topk(min(k, exact.shape[1]), largest=False)
    return nearest.values, candidates.gather(1, nearest.indices)


def _faiss_candidates(
    queries: torch.Tensor,
    references: torch.Tensor,
    k: int,
    centre: torch.Tensor | None,
    exact: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The k nearest that FAISS finds in the inverted lists nearest to each query: (N, min(k, M)) indices, best first.
    Without a centre the vectors must have unit length: then the nearest are the most similar.

    exact: finds the neighbours of queries whose lists hold fewer than k.
    """
    import faiss

    k, dim = min(k, len(references)), references.shape[1]
    lists = max(1, min(int(4 * len(references) ** 0.5), len(references) // FAISS_POINTS))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dim), dim, lists)
    sample = torch.linspace(0, len(references) - 1, min(len(references), FAISS_POINTS * lists)).long()
    index.train(_floats(references[sample], centre).numpy())
    for chunk in tqdm(references.split(50_000), desc="FAISS index", leave=False):
        index.add(_floats(chunk, centre).numpy())
    index.nprobe = min(lists, FAISS_PROBES)
    blocks = [index.search(_floats(block, centre).numpy(), k)[1] for block in queries.split(QUERY_CHUNK)]
    found = torch.from_numpy(np.concatenate(blocks))
    short = (found < 0).any(dim=1)
    if short.any():
        found[short] = exact(queries[short])
    return found
