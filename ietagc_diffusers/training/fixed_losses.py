"""Denoising losses under fixed noise and noise levels: precise enough to compare models, and free of sampling."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import Batch
from ..families import Family
from ..families.base import Objective
from ..families.draws import mapped
from .streams import RandomStreams

GOLDEN_RATIO = (5**0.5 - 1) / 2
DRAWN_TOGETHER = 100  # images whose noise is one draw


class FixedLosses:
    """Denoising losses of images under fixed noise and noise levels, so that models can be compared to a few
    ten-thousandths.

    Args:
        family: what the models share, see ``Family.load_frozen``.
        images: float32 (N, 3, H, W) in [-1, 1], or uint8.
        told: what the models are told of each of the N images, see ``Family.batch``.
        draws: noise draws for each image, each at another noise level.
        seed: of the noise.
        batch_size: images at once; the draws do not depend on it.
        sweep: each draw is at one level for all images, and the draws cover the range of levels.
        levels: these levels instead, one for each draw, the same for all images.

    Images and conditions wait in host memory, encoded; their noise is drawn anew each time, always the same, so that
    any number of draws needs no more memory than one.

    Attributes:
        levels: int64 (draws, N), the noise level of each draw of each image.
    """

    def __init__(
        self,
        family: Family,
        images: torch.Tensor,
        told: Sequence[Any],
        draws: int = 3,
        seed: int = 0,
        batch_size: int = 100,
        sweep: bool = False,
        levels: Sequence[int] | None = None,
    ):
        chunks = torch.arange(len(images)).split(DRAWN_TOGETHER)
        batches = (family.batch(_centred(images[rows]), [told[row] for row in rows]) for rows in chunks)
        if levels is not None:
            drawn_at = torch.tensor(levels)[:, None].expand(-1, len(images))
        else:
            drawn_at = (_swept if sweep else _spread)(draws, len(images), family.objective.num_levels)
        self._draw(family.objective, family.device, batches, drawn_at, seed, batch_size)

    @classmethod
    def of_batches(
        cls,
        objective: Objective,
        device: torch.device,
        batches: Iterable[Batch],
        num_images: int,
        draws: int = 3,
        seed: int = 0,
        batch_size: int = 100,
    ) -> "FixedLosses":
        """The same of ``num_images`` images as ``data.TrainingSamples`` gives them, the noise of each batch drawn at
        once.
        """
        losses = cls.__new__(cls)
        losses._draw(objective, device, batches, _spread(draws, num_images, objective.num_levels), seed, batch_size)
        return losses

    def _draw(self, objective, device, batches, levels, seed, batch_size):
        self.objective, self.device, self.levels, self.batch_size = objective, device, levels, batch_size
        self.seed, self.encoded, start = seed, [], 0
        for batch in batches:
            encoded = mapped(self.objective.encode(batch.to(self.device)), lambda tensor: tensor.to("cpu"))
            self.encoded.append((torch.arange(start, start + len(batch)), encoded))
            start += len(batch)

    @property
    def num_batches(self) -> int:
        """How many ``drawn`` gives of all draws."""
        return len(self.levels) * len(self.encoded)

    def drawn(self, draws: int | None = None) -> Iterator[tuple[int, torch.Tensor, Any]]:
        """(number of the draw, rows of the images, what ``Objective.draw`` returns of them, on the device) of all draws
        or of the first ``draws``. The random streams outside are left as they are.
        """
        streams = RandomStreams(self.device)
        with torch.random.fork_rng([streams.device] if streams.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            own = streams.get()
        for draw, levels in enumerate(self.levels[:draws]):
            for rows, encoded in self.encoded:
                others = streams.get()
                streams.set(own)
                try:
                    drawn = self.objective.draw(mapped(encoded, lambda tensor: tensor.to(self.device)))
                    own = streams.get()
                finally:
                    streams.set(others)
                yield draw, rows, self.objective.at_levels(drawn, levels[rows])

    @torch.no_grad()
    def of_draws(
        self, statistic: Callable[[Any], torch.Tensor], draws: int | None = None, desc: str | None = None
    ) -> torch.Tensor:
        """``statistic`` (B,) of what ``Objective.draw`` returns, of each image at each draw, or at the first ``draws``:
        float32 (draws, N). ``desc``: of a progress bar; None shows none.
        """
        values = torch.zeros(self.levels[:draws].shape)
        total = self.num_batches * len(values) // len(self.levels)
        for draw, rows, drawn in tqdm(self.drawn(draws), desc=desc, disable=desc is None, total=total):
            for some in torch.arange(len(rows)).split(self.batch_size):
                values[draw, rows[some]] = statistic(drawn[some]).cpu()
        return values

    def by_draw(self, denoiser: torch.nn.Module) -> torch.Tensor:
        """Loss of each image at each draw: float32 (draws, N)."""
        return self.of_draws(partial(self.objective.losses, denoiser))

    def __call__(self, denoiser: torch.nn.Module) -> torch.Tensor:
        """Mean loss of each image over its draws: float32 (N,)."""
        return self.by_draw(denoiser).mean(dim=0)


def _centred(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def _spread(draws: int, num_images: int, num_levels: int) -> torch.Tensor:
    """Levels spread evenly over the range: fewer draws are needed for the same precision than of random levels."""
    levels = (np.arange(draws * num_images) * GOLDEN_RATIO % 1 * num_levels).astype(np.int64)
    return torch.from_numpy(levels).view(draws, num_images)


def _swept(draws: int, num_images: int, num_levels: int) -> torch.Tensor:
    """The same level for all images, from the first to the last."""
    return torch.linspace(0, num_levels - 1, draws).round().long()[:, None].expand(draws, num_images)
