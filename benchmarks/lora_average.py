"""Which mean of adapters gives the better model?

    python -m benchmarks.lora_average            # the demo's model and pictures, about 10 minutes on an idle core

Trains adapters with each ``--lora_average``, and one without shards beside them, for the same number of steps, and
prints a row each: training and held-out loss of the saved adapters under fixed noise, the gap between them over the
base's, and the share of the mean's energy that a round's start lost, averaged over rounds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from demo.pictures import write_sets
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.losses import Losses, shown
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "demo" / "tiny-sd"
AVERAGES = ("svd", "concatenate", "fold")
COLUMNS = ("mean", "rank", "K", "seeds", "held-out loss", "training loss", "gap", "discarded", "kB", "s")


def train(pictures, output, args, seed, *flags):
    """Train adapters; returns the seconds."""
    command = [
        sys.executable, ROOT / "train_text_to_image_ietagc.py", f"--pretrained_model_name_or_path={BASE}",
        f"--train_data_dir={pictures}", "--resolution=32", "--center_crop", "--train_batch_size=30",
        f"--learning_rate={args.learning_rate}", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=20",
        f"--max_train_steps={args.steps}", f"--lora_rank={args.rank}", f"--seed={seed}", "--report_to=none",
        "--checkpointing_steps=100000", f"--output_dir={output}", *flags,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--steps_per_round", type=int, default=10)
    parser.add_argument("--num_shards", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write_sets(scratch)
        sets = [shown(load_images(scratch / name, name), 32, 300) for name in ("pictures", "heldout")]
        losses = Losses(BASE, *sets)
        base_train, base_heldout = losses.of_base()
        print(f"base: training loss {base_train:.4f}, held-out loss {base_heldout:.4f}\n", flush=True)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        rounds = [f"--num_shards={args.num_shards}", f"--steps_per_round={args.steps_per_round}"]
        kinds = {"none": ["--mitigation=none"]}
        kinds |= {kind: ["--mitigation=iet", *rounds, f"--lora_average={kind}"] for kind in AVERAGES}
        for kind, flags in kinds.items():
            found = []
            for seed in range(args.seeds):
                output = scratch / f"{kind}-{seed}"
                seconds = train(scratch / "pictures", output, args, seed, *flags)
                lost = np.mean([row.get("lora_discarded", 0.0) for row in RunFolder(output).rounds()])
                found.append((*losses(output), lost, (output / ADAPTER_FILE).stat().st_size / 1e3, seconds))
            of_train, heldout, lost, size, seconds = np.mean(found, axis=0)
            spread = np.std(np.array(found)[:, 1])
            gap = heldout - of_train - (base_heldout - base_train)
            shards = 1 if kind == "none" else args.num_shards
            cells = (kind, args.rank, shards, args.seeds, f"{heldout:.4f} ± {spread:.4f}", f"{of_train:.4f}")
            cells = (*cells, f"{gap:.4f}", f"{lost:.2g}", f"{size:.0f}", f"{seconds:.0f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
