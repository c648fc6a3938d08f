"""Start-up and rounds at the size of large training sets: time a million rows of what is done for every row.

Each part is measured at several sizes. It is linear if a million rows of the largest set take no longer than four times
a million of the smallest (memory beyond the processor's caches is slower); every part should take under a second.

    python -m benchmarks.scale --rows 1 10
"""

import argparse
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset

from ietagc_diffusers.data.loaders import SeededLoader
from ietagc_diffusers.data.rows import label_values
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.method.sharding import ShardPlan
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.layout import Layout
from ietagc_diffusers.training.records import write_sample_counts

MILLION = 1_000_000


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def write_counts(num_rows, plan):
    """skip_counts.parquet of a run whose rows were drawn from a larger set."""
    rows = Dataset.from_dict({SAMPLE_ID: np.arange(num_rows + 1)}).shuffle(seed=0).select(range(num_rows))
    counts = torch.ones(num_rows, dtype=torch.int64)
    run = SimpleNamespace(sample_counts=lambda: (counts, counts), layout=Layout(1), plan=plan)
    with tempfile.TemporaryDirectory() as folder:
        folder = RunFolder(folder)
        folder.records.mkdir(parents=True)
        return timed(lambda: write_sample_counts(run, rows, folder))[0]


def plan_epoch(shard, batch_size=8):
    """The order of one epoch of a shard, as its loader plans it block by block."""
    loader = SeededLoader(SimpleNamespace(), batch_size, 0, [0, 0], shard)
    for taken in range(0, len(shard) // batch_size, loader.BLOCK):
        loader.taken = taken
        loader._plan()


def measure(num_rows, num_shards):
    """Seconds of each part, by name."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, num_rows)
    groups = rng.integers(0, num_rows // 2, num_rows)  # two rows an image
    skips = np.broadcast_to(rng.poisson(2, num_rows), (num_shards, num_rows))
    seconds = {}
    seconds["split"], plan = timed(lambda: ShardPlan.split(num_rows, num_shards, 0))
    seconds["split by class"], _ = timed(lambda: ShardPlan.split(num_rows, num_shards, 0, labels))
    seconds["split in groups"], grouped = timed(lambda: ShardPlan.split(num_rows, num_shards, 0, None, groups))
    seconds["redistribute"], moved = timed(lambda: plan.redistribute(skips, 0.25))
    seconds["redistribute groups"], _ = timed(lambda: grouped.redistribute(skips, 0.25))
    seconds["count what moved"], _ = timed(lambda: moved.num_moved(plan))
    seconds["loader plan"], _ = timed(lambda: [plan_epoch(shard) for shard in plan.shards])
    seconds["sample counts"] = write_counts(num_rows, plan)
    rows = Dataset.from_dict({"label": labels}).shuffle(seed=0)
    seconds["read labels"], _ = timed(lambda: label_values(rows, "label"))
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=float, nargs="+", default=[1, 10], help="sizes, in millions of rows")
    parser.add_argument("--num_shards", type=int, default=4)
    args = parser.parse_args()
    measured = [measure(int(millions * MILLION), args.num_shards) for millions in args.rows]
    print("| seconds a million rows | " + " | ".join(f"{millions:g} M rows" for millions in args.rows) + " | |")
    print("|---|" + "---|" * (len(args.rows) + 1))
    for name in measured[0]:
        each = [seconds[name] / millions for seconds, millions in zip(measured, args.rows, strict=True)]
        remarks = ["over a second"] * (max(each) > 1) + ["not linear"] * (each[-1] > 4 * each[0] and each[-1] > 0.1)
        print(f"| {name} | " + " | ".join(f"{one:.2f}" for one in each) + f" | {', '.join(remarks) or 'good'} |")


if __name__ == "__main__":
    main()
