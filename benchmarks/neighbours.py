"""Nearest neighbours at the size of the paper's MQ on CIFAR-10: the 50 nearest of 50,000 training images of 3,072
values to each of 65,536 generations.

Prints the share of this machine's own matrix-product rate that the search reaches, its peak memory, and the ratio of
its time to the plain way's (the full distance matrix, then a sort), measured on as many queries as fit into memory.

    python -m benchmarks.neighbours
"""

import argparse
import resource
import time

import torch

from ietagc_diffusers.eval.neighbours import nearest_l2

GIB = 2**30


def timed(function):
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def matmul_rate(dim, device, seconds=5):
    """Floating-point operations a second of large float32 products on this machine: the median of several."""
    a, b = torch.randn(2048, dim, device=device), torch.randn(dim, 8192, device=device)
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(rates) < 5:
        took, _ = timed(lambda: a @ b)
        rates.append(2 * a.shape[0] * b.shape[1] * dim / took)
    return sorted(rates)[len(rates) // 2]


def plain(queries, references, k):
    """All distances, then a sort."""
    values, indices = torch.cdist(queries, references).sort(dim=1)
    return values[:, :k], indices[:, :k]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=65_536)
    parser.add_argument("--references", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=3_072)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--max_memory", type=float, default=2.0, help="GiB")
    parser.add_argument("--plain_queries", type=int, default=4_096, help="queries that the plain way is measured on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    queries, references = (
        torch.randint(0, 256, (n, args.dim), dtype=torch.uint8, generator=generator)
        for n in (args.queries, args.references)
    )
    inputs = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    options = {"max_memory": int(args.max_memory * GIB), "device": args.device}
    before = matmul_rate(args.dim, args.device)
    took, _ = timed(lambda: nearest_l2(queries, references, args.k, progress=True, **options))
    after = matmul_rate(args.dim, args.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate, achieved = (before + after) / 2, 2 * args.queries * args.references * args.dim / took
    print(f"{args.queries} x {args.references} x {args.dim}, k = {args.k}: {took:.1f} s on {args.device}")
    print(f"matrix products here: {before / 1e9:.0f} GFLOP/s before, {after / 1e9:.0f} after")
    print(f"the search: {achieved / 1e9:.0f} GFLOP/s, {achieved / rate:.0%} of that rate")
    print(
        f"peak memory: {peak:.1f} GiB, {peak - inputs:.1f} over the inputs; limit {args.max_memory:g} and the results"
    )

    few = queries[: args.plain_queries]
    ours, found = timed(lambda: nearest_l2(few, references, args.k, **options))
    floats = (few.to(args.device).float() / 255, references.to(args.device).float() / 255)
    theirs, wanted = timed(lambda: plain(*floats, args.k))
    print(f"{len(few)} queries: {ours:.1f} s against the plain way's {theirs:.1f} s: {theirs / ours:.1f} times as fast")
    error = (found[0] - wanted[0].cpu()).abs().max().item()
    print(f"largest difference of a distance to the plain way's: {error:.1e}")


if __name__ == "__main__":
    main()
