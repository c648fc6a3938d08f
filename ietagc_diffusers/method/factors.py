"""Means of low-rank updates (eq. 9 for adapters): of their products, not of their factors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """An update of a weight matrix as the product ``up @ down``: float tensors (O, n) and (n, I)."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        """n: the rank that the product can have."""
        return self.down.shape[0]

    def product(self) -> torch.Tensor:
        """The update itself, float64 (O, I)."""
        return self.up.double() @ self.down.double()


def shrinking(factors: Factors, limit: float) -> torch.Tensor:
    """What both factors are multiplied by so that the Frobenius norm of their product is at most ``limit``, without
    forming the matrix: () in the factors' precision, exactly 1 where the norm is within the limit.

    The rule of kohya's ``scale_weight_norms``. The norm's square is the trace of (up^T up)(down down^T).
    """
    up, down = factors.up.double(), factors.down.double()
    norm = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
    return (limit / norm).clamp(max=1).sqrt().to(factors.up.dtype)


class Truncated(NamedTuple):
    """``factors`` of a lower rank, and the energy (the sum of squares) of the whole update and of what was left out."""

    factors: Factors
    energy: float
    discarded: float


def total(parts: Sequence[Factors]) -> Factors:
    """The exact sum of updates: their factors side by side, of rank n_1 + n_2 + ..."""
    return Factors(torch.cat([part.up for part in parts], dim=1), torch.cat([part.down for part in parts]))


def inner_products(parts: Sequence[Factors]) -> torch.Tensor:
    """The inner product (the sum of the products of the numbers) of each of n updates with each other one, without
    forming the matrices: float64 (n, n).

    That of u_i d_i and u_j d_j is the sum of (u_i^T u_j) * (d_i d_j^T).
    """
    whole = total(parts)
    up, down = whole.up.double(), whole.down.double()
    products = (up.T @ up) * (down @ down.T)
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([part.rank for part in parts]))
    belongs = torch.nn.functional.one_hot(owner, len(parts)).double()
    return belongs.T @ products @ belongs


def changes(start: Factors, parts: Sequence[Factors]) -> tuple[float, float]:
    """How updates u_1 to u_K have left u_0 = ``start``: the mean over i of ||u_i - m||^2 and ||m - u_0||^2, where m is
    their mean. These are ``spread`` and ``moved`` of ``averaging.disagreement``.

    Args:
        parts: the u_i / K, whose sum is m.
    """
    number = len(parts)
    products = inner_products([start._replace(up=start.up / number), *parts])
    # From those of u_i / K to those of u_i - u_0.
    products = number**2 * (products[1:, 1:] - products[1:, :1] - products[:1, 1:] + products[:1, :1])
    moved = products.mean().item()
    return products.diagonal().mean().item() - moved, moved


def truncate(factors: Factors, rank: int) -> Truncated:
    """The nearest update of a rank (in the sum of squares), without forming the matrix; float32.

    An update of at most that rank stays as it is, bit for bit. Otherwise ``down`` has orthogonal rows, all as long as
    those of the given ``down`` are on the root mean square: how fast ``up`` learns depends on that length, and so stays
    what it was. The signs are fixed, so that equal updates have equal factors.
    """
    if factors.rank <= rank:
        return Truncated(factors, 0.0, 0.0)
    up, down = factors.up.double(), factors.down.double()
    basis_up, core_up = torch.linalg.qr(up)
    basis_down, core_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(core_up @ core_down.T)
    left, kept, right = (basis_up @ left)[:, :rank], values[:rank], (right @ basis_down.T)[:rank]
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    length = down.norm() / factors.rank**0.5
    scaled = Factors((left * kept * sign.T / length).float(), (right * sign * length).float())
    return Truncated(scaled, values.square().sum().item(), values[rank:].square().sum().item())
