"""Samples as the training sees them: images transformed, and what the model is told of them."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torchvision import transforms
from torchvision.transforms import functional as F

from ..errors import UsageError
from .batch import Batch, Tensors
from .conditions import Condition
from .rows import decode
from .sources import SAMPLE_ID, stored_column

REPLACEMENTS = 1000  # tries to find a good row in place of a bad one
Key = int | tuple[int, int]


def image_transform(resolution: int, center_crop: bool, random_flip: bool, interpolation: str) -> transforms.Compose:
    """The official script's transform: PIL image -> float32 (3, resolution, resolution) in [-1, 1]."""
    mode = getattr(transforms.InterpolationMode, interpolation.upper())
    return transforms.Compose(
        [
            transforms.Resize(resolution, interpolation=mode),
            (transforms.CenterCrop if center_crop else transforms.RandomCrop)(resolution),
            *([transforms.RandomHorizontalFlip()] if random_flip else []),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


def fixed_transforms(resolution: int, random_flip: bool, interpolation: str) -> tuple[transforms.Compose, ...]:
    """What ``image_transform`` with centre crop shows without chance: the image and, with flips, its mirror image."""
    plain = image_transform(resolution, True, False, interpolation)
    mirrored = transforms.Compose([*plain.transforms[:2], transforms.Lambda(F.hflip), *plain.transforms[2:]])
    return (plain, mirrored) if random_flip else (plain,)


class View(Protocol):
    """What a visit shows of a PIL image: float32 (3, H, W) in [-1, 1], and what the model is told of the view.

    Draws are from torch's stream and from ``rng``: ``random.Random``, or the module itself. ``fixed``: all that a visit
    may show, as functions of the image without chance; () where that is no small number. ``draw`` says which of them a
    visit shows, by the draws that a call makes.
    """

    @property
    def fixed(self) -> tuple[Callable[[Any], tuple[torch.Tensor, Tensors]], ...]: ...

    def draw(self, rng: Any) -> int: ...

    def __call__(self, image: Any, rng: Any) -> tuple[torch.Tensor, Tensors]: ...


class TrainingSamples(torch.utils.data.Dataset):
    """Rows as the training sees them.

    A key is a row, whose random crop, flip and condition then come from the process's random streams as in the official
    script; or a pair (row, seed), and they come from the seed only: the same for any number of workers and processes.

    Args:
        rows: with the image column and the condition's columns.
        transform: PIL image -> float32 (3, H, W) in [-1, 1] and a dict of tensors that the model is told of this view
            (empty, or sizes and crop).
        condition: what else the model is told.
        alpha: how transparent parts are shown, see ``decoder.to_rgb``.
        own_views: {row: view} of rows that are shown in another way than ``transform`` shows them, by the same draws.

    A row without image or condition is replaced by another of ``pool``, drawn from the key's seed, and named in the
    batch: what becomes of the run is not decided in the middle of a step.
    """

    def __init__(
        self,
        rows: Dataset,
        image_column: str,
        transform: View,
        condition: Condition,
        alpha: str = "white",
        own_views: Mapping[int, View] | None = None,
    ):
        self.images = rows.select_columns([image_column])
        # Apart from the images, so that reading a caption decodes none.
        self.conditions = rows.select_columns(list(condition.columns)) if condition.columns else None
        self.image_column = image_column
        self.transform: Any = transform
        self.own_views: Mapping[int, Any] = own_views or {}
        self.condition = condition
        self.alpha = alpha
        self.ids = stored_column(rows, SAMPLE_ID).to_numpy() if SAMPLE_ID in rows.column_names else None
        self.pool = np.arange(len(rows))

    def of_shard(self, shard_samples: np.ndarray) -> "TrainingSamples":
        """The same rows, with replacements from this shard."""
        samples = copy(self)
        samples.pool = shard_samples
        return samples

    def __len__(self) -> int:
        return len(self.images)

    def _read(self, row):
        """Image and condition of a row. Raises ``UsageError`` naming it."""
        try:
            value = self.condition.read({} if self.conditions is None else self.conditions[int(row)])
        except UsageError as error:
            raise UsageError(f"row {row} {error}") from error
        return self._image(row), value

    def _image(self, row):
        return decode(self.images, self.image_column, row, self.alpha)

    def _read_or_replace(self, row, seed):
        """Returns image, condition, the row they are of, and [row, reason] for each that was bad."""
        bad: list[list] = []
        rng = random.Random(seed)
        for candidate in itertools.chain([row], (int(rng.choice(self.pool)) for _ in range(REPLACEMENTS))):
            try:
                return *self._read(candidate), candidate, bad
            except UsageError as error:
                bad.append([candidate, str(error)])
        raise UsageError(f"row {row}: bad, and so were {REPLACEMENTS:,} others drawn in its place: {bad[0][1]}")

    def view_of(self, row: int) -> Any:
        """The view that shows a row's image."""
        return self.own_views.get(row, self.transform)

    def _visits(self, rows, images, values, seeds):
        """What visits show of the rows' images and say of them: lists of views and of conditions. Each visit draws from
        its own seed; where there are none, all draw from the streams, in the official scripts' order: first the images.
        """
        if seeds is None:
            shown = [self._show(row, image, random) for row, image in zip(rows, images, strict=True)]
            return shown, [self.condition.draw(value, random) for value in values]
        shown, drawn = [], []
        for row, image, value, seed in zip(rows, images, values, seeds, strict=True):
            torch.default_generator.manual_seed(seed)  # not torch's, which seeds the device too
            rng = random.Random(seed)
            shown.append(self._show(row, image, rng))
            drawn.append(self.condition.draw(value, rng))
        return shown, drawn

    def _show(self, row, image, rng):
        """What one visit shows of a row's image."""
        return self.view_of(row)(image, rng)

    def _images(self, shown, drawn):
        """The batch's fields that have to do with images and condition."""
        views, told = zip(*shown, strict=True)
        images = torch.stack(views).to(memory_format=torch.contiguous_format).float()
        of_views = {name: torch.stack([of_view[name] for of_view in told]) for name in told[0]}
        return {"images": images, "inputs": self.condition.tensors(drawn), "told": of_views}

    def images_of(self, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The images of visits (row, seed), without their condition: float32 (N, 3, H, W)."""
        shown = []
        with torch.random.fork_rng(devices=[]):
            for row, seed in keys:
                torch.default_generator.manual_seed(seed)
                shown.append(self.view_of(row)(self._image(row), random.Random(seed))[0])
        return torch.stack(shown).to(memory_format=torch.contiguous_format).float()

    def received(self, batch: Batch) -> Batch:
        """A batch as it is used, on the process that asked for it."""
        return batch

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        seeded = isinstance(keys[0], tuple)
        pairs: list[tuple[int, int]] = [key if isinstance(key, tuple) else (key, key) for key in keys]
        images, values, rows, bad = zip(*(self._read_or_replace(row, seed) for row, seed in pairs), strict=True)
        seeds = [seed for _, seed in pairs] if seeded else None
        with torch.random.fork_rng(devices=[], enabled=seeded):
            shown, drawn = self._visits(rows, images, values, seeds)
        return Batch(
            **self._images(shown, drawn),
            samples=torch.tensor(rows),
            seeds=seeds,
            ids=None if self.ids is None else self.ids[list(rows)].tolist(),
            bad=[entry for entries in bad for entry in entries],
        )
