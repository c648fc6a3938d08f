"""``make demo``: fine-tune twice from one tiny base model, draw, measure, and show what came out on a page.

Everything is written to runs/demo. Finished parts are kept: the same command continues an interrupted demo.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two trainings of one thread each beat one of two on a small model
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml

from demo import page
from demo.pictures import NUM_IMAGES, write_sets
from ietagc_diffusers.eval import benchmark
from ietagc_diffusers.eval.calibrate import calibrate
from ietagc_diffusers.eval.front import Front, Sampling, front
from ietagc_diffusers.eval.image_sets import ImageSet, load_images
from ietagc_diffusers.eval.protocol import Protocol
from ietagc_diffusers.eval.report import Scored
from ietagc_diffusers.eval.score import Tools, score
from ietagc_diffusers.files import write_json
from ietagc_diffusers.sscd import pixel_descriptor

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "configs" / "demo_runs.yaml"


def write_runs(folder: Path, runs: Path, seeds: list[int], tables: Sequence[str], fresh: ImageSet) -> Path:
    """Write a benchmark for this folder, with the measured copy threshold.

    Args:
        runs: the benchmark, such as ``configs/demo_runs.yaml``.
        seeds, tables: those to run.
        fresh: pictures that copy nothing, of which one in a hundred may count as a copy.

    Returns:
        The path of its YAML file.
    """
    config = yaml.safe_load(runs.read_text())
    for key in ("train", "reference", "prompts"):
        config[key] = str(folder / Path(config[key]).relative_to(config["output"]))
    config["output"] = str(folder)
    calibration = calibrate(pixel_descriptor(), load_images(folder / "pictures", "folder"), fresh, views=None)
    write_json(folder / "calibration.json", asdict(calibration))
    print(calibration.sentence)
    config["score"]["copy_similarity"] = calibration.copy_similarity
    config["seeds"] = seeds
    config["tables"] = {name: config["tables"][name] for name in tables}
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def fill(path: Path, folder: Path, minutes: str = "two") -> benchmark.Benchmark:
    """Run what is missing of the benchmark in a file, and print its tables. Exits if some of it is not finished.

    ``minutes``: that a run takes, about, in words.
    """
    print(f"Training: about {minutes} minutes for each run and core. Progress: {folder}/trained/*/*/train.log")
    try:
        failed = benchmark.run(path, jobs=os.cpu_count() or 1, cache=folder / "features")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command continues where it stopped.")
    print((folder / "tables.md").read_text(encoding="utf-8"))
    if failed:
        sys.exit(f"{failed} runs are not finished. The same command tries them again.")
    return benchmark.Benchmark(path)


def measured_front(
    runs: benchmark.Benchmark,
    folder: Path,
    output: Path | None = None,
    points: int | None = None,
    sampling: Sampling | None = None,
) -> Front:
    """The front of runs: losses of each training picture, counted once, and of each held-out picture.

    Args:
        output: default: ``folder``; points, sampling: see ``front``.
    """
    names = dict.fromkeys(cell.training for cell in runs.cells)
    folders = {name: [Path(runs.model(name, seed)) for seed in runs.seeds] for name in names}
    pictures = load_images(folder / "pictures", "folder")
    once = pictures.select(row for row, name in enumerate(pictures.names) if name.endswith("_0.png"))
    heldout = load_images(folder / "heldout", "folder")
    return front(folders, once, heldout, output or folder, batch_size=100, points=points, sampling=sampling)


def scored_models(runs: benchmark.Benchmark, folder: Path, names: Iterable[str]) -> list[Scored]:
    """The last models of variants, and in place of a further one the pictures that copy nothing."""
    cells = [benchmark.Cell(name, "none", runs.seeds[0]) for name in names]
    fresh, pictures, reference = (load_images(folder / name, "folder") for name in ("fresh", "pictures", "reference"))
    tools = Tools(Protocol(**runs.score))
    score(fresh, pictures, folder / "fresh_scored", tools, folder / "features", reference)
    return [
        *(Scored.load(runs.folder(cell), cell.training) for cell in cells),
        Scored.load(folder / "fresh_scored", page.FRESH),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--controls", action="store_true", help="also run the controls and the single components")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: runs/demo, or runs/demo-seed-N")
    args = parser.parse_args()
    folder = args.folder or Path("runs") / ("demo" if args.seed == 0 else f"demo-seed-{args.seed}")
    if not (ROOT / "demo" / "tiny-sd").exists():
        sys.exit("demo/tiny-sd is missing: `make tiny-sd` trains it")
    started = time.perf_counter()
    write_sets(folder)
    fresh = load_images(folder / "fresh", "folder").select(range(NUM_IMAGES))
    path = write_runs(folder, RUNS, [args.seed], ["runs", "controls"] if args.controls else ["runs"], fresh)
    runs = fill(path, folder)
    measured, scored = measured_front(runs, folder), scored_models(runs, folder, (page.CONTROL, page.METHOD))
    shown = page.write(folder, measured.points, scored)
    seconds = time.perf_counter() - started
    print(f"{page.copies(scored)}\n\n{page.reading(measured.points)}\n\n{seconds:.0f} s. The page: {shown}")


if __name__ == "__main__":
    main()
