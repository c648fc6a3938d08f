"""A pipeline that returns no training images: each image is compared with an index of the training set, and drawn
again with another seed or refused if it is too similar.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ietagc_diffusers import __version__
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_json
from ietagc_diffusers.sscd import Descriptor

from .features import embed
from .image_sets import ImageSet, to_tensor
from .neighbours import most_similar
from .vectors import Several
from .views import ALL_VIEWS, Views, best_of

FORMAT = 2  # of a saved index
PER_PROMPT = {
    "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3",
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
}  # fmt: skip
OF_A_BATCH = ("ip_adapter_image", "ip_adapter_image_embeds")  # with these a part of a batch cannot be drawn again


@dataclass(frozen=True)
class TrainingIndex:
    """Descriptors of all that training may have shown of the training images.

    Args:
        vectors: float32 (R, D) of unit length, several of each image.
        names: of the image that each is of: R.
        identity: of the descriptor that computed them.
        mirrored: whether a mirror image counts as a copy too.
    """

    vectors: torch.Tensor
    names: list[str]
    identity: dict[str, Any]
    mirrored: bool = True

    @classmethod
    def build(
        cls,
        images: ImageSet,
        descriptor: Descriptor,
        cache: Path | None = None,
        batch_size: int = 32,
        views: Views = ALL_VIEWS,
    ) -> "TrainingIndex":
        """The index of a set of images; those that cannot be read are left out.

        Args:
            cache: folder for features.
            views: what training may have shown of them, by default all.
        """
        described = embed(images, views.of_training(descriptor), cache, batch_size, desc="Describing training images")
        found = described.several["views"]
        names = [described.images.names[owner] for owner in found.owners.tolist()]
        return cls(found.vectors, names, descriptor.identity, views.mirrored)

    def save(self, folder: str | Path) -> None:
        """Write index.safetensors and index.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": self.vectors.contiguous()}, folder / "index.safetensors")
        write_json(folder / "index.json", self._about)

    @property
    def _about(self) -> dict[str, Any]:
        of_index = {"descriptor": self.identity, "names": self.names, "mirrored": self.mirrored}
        return {"version": __version__, "format": FORMAT} | of_index

    @classmethod
    def load(cls, folder: str | Path) -> "TrainingIndex":
        """The index that ``save`` wrote. Raises ``UsageError`` if there is none, or one of an earlier version, which
        held only whole images.
        """
        about = read_json(Path(folder) / "index.json")
        if about.get("format") != FORMAT:
            raise UsageError(f"{folder}: was built by another version, and lacks views of the images: build it again")
        vectors = load_file(Path(folder) / "index.safetensors")["vectors"]
        return cls(vectors, about["names"], about["descriptor"], about["mirrored"])


@dataclass
class Guarded:
    """The result of a guarded call: lists with an entry for each image.

    Attributes:
        images: PIL images; None where one was refused.
        similarity: of the last try to the nearest training image.
        nearest: name of that training image.
        tries: how often the image was drawn.
        refused: whether it was refused.
    """

    images: list[Image.Image | None]
    similarity: list[float]
    nearest: list[str]
    tries: list[int]
    refused: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.refused = [image is None for image in self.images]


class SimilarityGuard:
    """Wraps a pipeline: ``guard(prompt, ...)`` takes the pipeline's arguments and returns a ``Guarded``.

    The first try is the pipeline's own call. Images that are too similar to a training image are drawn again together,
    each from a seed that is derived from its generator's state and the number of the try.

    Args:
        pipeline: any text-to-image pipeline that returns PIL images, mitigated or not.
        descriptor: the one that built the index.
        max_similarity: images above it are not returned; default: the descriptor's copy threshold, if it has one.
        retries: how often an image is drawn again before it is refused, at least 0.

    Raises:
        UsageError: the index was built by another descriptor, or ``max_similarity`` is needed.
    """

    def __init__(
        self,
        pipeline: Any,
        descriptor: Descriptor,
        index: TrainingIndex,
        max_similarity: float | None = None,
        retries: int = 3,
    ):
        if index.identity != descriptor.identity:
            built_by, given = (json.dumps(identity) for identity in (index.identity, descriptor.identity))
            raise UsageError(f"`index`: was built by {built_by}, not by {given}: build it again")
        if retries < 0:
            raise UsageError(f"`retries` {retries}: must be at least 0")
        self.pipeline, self.descriptor, self.index, self.retries = pipeline, descriptor, index, retries
        self.max_similarity = descriptor.threshold(max_similarity, "max_similarity")

    def __call__(
        self, prompt: Any = None, *, generator: Any = None, num_images_per_prompt: int = 1, **options: Any
    ) -> Guarded:
        """Takes the pipeline's arguments, except ``output_type`` and ``return_dict``.

        ``latents`` are used for the first try only.
        """
        if options.pop("output_type", "pil") != "pil" or options.pop("return_dict", True) is not True:
            raise UsageError(
                "`output_type`, `return_dict`: a guard compares PIL images and returns a Guarded: leave these out"
            )
        for name in OF_A_BATCH:
            if options.get(name) is not None:
                raise UsageError(f"`{name}`: a guard cannot draw single images of a batch again with it: leave it out")
        options |= {} if prompt is None else {"prompt": prompt}
        states = _states(generator)
        first = self.pipeline(**options, generator=generator, num_images_per_prompt=num_images_per_prompt).images
        states = states or [torch.randint(2**63 - 1, ()).numpy().tobytes()]
        images, tries = list(first), [1] * len(first)
        similarity, nearest = self._compare(images)
        options.pop("latents", None)
        for attempt in range(1, self.retries + 1):
            rows = [i for i, value in enumerate(similarity) if value > self.max_similarity]
            if not rows:
                break
            drawn = self.pipeline(
                **_of_images(options, rows, num_images_per_prompt, len(images)),
                generator=[_derived(states, row, attempt) for row in rows],
                num_images_per_prompt=1,
            ).images
            for row, image, value, name in zip(rows, drawn, *self._compare(drawn), strict=True):
                images[row], similarity[row], nearest[row], tries[row] = image, value, name, attempt + 1
        passed = [
            image if value <= self.max_similarity else None for image, value in zip(images, similarity, strict=True)
        ]
        return Guarded(passed, similarity, nearest, tries)

    def _compare(self, images: Sequence[Image.Image]) -> tuple[list[float], list[str]]:
        """Similarity to the nearest training image, and its name, of each PIL image."""
        drawn = torch.stack([to_tensor(image.convert("RGB")) for image in images])
        extractors = Views(mirrored=self.index.mirrored).of_others(self.descriptor)
        queries = [Several.of_each(extractor(drawn)) for extractor in extractors.values()]
        search = partial(most_similar, references=self.index.vectors, index="exact", device=self.descriptor.device)
        similarity, rows = best_of(search, queries)
        return similarity.tolist(), [self.index.names[row] for row in rows]


def _states(generator: Any) -> list[bytes]:
    """The state of each generator before the first try."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    return [g.get_state().numpy().tobytes() for g in generators]


def _derived(states: list[bytes], row: int, attempt: int) -> torch.Generator:
    text = states[row % len(states)] + f"/{row if len(states) == 1 else 0}/{attempt}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)


def _of_images(options: dict[str, Any], rows: list[int], per_prompt: int, total: int) -> dict[str, Any]:
    """The arguments for these images only: lists and tensors with an entry for each prompt get one for each image."""
    num_prompts = total // per_prompt
    chosen: dict[str, Any] = {}
    for key, value in options.items():
        if key in PER_PROMPT and isinstance(value, str):
            chosen[key] = [value] * len(rows)
        elif key in PER_PROMPT and isinstance(value, (list, torch.Tensor)) and len(value) == num_prompts:
            places = [row // per_prompt for row in rows]
            chosen[key] = value[places] if isinstance(value, torch.Tensor) else [value[i] for i in places]
        else:
            chosen[key] = value
    return chosen
