"""A matrix of training variants, mitigations at inference and seeds: train, draw, score, and write the paper's tables.

Each cell runs in a process of its own, so that a failure does not end the others. Finished cells are kept.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.files import read_json, write_json
from ietagc_diffusers.sscd import load_descriptor

from .configuration import named
from .jobs import run_jobs, train
from .matrix import Benchmark, Cell
from .processes import Processes, Stopped
from .score import SCORES, Protocol
from .tables import write_tables

__all__ = ["Benchmark", "Cell", "collect", "run"]

FAILED = "failed.txt"


def run(
    path: str | Path, jobs: int = 1, device: str = "cpu", cache: Path | None = None, only_tables: bool = False
) -> int:
    """Fill the matrix and write tables.md, tables.csv, tables.tex and results.json into its ``output``.

    Args:
        path: of the ``Benchmark``.
        jobs: models that are trained and scored at once.
        cache: folder for features.
        only_tables: only write the tables of the cells that are finished.

    Returns:
        The number of cells that failed.
    """
    benchmark = Benchmark(path)
    if not only_tables:
        _fill(benchmark, jobs, device, cache)
    results = collect(benchmark)
    benchmark.output.mkdir(parents=True, exist_ok=True)
    write_json(benchmark.output / "results.json", results)
    write_tables(benchmark, results)
    return sum("failed" in result for result in results)


def collect(benchmark: Benchmark) -> list[dict[str, Any]]:
    """The results so far: [{version, training, inference, seed, scores or failed}], one of each cell."""
    results = []
    for cell in benchmark.cells:
        folder = benchmark.folder(cell)
        about = {"version": __version__, "training": cell.training, "inference": cell.inference, "seed": cell.seed}
        if (folder / SCORES).exists():
            results.append(about | {"scores": read_json(folder / SCORES)})
        else:
            why = (folder / FAILED).read_text().strip() if (folder / FAILED).exists() else "was not run"
            results.append(about | {"failed": why})
    return results


def _fill(benchmark: Benchmark, jobs: int, device: str, cache: Path | None) -> None:
    """Run the cells that are missing, those of one model one after another."""
    missing: dict[tuple[str, int], list[Cell]] = {}
    for cell in benchmark.cells:
        if not (benchmark.folder(cell) / SCORES).exists():
            missing.setdefault((cell.training, cell.seed), []).append(cell)
    total = sum(map(len, missing.values()))
    if missing:  # before anything is trained, to fail early; and downloads happen once
        with named(f"`config` {benchmark.path}"):
            benchmark.check_captions([cell for cells in missing.values() for cell in cells])
        with named(f"`config` {benchmark.path}: score"):
            protocol = Protocol(**benchmark.score)
            protocol.copy_threshold(load_descriptor(protocol.descriptor, protocol.name))
    options = ["--config", benchmark.path, "--device", device, "--feature_cache", cache or "none"]
    works = [partial(_run_model, benchmark, cells, options) for cells in missing.values()]
    run_jobs(works, jobs, total, "Cells")


def _run_model(benchmark: Benchmark, cells: list[Cell], options: list[Any], bar: tqdm, processes: Processes) -> None:
    """Train a model and run its cells; ``options``: of the benchmark's command."""
    training, seed = cells[0].training, cells[0].seed
    try:
        _train_and_score(benchmark, cells, options, bar, processes)
    except Stopped:
        return
    except Exception as error:  # of any kind: the other models continue
        tqdm.write(f"{training} / seed {seed} failed: {type(error).__name__}: {error}")


def _train_and_score(
    benchmark: Benchmark, cells: list[Cell], options: list[Any], bar: tqdm, processes: Processes
) -> None:
    training, seed, failed = cells[0].training, cells[0].seed, None
    if training in benchmark.effective:  # others are trained already
        folder = Path(benchmark.model(training, seed))
        command = benchmark.training_command(training, seed)
        failed = train(command, benchmark.values(training), folder, processes)
    for cell in cells:
        folder = benchmark.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        why = failed
        if why is None:
            command = [sys.executable, "-m", "ietagc_diffusers", "benchmark", *options]
            command += ["--cell", json.dumps([cell.training, cell.inference, cell.seed])]
            why = processes.call(command, folder / "log.txt")
        if why is None:
            (folder / FAILED).unlink(missing_ok=True)
        else:
            (folder / FAILED).write_text(why)
            tqdm.write(f"{cell.name} failed: {why}")
        bar.update()
