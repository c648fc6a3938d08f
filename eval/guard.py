"""A pipeline that does not give training images back: each image is compared with an index of the training set, and
drawn anew with another seed, or refused.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import read_json, write_json

from .features import embed
from .image_sets import to_tensor
from .neighbours import most_similar

PER_PROMPT = {
    "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds",
    "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
}  # fmt: skip
OF_A_BATCH = ("ip_adapter_image", "ip_adapter_image_embeds")  # a part of the batch cannot be drawn anew with these


@dataclass(frozen=True)
class TrainingIndex:
    """Descriptors of the training images, and what made them.

    vectors: float32 (M, D) of unit length; names: M; identity: of the descriptor.
    """

    vectors: torch.Tensor
    names: list
    identity: dict

    @classmethod
    def build(cls, images, descriptor, cache=None, batch_size=32):
        """The index of an ``ImageSet``; images that cannot be read are left out."""
        made = embed(images, {"descriptor": descriptor}, cache, batch_size, desc="Describing training images")
        return cls(made.features["descriptor"], [images.names[i] for i in made.kept], descriptor.identity)

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": self.vectors.contiguous()}, folder / "index.safetensors")
        write_json(folder / "index.json", {"descriptor": self.identity, "names": self.names})

    @classmethod
    def load(cls, folder):
        """Raises ``UsageError`` if there is none."""
        about = read_json(Path(folder) / "index.json")
        return cls(load_file(Path(folder) / "index.safetensors")["vectors"], about["names"], about["descriptor"])


@dataclass
class Guarded:
    """What a guarded call returns, a place for each image: images (None where refused), the similarity of the last try
    to the nearest training image, that image's name, and how often it was drawn.
    """

    images: list
    similarity: list
    nearest: list
    tries: list
    refused: list = field(init=False)

    def __post_init__(self):
        self.refused = [image is None for image in self.images]


class SimilarityGuard:
    """Wraps a pipeline: ``guard(prompt, ...)`` takes the pipeline's arguments and returns a ``Guarded``.

    The first try is the pipeline's own call; an image that is too similar to a training image is drawn again, with the
    others that were, from a seed that derives from its generator's state and the number of the try.

    Args:
        pipeline: any text-to-image pipeline that returns PIL images; a mitigated one, too.
        descriptor: the one that made the index.
        index: ``TrainingIndex``.
        max_similarity: over it an image is not given out; default: the descriptor's copy threshold.
        retries: how often an image is drawn anew before it is refused.

    Raises:
        UsageError: the index was made by another descriptor.
    """

    def __init__(self, pipeline, descriptor, index, max_similarity=None, retries=3):
        if index.identity != descriptor.identity:
            made, given = (json.dumps(x) for x in (index.identity, descriptor.identity))
            raise UsageError(f"the index was made by {made}, not by {given}: build it anew")
        if retries < 0:
            raise UsageError(f"retries {retries}: must be at least 0")
        self.pipeline, self.descriptor, self.index, self.retries = pipeline, descriptor, index, retries
        self.max_similarity = descriptor.copy_similarity if max_similarity is None else max_similarity

    def __call__(self, prompt=None, *, generator=None, num_images_per_prompt=1, **options):
        """Other arguments are the pipeline's. ``output_type`` is PIL, and ``latents`` hold for the first try alone."""
        if options.pop("output_type", "pil") != "pil" or options.pop("return_dict", True) is not True:
            raise UsageError(
                "output_type, return_dict: a guard compares pictures and returns what it found: leave them out"
            )
        for name in OF_A_BATCH:
            if options.get(name) is not None:
                raise UsageError(f"{name}: a guard cannot draw single images of a batch anew with it: leave it out")
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
        given = [
            image if value <= self.max_similarity else None for image, value in zip(images, similarity, strict=True)
        ]
        return Guarded(given, similarity, nearest, tries)

    def _compare(self, images):
        """Similarity to the nearest training image, and its name, of each PIL image."""
        vectors = self.descriptor(torch.stack([to_tensor(image.convert("RGB")) for image in images]))
        values, found = most_similar(vectors, self.index.vectors, index="exact", device=self.descriptor.device)
        return values[:, 0].tolist(), [self.index.names[i] for i in found[:, 0]]


def _states(generator):
    """The state of each generator before the first try."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    return [g.get_state().numpy().tobytes() for g in generators]


def _derived(states, row, attempt):
    text = states[row % len(states)] + f"/{row if len(states) == 1 else 0}/{attempt}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)


def _of_images(options, rows, per_prompt, total):
    """The arguments for single images: those that are lists or tensors with a place a prompt, one place an image."""
    num_prompts = total // per_prompt
    chosen = {}
    for key, value in options.items():
        if key in PER_PROMPT and isinstance(value, str):
            chosen[key] = [value] * len(rows)
        elif key in PER_PROMPT and isinstance(value, (list, torch.Tensor)) and len(value) == num_prompts:
            places = [row // per_prompt for row in rows]
            chosen[key] = value[places] if isinstance(value, torch.Tensor) else [value[i] for i in places]
        else:
            chosen[key] = value
    return chosen
