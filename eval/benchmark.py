"""A matrix of training variants x mitigations at inference x seeds: trains what is missing, draws, scores, and fills
the paper's tables.

Each cell is a process of its own, so that one that fails does not take the others with it; finished ones are kept.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from ietagc_diffusers.config import UsageError
from ietagc_diffusers.mitigations import parse_mitigations

from .generate import Settings, generate, model_hash
from .images import load_images
from .prompts import caption_prompts, choose, read_prompts
from .records import read_json, write_json
from .score import SCORES, Protocol, Tools, score
from .tables import COLUMNS, write_tables

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_text_to_image_ietagc.py"
FAILED = "failed.txt"
KEYS = {
    "base", "train", "reference", "prompts", "num_images", "output", "seeds", "launcher", "common", "training",
    "inference", "generate", "score", "columns", "tables",
}  # fmt: skip
NEEDED = {"train", "output", "training", "tables"}


@dataclass(frozen=True)
class Cell:
    """One number of images: a training variant, a chain of mitigations by name, a seed."""

    training: str
    inference: str
    seed: int

    @property
    def name(self):
        return f"{self.training} / {self.inference} / seed {self.seed}"


class Benchmark:
    """A matrix as its YAML file says it. Paths in it are relative to the working folder.

    Keys:
        base, common: the pipeline that variants start from, and training flags that they share (a ``config`` recipe
            among them); training: {variant: flags}, or {variant: {model: folder or Hub id}} for one that is there, in
            which ``{seed}`` stands for the seed.
        inference: {name: chain}; ``none`` is always there.
        train, reference, prompts, num_images: training images, images for the Fréchet distance (default: the training
            images), prompts (default: the training captions) and how many of them.
        generate: ``Settings``; score: ``Protocol``; seeds: list; launcher: how Python is started for training, such as
            ``accelerate launch --num_processes 4``.
        tables: {name: {title, rows: [{label, training, inference, phase}]}}; columns: keys of ``tables.COLUMNS``.

    Raises:
        UsageError: naming the key that is wrong, and the nearest known one.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            config = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"--config {path}: cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise UsageError(f"--config {path}: should hold keys: {', '.join(sorted(KEYS))}")
        _known(config, KEYS, f"--config {path}")
        for key in sorted(NEEDED - config.keys()):
            raise UsageError(f"--config {path}: has no '{key}'")
        self.base, self.common = config.get("base"), config.get("common") or {}
        self.training = {name: flags or {} for name, flags in config["training"].items()}
        self.inference = {"none": "none", **(config.get("inference") or {})}
        self.train, self.reference = config["train"], config.get("reference")
        self.prompts, self.num_images = config.get("prompts"), config.get("num_images")
        self.output, self.seeds = Path(config["output"]), config.get("seeds") or [0]
        self.launcher = shlex.split(config["launcher"]) if config.get("launcher") else [sys.executable]
        self.generate = _fields(Settings, config.get("generate") or {}, f"--config {path}: generate")
        self.score = _fields(Protocol, config.get("score") or {}, f"--config {path}: score")
        self.columns = config.get("columns") or ["sim_score", "clip_score", "fid"]
        _known(dict.fromkeys(self.columns), COLUMNS, f"--config {path}: columns")
        self.tables = config["tables"]
        for chain in self.inference.values():
            parse_mitigations(chain)
        for name, table in self.tables.items():
            for row in table.get("rows") or []:
                _known(row, {"label", "training", "inference", "phase"}, f"--config {path}: table {name}")
                _known({row.get("training"): 0}, self.training, f"--config {path}: table {name}: training")
                _known({row.get("inference", "none"): 0}, self.inference, f"--config {path}: table {name}: inference")
        for name, flags in self.training.items():
            if "model" not in flags and self.base is None:
                raise UsageError(f"--config {path}: training {name}: give 'base', or its 'model'")

    @property
    def cells(self):
        """The cells of all rows of all tables, each once."""
        rows = [row for table in self.tables.values() for row in table["rows"]]
        return list(
            dict.fromkeys(
                Cell(row["training"], row.get("inference", "none"), seed) for seed in self.seeds for row in rows
            )
        )

    # Folders are named by what decides their content, so that nothing of another configuration is taken for this one's.

    def drawn(self, cell):
        """The folder of a cell's images."""
        conditions = [
            self.model(cell.training, cell.seed), self.inference[cell.inference], self.generate, self.num_images,
            self.prompts, self.train,
        ]  # fmt: skip
        name = f"{_slug(cell.training)}-{_slug(cell.inference)}-{_hash(conditions)}"
        return self.output / "cells" / name / f"seed-{cell.seed}"

    def folder(self, cell):
        """The folder of a cell's scores."""
        return self.drawn(cell) / f"scored-{_hash([self.score, self.reference])}"

    def flags(self, training):
        """A variant's training flags, but for seed and folder."""
        return {
            "pretrained_model_name_or_path": self.base,
            "train_data_dir" if Path(self.train).is_dir() else "dataset_name": self.train,
            **self.common,
            **self.training[training],
        }

    def model(self, training, seed):
        """The variant's pipeline: the one given, or where it is trained."""
        given = self.training[training].get("model")
        if given is not None:
            return str(given).format(seed=seed)
        return str(self.output / "trained" / f"{_slug(training)}-{_hash(self.flags(training))}" / f"seed-{seed}")

    def training_command(self, training, seed):
        own = {"seed": seed, "output_dir": self.model(training, seed), "resume_from_checkpoint": "latest"}
        return [*self.launcher, str(SCRIPT), *_as_flags(self.flags(training) | own)]

    def run_cell(self, cell, device="cpu", cache=None):
        """Draw and score a cell."""
        images = self.drawn(cell) / "images"
        training = load_images(self.train, "train")
        prompts = read_prompts(self.prompts) if self.prompts else caption_prompts(training, "train")
        prompts = choose(prompts, self.num_images or len(prompts), 0)
        chain = self.inference[cell.inference]
        # Seeds of training and of drawing go together; no two cells of a row share an image's seed.
        settings = Settings(**self.generate | {"seed": cell.seed * len(prompts), "mitigation": chain})
        model = self.model(cell.training, cell.seed)
        generate(model, prompts, images, settings, device, desc=cell.name)
        tools = Tools(Protocol(**self.score | {"device": device}))
        reference = load_images(self.reference, "reference") if self.reference else None
        about = {"model": model, "model_hash": model_hash(model), "cell": [cell.training, cell.inference, cell.seed]}
        score(load_images(images, "output"), training, self.folder(cell), tools, cache, reference, about)


def _slug(name):
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name.replace("+", "plus"))


def _hash(value):
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=3).hexdigest()


def _known(given, known, where):
    """Raise for a key that is not known."""
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), [str(k) for k in known], 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(map(str, known))}"
            raise UsageError(f"{where}: unknown '{key}'{hint}")


def _fields(kind, given, where):
    _known(given, {field.name for field in fields(kind)}, where)
    return given


def _as_flags(flags):
    """{flag: value} as a command line; True is the bare flag, False and None leave it out, lists are several values."""
    line = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [value]
        line += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
    return line


def run(path, jobs=1, device="cpu", cache=None, only_tables=False):
    """Fill the matrix and write tables.md, tables.csv, tables.tex and results.json into its ``output``.

    Args:
        jobs: models at a time.

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


def collect(benchmark):
    """What is there: [{training, inference, seed, scores or failed}]."""
    results = []
    for cell in benchmark.cells:
        folder = benchmark.folder(cell)
        about = {"training": cell.training, "inference": cell.inference, "seed": cell.seed}
        if (folder / SCORES).exists():
            results.append(about | {"scores": read_json(folder / SCORES)})
        else:
            why = (folder / FAILED).read_text().strip() if (folder / FAILED).exists() else "was not run"
            results.append(about | {"failed": why})
    return results


def _fill(benchmark, jobs, device, cache):
    """Run what is missing, the cells of one model one after another."""
    missing = {}
    for cell in benchmark.cells:
        if not (benchmark.folder(cell) / SCORES).exists():
            missing.setdefault((cell.training, cell.seed), []).append(cell)
    total = sum(map(len, missing.values()))
    processes = Processes()
    with (
        tqdm(total=total, desc="Cells") as bar,
        ThreadPoolExecutor(max_workers=jobs) as pool,
        processes.ended_by_signals(),
    ):
        jobs = [
            pool.submit(_run_model, benchmark, *key, cells, device, cache, bar, processes)
            for key, cells in missing.items()
        ]
        for job in jobs:
            job.result()


class Stopped(Exception):
    """The benchmark was interrupted."""


class Processes:
    """The running commands, so that an interruption ends them all and begins no more."""

    def __init__(self):
        self.running, self.stopped, self.lock = set(), False, threading.Lock()

    @contextmanager
    def ended_by_signals(self):
        """Within it SIGTERM is an interruption as Ctrl-C is, and any exception ends what runs."""

        def interrupt(*_):
            raise KeyboardInterrupt

        on_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, interrupt) if on_main else None
        try:
            yield
        except BaseException:
            with self.lock:
                self.stopped = True
                for process in self.running:
                    process.terminate()
            raise
        finally:
            if on_main:
                signal.signal(signal.SIGTERM, before)

    def call(self, command, log):
        """Run a command with its output in a file. Returns the last line of it if it fails; raises ``Stopped``."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with Path(log).open("w") as output:
            with self.lock:
                if self.stopped:
                    raise Stopped
                process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=environment)
                self.running.add(process)
            code = process.wait()
        self.running.discard(process)
        if self.stopped or code in (-signal.SIGINT, -signal.SIGTERM, 130):
            raise Stopped
        if code == 0:
            return None
        lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
        return f"exit {code}: {lines[-1][:300] if lines else 'no output'} (see {log})"


def _run_model(benchmark, training, seed, cells, device, cache, bar, processes):
    try:
        _train_and_score(benchmark, training, seed, cells, device, cache, bar, processes)
    except Stopped:
        return


def _train_and_score(benchmark, training, seed, cells, device, cache, bar, processes):
    failed = _train(benchmark, training, seed, processes)
    for cell in cells:
        folder = benchmark.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        why = failed
        if why is None:
            command = [sys.executable, "-m", "eval", "benchmark", "--config", benchmark.path, "--device", device]
            command += ["--cell", json.dumps([cell.training, cell.inference, cell.seed])]
            command += ["--feature_cache", cache or "none"]
            why = processes.call(command, folder / "log.txt")
        if why is None:
            (folder / FAILED).unlink(missing_ok=True)
        else:
            (folder / FAILED).write_text(why)
            tqdm.write(f"{cell.name} failed: {why}")
        bar.update()


def _train(benchmark, training, seed, processes):
    """Train a variant if it is not there. Returns why it failed, or None."""
    folder = Path(benchmark.model(training, seed))
    finished = folder / "model_index.json"
    if "model" in benchmark.training[training] or finished.exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    why = processes.call(benchmark.training_command(training, seed), folder / "train.log")
    if why is None and not finished.exists():
        raise Stopped  # a signal ends the script with a checkpoint and 0
    if why is None:
        write_json(folder / "seconds.json", {"train": round(time.perf_counter() - started, 1)})
    return None if why is None else f"training: {why}"
