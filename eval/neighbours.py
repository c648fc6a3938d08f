"""Exact nearest neighbours by chunked matrix products, in bounded memory."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

MARGIN = 8  # candidates beyond k: rounding of the expanded square can swap neighbours that are nearly tied
# An expanded square is the difference of sums; where it is a smaller share of them than this, rounding shows in it.
# Where it is larger, float32 rounds products by about 1e-6 of the sums, and so a distance by at most 1e-5 of itself.
CANCELS = 1 / 16
QUERY_CHUNK = 1024
PAIRS = 2**18  # pairs of vectors that are listed at a time
BLOCK = 32  # columns that stand together when the best are sought
CACHE = 2**19  # bytes that fit into a core's cache, where passes over them are several times as fast
GIB = 2**30

Found = tuple[torch.Tensor, torch.Tensor]
Groups = tuple[torch.Tensor, torch.Tensor]


def nearest_l2(
    queries: torch.Tensor,
    references: torch.Tensor,
    k: int = 1,
    max_memory: int = 2 * GIB,
    device: str | torch.device = "cpu",
    index: str = "exact",
    progress: bool = False,
    owners: torch.Tensor | None = None,
) -> Found:
    """The k nearest references of each query in l2.

    Candidates come from the expanded square ||q||^2 + ||r||^2 - 2 q.r of vectors centred on the references. There a
    duplicate's distance can round to more than 0, so distances that are small beside the vectors are measured again by
    subtraction.

    Args:
        queries: (N, D), references: (M, D), float32 or uint8; uint8 counts as value / 255.
        k: number of neighbours; with fewer references (or owners) all of them.
        max_memory: bytes of working memory, in addition to inputs and results.
        index: ``exact``; ``faiss``: candidates from an inverted file, which can miss neighbours, see
            ``eval.approximate``.
        progress: whether a progress bar is shown.
        owners: (M,) int64, not decreasing: what each reference is a view of. The neighbours of a query are then of k
            different owners, each by its nearest row.

    Returns:
        Distances float32 (N, k), ascending, right to about 1e-5 of themselves, and indices of rows (N, k), on the CPU.

    Raises:
        ImportError: ``faiss`` was asked for and is not installed.
        ValueError: ``owners`` decrease, or are not one for each reference.
    """
    ranges = None if owners is None else Owners.of(owners, len(references))
    search = Search(queries, references, k + MARGIN, max_memory, device, ranges, _centre(references), progress)
    if index == "faiss":
        from .approximate import candidates

        rows = candidates(search)
        squared = torch.full(rows.shape, -1.0)  # not known
    else:
        rows, squared = search.best()
    search.refine(rows, squared)
    distances, rows = best_of_owners(squared.neg_(), rows, ranges, k)
    return distances.neg_().clamp_(min=0).sqrt_(), rows


def most_similar(
    queries: torch.Tensor,
    references: torch.Tensor,
    k: int = 1,
    exclude_self: bool = False,
    groups: Groups | torch.Tensor | None = None,
    max_memory: int = 2 * GIB,
    device: str | torch.device = "cpu",
    index: str = "exact",
    owners: torch.Tensor | None = None,
) -> Found:
    """The k most similar references of each query by dot product, which for unit vectors is the cosine.

    Args:
        exclude_self: queries are the references, and none is its own neighbour, nor its owner's rows.
        groups: (N,) and (M,) integers; references of a query's own group are not its neighbours. With ``owners`` it
            may be (N,) only: the owner that each query belongs to. Such a search is always exact.

    Other arguments as for ``nearest_l2``.

    Returns:
        Similarities float32 (N, k), descending, and indices of rows (N, k), on the CPU. Where ``groups`` leave a query
        fewer than k neighbours, the last similarities are -inf.
    """
    ranges = None if owners is None else Owners.of(owners, len(references))
    if exclude_self:
        own = torch.arange(len(references)) if owners is None else owners
        groups = own, own
    elif isinstance(groups, torch.Tensor):
        if owners is None:
            raise ValueError("groups of the queries only need owners to compare with")
        groups = groups, owners
    search = Search(queries, references, k, max_memory, device, ranges, groups=groups)
    if index == "faiss" and groups is None:
        from .approximate import candidates

        rows = candidates(search)
        pairs = zip(queries.split(QUERY_CHUNK), rows.split(QUERY_CHUNK), strict=True)
        similarities = torch.cat([torch.einsum("nd,nkd->nk", some, references[found]) for some, found in pairs])
        return best_of_owners(similarities, rows, ranges, k)
    rows, similarities = search.best()
    return similarities, rows


@dataclass(frozen=True)
class Owners:
    """Which rows belong together: each owner's are a range.

    Args:
        of_row: (M,) the number of each row's owner, from 0.
        first: (owners,) the first row, ``count``: (owners,) the number of rows of each.
    """

    of_row: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, owners: torch.Tensor, num_rows: int) -> "Owners":
        """From (M,) integers that do not decrease; otherwise ``ValueError``."""
        if owners.shape != (num_rows,) or bool((owners[1:] < owners[:-1]).any()):
            raise ValueError(f"owners {tuple(owners.shape)}: must be {num_rows} numbers that do not decrease")
        _, of_row, count = owners.cpu().unique_consecutive(return_inverse=True, return_counts=True)
        return cls(of_row, count.cumsum(0) - count, count)

    def __len__(self) -> int:
        return len(self.count)

    def rows_for(self, k: int) -> int:
        """How many of the best rows are sure to be of ``k`` owners, where there are as many."""
        return (k - 1) * int(self.count.max()) + 1 if k and len(self) else 0


def best_of_owners(scores: torch.Tensor, rows: torch.Tensor, owners: Owners | None, k: int) -> Found:
    """The k highest scores of (N, C) and their rows, best first; of each owner only its best row."""
    if owners is not None:
        ordered = scores.sort(dim=1, descending=True, stable=True)
        scores, rows = ordered.values, rows.gather(1, ordered.indices)
        owner = owners.of_row[rows].sort(dim=1, stable=True)
        again = torch.zeros_like(rows, dtype=torch.bool)
        again[:, 1:] = owner.values[:, 1:] == owner.values[:, :-1]
        scores.masked_fill_(torch.zeros_like(again).scatter_(1, owner.indices, again), -torch.inf)
        k = min(k, len(owners))
    best = scores.topk(min(k, scores.shape[1]))
    return best.values, rows.gather(1, best.indices)


class Search:
    """A search for the references with the highest score: q.r, or with a centre minus the squared distance.

    Args:
        k: how many references, or owners, are sought.
        centre: (D,) what is subtracted from all vectors, for distances; None for dot products.

    Other arguments as for ``nearest_l2`` and ``most_similar``.
    """

    def __init__(
        self,
        queries: torch.Tensor,
        references: torch.Tensor,
        k: int,
        max_memory: int,
        device: str | torch.device,
        owners: Owners | None,
        centre: torch.Tensor | None = None,
        progress: bool = False,
        groups: Groups | None = None,
    ):
        self.queries, self.references, self.owners = queries, references, owners
        self.k = min(k, len(references) if owners is None else len(owners))
        self.max_memory, self.device, self.progress, self.groups = max_memory, torch.device(device), progress, groups
        self.centre = None if centre is None else centre.to(device)

    def floats(self, vectors: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """As float32 on the device, minus the centre; bytes are divided by 255. ``out``: for all of them."""
        if out is None:
            out = torch.empty(vectors.shape, device=self.device)
        rows = max(1, CACHE // (4 * max(1, vectors.shape[1]))) if self.device.type == "cpu" else max(1, len(vectors))
        for some, into in zip(vectors.split(rows), out.split(rows), strict=True):
            into.copy_(some)
            if vectors.dtype == torch.uint8:
                into.div_(255)
            if self.centre is not None:
                into.sub_(self.centre)
        return out

    def best(self, queries: torch.Tensor | None = None) -> Found:
        """The rows (N, k) of the k best of ``queries``, by default of all, best first; and their dot products, or with
        a centre their squared distances.

        References are the outer loop, so that each chunk of them is converted once; the best so far of each query are
        kept.
        """
        queries = self.queries if queries is None else queries
        num_queries, dim = queries.shape
        rows, columns = _chunk_sizes(num_queries, len(self.references), dim, self.max_memory)
        best = torch.full((num_queries, self.k), -torch.inf)
        indices = torch.zeros((num_queries, self.k), dtype=torch.long)
        # Large buffers are made once: to have the system clear new ones takes longer than to fill them.
        products = torch.empty(rows * columns, device=self.device)
        query_buffer, buffer = (torch.empty((size, dim), device=self.device) for size in (rows, columns))
        total = -(-num_queries // rows) * -(-len(self.references) // columns)
        with tqdm(total=total, desc="Nearest neighbours", disable=not self.progress, leave=False) as bar:
            for first in range(0, len(self.references), columns):
                there = slice(first, first + columns)
                chunk = self._converted(self.references[there], buffer)
                # The highest q.r - ||r||^2 / 2 has the lowest ||q - r||^2.
                added = torch.zeros(len(chunk), device=self.device)
                if self.centre is not None:
                    added = _squares(chunk) / -2
                mask = None if self.groups is None else _Mask(self.groups[1][there], self.device)
                for start in range(0, num_queries, rows):
                    here = slice(start, start + rows)
                    block = self._converted(queries[here], query_buffer)
                    scores = products[: len(block) * len(chunk)].view(len(block), len(chunk))
                    torch.addmm(added, block, chunk.T, out=scores)
                    if mask is not None and self.groups is not None:
                        mask.hide(scores, self.groups[0][here])
                    values, found = (x.cpu() for x in _top(scores, self.rows_of(len(chunk))))
                    values = torch.cat([best[here], values], dim=1)
                    found = torch.cat([indices[here], found + first], dim=1)
                    best[here], indices[here] = best_of_owners(values, found, self.owners, self.k)
                    bar.update()
        if self.centre is not None:
            best = self._squared_lengths(queries)[:, None] - 2 * best
        return indices, best

    def rows_of(self, num_rows: int) -> int:
        """How many of a chunk's best rows can be among the k best owners' best."""
        return min(num_rows, self.k if self.owners is None else self.owners.rows_for(self.k))

    def _converted(self, vectors: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        if self.centre is None and vectors.dtype == torch.float32 and vectors.device == self.device:
            return vectors
        return self.floats(vectors, buffer[: len(vectors)])

    def _squared_lengths(self, vectors: torch.Tensor) -> torch.Tensor:
        rows = max(1, CACHE // (4 * vectors.shape[1]))
        return torch.cat([_squares(self.floats(some)).cpu() for some in vectors.split(rows)])

    def squared_distances(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """By subtraction, of pairs: queries (P,) and rows of the references (P,), as indices."""
        on_host = self.device.type == "cpu"
        size = max(1, (CACHE if on_host else self.max_memory // 4) // (8 * self.queries.shape[1]))
        squared = torch.empty(len(rows))  # filled in place: small results between large buffers fragment the heap
        for start in range(0, len(rows), size):
            here = slice(start, start + size)
            near = self.floats(self.references[rows[here]])
            squared[here] = _squares(near.sub_(self.floats(self.queries[queries[here]]))).cpu()
        return squared

    def refine(self, rows: torch.Tensor, squared: torch.Tensor) -> None:
        """Replace those of the squared distances (N, C) to ``rows`` (N, C) that rounding may have spoilt, or that are
        not known (negative), by exact ones. Where another row of the same owner is nearer, it takes the row's place.
        """
        lengths = self._squared_lengths(self.queries)[:, None]
        # ||r|| is at most ||q|| + ||q - r||, so that no lengths of references have to be kept.
        sums = lengths + (lengths.sqrt() + squared.clamp(min=0).sqrt()).square()
        query, place = ((squared < 0) | (squared < CANCELS * sums)).nonzero(as_tuple=True)
        if self.owners is None:
            squared[query, place] = self.squared_distances(query, rows[query, place])
            return
        owner = self.owners.of_row[rows[query, place]]
        for some in torch.arange(len(query)).split(max(1, PAIRS // int(self.owners.count.max()))):
            which, row = _ranges(self.owners.first[owner[some]], self.owners.count[owner[some]])
            apart = self.squared_distances(query[some][which], row)
            nearest = torch.full((len(some),), torch.inf).scatter_reduce_(0, which, apart, "amin")
            row = row.where(apart == nearest[which], len(self.references))
            first = torch.full((len(some),), len(self.references)).scatter_reduce_(0, which, row, "amin")
            squared[query[some], place[some]], rows[query[some], place[some]] = nearest, first


class _Mask:
    """Hides the scores of references of a query's own group.

    ``groups``: (columns,) of the references of a chunk.
    """

    def __init__(self, groups: torch.Tensor, device: torch.device):
        ordered = groups.cpu().sort(stable=True)
        self.groups, self.columns, self.device = ordered.values, ordered.indices, device

    def hide(self, scores: torch.Tensor, groups: torch.Tensor) -> None:
        """In scores (rows, columns) of queries of ``groups`` (rows,)."""
        groups = groups.cpu().contiguous()
        start = torch.searchsorted(self.groups, groups)
        count = torch.searchsorted(self.groups, groups, right=True) - start
        row, place = _ranges(start, count)
        scores[row.to(self.device), self.columns[place].to(self.device)] = -torch.inf


def _ranges(first: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The members of the ranges of ``count`` numbers from ``first`` one after another: which range, and the number."""
    which = torch.arange(len(count)).repeat_interleave(count)
    place = torch.arange(len(which)) - (count.cumsum(0) - count)[which]
    return which, first[which] + place


def _squares(vectors: torch.Tensor) -> torch.Tensor:
    """The squared length of each row, without a copy of the rows."""
    return torch.linalg.vector_norm(vectors, dim=1).square_()


def _centre(vectors: torch.Tensor) -> torch.Tensor:
    """Roughly the mean of vectors (M, D): any point among them keeps the expanded squares small."""
    some = vectors[torch.linspace(0, len(vectors) - 1, min(len(vectors), QUERY_CHUNK)).long()].float()
    return some.mean(dim=0) / (255 if vectors.dtype == torch.uint8 else 1)


def _chunk_sizes(num_queries: int, num_references: int, dim: int, max_memory: int) -> tuple[int, int]:
    """How many queries and references are processed at a time. Working memory holds two copies of both (float32, and
    what moves between devices) and their products, at 4 bytes a value.
    """
    rows = min(QUERY_CHUNK, max(1, num_queries), max(1, max_memory // (32 * dim)))
    left = max_memory - 8 * rows * dim
    return rows, max(1, min(num_references, left // (8 * dim + 8 * rows)))


def _top(scores: torch.Tensor, k: int) -> Found:
    """The k highest of each row of scores (rows, columns), and their columns, in any order.

    They are in the k blocks of columns with the highest maxima, so that only the maxima and these blocks are sorted.
    """
    columns = scores.shape[1]
    whole = columns // BLOCK * BLOCK
    if 4 * BLOCK * k > columns:
        found = scores.topk(k, sorted=False)
        return found.values, found.indices
    blocks = scores[:, :whole].unflatten(1, (-1, BLOCK)).amax(dim=2).topk(k, sorted=False).indices
    among = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    rest = torch.arange(whole, columns, device=scores.device).expand(len(scores), -1)
    among = torch.cat([among, rest], dim=1)
    found = scores.gather(1, among).topk(k, sorted=False)
    return found.values, among.gather(1, found.indices)
