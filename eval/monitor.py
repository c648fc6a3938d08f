"""Copies among images that are drawn along a training: how a run compares them with its training images."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.sscd import Descriptor, DescriptorError, load_descriptor
from ietagc_diffusers.sscd.descriptor import SSCD_EDGE
from ietagc_diffusers.training.monitor import Compared
from ietagc_diffusers.training.settings import RunSettings

from .features import default_cache, embed
from .image_sets import BadImage, ImageSet, images_of_rows, to_tensor
from .metrics.base import prompt_numbers
from .metrics.similarity import COPY_RATE, SIM_SCORE, is_copy
from .neighbours import most_similar
from .report import grey
from .vectors import Several
from .views import Views, best_of

logger = logging.getLogger(__name__)
AT_ONCE = 32  # images that are described
SHOWN, COLUMNS = 36, 3  # pairs on a sheet, and in a line of it
EDGE, GAP, LINE = 144, 6, 22  # pixels: of an image, between two, of a line of text
PAPER, INK, RED = "#ffffff", "#222222", "#c43b3b"


def comparer(settings: RunSettings, device: torch.device) -> Callable[[Dataset], "Comparison"]:
    """From the rows of a run to what compares drawn images with theirs, by the descriptor that the run's settings name,
    with all that training may show of an image: crops and mirror images, as in an audit.

    Raises:
        UsageError: the descriptor cannot be loaded, or has no threshold.
    """
    try:
        descriptor = load_descriptor(settings.monitor_descriptor, None, str(device))
    except DescriptorError as error:
        raise UsageError(str(error).replace("`descriptor`", "`monitor_descriptor`")) from error
    threshold = descriptor.threshold(settings.monitor_copy_similarity, "monitor_copy_similarity")
    if descriptor.sscd and settings.resolution <= SSCD_EDGE:
        logger.warning(
            f"`monitor_descriptor` {descriptor.name}: misses many copies among images of at most {SSCD_EDGE} pixels; "
            "pixel finds near-exact ones"
        )
    views = Views.of(settings.center_crop, settings.random_flip)
    return lambda rows: Comparison.of(images_of_rows(rows, settings), descriptor, threshold, views)


@dataclass(frozen=True)
class Comparison:
    """Compares drawn images with the images of a training set.

    Attributes:
        images: those of the training set that can be read; described: their views.
        threshold: an image that is more similar is a copy.
        views: what training may show of an image.
    """

    images: ImageSet
    described: Several
    descriptor: Descriptor
    threshold: float
    views: Views

    @classmethod
    def of(cls, images: ImageSet, descriptor: Descriptor, threshold: float, views: Views) -> "Comparison":
        """Describe the training images; what is in the cache of features already is not computed again.

        Raises:
            UsageError: none of the images can be read.
        """
        found = embed(images, views.of_training(descriptor), default_cache(), desc="Describing training images")
        if found.skipped:
            logger.warning(f"{len(found.skipped)} training images cannot be read: copies of them are not found")
        return cls(found.images, found.several["views"], descriptor, threshold, views)

    def __call__(self, drawn: Sequence[Image.Image], told: Sequence[str | None]) -> Compared:
        """How similar the drawn images, all of one size, are to their nearest training images.

        Args:
            told: what each was drawn for. Images of one caption are not independent, and the intervals count them once.
        """
        similarity, nearest = self._nearest(torch.stack([to_tensor(image.convert("RGB")) for image in drawn]))
        groups = prompt_numbers(told)
        numbers = {
            "num_images": len(drawn),
            "descriptor": self.descriptor.name,
            "copy_similarity": self.threshold,
            **SIM_SCORE.of(similarity, groups=groups),
            **COPY_RATE.of(is_copy(similarity, self.threshold), groups=groups),
        }
        order = similarity.argsort(descending=True, stable=True)[:SHOWN].tolist()
        pairs = [(drawn[i], self._image(int(nearest[i])), float(similarity[i])) for i in order]
        return Compared(numbers, sheet(pairs, self.threshold))

    def _nearest(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The similarity (N,) of images uint8 (N, 3, H, W) to the nearest training image, and its number (N,)."""
        ways = [
            Several.of_each(torch.cat([describe(some) for some in images.split(AT_ONCE)]))
            for describe in self.views.of_others(self.descriptor).values()
        ]
        search = functools.partial(most_similar, references=self.described.vectors, device=self.descriptor.device)
        similarity, rows = best_of(search, ways)
        return similarity, self.described.owners[rows]

    def _image(self, index: int) -> Image.Image:
        try:
            return self.images.image(index)
        except BadImage:  # it is no longer there
            return grey()


def sheet(pairs: Sequence[tuple[Image.Image, Image.Image, float]], threshold: float) -> Image.Image:
    """Pairs of a drawn image and its nearest training image, line by line, with their similarity below; those over
    ``threshold`` in a frame.
    """
    columns = min(COLUMNS, len(pairs))
    width, height = 2 * EDGE + 5 * GAP, EDGE + LINE + 4 * GAP  # of a pair
    paper = Image.new("RGB", (columns * width, -(-len(pairs) // columns) * height), PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(16)
    for number, (drawn, training, similarity) in enumerate(pairs):
        left, top = number % columns * width + GAP, number // columns * height + GAP
        copy = similarity > threshold
        if copy:
            corner = (left + width - 2 * GAP, top + height - 2 * GAP)
            pen.rectangle((left, top, *corner), outline=RED, width=2)
        for place, image in enumerate((drawn, training)):
            fitted = ImageOps.pad(image.convert("RGB"), (EDGE, EDGE), color=PAPER)
            paper.paste(fitted, (left + GAP + place * (EDGE + GAP), top + GAP))
        text = f"{similarity:.3f}{' copy' if copy else ''}"
        pen.text((left + GAP, top + EDGE + int(1.5 * GAP)), text, fill=RED if copy else INK, font=font)
    return paper
