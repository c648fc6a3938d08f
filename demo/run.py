"""``make demo``: fine-tune twice from one base through the real script, draw, measure, and show.

Everything goes to runs/demo; what is finished is kept, so an interrupted demo goes on where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from demo import page
from demo.arms import CONTROLS, DEMO, POINTS
from demo.measure import BASE, Pictures, measure_run

ROOT = Path(__file__).resolve().parent.parent
FULL_ARM = "iet-agc+"


def slug(name):
    return name.replace(", ", "-").replace(" ", "-").replace("+", "plus")


class Runner:
    """Trains and measures arms in subprocesses, as many at a time as there are cores, each on one thread."""

    def __init__(self, folder, seed):
        self.folder = folder
        self.seed = seed
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.bar = None

    def command(self, name, flags):
        run_dir = self.folder / slug(name)
        return [
            sys.executable,
            ROOT / "train_text_to_image_ietagc.py",
            f"--config={ROOT / 'configs' / 'demo.yaml'}",
            f"--pretrained_model_name_or_path={BASE}",
            f"--train_data_dir={self.folder / 'pictures'}",
            f"--output_dir={run_dir}",
            f"--seed={self.seed}",
            "--resume_from_checkpoint=latest",
            *flags,
        ]

    def run(self, name, flags, sample):
        run_dir = self.folder / slug(name)
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "model_index.json").exists():
            self.call(self.command(name, flags), run_dir / "train.log", watch=run_dir)
        measured = run_dir / ("scores.json" if sample else "front.json")
        if not measured.exists():
            command = [
                sys.executable,
                "-m",
                "demo.run",
                "--measure",
                name,
                "--folder",
                self.folder,
                "--seed",
                str(self.seed),
            ]
            self.call([*command, *(["--sample"] if sample else [])], run_dir / "measure.log")
        self.bar.update(1)

    def call(self, command, log, watch=None):
        """Run a command with its output in a file. Raises with the end of it if it fails."""
        with log.open("w") as output:
            process = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=self.environment, cwd=ROOT
            )
            seen = 0
            while process.poll() is None:
                time.sleep(0.5)
                if watch is not None:
                    now = len(list((watch / "rounds").glob("round-*")))
                    self.bar.update((now - seen) / POINTS)
                    seen = now
        if process.returncode:
            raise SystemExit(f"{log} ends with:\n{log.read_text()[-1500:]}")

    def run_all(self, arms, sample):
        """Run {name: flags}; ``sample`` says whether the last model's images are drawn and scored."""
        self.bar = tqdm(total=2 * len(arms), desc="Training and measuring", bar_format="{l_bar}{bar}| {elapsed}")
        with self.bar, ThreadPoolExecutor(max_workers=min(len(arms), os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(self.run, name, flags, sample) for name, flags in arms.items()]
            for job in jobs:
                job.result()


def filled(arms, rates):
    """Fill the measured skip and augment rates of the full method into the controls that imitate them."""
    return {name: [flag.format(**rates) for flag in flags] for name, flags in arms.items()}


def measured_rates(run_dir):
    rows = [json.loads(line) for line in (run_dir / "ietagc" / "rounds.jsonl").read_text().splitlines()]
    return {key: round(sum(row[key] for row in rows) / len(rows), 3) for key in ("skip_rate", "augment_rate")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--controls", action="store_true", help="also run the controls and the single components")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: runs/demo, or runs/demo-seed-N")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or ROOT / "runs" / ("demo" if args.seed == 0 else f"demo-seed-{args.seed}")
    if args.measure:
        measure_run(args.measure, folder / slug(args.measure), args.sample)
        return
    if not BASE.exists():
        sys.exit(f"{BASE} is missing: `make tiny-sd` makes it")
    started = time.perf_counter()
    pictures = Pictures()
    if not (folder / "pictures" / "metadata.jsonl").exists():
        pictures.write(folder / "pictures")
    runner = Runner(folder, args.seed)
    runner.run_all(DEMO, sample=True)
    if args.controls:
        runner.run_all(filled(CONTROLS, measured_rates(folder / slug(FULL_ARM))), sample=False)
    arms = {name: folder / slug(name) for name in [*DEMO, *CONTROLS] if (folder / slug(name) / "front.json").exists()}
    path = page.write(folder, pictures, arms, list(DEMO))
    print(page.table(folder, list(DEMO), arms))
    print(f"\n{time.perf_counter() - started:.0f} s. The page: {path}")


if __name__ == "__main__":
    main()
