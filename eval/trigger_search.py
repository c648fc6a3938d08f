"""The search for an embedding that makes a model draw a given image, as in "Finding DoRI" (Kowalczuk, Hintersdorf,
Struppek et al. 2026): gradient descent on the embedding of a prompt, for the denoising loss of the image.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families import drawn_edge
from ietagc_diffusers.families.base import Tensors
from ietagc_diffusers.families.latent_diffusion import LatentDiffusion
from ietagc_diffusers.mitigations.wen import frozen
from ietagc_diffusers.sscd import Descriptor

from .generate import Settings as Drawing
from .generate import set_up
from .image_sets import to_tensor
from .membership import Opened, Target

STARTS = ("caption", "empty", "noise")
DTYPES = ("float32", "bfloat16")  # in half precision the gradients of a loss that is not scaled vanish


@dataclass(frozen=True)
class Search:
    """How an embedding is searched for, and how images are drawn from it.

    Args:
        start: the embedding of the image's caption, of the empty one, or noise with the mean and the standard deviation
            of the caption's.
        learning_rate: of Adam, in standard deviations of the caption's embedding, so that one value suits all models.
        max_steps: after which the search ends.
        check_every: steps between images that are drawn; one is drawn before the first step, and after the last.
        draws: noise draws, each at another noise level, whose mean loss a step lowers.
        images_per_check: images that are drawn each time, from different noise; the most similar one counts.
        gradient_checkpointing: compute activations again in the backward pass, which needs less memory.
        drawing: steps, guidance, scheduler, seed and precision; ``dtype`` of ``DTYPES`` is also that of the search.

    Raises:
        UsageError: naming a setting that is out of range.
    """

    start: str = "caption"
    learning_rate: float = 0.1
    max_steps: int = 200
    check_every: int = 10
    draws: int = 8
    images_per_check: int = 1
    gradient_checkpointing: bool = False
    drawing: Drawing = field(default_factory=Drawing)

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise UsageError(f"`start` {self.start}: must be one of {', '.join(STARTS)}")
        if self.drawing.dtype not in DTYPES:
            raise UsageError(f"`dtype` {self.drawing.dtype}: must be one of {', '.join(DTYPES)}")
        if not 0 < self.learning_rate <= 10:
            raise UsageError(f"`learning_rate` {self.learning_rate}: must be over 0 and at most 10")
        if self.check_every > self.max_steps:
            raise UsageError(f"`check_every` {self.check_every}: must be at most `max_steps`, {self.max_steps}")

    @property
    def checks(self) -> list[int]:
        """After how many steps images are drawn, from 0 to ``max_steps``."""
        return [*range(0, self.max_steps, self.check_every), self.max_steps]


@dataclass(frozen=True)
class Found:
    """How the search for one image went.

    similarities: to the image, of what was drawn at each of ``Search.checks``, up to the first over the threshold.
    steps: at which that was; None: at none. diverged: whether the search ended because its loss was no longer finite.
    first, best: what was drawn before the first step, and the most similar of all that were drawn.
    """

    similarities: list[float]
    steps: int | None
    diverged: bool
    first: Image.Image
    best: Image.Image


class TriggerSearch:
    """Searches a model, whose weights stay as they are.

    Args:
        opened: of a family that is told captions, see ``check_captions``.
        descriptor: of the similarity; threshold: over it an image counts as drawn.
    """

    def __init__(self, opened: Opened, descriptor: Descriptor, threshold: float, search: Search):
        assert isinstance(opened.family, LatentDiffusion)
        self.family, self.denoiser = opened.family, opened.denoiser
        self.objective = self.family.objective
        self.descriptor, self.threshold, self.search = descriptor, threshold, search
        with torch.no_grad():
            self.nothing = self.family.embeddings(self.family.unconditional())
        self.family.denoiser = opened.denoiser
        self.pipeline: Any = self.family.pipeline().to(self.family.device)
        if getattr(self.pipeline, "safety_checker", None) is not None:
            self.pipeline.safety_checker = None  # it would black out copies
        set_up(self.pipeline, search.drawing)
        if search.gradient_checkpointing:
            self.family.denoiser.enable_gradient_checkpointing()

    def __call__(self, pixels: torch.Tensor, text: str) -> Found:
        """Search for an image, uint8 (3, H, W), from what its caption says. All that is random follows from the seed of
        the settings and from the image, so that it is the same for all models, and whatever was searched for before.
        """
        target = self.descriptor(pixels[None])[0]
        similarities: list[float] = []
        first = best = Image.new("RGB", (1, 1))
        with torch.random.fork_rng(), frozen(self.denoiser):
            seed = seed_of(pixels, self.search.drawing.seed)
            torch.manual_seed(seed)
            encoded = self._encoded(pixels, text)
            embeddings, optimizer = self.prepare(encoded)
            for step in range(self.search.max_steps + 1):
                if step and not self.descend(encoded, embeddings, optimizer):
                    return Found(similarities, None, True, first, best)
                if step not in self.search.checks:
                    continue
                images = self.draw(embeddings, seed, pixels.shape[1:])
                found = self.descriptor(torch.stack([to_tensor(image) for image in images])) @ target
                place = int(found.argmax())
                if not similarities or found[place] > max(similarities):
                    best = images[place]
                first = first if similarities else images[place]
                similarities.append(found[place].item())
                if similarities[-1] > self.threshold:
                    return Found(similarities, step, False, first, best)
        return Found(similarities, None, False, first, best)

    def _autocast(self) -> torch.autocast:
        """Of the model's arithmetic, not of the descriptor's."""
        dtype = getattr(torch, self.search.drawing.dtype)
        return torch.autocast(self.family.device.type, dtype, enabled=dtype != torch.float32)

    def _encoded(self, pixels: torch.Tensor, text: str) -> Any:
        """The image as often as there are noise draws, encoded."""
        images = (pixels.float() / 127.5 - 1).expand(self.search.draws, *pixels.shape)
        with self._autocast():
            return self.objective.encode(self.family.batch(images, [text] * len(images)).to(self.family.device))

    def prepare(self, encoded: Any) -> tuple[Tensors, torch.optim.Optimizer]:
        """The embeddings to start from, tensors (1, ...), and what changes them."""
        told = {name: value[:1].float() for name, value in self.family.embeddings(encoded.condition).items()}
        starts = told
        if self.search.start == "empty":
            starts = self.nothing
        elif self.search.start == "noise":
            starts = {name: one.mean() + one.std() * torch.randn_like(one) for name, one in told.items()}
        embeddings = {name: one.detach().float().clone().requires_grad_() for name, one in starts.items()}
        rate = self.search.learning_rate
        groups = [{"params": [one], "lr": rate * told[name].std().item()} for name, one in embeddings.items()]
        return embeddings, torch.optim.Adam(groups)

    def descend(self, encoded: Any, embeddings: Tensors, optimizer: torch.optim.Optimizer) -> bool:
        """One step. Its noise and noise levels are drawn anew: the range of levels has as many equal parts as there are
        draws, and each draw has a level of its own part. Returns whether the loss is finite; nothing is changed if not.
        """
        draws, number = self.search.draws, self.objective.num_levels
        levels = ((torch.arange(draws) + torch.rand(draws)) / draws * number).long().clamp(max=number - 1)
        drawn = self.objective.at_levels(self.objective.draw(encoded), levels).told(embeddings)
        with self._autocast():
            loss = self.objective.losses(self.denoiser, drawn).mean()
        if not loss.isfinite():
            return False
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return True

    @torch.no_grad()
    def draw(self, embeddings: Tensors, seed: int, size: torch.Size) -> list[Image.Image]:
        """Images of a size (height, width) in pixels, from seeds that follow ``seed``."""
        number, drawing = self.search.images_per_check, self.search.drawing
        told = [
            {name: one.detach().expand(number, *one.shape[1:]) for name, one in each.items()}
            for each in (embeddings, self.nothing)
        ]
        with self._autocast():
            return self.pipeline(
                **self.family.in_place_of_prompt(*told),
                num_inference_steps=drawing.num_inference_steps,
                guidance_scale=drawing.guidance_scale,
                generator=[torch.Generator().manual_seed(seed + place) for place in range(number)],
                height=drawn_edge(size[0]),
                width=drawn_edge(size[1]),
            ).images


def seed_of(pixels: torch.Tensor, seed: int) -> int:
    """A seed, of 32 bits, from an image and a seed."""
    digest = hashlib.blake2b(f"{seed} ".encode() + pixels.numpy().tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def check_captions(target: Target) -> None:
    """Raise ``UsageError`` for a model that is told no captions."""
    if not issubclass(target.kind, LatentDiffusion):
        raise UsageError(
            f"`{target.setting}` {target.place}: is {target.kind.name.lower()}: there is no caption whose embedding "
            "could be changed"
        )
