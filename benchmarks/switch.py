"""What it costs to change from one proxy to the next, and to average, in steps of training.

    python -m benchmarks.real_shapes sd15 runs/sd15
    python -m benchmarks.switch runs/sd15 --resolution 64 --train_batch_size 1 --proxy_state disk

A run of two proxies and two rounds, with more flags of the training script behind the folder of the base. Changing is
all between the last step of a proxy and the first of the next: its weights go into the mean, its optimizer state waits
and the other's comes back. No checkpoint is written, and the pipeline is saved at the end as always.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ietagc_diffusers.arguments import parse_args
from ietagc_diffusers.training.ensemble import IterativeEnsemble
from ietagc_diffusers.training.proxy import Proxy
from ietagc_diffusers.training.run import train

ROUNDS = (100, 1000, 1562)  # steps; the last: the paper's 10 epochs of a quarter of LAION-10k, in batches of 16


def write_pictures(folder: Path, size: int, count: int = 8) -> None:
    """Smooth noise, each picture with the same caption."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        noise.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    lines = (json.dumps({"file_name": f"{number}.png", "text": "a photo of a thing"}) for number in range(count))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def timed(seconds: dict[str, list[float]], kind: type, method: str) -> None:
    """Let ``seconds[method]`` have how long each call takes."""
    original, seconds[method] = getattr(kind, method), []

    def call(*args, **options):
        started = time.perf_counter()
        result = original(*args, **options)
        seconds[method].append(time.perf_counter() - started)
        return result

    setattr(kind, method, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder of a base model")
    parser.add_argument("--steps", type=int, default=3, help="of a proxy in each of the two rounds")
    parser.add_argument("--output", type=Path, help="where the run is written; default: a folder that is removed")
    args, more = parser.parse_known_args()
    seconds: dict[str, list[float]] = {}
    for method in ("_activate", "_retire", "_end_round"):
        timed(seconds, IterativeEnsemble, method)
    timed(seconds, Proxy, "step")
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) / "pictures"
        write_pictures(pictures, 256)
        flags = [f"--pretrained_model_name_or_path={args.base}", f"--train_data_dir={pictures}", "--num_shards=2"]
        flags += [f"--steps_per_round={args.steps}", f"--max_train_steps={4 * args.steps}", "--report_to=none"]
        flags += ["--checkpointing_steps=1000000", "--seed=0", f"--output_dir={args.output or Path(scratch) / 'run'}"]
        train(parse_args([*flags, *more]))
    step = statistics.median(seconds["step"][1:])  # the first makes the optimizer's state
    # A proxy is asked to be active before each step, and is already but before the first of its turn. Only those of the
    # second round have a state to bring back.
    change = sum(seconds["_activate"][2 * args.steps :] + seconds["_retire"][2:]) / 2
    average = statistics.mean(seconds["_end_round"])
    print(f"a step: {step:.2f} s; a change: {change:.2f} s; averaging: {average:.2f} s")
    for steps in ROUNDS:
        print(f"rounds of {steps} steps of each of 4 proxies: {(4 * change + average) / (4 * steps * step):.2%}")


if __name__ == "__main__":
    main()
