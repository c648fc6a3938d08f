"""Vectors of many images, one or several of each, kept once."""

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ietagc_diffusers.errors import UsageError


class Vectors:
    """Vectors (R, D) that are added image by image and at the end are one tensor, without a second copy of them.

    Of images with one vector each the tensor is allocated at once. Others, of which it is not known how many there will
    be, go into a nameless file in the system's folder for temporary files, which is mapped into memory.
    """

    def __init__(self, num_images: int):
        self.num_images = num_images
        self.counts: list[int] = []
        self.like: np.ndarray | None = None
        self.rows: np.ndarray | None = None
        self.file: Any = None

    def append(self, vectors: np.ndarray) -> None:
        """Add an image's vectors, (D,) or (V, D)."""
        if self.like is None:
            self.like = vectors
            if vectors.ndim == 1:
                self.rows = np.empty((self.num_images, len(vectors)), vectors.dtype)
            else:
                self.file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the tensor)
        if self.rows is not None:
            self.rows[len(self.counts)] = vectors
            self.counts.append(1)
        else:
            self._write(vectors.tobytes())
            self.counts.append(len(vectors))

    def _write(self, data: bytes) -> None:
        try:
            self.file.write(data)
        except OSError as error:
            raise UsageError(
                f"{tempfile.gettempdir()}: {error.strerror}: vectors of many crops of each image are kept there while "
                "they are compared; name a larger folder by the environment variable TMPDIR"
            ) from error

    def result(self) -> "torch.Tensor | Several":
        """All of them: (M, D), or several of each image."""
        if self.rows is not None:
            return torch.from_numpy(self.rows[: len(self.counts)])
        if self.like is None:
            raise ValueError("there are no vectors")
        self.file.flush()
        shape = (sum(self.counts), self.like.shape[1])
        mapped = torch.from_numpy(np.memmap(self.file, self.like.dtype, "c", shape=shape))
        return Several(mapped, torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts)))


@dataclass(frozen=True)
class Several:
    """Several vectors of each of M images.

    vectors: (R, D), image by image; owners: int64 (R,), ascending: which image each is of.
    """

    vectors: torch.Tensor
    owners: torch.Tensor

    @classmethod
    def of_one(cls, vectors: torch.Tensor) -> "Several":
        """One vector of each of R images."""
        return cls(vectors, torch.arange(len(vectors)))

    @classmethod
    def of_each(cls, vectors: torch.Tensor) -> "Several":
        """V vectors of each of M images, (M, V, D)."""
        return cls(vectors.flatten(0, 1), torch.arange(len(vectors)).repeat_interleave(vectors.shape[1]))

    @property
    def counts(self) -> torch.Tensor:
        """How many of each image: (M,)."""
        return torch.bincount(self.owners)

    @property
    def starts(self) -> torch.Tensor:
        """The row of the first of each image: (M,)."""
        return self.counts.cumsum(0) - self.counts

    def best(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (R,) of the vectors, the row of the highest of each image: (M,)."""
        return self.starts + torch.stack([of_image.argmax() for of_image in values.split(self.counts.tolist())])

    def last(self) -> torch.Tensor:
        """The last one of each image: (M, D)."""
        return self.vectors[self.starts + self.counts - 1]

    def middle(self) -> torch.Tensor:
        """The middle one of each image, as a generated image would show it: (M, D)."""
        return self.vectors[self.starts + (self.counts - 1) // 2]

    def select(self, indices: list[int]) -> "Several":
        """Those of some of the images, in this order."""
        counts, starts = self.counts[indices], self.starts[indices]
        owners = torch.arange(len(indices)).repeat_interleave(counts)
        within = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        return Several(self.vectors[starts[owners] + within], owners)
