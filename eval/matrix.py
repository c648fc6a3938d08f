"""The matrix of a benchmark: what its YAML file says, where each result belongs, and how a cell is drawn and scored."""

import functools
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ietagc_diffusers.arguments import flag_names, parse_flags, recipe_to_argv
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.method.recipes import check_keys, read_recipe, recipe_path
from ietagc_diffusers.mitigations import parse_mitigations
from ietagc_diffusers.training.scripts import SCRIPTS

from .configuration import READ, USED, checked, named, read_configuration, short_hash, slug, unlike
from .generate import Settings, check_unprompted, generate, model_hash
from .heldout import load_other_images
from .image_sets import ImageSet, load_images, training_images, training_settings
from .jobs import TRAIN, run_folder
from .pipelines import is_unprompted, num_classes
from .prompts import Prompt, caption_prompts, choose, read_prompts, without_prompts
from .record import TrainingSet, training_set
from .score import Protocol, Tools, score
from .tables import COLUMNS

UNET_CONFIG = "model_config_name_or_path"  # of a model from scratch
KEYS = {
    "script", "base", "train", "reference", "heldout", "prompts", "num_images", "output", "seeds", "launcher", "common",
    "training", "inference", "generate", "score", "columns", "tables",
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
        script: the training script, a key of ``SCRIPTS``; default: text_to_image.
        base: the pipeline that training starts from; unconditional models need none.
        common: training flags of all variants; with ``config``, a recipe's too.
        training: {variant: flags}, or {variant: {model: folder or Hub id}} for a model that is trained already, in
            which ``{seed}`` stands for the seed.
        inference: {name: chain of mitigations}; ``none`` is always among them.
        train: training images. The images of a variant that is trained here are compared with those of them that its
            run used, as it recorded them; those of a given model with all.
        reference: images for the Fréchet distance; default: the training images.
        heldout: pictures that were not trained on, which scores compare with; default: none.
        prompts, num_images: prompts and how many of them; default: the captions of the images that a cell is compared
            with, in the column that ``common`` names, all of them. Models without prompts need ``num_images`` and take
            no ``prompts``; of classes, each is drawn equally often.
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
        part = read_configuration(self.path, KEYS, NEEDED, where)
        script = part("script", str, "text_to_image")
        check_keys([script], SCRIPTS, f"{where}: script")
        self.script, self.kind = script, SCRIPTS[script]
        self.base, self.common = part("base", str), part("common", dict, {})
        self.inference = {"none": "none", **part("inference", dict, {})}
        self.train, self.reference, self.heldout = part("train", str), part("reference", str), part("heldout", str)
        self.prompts, self.num_images = part("prompts", str), part("num_images", int)
        self.output, self.seeds = Path(part("output", str)), part("seeds", list, [0])
        self.launcher = shlex.split(part("launcher", str, "")) or [sys.executable]
        self.generate, self.score = part("generate", dict, {}), part("score", dict, {})
        self.columns = part("columns", list, ["sim_score", "clip_score", "fid"])
        self.tables = part("tables", dict)
        for seed in self.seeds:
            checked(seed, int, f"{where}: seeds")
        if self.num_images is not None and self.num_images < 1:
            raise UsageError(f"{where}: num_images {self.num_images}: must be at least 1")
        settings = {field.name for field in fields(Settings)} - {"seed", "mitigation"}
        check_keys(self.generate, settings, f"{where}: generate (seed and mitigation are the cells')")
        check_keys(self.score, {field.name for field in fields(Protocol)}, f"{where}: score")
        check_keys(self.columns, COLUMNS, f"{where}: columns")
        with named(f"{where}: generate"):
            Settings(**self.generate)
        for name, chain in self.inference.items():
            here = f"{where}: inference {name}"
            checked(chain, str, here)
            with named(here):
                parse_mitigations(chain)
        self.training = {
            name: checked(flags or {}, dict, f"{where}: training {name}")
            for name, flags in part("training", dict).items()
        }
        # What all variants share, the recipe's included, where it says so.
        self.shared = dict(self.common)
        if recipe := self.common.get("config"):
            with named(f"{where}: common"):
                self.shared = read_recipe(recipe, flag_names(self.kind)) | self.common
        self.caption_column = self.shared.get("caption_column") or "text"
        # Every flag's effective value, the recipe's included, of the variants that are trained here.
        self.effective = {}
        for name, flags in self.training.items():
            if "model" not in flags:
                with named(f"{where}: training {name}"):
                    self.effective[name] = self._effective(name)
        for name, table in self.tables.items():
            here = f"{where}: table {name}"
            check_keys(checked(table, dict, here), {"title", "rows"}, here)
            for row in checked(table.get("rows"), list, f"{here}: rows"):
                check_keys(checked(row, dict, here), {"label", "training", "inference", "phase"}, here)
                check_keys([row.get("training")], self.training, f"{here}: training")
                check_keys([row.get("inference", "none")], self.inference, f"{here}: inference")
        for cell in self.cells:
            if self._is_unprompted(cell):
                with named(where):
                    self._check_unprompted(cell)

    def _is_unprompted(self, cell: Cell) -> bool:
        """Whether the cell's model draws without prompts; False for a given one that is not on this machine (yet)."""
        if cell.training in self.effective:
            return not self.kind.prompted
        model = self.model(cell.training, cell.seed)
        return Path(model).exists() and is_unprompted(model)

    def _check_unprompted(self, cell: Cell) -> None:
        """Raise ``UsageError`` for what a model without prompts, which the cell's is, cannot be told."""
        if self.prompts is not None:
            raise UsageError(f"prompts {self.prompts}: {cell.training} draws without prompts; leave it out")
        if self.num_images is None:
            raise UsageError(f"num_images: {cell.training} draws without prompts; say how many images")
        check_unprompted(self._settings(cell, 0))

    def _effective(self, name: str) -> dict[str, Any]:
        if self.base is None and self.kind.prompted:
            raise UsageError("give 'base', or its 'model'")
        check_keys(self.common | self.training[name], [*flag_names(self.kind), "config"], "flags")
        flags = parse_flags(recipe_to_argv(self.flags(name)), self.kind).values()
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
    # taken for this one's. Models, their configurations and prompts enter by content, training and other images by
    # path.

    def drawn(self, cell: Cell) -> Path:
        """The folder of a cell's images."""
        model = self.model(cell.training, cell.seed)
        conditions = [
            model if cell.training in self.effective else self.content(model), self.inference[cell.inference],
            self.generate, self.num_images, self.content(self.prompts), self.train,
        ]  # fmt: skip
        if self.prompts is None and self.kind.prompted:
            column = {"caption_column": self.caption_column} if self.caption_column != "text" else {}
            conditions += [told] if (told := self._unusual(cell.training) | column) else []
        name = f"{slug(cell.training)}-{slug(cell.inference)}-{short_hash(conditions)}"
        return self.output / "cells" / name / f"seed-{cell.seed}"

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's scores."""
        compared = [self.score, self.reference, *([self.heldout] if self.heldout else [])]
        compared += [unusual] if (unusual := self._unusual(cell.training)) else []
        return self.drawn(cell) / f"scored-{short_hash(compared)}"

    def _unusual(self, training: str) -> dict[str, Any]:
        """The flags by which other images of ``train`` are compared with than all, or as others than usual."""
        names = (*READ, *USED) if training in self.effective else ("image_column", *READ)
        return unlike(self.effective.get(training, self.shared), self.kind.defaults(), names)

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

        def place(mark: str) -> Path:
            return self.output / "trained" / f"{slug(training)}-{mark}" / f"seed-{seed}"

        marks = self.content(self.base), self.train
        return str(run_folder(place, self.values(training), self.kind.defaults(), *marks))

    def values(self, training: str) -> dict[str, Any]:
        """What a variant is trained with, as ``jobs.run_folder`` takes it."""
        effective = self.effective[training]
        if config := effective.get(UNET_CONFIG):
            effective = effective | {UNET_CONFIG: self.content(config)}
        return effective

    def training_command(self, training: str, seed: int) -> list[str]:
        own = {"seed": seed, "output_dir": self.model(training, seed), "resume_from_checkpoint": "latest"}
        return [*self.launcher, *TRAIN, f"--script={self.script}", *recipe_to_argv(self.flags(training) | own)]

    def run_cell(self, cell: Cell, device: str = "cpu", cache: Path | None = None) -> None:
        """Draw and score a cell. ``cache``: folder for features."""
        images = self.drawn(cell) / "images"
        model, every = self.model(cell.training, cell.seed), self.images(cell.training)
        training = self._compared(cell, model, every)
        prompts = self._prompts(cell, model, _same_rows(every, training.images))
        settings = self._settings(cell, len(prompts))
        # Before anything is drawn, to fail early.
        tools = Tools(Protocol(**self.score | {"device": device}))
        reference = load_other_images(self.reference, "reference", training) if self.reference else None
        heldout = load_other_images(self.heldout, "heldout", training) if self.heldout else None
        generate(model, prompts, images, settings, device, desc=cell.name)
        notes = [*training.warnings, *training.notes]
        about = {"model": model, "model_hash": model_hash(model), "cell": [cell.training, cell.inference, cell.seed]}
        drawn, output = load_images(images, "output"), self.folder(cell)
        score(drawn, training.images, output, tools, cache, reference, about, heldout, notes)

    def images(self, training: str) -> ImageSet:
        """All images of ``train``, read as a variant reads them, with the captions that are drawn."""
        flags = self.effective.get(training, self.shared)
        read = {name: flags[name] for name in READ if flags.get(name) is not None}
        settings = training_settings(self.train, image_column=self._image_column(training), **read)
        return training_images(settings, "train", self.caption_column)

    def check_captions(self, cells: Sequence[Cell]) -> None:
        """Raise ``UsageError`` if captions should be drawn for these cells, and the training images have none."""
        prompted = [cell for cell in cells if self.prompts is None and not self._is_unprompted(cell)]
        for training in dict.fromkeys(cell.training for cell in prompted):
            caption_prompts(self.images(training), "train")

    def _compared(self, cell: Cell, model: str, every: ImageSet) -> TrainingSet:
        """What a cell's images are compared with; ``every``: all training images."""
        if cell.training in self.effective:
            return training_set(model, self.train, self._image_column(cell.training))
        return TrainingSet(every)

    def _settings(self, cell: Cell, num_images: int) -> Settings:
        """How a cell's images are drawn. No two cells of a row share an image's seed."""
        chain = self.inference[cell.inference]
        return Settings(**self.generate | {"seed": cell.seed * num_images, "mitigation": chain})

    def _prompts(self, cell: Cell, model: str, training: ImageSet) -> list[Prompt]:
        if is_unprompted(model):
            self._check_unprompted(cell)
            return without_prompts(self.num_images or 0, num_classes(model), 0)
        prompts = read_prompts(self.prompts) if self.prompts else caption_prompts(training, "train")
        return choose(prompts, self.num_images or len(prompts), 0)

    def _image_column(self, training: str) -> str:
        """The column in which the training images are."""
        return self.effective.get(training, self.shared).get("image_column") or "image"


def _same_rows(images: ImageSet, others: ImageSet) -> ImageSet:
    """Those of ``images`` that are rows of ``others``, which are of the same source."""
    rows = {row[SAMPLE_ID] for row in others.rows}
    return images.select(index for index, row in enumerate(images.rows) if row[SAMPLE_ID] in rows)


def _content(path: str | None) -> str | None:
    """A hash of a pipeline folder or a file; a Hub id, or None, unchanged."""
    if path is None or not Path(path).exists():
        return path
    if Path(path).is_dir():
        return model_hash(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
