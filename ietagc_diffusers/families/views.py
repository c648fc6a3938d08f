"""What a visit shows of an image, and what the model is told of that view."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torchvision import transforms
from torchvision.transforms import functional as F

from ..data import ImageSettings, View, fixed_transforms, image_transform
from .base import Image, Tensors

Shown = tuple[torch.Tensor, Tensors]  # float32 (3, H, W) in [-1, 1], and named tensors


@dataclass(frozen=True)
class Untold:
    """A view without chance of which the model is told nothing."""

    transform: transforms.Compose

    def __call__(self, image: Image) -> Shown:
        return self.transform(image), {}


@dataclass(frozen=True)
class Pixels:
    """A view that tells the model nothing but its pixels, as the official script of Stable Diffusion shows it.

    ``fixed``: what the transform shows without chance, the image and perhaps its mirror image; () where that is more.
    """

    transform: transforms.Compose
    fixed: tuple[Untold, ...] = ()

    @classmethod
    def of(cls, settings: ImageSettings) -> "Pixels":
        size, flip, mode = settings.resolution, settings.random_flip, settings.image_interpolation_mode
        fixed = map(Untold, fixed_transforms(size, flip, mode) if settings.center_crop else ())
        return cls(image_transform(size, settings.center_crop, flip, mode), tuple(fixed))

    def __call__(self, image: Image, rng: Any = random) -> Shown:
        return self.transform(image), {}

    def draw(self, rng: Any = random) -> int:
        """Which of the fixed views a visit shows, by the draw that the transform makes."""
        return int(torch.rand(1) < 0.5) if len(self.fixed) > 1 else 0


@dataclass(frozen=True)
class Bordered:
    """Another view with a grey border over its outermost pixels. It draws what the other draws, and shows it to the
    model as the other does.

    Args:
        view: or one of its ``fixed``.
        grey: 0 (black) to 255 (white).
        width: of the border in pixels, less than half of the image's.
    """

    view: Any
    grey: int
    width: int

    @property
    def fixed(self) -> tuple["Bordered", ...]:
        return tuple(Bordered(view, self.grey, self.width) for view in self.view.fixed)

    def draw(self, rng: Any = random) -> int:
        return self.view.draw(rng)

    def __call__(self, image: Image, *rng: Any) -> Shown:
        pixels, told = self.view(image, *rng)
        return bordered(pixels, self.grey / 127.5 - 1, self.width), told


def bordered(images: torch.Tensor, value: Any, width: int) -> torch.Tensor:
    """Images (..., H, W) with ``value``, a number or (..., 1, 1), as their outermost ``width`` pixels; the inside is
    left as it is.
    """
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
    inside[width:-width, width:-width] = True
    return torch.where(inside, images, value)


@dataclass(frozen=True)
class NoisyPixels:
    """Another view with Gaussian noise on its pixels, drawn after all else of the view from torch's stream. Pixels may
    leave [-1, 1].
    """

    view: View
    deviation: float
    fixed: tuple[Untold, ...] = ()

    def __call__(self, image: Image, rng: Any = random) -> Shown:
        pixels, told = self.view(image, rng)
        return pixels + self.deviation * torch.randn_like(pixels), told

    def draw(self, rng: Any = random) -> int:
        return 0


@dataclass(frozen=True)
class PrecisePixels:
    """A view of an image of 8, 16 or 32 bits and any number of channels, as the official unconditional script shows it
    with ``preserve_input_precision``: resized as floating-point numbers, and with three channels.
    """

    transform: transforms.Compose
    fixed: tuple[Untold, ...] = ()

    @classmethod
    def of(cls, settings: ImageSettings) -> "PrecisePixels":
        shown = Pixels.of(settings).transform.transforms
        spatial = [step for step in shown if not isinstance(step, (transforms.ToTensor, transforms.Normalize))]
        numbers = [
            transforms.PILToTensor(),
            transforms.Lambda(_three_channels),
            transforms.ConvertImageDtype(torch.float32),
        ]
        return cls(transforms.Compose([*numbers, *spatial, transforms.Normalize([0.5], [0.5])]))

    def __call__(self, image: Image, rng: Any = random) -> Shown:
        return self.transform(image), {}

    def draw(self, rng: Any = random) -> int:
        return 0


def _three_channels(image: torch.Tensor) -> torch.Tensor:
    """(C, H, W) -> (3, H, W): the first three channels, from the first again where there are fewer."""
    number = len(image)
    return image[[0, 1 % number, 2 % number]]


@dataclass(frozen=True)
class Sized:
    """A view without chance of which the model is told ``time_ids`` (6,): height and width of the image before it was
    resized, top and left edge of the crop, and height and width of the view.
    """

    resolution: int
    interpolation: str
    mirrored: bool = False

    def __call__(self, image: Image) -> Shown:
        resized = self.resized(image)
        if self.mirrored:
            resized = F.hflip(resized)
        top, left = (max(0, round((edge - self.resolution) / 2)) for edge in (resized.height, resized.width))
        return self.cropped(image, resized, top, left)

    def resized(self, image: Image) -> Image:
        mode = getattr(transforms.InterpolationMode, self.interpolation.upper())
        return F.resize(image, self.resolution, mode)

    def cropped(self, image: Image, resized: Image, top: int, left: int) -> Shown:
        size = self.resolution
        pixels = F.normalize(F.to_tensor(F.crop(resized, top, left, size, size)), [0.5], [0.5])
        numbers = [image.height, image.width, top, left, size, size]
        return pixels, {"time_ids": torch.tensor(numbers, dtype=torch.float32)}


@dataclass(frozen=True)
class SizedPixels:
    """A view as the official scripts of Stable Diffusion XL show it: mirrored by a draw from Python's stream, cropped
    by draws from torch's, and told as ``Sized`` tells it. The crop that is told is the crop that is shown.
    """

    plain: Sized
    center_crop: bool
    random_flip: bool

    @classmethod
    def of(cls, settings: ImageSettings) -> "SizedPixels":
        plain = Sized(settings.resolution, settings.image_interpolation_mode)
        return cls(plain, settings.center_crop, settings.random_flip)

    @property
    def fixed(self) -> tuple[Sized, ...]:
        if not self.center_crop:
            return ()
        mirrored = Sized(self.plain.resolution, self.plain.interpolation, mirrored=True)
        return (self.plain, mirrored) if self.random_flip else (self.plain,)

    def draw(self, rng: Any = random) -> int:
        mirrored = self.random_flip and rng.random() < 0.5
        if mirrored:
            torch.rand(1)  # the official scripts mirror by a transform that draws whether to, and always does
        return int(mirrored)

    def __call__(self, image: Image, rng: Any = random) -> Shown:
        if self.center_crop:
            return self.fixed[self.draw(rng)](image)
        resized = self.plain.resized(image)
        if self.draw(rng):
            resized = F.hflip(resized)
        size = self.plain.resolution
        top, left, _, _ = transforms.RandomCrop.get_params(resized, (size, size))
        return self.plain.cropped(image, resized, top, left)
