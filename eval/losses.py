"""Training and held-out losses of the models that runs left behind."""

import base64
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ietagc_diffusers.data import image_transform
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families import Unconditional, family_of
from ietagc_diffusers.files import read_json_lines
from ietagc_diffusers.run_folder import ADAPTER_FILE, RunFolder
from ietagc_diffusers.training.fixed_losses import FixedLosses

from .curves import FrontPoint
from .generate import model_hash
from .image_sets import BadImage, ImageSet, to_tensor
from .levels import by_level, edges_of
from .prompts import choose
from .told import CAPTIONS, Told

Shown = tuple[torch.Tensor, list[Any]]  # images, and what models are told of them


class Chosen(NamedTuple):
    """Some images of a set as a model is shown them, uint8 (N, 3, H, W), what it is told of each, and their places in
    the set.
    """

    pixels: torch.Tensor
    told: list[Any]
    indices: list[int]


def chosen(
    images: ImageSet,
    resolution: int,
    max_images: int,
    seed: int = 0,
    setting: str = "train",
    told: Told = CAPTIONS,
    interpolation: str = "bilinear",
    user: str = "the front",
) -> Chosen:
    """Images as the training transform with a centre crop shows them, and what models are told of them. Those of which
    there is nothing to tell, and those that do not decode, are left out.

    ``setting`` names the source in messages, ``train`` or ``heldout``, and ``user`` what needs the images.
    """
    transform = image_transform(resolution, True, False, interpolation).transforms[:2]  # resize, crop
    values = (told.of_heldout if setting == "heldout" else told.of_training)(images)
    pixels, rows = [], []
    for index, value in choose(values, min(max_images, len(values)), seed) if values else []:
        with suppress(BadImage):
            image = images.image(index)
            for step in transform:
                image = step(image)
            pixels.append(to_tensor(image))
            rows.append((value, index))
    if len(pixels) < 2:
        raise UsageError(f"`{setting}` {images.source}: {user} needs at least two images{told.needed}")
    return Chosen(torch.stack(pixels), [value for value, _ in rows], [index for _, index in rows])


def shown(
    images: ImageSet, resolution: int, max_images: int, seed: int = 0, setting: str = "train", told: Told = CAPTIONS
) -> Shown:
    """``chosen`` without the places: uint8 (N, 3, resolution, resolution), and N captions, labels or None."""
    return chosen(images, resolution, max_images, seed, setting, told)[:2]


@dataclass(frozen=True)
class SavedModel:
    """A model that a run left behind: the run's name, which of its seeds, the step, and the denoiser's folder."""

    run: str
    replicate: int
    step: int
    folder: Path


def saved_models(runs: dict[str, list[Path]], denoiser: str, points: int | None = None) -> list[SavedModel]:
    """The models of runs {name: run folders, one a seed}, at most ``points`` of each, evenly spread.

    ``denoiser``: its folder's name in a pipeline.
    """
    models = []
    for name, folders in runs.items():
        for number, folder in enumerate(folders):
            found = RunFolder(folder).saved_models(denoiser)
            if not found:
                raise UsageError(f"`run` {folder}: holds no checkpoints and no rounds; train with `save_rounds`")
            models += [SavedModel(name, number, *model) for model in spread(found, points)]
    return models


def spread(models: list, points: int | None) -> list:
    """``points`` of a list, evenly spread, its last among them."""
    if points is None or len(models) <= points:
        return models
    return [models[round((i + 1) * len(models) / points) - 1] for i in range(points)]


@dataclass(frozen=True)
class ModelLosses:
    """Losses of a model: the means over training and over held-out images, and, if they are known, those of each draw
    of each image: float32 (draws, N) of both sets.
    """

    train: float
    heldout: float
    draws: tuple[torch.Tensor, ...] = ()


class Losses:
    """Training and held-out losses of a denoiser under fixed noise; measured models are remembered in a file.

    Args:
        base: the pipeline that all runs started from.
        training, heldout: images and what models are told of them, see ``FixedLosses``.
        memory: JSON-lines file, or None. A line has a key, both means, and the losses of each draw, so that they can
            be read by any number of levels. Files of earlier versions have only means: these are enough where the mean
            is wanted, else the models are measured again.
        prediction_type: of the runs, if not the base's.
        draws, seed, batch_size: see ``FixedLosses``.
        levels: buckets of noise levels that points have besides the mean; 1 is the mean only.
    """

    def __init__(
        self,
        base: str | Path,
        training: Shown,
        heldout: Shown,
        memory: Path | None = None,
        prediction_type: str | None = None,
        device: str = "cpu",
        draws: int = 3,
        seed: int = 0,
        batch_size: int = 100,
        levels: int = 1,
    ):
        self.base, self.memory = base, memory
        self.family = family_of(base, setting="base").load_frozen(str(base), prediction_type, device, setting="base")
        self.edges = edges_of(self.family.objective.num_levels, levels)
        self.wants_levels = levels > 1
        sets = (training, heldout)
        self.fix = lambda: [FixedLosses(self.family, *images, draws, seed, batch_size) for images in sets]
        self.sets = self.fix()
        origin = model_hash(base) if Path(base).is_dir() else str(base)
        digest = hashlib.blake2b(json.dumps([origin, prediction_type, device, draws, seed]).encode())
        for images, told in sets:
            for image in images:
                digest.update(image.numpy().tobytes())
            digest.update(json.dumps(told).encode())
        self.conditions = digest.hexdigest()[:16]
        rows = [] if memory is None else read_json_lines(memory)
        self.known: dict[str, list] = {key: row for key, *row in rows}  # two means, and the draws of both sets

    def of_base(self) -> tuple[float, float]:
        """(training loss, held-out loss) of the base's own denoiser."""
        return self(self.base, self.family.denoiser_name)

    def __call__(self, folder: str | Path, subfolder: str | None = None) -> tuple[float, float]:
        """(training loss, held-out loss) of the denoiser that ``of`` takes."""
        found = self.of(folder, subfolder)
        return found.train, found.heldout

    def of(self, folder: str | Path, subfolder: str | None = None) -> ModelLosses:
        """Losses of the denoiser in a folder or in a pipeline's subfolder, or of the base with the adapter in a
        folder.
        """
        key = self.conditions + weights_hash(Path(folder) / (subfolder or "."))
        if len(self.known.get(key, [])) < (4 if self.wants_levels else 2):
            if subfolder is None and (Path(folder) / ADAPTER_FILE).is_file():
                self.known[key] = self._of_adapter(folder)
            else:
                self.known[key] = self._of(self.family.load_denoiser(folder, subfolder), self.sets)
            if self.memory is not None:
                with Path(self.memory).open("a") as file:
                    file.write(json.dumps([key, *self.known[key]]) + "\n")
        train, heldout, *packed = self.known[key]
        draws = zip(packed, self.sets, strict=False)
        return ModelLosses(train, heldout, tuple(_unpacked(text, fixed.levels.shape) for text, fixed in draws))

    def point(self, run: str, replicate: int, step: int, found: ModelLosses, start: ModelLosses | None) -> FrontPoint:
        """A model's point on the front. What ``start`` has for a gap is subtracted, in all and in each bucket; None
        subtracts nothing.
        """
        difficulty = 0.0 if start is None else start.heldout - start.train
        gap = found.heldout - found.train - difficulty
        point = FrontPoint(run, step, found.train, found.heldout, gap, replicate)
        if not self.wants_levels:
            return point
        levels = [fixed.levels for fixed in self.sets]
        return replace(point, levels=by_level(self.edges, levels, found.draws, None if start is None else start.draws))

    def _of_adapter(self, folder):
        denoiser = self.family.load_adapted(self.base, folder)
        with self.family.text_adapted(folder) as changed:
            return self._of(denoiser, self.fix() if changed else self.sets)

    def _of(self, denoiser, sets):
        denoiser = denoiser.to(self.family.device).eval()
        found = [losses.by_draw(denoiser) for losses in sets]
        return [*(draws.mean(dim=0).mean().item() for draws in found), *map(_packed, found)]


def _packed(losses: torch.Tensor) -> str:
    return base64.b64encode(losses.numpy().astype("<f4").tobytes()).decode()


def _unpacked(text: str, shape: torch.Size) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
    return torch.from_numpy(values).view(shape)


def weights_hash(folder: Path) -> str:
    """A hash of the weight files in a folder; of its name if it is a Hub id."""
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in (".safetensors", ".bin"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else str(folder)


Measured = list[tuple[FrontPoint, Path | None]]
Starts = dict[tuple[str, int], Path]


def untrained(runs: dict[str, list[Path]], models: list[SavedModel], output: Path) -> Starts:
    """The pipelines that runs from scratch started from, {(run, replicate): folder}, written into ``output``: their
    weights are those that the run's seed draws.

    Raises:
        UsageError: a run that started from a base.
    """
    starts = {}
    configs = {(model.run, model.replicate): model.folder for model in models}
    for (name, number), weights in configs.items():
        folder = runs[name][number]
        settings = RunFolder(folder).config()
        base = settings.get("pretrained_model_name_or_path")
        if base is not None:
            raise UsageError(f"`run` {folder}: was trained from {base}, and others from scratch; give `base`")
        made = Unconditional.untrained(settings, weights)
        parts = (made.denoiser.config, made.scheduler.config)
        key = hashlib.blake2b(json.dumps([settings["seed"], *map(str, parts)]).encode(), digest_size=4).hexdigest()
        starts[name, number] = output / key
        if not (starts[name, number] / "model_index.json").is_file():
            made.save_pipeline(starts[name, number])
    return starts


def measure(losses: Losses, models: list[SavedModel], starts: Starts | None = None) -> Measured:
    """Each point of the front with the folder of its denoiser, which is None for the base, every run's first point.

    Args:
        starts: what runs from scratch started from instead. How much more difficult one of the two sets is can only be
            measured with a model that has seen neither of them and yet others like them; an untrained one says nothing
            about it, so that of such runs nothing is subtracted from the gap.
    """
    seeds = dict.fromkeys((model.run, model.replicate) for model in models)
    start = None
    measured: Measured = []
    if starts is None:
        start = losses.of(losses.base, losses.family.denoiser_name)
        measured += [(losses.point(*seed, 0, start, start), None) for seed in seeds]
    else:
        for seed in seeds:
            folder = starts[seed] / losses.family.denoiser_name
            own = losses.of(folder)
            measured.append((losses.point(*seed, 0, own, own), folder))
    for model in tqdm(models, desc="Front"):
        found = losses.of(model.folder)
        measured.append((losses.point(model.run, model.replicate, model.step, found, start), model.folder))
    return measured
