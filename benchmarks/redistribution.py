"""Which skip counts find the samples that are skipped most: those of one round, or of several?

    python -m benchmarks.redistribution [--rounds 20] [--steps 5 10 20]

Trains the demo's model with IET-AGC, whose shards stay as they are, and takes as the truth of each shard the quarter
that is skipped most in the second half of the rounds, one of them left out. Prints which share of that quarter is found
by the counts of the round that is left out, and by decayed and total counts of the first half and that round. Chance is
25%.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from demo.renders import make_set, write_image_folder
from ietagc_diffusers import Callback, RunFolder, train
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.method.sharding import SkipHistory

ROOT = Path(__file__).resolve().parent.parent
QUARTER = 0.25


def counts_by_round(rounds, steps, seed):
    """Skip counts (rounds, N) of a run, the shard of each sample (N,), and visits per sample and round."""
    kept = []

    class Keep(Callback):
        """Keeps the counts of each round."""

        def on_round(self, run, row, before):
            visits, skips = run.sample_counts()
            kept.append((visits.numpy().copy(), skips.numpy().copy()))
            Keep.shards = run.plan.shards

    with tempfile.TemporaryDirectory() as scratch:
        captions, pictures = make_set(300, "mosaic", [7])
        write_image_folder(Path(scratch) / "pictures", captions, pictures, [4] * 30 + [1] * 270)
        flags = [
            f"--pretrained_model_name_or_path={ROOT / 'demo' / 'tiny-sd'}", f"--train_data_dir={scratch}/pictures",
            f"--output_dir={scratch}/out", "--mitigation=iet-agc", "--resolution=32", "--train_batch_size=30",
            "--learning_rate=1e-3", "--lr_warmup_steps=40", f"--steps_per_round={steps}", f"--seed={seed}",
            f"--max_train_steps={4 * rounds * steps}", "--checkpointing_steps=1000000", "--report_to=none",
        ]  # fmt: skip
        train(parse_flags(flags), callbacks=[Keep()])
        assert RunFolder(f"{scratch}/out").is_finished
    visits, skips = (np.stack(column) for column in zip(*kept, strict=True))
    shard = np.empty(skips.shape[1], dtype=int)
    for number, samples in enumerate(Keep.shards):
        shard[samples] = number
    return np.diff(skips, axis=0, prepend=0), shard, visits[-1].mean() / rounds


def top(counts, samples, rng):
    """The quarter of the samples with the highest counts, ties by chance."""
    order = np.lexsort((rng.random(len(samples)), -counts[samples]))
    return set(samples[order[: round(QUARTER * len(samples))]].tolist())


def found(counts, shard, rng):
    """Share of the true quarter that each kind of counts finds, a list for each kind."""
    shares = {kind: [] for kind in SkipHistory.KINDS}
    half = len(counts) // 2
    for left_out in range(half, len(counts)):
        truth = counts[half:].sum(axis=0) - counts[left_out]
        for kind, values in shares.items():
            history = SkipHistory(kind)
            # Nothing of the truth is judged by: only the rounds of the first half, and the one that is left out.
            for round_counts in [*counts[:half], counts[left_out]]:
                score = np.atleast_2d(history.add(round_counts[None]))[0]
            for number in range(shard.max() + 1):
                samples = np.flatnonzero(shard == number)
                best = top(truth, samples, rng)
                values.append(len(top(score, samples, rng) & best) / len(best))
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20], help="of a proxy in a round")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| visits per sample and round | " + " | ".join(SkipHistory.KINDS) + " |")
    print("|---|" + "---|" * len(SkipHistory.KINDS))
    for steps in tqdm(args.steps, desc="Runs"):
        counts, shard, visits = counts_by_round(args.rounds, steps, args.seed)
        shares = found(counts, shard, np.random.default_rng(args.seed))
        print(f"| {visits:.1f} | " + " | ".join(f"{np.mean(values):.0%}" for values in shares.values()) + " |")


if __name__ == "__main__":
    main()
