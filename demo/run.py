"""``make demo``: fine-tune twice from one base through the real script, draw, measure, and show.

Everything goes to runs/demo; what is finished is kept, so an interrupted demo goes on where it stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from ietagc_diffusers.eval.score import SCORES
from tqdm.auto import tqdm

from demo import page
from demo.arms import CONTROLS, DEMO, POINTS
from demo.measure import BASE, Pictures, measure_run, score_folder

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

    def train(self, name, flags):
        common = [
            f"--config={ROOT / 'configs' / 'demo.yaml'}",
            f"--pretrained_model_name_or_path={BASE}",
            f"--train_data_dir={self.folder / 'pictures'}",
            f"--output_dir={self.folder / slug(name)}",
            f"--seed={self.seed}",
            "--resume_from_checkpoint=latest",
        ]
        self.call([ROOT / "train_text_to_image_ietagc.py", *common, *flags], name, "train.log")

    def measure(self, name, sample):
        common = ["--measure", name, "--folder", self.folder, "--seed", self.seed]
        self.call(["-m", "demo.run", *common, *(["--sample"] if sample else [])], name, "measure.log")

    def call(self, command, name, log):
        """Run Python on a command, its output in a file of the arm. Exits with the end of it if it fails."""
        path = self.folder / slug(name) / log
        with path.open("w") as output:
            done = subprocess.run(
                [sys.executable, *map(str, command)], stdout=output, stderr=output, env=self.environment, cwd=ROOT
            )
        if done.returncode:
            raise SystemExit(f"{path} ends with:\n{path.read_text()[-1500:]}")

    def run(self, name, flags, sample):
        run_dir = self.folder / slug(name)
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "model_index.json").exists():
            self.train(name, flags)
        if not all(
            (run_dir / wanted).exists() for wanted in ("front.json", *(["scored/scores.json"] if sample else []))
        ):
            self.measure(name, sample)

    def progress(self, name):
        """From 0 to 1: training is three quarters."""
        run_dir = self.folder / slug(name)
        trained = len(list((run_dir / "rounds").glob("round-*"))) / POINTS
        return 0.75 * min(trained, 1) + 0.25 * (run_dir / "front.json").exists()

    def run_all(self, arms, sample):
        """Run {name: flags}; ``sample`` says whether the last model's images are drawn and scored."""
        bar = tqdm(desc="Training and measuring", total=len(arms), bar_format="{l_bar}{bar}| {elapsed}")
        with bar, ThreadPoolExecutor(max_workers=min(len(arms), os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(self.run, name, flags, sample) for name, flags in arms.items()]
            while wait(jobs, timeout=1).not_done:
                bar.n = sum(map(self.progress, arms))
                bar.refresh()
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
    parser.add_argument("--pictures", action="store_true", help="only write the pictures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or ROOT / "runs" / ("demo" if args.seed == 0 else f"demo-seed-{args.seed}")
    if args.measure:
        measure_run(args.measure, folder / slug(args.measure), folder, args.sample)
        return
    if args.pictures:
        Pictures().write(folder)
        return
    if not BASE.exists():
        sys.exit(f"{BASE} is missing: `make tiny-sd` makes it")
    started = time.perf_counter()
    pictures = Pictures()
    pictures.write(folder)
    runner = Runner(folder, args.seed)
    runner.run_all(DEMO, sample=True)
    if args.controls:
        runner.run_all(filled(CONTROLS, measured_rates(folder / slug(FULL_ARM))), sample=False)
    arms = {name: folder / slug(name) for name in [*DEMO, *CONTROLS] if (folder / slug(name) / "front.json").exists()}
    if not (folder / "fresh_scored" / SCORES).exists():
        score_folder(pictures, folder / "fresh", folder / "fresh_scored", folder)
    path, numbers = page.write(folder, arms, {name: arms[name] for name in DEMO})
    print(f"{numbers}\n\n{time.perf_counter() - started:.0f} s. The page: {path}")


if __name__ == "__main__":
    main()
