"""Nearest neighbours as an audit searches for them: the share of this machine's matrix-product rate that they reach.

Products and searches are measured in turn, because other work on a machine changes both.

Prints also the peak memory, and with ``--plain`` the ratio of the time to the plain way's (the full distance matrix,
then a sort), on as many queries as fit into memory.

    python -m benchmarks.neighbours                                             # l2, 64 px: 2,000 x 100,000 x 12,288
    python -m benchmarks.neighbours --search similar --dim 512 --k 1            # descriptors
    python -m benchmarks.neighbours --queries 65536 --references 50000 --dim 3072 --plain 4096    # MQ on CIFAR-10
"""

import argparse
import resource
import statistics
import time

import torch

from ietagc_diffusers.eval.neighbours import most_similar, nearest_l2

GIB = 2**30


def timed(function):
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def matmul_rate(dim, device, seconds=5):
    """Floating-point operations a second of large float32 products on this machine: the median of several."""
    a, b = torch.randn(1024, dim, device=device), torch.randn(dim, 8192, device=device)
    product = a @ b
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(rates) < 5:
        took, _ = timed(lambda: torch.mm(a, b, out=product))
        rates.append(2 * a.shape[0] * b.shape[1] * dim / took)
    return statistics.median(rates)


def plain(queries, references, k):
    """All distances, then a sort."""
    values, indices = torch.cdist(queries, references).sort(dim=1)
    return values[:, :k], indices[:, :k]


def vectors(number, dim, search, generator):
    """Pictures as bytes, or descriptors of unit length."""
    if search == "l2":
        return torch.randint(0, 256, (number, dim), dtype=torch.uint8, generator=generator)
    return torch.nn.functional.normalize(torch.randn(number, dim, generator=generator), dim=1)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", choices=["l2", "similar"], default="l2")
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--references", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=12_288)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--views", type=int, default=1, help="rows that belong to one owner")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_memory", type=float, default=2.0, help="GiB")
    parser.add_argument("--plain", type=int, default=0, help="queries that the plain way is measured on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.plain and args.search != "l2":
        parser.error("--plain: is for --search l2")
    generator = torch.Generator().manual_seed(0)
    queries, references = (vectors(n, args.dim, args.search, generator) for n in (args.queries, args.references))
    owners = torch.arange(args.references) // args.views if args.views > 1 else None
    options = {"max_memory": int(args.max_memory * GIB), "device": args.device, "owners": owners}
    search = {"l2": nearest_l2, "similar": most_similar}[args.search]

    inputs = peak()
    rates, shares = [matmul_rate(args.dim, args.device)], []
    for _ in range(args.repeats):
        took, _ = timed(lambda: search(queries, references, args.k, **options))
        rates.append(matmul_rate(args.dim, args.device))
        achieved = 2 * args.queries * args.references * args.dim / took
        shares.append(achieved / statistics.mean(rates[-2:]))
        print(
            f"{took:.1f} s: {achieved / 1e9:.0f} GFLOP/s, {shares[-1]:.0%} of the products' "
            f"{rates[-2] / 1e9:.0f} before and {rates[-1] / 1e9:.0f} after",
            flush=True,
        )
    print(
        f"{args.search}, {args.queries} x {args.references} x {args.dim}, k = {args.k}, views {args.views}, "
        f"{args.device}, {torch.get_num_threads()} threads: {statistics.median(shares):.0%} of the matrix-product rate"
    )
    print(f"peak memory: {peak() - inputs:.1f} GiB over the inputs; limit {args.max_memory:g} and the results")
    if not args.plain:
        return
    few = queries[: args.plain]
    ours, found = timed(lambda: search(few, references, args.k, **options))
    floats = (few.to(args.device).float() / 255, references.to(args.device).float() / 255)
    theirs, wanted = timed(lambda: plain(*floats, args.k))
    print(f"{len(few)} queries: {ours:.1f} s against the plain way's {theirs:.1f} s: {theirs / ours:.1f} times as fast")
    error = (found[0] - wanted[0].cpu()).abs().max().item()
    print(f"largest difference of a distance to the plain way's: {error:.1e}")


if __name__ == "__main__":
    main()
