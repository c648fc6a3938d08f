"""A matrix of training variants, mitigations at inference and seeds: train, draw, score, and write the paper's tables.

Each cell runs in a process of its own, so that a failure does not end the others. Finished cells are kept.
"""

import functools
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.arguments import flag_names, parse_flags, recipe_to_argv
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_json
from ietagc_diffusers.method.config import check_keys, recipe_path
from ietagc_diffusers.mitigations import parse_mitigations
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.sscd import load_descriptor

from .generate import Settings, generate, model_hash
from .image_sets import load_images, load_training_set
from .processes import Processes, Stopped
from .prompts import caption_prompts, choose, read_prompts
from .score import SCORES, Protocol, Tools, score
from .tables import COLUMNS, write_tables

TRAIN = ["-m", "ietagc_diffusers", "train"]
FAILED = "failed.txt"
KEYS = {
    "base", "train", "reference", "prompts", "num_images", "output", "seeds", "launcher", "common", "training",
    "inference", "generate", "score", "columns", "tables",
}  # fmt: skip
NEEDED = {"train", "output", "training", "tables"}
# Training flags that do not name a variant: paths, for which others stand below, and those that differ between the
# seeds of a variant or between machines.
NOT_OF_A_VARIANT = (
    "pretrained_model_name_or_path", "train_data_dir", "dataset_name",
    "seed", "output_dir", "resume_from_checkpoint", "config", "local_rank",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A set of images to score: of a training variant, with a named chain of mitigations, from a seed."""

    training: str
    inference: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.training} / {self.inference} / seed {self.seed}"


class Benchmark:
    """The matrix of a YAML file. Paths in it are relative to the working folder.

    Keys of the file:
        base: the pipeline that training starts from.
        common: training flags of all variants; with ``config``, a recipe's too.
        training: {variant: flags}, or {variant: {model: folder or Hub id}} for a model that is trained already, in
            which ``{seed}`` stands for the seed.
        inference: {name: chain of mitigations}; ``none`` is always among them.
        train: training images.
        reference: images for the Fréchet distance; default: the training images.
        prompts, num_images: prompts and how many of them; default: the training captions, all of them.
        generate: fields of ``Settings``.
        score: fields of ``Protocol``.
        seeds: a list.
        launcher: how Python is started for training, such as ``accelerate launch --num_processes 4``.
        tables: {name: {title, rows: [{label, training, inference, phase}]}}.
        columns: keys of ``tables.COLUMNS``.
        output: folder of the results.

    Args:
        path: the file, or the name of one that comes with the package.

    Raises:
        UsageError: naming the key that is wrong, and the nearest known one.
    """

    def __init__(self, path: str | Path):
        self.path, self.content = recipe_path(path), functools.cache(_content)
        where = f"`config` {path}"
        try:
            config = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{where}: cannot be read: {' '.join(str(error).split())}") from error
        config = _checked(config, dict, where)
        check_keys(config, KEYS, where)
        for key in sorted(NEEDED - config.keys()):
            raise UsageError(f"{where}: has no '{key}'")

        def part(key: str, kind: type, default: Any = None) -> Any:
            value = config.get(key)
            return default if value is None else _checked(value, kind, f"{where}: {key}")

        self.base, self.common = part("base", str), part("common", dict, {})
        self.inference = {"none": "none", **part("inference", dict, {})}
        self.train, self.reference = part("train", str), part("reference", str)
        self.prompts, self.num_images = part("prompts", str), part("num_images", int)
        self.output, self.seeds = Path(part("output", str)), part("seeds", list, [0])
        self.launcher = shlex.split(part("launcher", str, "")) or [sys.executable]
        self.generate, self.score = part("generate", dict, {}), part("score", dict, {})
        self.columns = part("columns", list, ["sim_score", "clip_score", "fid"])
        self.tables = part("tables", dict)
        for seed in self.seeds:
            _checked(seed, int, f"{where}: seeds")
        if self.num_images is not None and self.num_images < 1:
            raise UsageError(f"{where}: num_images {self.num_images}: must be at least 1")
        settings = {field.name for field in fields(Settings)} - {"seed", "mitigation"}
        check_keys(self.generate, settings, f"{where}: generate (seed and mitigation are the cells')")
        check_keys(self.score, {field.name for field in fields(Protocol)}, f"{where}: score")
        check_keys(self.columns, COLUMNS, f"{where}: columns")
        with _named(f"{where}: generate"):
            Settings(**self.generate)
        for name, chain in self.inference.items():
            here = f"{where}: inference {name}"
            _checked(chain, str, here)
            with _named(here):
                parse_mitigations(chain)
        self.training = {
            name: _checked(flags or {}, dict, f"{where}: training {name}")
            for name, flags in part("training", dict).items()
        }
        # Every flag's effective value, the recipe's included, of the variants that are trained here.
        self.effective = {}
        for name, flags in self.training.items():
            if "model" not in flags:
                with _named(f"{where}: training {name}"):
                    self.effective[name] = self._effective(name)
        for name, table in self.tables.items():
            here = f"{where}: table {name}"
            check_keys(_checked(table, dict, here), {"title", "rows"}, here)
            for row in _checked(table.get("rows"), list, f"{here}: rows"):
                check_keys(_checked(row, dict, here), {"label", "training", "inference", "phase"}, here)
                check_keys([row.get("training")], self.training, f"{here}: training")
                check_keys([row.get("inference", "none")], self.inference, f"{here}: inference")

    def _effective(self, name: str) -> dict[str, Any]:
        if self.base is None:
            raise UsageError("give 'base', or its 'model'")
        check_keys(self.common | self.training[name], [*flag_names(), "config"], "flags")
        flags = parse_flags(recipe_to_argv(self.flags(name))).values()
        return {key: value for key, value in flags.items() if key not in NOT_OF_A_VARIANT}

    @property
    def cells(self) -> list[Cell]:
        """The cells of all rows of all tables, each once."""
        rows = [row for table in self.tables.values() for row in table["rows"]]
        return list(
            dict.fromkeys(
                Cell(row["training"], row.get("inference", "none"), seed) for seed in self.seeds for row in rows
            )
        )

    # Folders are named by a hash of all that decides their content, so that results of another configuration are never
    # taken for this one's. Models and prompts enter by content, training and reference images by path.

    def drawn(self, cell: Cell) -> Path:
        """The folder of a cell's images."""
        model = self.model(cell.training, cell.seed)
        conditions = [
            model if cell.training in self.effective else self.content(model), self.inference[cell.inference],
            self.generate, self.num_images, self.content(self.prompts), self.train,
        ]  # fmt: skip
        name = f"{_slug(cell.training)}-{_slug(cell.inference)}-{_hash(conditions)}"
        return self.output / "cells" / name / f"seed-{cell.seed}"

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's scores."""
        return self.drawn(cell) / f"scored-{_hash([self.score, self.reference])}"

    def flags(self, training: str) -> dict[str, Any]:
        """A variant's training flags, except seed and folder."""
        return {
            "pretrained_model_name_or_path": self.base,
            "train_data_dir" if Path(self.train).is_dir() else "dataset_name": self.train,
            **self.common,
            **self.training[training],
        }

    def model(self, training: str, seed: int) -> str:
        """The variant's pipeline: the given one, or the folder it is trained in."""
        if training not in self.effective:
            return str(self.training[training]["model"]).replace("{seed}", str(seed))
        name = f"{_slug(training)}-{_hash([self.content(self.base), self.train, self.effective[training]])}"
        return str(self.output / "trained" / name / f"seed-{seed}")

    def training_command(self, training: str, seed: int) -> list[str]:
        own = {"seed": seed, "output_dir": self.model(training, seed), "resume_from_checkpoint": "latest"}
        return [*self.launcher, *TRAIN, *recipe_to_argv(self.flags(training) | own)]

    def run_cell(self, cell: Cell, device: str = "cpu", cache: Path | None = None) -> None:
        """Draw and score a cell. ``cache``: folder for features."""
        images = self.drawn(cell) / "images"
        training = load_training_set(self.train)
        prompts = read_prompts(self.prompts) if self.prompts else caption_prompts(training, "train")
        prompts = choose(prompts, self.num_images or len(prompts), 0)
        chain = self.inference[cell.inference]
        # Each training seed has its own seeds for drawing: no two cells of a row share an image's seed.
        settings = Settings(**self.generate | {"seed": cell.seed * len(prompts), "mitigation": chain})
        model = self.model(cell.training, cell.seed)
        tools = Tools(Protocol(**self.score | {"device": device}))  # before anything is drawn, to fail early
        generate(model, prompts, images, settings, device, desc=cell.name)
        reference = load_images(self.reference, "reference") if self.reference else None
        about = {"model": model, "model_hash": model_hash(model), "cell": [cell.training, cell.inference, cell.seed]}
        score(load_images(images, "output"), training, self.folder(cell), tools, cache, reference, about)


KINDS = {dict: "keys and values", list: "a list", str: "a text", int: "a whole number"}


def _checked(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{where}: should hold {KINDS[kind]}, holds {json.dumps(value, default=str)[:80]}")
    return value


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Inside, ``where`` is added to the message of a ``UsageError``."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _content(path: str | None) -> str | None:
    """A hash of a pipeline folder or a file; a Hub id, or None, unchanged."""
    if path is None or not Path(path).exists():
        return path
    if Path(path).is_dir():
        return model_hash(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name.replace("+", "plus"))


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()


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
        with _named(f"`config` {benchmark.path}: score"):
            protocol = Protocol(**benchmark.score)
            protocol.copy_threshold(load_descriptor(protocol.descriptor, protocol.name))
    processes = Processes()
    with (
        tqdm(total=total, desc="Cells") as bar,
        ThreadPoolExecutor(max_workers=jobs) as pool,
        processes.ended_by_signals(),
    ):
        options = ["--config", benchmark.path, "--device", device, "--feature_cache", cache or "none"]
        running = [pool.submit(_run_model, benchmark, cells, options, bar, processes) for cells in missing.values()]
        while wait(running, timeout=1).not_done:
            bar.refresh()  # its clock
        for job in running:
            job.result()


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
    failed = _train(benchmark, cells[0].training, cells[0].seed, processes)
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


def _train(benchmark: Benchmark, training: str, seed: int, processes: Processes) -> str | None:
    """Train a variant unless it is trained already. Returns why it failed, or None."""
    folder = Path(benchmark.model(training, seed))
    run = RunFolder(folder)
    if training not in benchmark.effective or run.is_finished:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    why = processes.call(benchmark.training_command(training, seed), folder / "train.log")
    if why is None and not run.is_finished:
        raise Stopped  # after a signal training writes a checkpoint and exits with 0
    if why is not None:
        return f"training: {why}"
    seconds = round(time.perf_counter() - started, 1)
    write_json(folder / "seconds.json", {"version": __version__, "train": seconds})
    return None
