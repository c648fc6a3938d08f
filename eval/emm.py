"""Effective model memorization: train over growing training-set sizes, draw, and count what is memorized.

Each model is trained and drawn from in processes of its own, so that a failure does not end the others. Finished ones
are kept.
"""

import json
import math
import shlex
import shutil
import sys
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.arguments import flag_names, parse_flags, recipe_to_argv
from ietagc_diffusers.errors import UsageError, one_line
from ietagc_diffusers.families import Unconditional
from ietagc_diffusers.files import read_json, shipped, write_json, write_text
from ietagc_diffusers.method.recipes import check_keys, recipe_path
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.build import Budget
from ietagc_diffusers.training.scripts import UnconditionalScript

from .capacity import STATISTICS, Curves, Ratio, capacity, markdown, of_snapshots, picture
from .configuration import USED, checked, named, read_configuration, short_hash, slug, unlike
from .features import Pixels, embed
from .generate import Settings, check_unprompted, generate
from .image_sets import ImageSet, load_images
from .jobs import TRAIN, run_folder, run_jobs, train
from .losses import spread
from .metrics.l2 import l2_ratio, memorization_ratio
from .neighbours import nearest_l2
from .pipelines import num_classes
from .plots import png
from .processes import Processes, Stopped
from .prompts import without_prompts
from .record import training_set
from .subsets import first_of_each, source_rows, write_subset
from .views import mirrored_pixels, nearest_of_both

KEYS = {
    "train", "output", "sizes", "epochs", "steps", "num_images", "threshold", "snapshots", "seed", "launcher", "common",
    "generate", "configurations",
}  # fmt: skip
NEEDED = {"train", "output", "sizes", "configurations"}
OWN = {"unet", "sizes"}  # keys of a configuration that are not flags
# Flags that the study gives, or that would give configurations different images.
NOT_OF_A_CONFIGURATION = {
    "train_data_dir", "dataset_name", "output_dir", "resume_from_checkpoint", "seed", "max_train_steps",
    "num_train_epochs", "num_epochs", "max_train_samples", "save_rounds", "pretrained_model_name_or_path",
}  # fmt: skip
OF_NO_RECIPE = ("dataset_name", "max_train_samples", "pretrained_model_name_or_path")
OF_THE_SOURCE = ("image_column", "label_column", "dataset_config_name", "dataset_split", "alpha")
NUM_IMAGES, THRESHOLD, SNAPSHOTS = 10_000, 0.9, 10  # the first two are Gu et al.'s
FAILED = "failed.txt"


class Study:
    """Configurations by training-set sizes, as a YAML file says. Paths in it are relative to the working folder.

    Keys of the file:
        train: training images: a folder or a Hub id.
        sizes: of the subsets, each the first images of each class (of ``label_column``, a flag in ``common``), or the
            first images.
        configurations: {name: flags of the unconditional script}. Beside flags one may have ``unet``, options of
            Diffusers' ``UNet2DModel`` in place of those of ``model_config_name_or_path``, and ``sizes`` of its own.
            With ``class_labels: unique`` there are as many classes as images, unless ``num_classes`` says otherwise.
        common: flags of all configurations; with ``config``, a recipe's too.
        epochs, steps: how long each model is trained, one of the two; epochs of one process a shard.
        snapshots: how many models along a run are looked at, evenly spread, the last among them; the first of several
            is left out, as by Gu et al. A configuration without ``steps_per_round`` and ``epochs_per_round`` has so
            many rounds.
        num_images: that each model draws.
        threshold: the ratio from which a model counts as memorizing.
        seed: of training and drawing.
        generate: fields of ``Settings``.
        launcher: how Python is started for training, such as ``accelerate launch --num_processes 4``.
        output: folder of the results.

    Args:
        path: the file, or the name of one that comes with the package.

    Raises:
        UsageError: naming the key that is wrong, and the nearest known one.
    """

    def __init__(self, path: str | Path):
        self.path = recipe_path(path)
        self.where = where = f"`config` {path}"
        part = read_configuration(self.path, KEYS, NEEDED, where)
        self.train, self.output = part("train", str), Path(part("output", str))
        self.epochs, self.steps = part("epochs", int), part("steps", int)
        if (self.epochs is None) == (self.steps is None):
            raise UsageError(f"{where}: give either epochs or steps")
        self.num_images, self.snapshots = part("num_images", int, NUM_IMAGES), part("snapshots", int, SNAPSHOTS)
        self.threshold, self.seed = part("threshold", float, THRESHOLD), part("seed", int, 0)
        for key, least in (("num_images", 1), ("snapshots", 1), ("epochs", 1), ("steps", 1), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UsageError(f"{where}: {key} {value}: must be at least {least}")
        if not 0 < self.threshold <= 1:
            raise UsageError(f"{where}: threshold {self.threshold}: must be over 0, and at most 1")
        self.launcher = shlex.split(part("launcher", str, "")) or [sys.executable]
        self.common, self.generate = part("common", dict, {}), part("generate", dict, {})
        known = {field.name for field in fields(Settings)} - {"seed", "mitigation"}
        check_keys(self.generate, known, f"{where}: generate (the seed is the study's)")
        with named(f"{where}: generate"):
            self.drawing = Settings(**self.generate | {"seed": self.seed})
            check_unprompted(self.drawing)
        check_keys(self.common, _flags(), f"{where}: common")
        sizes = _sizes(part("sizes", list), f"{where}: sizes")
        self.configurations, self.sizes, self.unets = {}, {}, {}
        for name, given in part("configurations", dict).items():
            here = f"{where}: configurations {name}"
            flags = dict(checked(given or {}, dict, here))
            check_keys(flags, (_flags() | OWN) - set(OF_THE_SOURCE), here)
            options = checked(flags.pop("unet", {}), dict, f"{here}: unet")
            self.sizes[name] = _sizes(flags.pop("sizes", sizes), f"{here}: sizes")
            self.configurations[name] = flags
            with named(here):
                self.unets[name] = _unet(_parsed(self.flags(name, self.sizes[name][-1])), options)
        if not self.configurations:
            raise UsageError(f"{where}: configurations: there are none")

    @property
    def cells(self) -> list[tuple[str, int]]:
        """(configuration, size) of each model, the smallest first."""
        return sorted(((name, size) for name in self.configurations for size in self.sizes[name]), key=lambda c: c[1])

    @cached_property
    def subsets(self) -> Path:
        """The folder of the subsets, named by what they depend on."""
        source = [self.train, {name: self.common.get(name) for name in OF_THE_SOURCE}]
        return self.output / "subsets" / short_hash(source)

    def subset(self, size: int) -> Path:
        return self.subsets / f"size-{size}"

    def flags(self, name: str, size: int) -> dict[str, Any]:
        """The training flags of a configuration for ``size`` images, except the folder and ``unet``."""
        flags = {"report_to": "none"} | self.common | self.configurations[name]
        for key in ("dataset_config_name", "dataset_split"):  # of the source
            flags.pop(key, None)
        if flags.get("class_labels") == "unique":
            flags.setdefault("num_classes", size)
        flags |= {"train_data_dir": str(self.subset(size)), "seed": self.seed, "save_rounds": True}
        settings = _parsed(flags)
        for key in OF_NO_RECIPE:
            if getattr(settings, key) is not None:
                raise UsageError(f"`{key}` {getattr(settings, key)}: a study has images of its own; leave it out")
        # In steps, which a recipe may say too, and which its epochs would not override.
        steps = self.steps or self.epochs * Budget.of(settings, size, group_size=1).steps_per_epoch
        flags["max_train_steps"] = steps
        if settings.method.steps_per_round is None and settings.method.epochs_per_round is None:
            flags["steps_per_round"] = math.ceil(steps / settings.method.num_shards / self.snapshots)
        return flags

    def folder(self, name: str, size: int) -> Path:
        """The folder of a run, named by all that its models depend on."""

        def place(mark: str) -> Path:
            return self.output / "runs" / slug(name) / f"size-{size}-{mark}"

        marks = self.subsets.name, self.unets[name]
        return run_folder(place, self.values(name, size), UnconditionalScript.defaults(), *marks)

    def values(self, name: str, size: int) -> dict[str, Any]:
        """What a model is trained with, as ``jobs.run_folder`` takes it."""
        values = _parsed(self.flags(name, size)).values()
        for key in ("output_dir", "local_rank", "train_data_dir"):
            del values[key]
        return values

    def measured(self, name: str, size: int) -> Path:
        """The folder of what was measured of a run."""
        marks = [self.generate, self.num_images, self.snapshots]
        if unusual := unlike(self.values(name, size), UnconditionalScript.defaults(), (*USED, "alpha")):
            marks.append(unusual)
        return self.folder(name, size) / f"measured-{short_hash(marks)}"

    def training_command(self, name: str, size: int) -> list[str]:
        """The command that trains a model. Writes the configuration of its UNet, if it has one."""
        folder, own = self.folder(name, size), {}
        if self.unets[name] is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "unet.json", self.unets[name])
            own = {"model_config_name_or_path": str(folder / "unet.json")}
        flags = self.flags(name, size) | {"output_dir": str(folder), "resume_from_checkpoint": "latest"} | own
        return [*self.launcher, *TRAIN, "--script=unconditional", *recipe_to_argv(flags)]

    def write_subsets(self) -> None:
        """Write the subsets that are missing."""
        missing = [size for size in sorted({size for _, size in self.cells}) if not self.subset(size).exists()]
        if not missing:
            return
        source = {name: self.common[name] for name in OF_THE_SOURCE if name in self.common}
        source["train_data_dir" if Path(self.train).is_dir() else "dataset_name"] = self.train
        with named(self.where):
            rows, labels = source_rows(_parsed(source))
            chosen = {size: first_of_each(labels, len(rows), size) for size in missing}
        self.subsets.mkdir(parents=True, exist_ok=True)
        for size, numbers in chosen.items():
            write_subset(rows, numbers, self.subset(size))

    def measure(self, name: str, size: int, device: str = "cpu") -> None:
        """Draw from the models along a run, and write the memorization ratio of each, and of all into ratios.json."""
        folder, settings = self.measured(name, size), _parsed(self.flags(name, size))
        pixels = Pixels(settings.resolution)
        run = self.folder(name, size)
        training = _pixels(training_set(run, str(self.subset(size)), settings.image_column).images, pixels)
        models = spread(RunFolder(run).saved_models(Unconditional.denoiser_name), self.snapshots)
        records = []
        for step, model in models[1:] or models:
            record = folder / f"step-{step}.json"
            if not record.exists():
                images, pipeline = folder / f"step-{step}", model.parent
                prompts = without_prompts(self.num_images, num_classes(pipeline), self.seed)
                generate(pipeline, prompts, images, self.drawing, device, desc=f"{name}, {size} images, step {step}")
                drawn = _pixels(load_images(images, "output"), pixels)
                found = memorization_ratio(gu_ratios(drawn, training, settings.random_flip, device))
                write_json(record, {"step": step, "num_images": len(drawn), "num_train": len(training)} | found)
                if step != models[-1][0]:
                    shutil.rmtree(images)  # only those of the last model are kept
            records.append(read_json(record))
        write_json(folder / "ratios.json", records)

    def results(self) -> list[dict[str, Any]]:
        """[{configuration, size, snapshots or failed}] of each model: what is measured so far."""
        found = []
        for name, size in self.cells:
            folder, about = self.measured(name, size), {"configuration": name, "size": size}
            if (folder / "ratios.json").exists():
                found.append(about | {"snapshots": read_json(folder / "ratios.json")})
            else:
                failed = folder / FAILED
                found.append(about | {"failed": failed.read_text().strip() if failed.exists() else "was not run"})
        return found


def _parsed(flags: dict[str, Any]) -> UnconditionalScript:
    """The settings that training flags give. Raises ``UsageError``."""
    settings = parse_flags(recipe_to_argv(flags), UnconditionalScript)
    if not isinstance(settings, UnconditionalScript):
        raise TypeError("the parser of a script gives its settings")
    return settings


def _flags() -> set[str]:
    return {*flag_names(UnconditionalScript), "config"} - NOT_OF_A_CONFIGURATION


def _sizes(values: Any, where: str) -> list[int]:
    sizes = sorted({checked(size, int, where) for size in checked(values, list, where)})
    if not sizes or sizes[0] < 2:
        raise UsageError(f"{where}: {sizes[:1]}: a ratio needs at least 2 training images")
    return sizes


def _unet(settings: UnconditionalScript, options: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of a UNet: the one that the flags name, with these options; None for the script's own."""
    place = settings.model_config_name_or_path
    if place is None:
        if options:
            raise UsageError("unet: options are in place of those of `model_config_name_or_path`; give that too")
        return None
    known = UNet2DModel._get_init_keys(UNet2DModel)
    check_keys(options, known, "unet")
    try:
        config = UNet2DModel.load_config(str(shipped(place, ".json")), cache_dir=settings.cache_dir)
    except (OSError, ValueError) as error:
        raise UsageError(f"`model_config_name_or_path` {place}: cannot be read: {one_line(error)}") from error
    return {"_class_name": "UNet2DModel"} | {key: value for key, value in (config | options).items() if key in known}


def _pixels(images: ImageSet, pixels: Pixels) -> torch.Tensor:
    """(N, 3 * S * S) uint8."""
    features = embed(images, {"pixels": pixels}, desc=f"Reading {len(images)} images").features["pixels"]
    if not isinstance(features, torch.Tensor):
        raise TypeError("an image has one vector of pixels")
    return features


def gu_ratios(
    generated: torch.Tensor, training: torch.Tensor, mirrored: bool = False, device: str = "cpu"
) -> torch.Tensor:
    """Distance to the nearest training image over that to the second nearest, of each generated image (N,).

    Args:
        generated, training: pixels (N, D) and (M, D), uint8.
        mirrored: whether training also showed mirror images: a generated image is then as near as it or its mirror
            image is.
    """
    queries = [generated, mirrored_pixels(generated)] if mirrored else [generated]
    search = partial(nearest_l2, references=training, k=2, device=device)
    found = nearest_of_both(search, queries, torch.arange(len(training)), 2)
    return l2_ratio(*found, training, "gu")


def run(path: str | Path, jobs: int = 1, device: str = "cpu", only_results: bool = False) -> int:
    """Train and measure what is missing, and write emm.json, emm.md and emm.png into the study's ``output``.

    Args:
        path: of the ``Study``.
        jobs: models that are trained and measured at once.
        only_results: only write the results of the models that are finished.

    Returns:
        The number of models that failed.
    """
    study = Study(path)
    if not only_results:
        study.write_subsets()
        missing = [cell for cell in study.cells if not (study.measured(*cell) / "ratios.json").exists()]
        options = ["--config", str(study.path), "--device", device]
        run_jobs([partial(_run_cell, study, cell, options) for cell in missing], jobs, len(missing), "Models")
    return write_results(study)


def _run_cell(study: Study, cell: tuple[str, int], options: list[str], bar: tqdm, processes: Processes) -> None:
    folder = study.measured(*cell)
    try:
        why = train(study.training_command(*cell), study.values(*cell), study.folder(*cell), processes)
        folder.mkdir(parents=True, exist_ok=True)
        if why is None:
            command = [sys.executable, "-m", "ietagc_diffusers", "emm", *options, "--cell", json.dumps(cell)]
            why = processes.call(command, folder / "log.txt")
    except Stopped:
        raise
    except Exception as error:  # of any kind: the other models continue
        why = f"{type(error).__name__}: {error}"
        folder.mkdir(parents=True, exist_ok=True)
    if why is None:
        (folder / FAILED).unlink(missing_ok=True)
    else:
        (folder / FAILED).write_text(why)
        tqdm.write(f"{cell[0]}, {cell[1]} images failed: {why}")
    bar.update()


def write_results(study: Study) -> int:
    """Write emm.json, emm.md and emm.png. Returns the number of models without a result."""
    results = study.results()
    curves: Curves = {name: {} for name in study.configurations}
    for result in results:
        if "snapshots" in result:
            curves[result["configuration"]][result["size"]] = [Ratio.of(each) for each in result["snapshots"]]
    failed = [result for result in results if "failed" in result]
    notes = [
        f"Each model drew {study.num_images:,} images. Trained for "
        + (f"{study.epochs:,} epochs" if study.steps is None else f"{study.steps:,} steps")
        + f" at each size; seed {study.seed}.",
        *(f"- {x['configuration']}, {x['size']:,} images: no result: {x['failed']}" for x in failed),
    ]
    capacities = {
        name: {
            statistic: vars(capacity({n: of_snapshots(x, statistic).value for n, x in sizes.items()}, study.threshold))
            for statistic in STATISTICS
        }
        for name, sizes in curves.items()
        if sizes
    }
    study.output.mkdir(parents=True, exist_ok=True)
    about = {"version": __version__, "threshold": study.threshold, "epochs": study.epochs, "steps": study.steps}
    write_json(study.output / "emm.json", about | {"emm": capacities, "models": results})
    write_text(study.output / "emm.md", markdown(curves, study.threshold, notes))
    png(picture(curves, study.threshold), study.output / "emm.png")
    return len(failed)
