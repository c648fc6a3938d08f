"""The paths of a training run, for those who write them and those who read them."""

import hashlib
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError
from .files import read_json

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ROUND = re.compile(r"round-(\d+)")
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the adapter of a LoRA run, as diffusers names it
EMA = "_ema"  # ends the name of a folder with the moving average of a module's weights


class RunFolder:
    """``output_dir`` of a run: a pipeline or adapter that diffusers loads, and beside it the records of its training.

    Attributes:
        records: the folder ``ietagc``, which holds
        config_file: every effective setting, as a recipe that repeats the run;
        training_set_file: what the run was trained on: fingerprints, selection of rows and how images are shown;
        training_rows_file: the rows that were used, as Parquet, and where they lie on this machine;
        rounds_file: a JSON line per round;
        monitor_file, monitor_page: measurements along the training, see ``training.monitor``: a JSON line each, and a
            page;
        monitor_sheets: of drawn images beside their nearest training images;
        best: the best model so far;
        skip_counts_file: visits and skips of every sample, as Parquet;
        bad_samples_file: a JSON line per row that was replaced;
        identity_file: the fingerprints that the run has had;
        lock_file: held by the process that trains, see ``training.lock``;
        waiting: tensors that wait on the disk while others train;
        snapshot: the model that is uploaded along the way, with its records, as the folder of a run;
        unfinished: the model of the last ``--save_model_epochs``, as a pipeline, until the run ends.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.records = self.path / "ietagc"
        self.config_file = self.records / "config.yaml"
        self.training_set_file = self.records / "training_set.json"
        self.training_rows_file = self.records / "training_rows.parquet"
        self.rounds_file = self.records / "rounds.jsonl"
        self.monitor_file = self.records / "monitor.jsonl"
        self.monitor_page = self.records / "monitor.html"
        self.monitor_sheets = self.records / "monitor"
        self.best = self.records / "best"
        self.skip_counts_file = self.records / "skip_counts.parquet"
        self.bad_samples_file = self.records / "bad_samples.jsonl"
        self.identity_file = self.records / "run.json"
        self.lock_file = self.records / "lock"
        self.waiting = self.records / "waiting"
        self.snapshot = self.records / "snapshot"
        self.unfinished = self.path / "unfinished"
        self.card_file = self.path / "README.md"
        self.card_grid_file = self.path / "val_imgs_grid.png"

    def shard(self, number: int) -> Path:
        """Where ``--save_shards`` writes a shard, as a dataset."""
        return self.records / "shards" / f"shard-{number}"

    def monitor_sheet(self, step: int) -> Path:
        """The sheet of the measurement after this many steps."""
        return self.monitor_sheets / f"step-{step:06d}.png"

    def round(self, number: int) -> Path:
        """Where ``--save_rounds`` writes the aggregated model after a round (the first is 1), as a pipeline."""
        return self.path / "rounds" / f"round-{number:04d}"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints, by step. Only names are looked at: a checkpoint has its name once it is complete."""
        return [path for _, path in _numbered(self.path, _CHECKPOINT)]

    def tidy(self) -> None:
        """Remove what a process that was killed had half written, so that it takes no room for good. A checkpoint that
        was about to be replaced by another of the same step keeps its name. Nobody may be writing into the folder.
        """
        leftovers = []
        for path in [*self.path.glob("checkpoint-*.tmp"), *self.path.glob("checkpoint-*.old")]:
            if not _CHECKPOINT.fullmatch(path.stem):
                continue
            if path.suffix == ".old" and not path.with_suffix("").exists():
                with suppress(OSError):  # then it stays as it is: it is the only one
                    path.rename(path.with_suffix(""))
            else:
                leftovers.append(path)
        leftovers += [path for path in (self.path / "rounds").glob("*.part") if _ROUND.fullmatch(path.stem)]
        leftovers += [place.with_name(f"{place.name}.part") for place in (self.best, self.unfinished)]
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)

    def earlier(self, number: int) -> Path:
        """Where what another run left in this folder is moved when a new run begins."""
        return self.path / f"earlier-run-{number}"

    def belongings(self) -> list[Path]:
        """All that a run leaves in the folder and that is there, but for the trackers' logs."""
        pipeline = [self.path / "model_index.json", self.path / ADAPTER_FILE, *self.parts()]
        passing = (self.waiting, self.snapshot, self.lock_file)
        records = [path for path in self.records.glob("*") if path not in passing]
        own = [*records, self.path / "rounds", self.unfinished, self.card_file, self.card_grid_file]
        return [path for path in [*self.checkpoints(), *own, *pipeline] if path.exists()]

    def parts(self) -> list[Path]:
        """The folders of the pipeline's parts, by name."""
        try:
            index = json.loads((self.path / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return (
            sorted(self.path / part for part in index if (self.path / part).is_dir()) if isinstance(index, dict) else []
        )

    def weights_hash(self) -> str:
        """A hash, 16 hexadecimal digits, of the weights of the trained model: the pipeline's or the adapter."""
        digest = hashlib.sha256()
        weights = [path for part in self.parts() for path in sorted(part.glob("*.safetensors"))]
        for path in [*weights, *self.path.glob(ADAPTER_FILE)]:
            with path.open("rb") as file:
                digest.update(
                    path.relative_to(self.path).as_posix().encode() + hashlib.file_digest(file, "sha256").digest()
                )
        return digest.hexdigest()[:16]

    @property
    def is_finished(self) -> bool:
        """Whether the trained model is here: a pipeline, or an adapter for its base."""
        return (self.path / "model_index.json").is_file() or self.is_adapter

    @property
    def is_adapter(self) -> bool:
        """Whether the trained model is only an adapter for its base."""
        return (self.path / ADAPTER_FILE).is_file() and not (self.path / "model_index.json").is_file()

    def config(self) -> dict[str, Any]:
        """The settings that the run recorded. Raises ``UsageError`` if there are none that can be read."""
        if not self.config_file.is_file():
            raise UsageError(f"{self.path}: has no ietagc/config.yaml: not the folder of a training run")
        try:
            config = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{self.config_file}: cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict):
            raise UsageError(f"{self.config_file}: cannot be read: holds no settings")
        return config

    def training_set(self) -> dict[str, Any]:
        """What the run recorded of its training set: settings by name, and fingerprints. Of an older run its settings;
        {} if there is no record. Raises ``UsageError`` for one that cannot be read.
        """
        settings = self.config() if self.config_file.is_file() else {}
        recorded = read_json(self.training_set_file) if self.training_set_file.is_file() else {}
        if not isinstance(recorded, dict):
            raise UsageError(f"{self.training_set_file}: cannot be read: holds no record")
        return settings | recorded

    def rounds(self) -> list[dict[str, Any]]:
        """The rows of ``rounds_file``; none if there is no such file."""
        if not self.rounds_file.is_file():
            return []
        return [json.loads(line) for line in self.rounds_file.read_text(encoding="utf-8").splitlines()]

    def saved_models(self, denoiser: str) -> list[tuple[int, Path]]:
        """The models that the run left along its way, [(global step, folder of the weights)] by step: the rounds that
        ``--save_rounds`` wrote if there are any, else the checkpoints; moving averages where there are any. Of a LoRA
        run it is the folder that holds the adapter.

        ``denoiser``: the trained module's folder in a pipeline, see ``families.Family.denoiser_name``.
        """
        rounds = _numbered(self.path / "rounds", _ROUND)
        if rounds:
            step_of = {row["round"]: row["global_step"] for row in self.rounds()}
            # Rounds that are not on record are of a branch that was left when the run was resumed before them.
            known = [(number, path) for number, path in rounds if number in step_of]
            return [(step_of[number], _weights_in(path, denoiser)) for number, path in known]
        models = []
        for step, path in _numbered(self.path, _CHECKPOINT):
            average = path / f"{denoiser}{EMA}"
            models.append((step, average if average.is_dir() else _weights_in(path, denoiser)))
        return models


def _weights_in(folder: Path, denoiser: str) -> Path:
    """Where a model's trained weights are: in the folder of its denoiser, or an adapter in the folder itself."""
    return folder if (folder / ADAPTER_FILE).is_file() else folder / denoiser


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """(number, path) of the entries of a folder whose whole name matches, by number."""
    return sorted((int(m[1]), path) for path in folder.glob("*") if (m := pattern.fullmatch(path.name)))
