"""One call of a mitigated pipeline, and one step of it."""

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import Any

import torch

from .base import PromptMitigation
from .denoisers import denoiser_of


class Step:
    """One call of the denoiser by the pipeline.

    Attributes:
        index: of the call, from 0.
        sample: the denoiser's input (2B or B, C, h, w).
        timestep: likewise: (), or of each row.
        inputs: the denoiser's other arguments.
        guided: whether there are 2B rows, the unconditional B first.
        conditional: the rows (slice) of the conditional branch.
    """

    def __init__(self, call: "Call", index: int, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.call, self.index, self.kind = call, index, call.kind
        self.sample, self.timestep, self.inputs = self.kind.arguments(args, kwargs)
        self.guided = call.pipeline.do_classifier_free_guidance
        self.conditional = slice(len(self.sample) // 2 if self.guided else 0, len(self.sample))

    @property
    def time(self) -> float:
        """The timestep, which is that of all rows."""
        return float(self.timestep.flatten()[0])

    @property
    def embeddings(self) -> torch.Tensor:
        """The conditional prompt embeddings (B, L, D): a view of the pipeline's own tensor, so that changes apply to
        all later steps and are seen by callbacks.
        """
        return self.inputs["encoder_hidden_states"][self.conditional]

    @property
    def pooled(self) -> torch.Tensor | None:
        """The pooled conditional prompt embeddings (B, D), also a view; None in models that have none."""
        pooled = self.kind.pooled_of(self.inputs)
        return None if pooled is None else pooled[self.conditional]

    def unpadded(self, values: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """``values`` where encoders computed ``embeddings`` of the same shape; 0 where the pipeline filled them up
        with zeros, which it does where encoders differ in width.
        """
        return values * (embeddings != 0) if self.kind.padded else values

    def predict_conditional(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The denoiser's output (B, C, h, w) with ``embeddings`` (B, L, D) in place of the prompt's."""
        return self._predict(self.conditional, slice(None), embeddings, None)

    def predict_unconditional(self) -> torch.Tensor:
        """The denoiser's output (B, C, h, w) for the negative prompt, or for the empty prompt where guidance is off."""
        if self.guided:
            rows = slice(0, self.conditional.start)
            return self._predict(rows, slice(0), self.inputs["encoder_hidden_states"][rows], None)
        embeddings, *pooled = self.call.unconditional
        return self._predict(slice(None), slice(0), embeddings, pooled[0] if pooled else None)

    def _predict(
        self, rows: slice, conditional: slice, embeddings: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        given = {**self.inputs, self.kind.sample: self.sample, "timestep": self.timestep}
        inputs = self.kind.with_prompt(_take(given, rows, len(self.sample)), embeddings, pooled)
        with self.call.apart(conditional):
            return self.call.denoiser(**{**inputs, "return_dict": False})[0]


def _repeats(kwargs: dict[str, Any]) -> bool:
    """Whether the denoiser is called a second time in a step: Stable Diffusion 3's skip-layer guidance."""
    return kwargs.get("skip_layers") is not None


def _take(value: Any, rows: slice, total: int) -> Any:
    """``rows`` of every tensor of ``total`` rows in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and len(value) == total else value
    if isinstance(value, dict):
        return {key: _take(part, rows, total) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(part, rows, total) for part in value)
    return value


class Call:
    """State of a mitigated pipeline during one call; a context manager that removes its hooks at the end.

    An image's seeds are derived from the state that its generator has when the call starts. No state is consumed, and
    an image with its own generator does not depend on its batch. Without generators one seed is drawn from torch's
    global generator when it is first needed.

    Args:
        pipeline: with ``mitigations``.
        generator: the call's argument: a ``torch.Generator``, a list of one for each image, or None.
    """

    def __init__(self, pipeline: Any, generator: Any):
        self.pipeline = pipeline
        self.kind = denoiser_of(pipeline)
        self.generators = generator if isinstance(generator, list) else [generator] if generator else []
        self.mitigations = [copy(mitigation) for mitigation in pipeline.mitigations]
        for position, mitigation in enumerate(self.mitigations):
            mitigation.call, mitigation.salt = self, f"{position}/{mitigation.name}"
        self.mitigations = [mitigation for mitigation in self.mitigations if mitigation.acts]
        self.states = [hashlib.sha256(g.get_state().numpy().tobytes()).digest() for g in self.generators]
        self.num_images = 0
        self.prompts: dict[str, list[str]] = {}  # of each image, by argument: prompt, prompt_2, prompt_3
        self.unconditional: Sequence[torch.Tensor] = ()
        self.conditional = slice(None)
        self.is_apart = False
        self.steps = 0
        self.step: Step | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> "Call":
        self.previous, self.pipeline.current_call = self.pipeline.current_call, self
        if self.mitigations:
            denoiser = self.denoiser
            try:
                for mitigation in self.mitigations:
                    self.handles += mitigation.attach(denoiser)
                self.handles.append(denoiser.register_forward_pre_hook(self._before_step, with_kwargs=True))
                self.handles.append(denoiser.register_forward_hook(self._after_step, with_kwargs=True))
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.pipeline.current_call = self.previous

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser, as the pipeline calls it."""
        return getattr(self.pipeline, self.kind.component)

    @cached_property
    def _drawn_state(self) -> bytes:
        return torch.randint(2**63 - 1, ()).numpy().tobytes()

    def seeds(self, salt: str) -> list[int]:
        """A 64-bit seed for each of the call's images; images that share a generator get different ones."""
        states = self.states or [self._drawn_state]
        owners = [id(generator) for generator in self.generators] or [0]
        uses: Counter = Counter()
        seeds = []
        for image in range(self.num_images):
            place = image % len(states)
            text = f"{salt}/{uses[owners[place]]}".encode()
            uses[owners[place]] += 1
            seeds.append(int.from_bytes(hashlib.sha256(text + states[place]).digest()[:8], "little"))
        return seeds

    def encode(self, encode_prompt: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, ...]:
        """The result of ``encode_prompt(**arguments)``, with the conditional embeddings of the rewritten prompts."""
        encoded = list(encode_prompt(**arguments))  # conditional and unconditional in turn, then the pooled ones
        self.num_images = len(encoded[0])
        others = {key: arguments.get(key) or None for key in ("prompt_2", "prompt_3")}
        given = {"prompt": arguments.get("prompt"), **others}
        self.prompts = {key: self._for_images(value) for key, value in given.items() if value is not None}
        if self._rewrite():
            again = {**arguments, **self.prompts, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            encoded[::2] = encode_prompt(**again)[::2]
        if not arguments.get("do_classifier_free_guidance", True) and any(m.compares for m in self.mitigations):
            nothing = {key: None for key in arguments if key.startswith("negative")}
            self.unconditional = encode_prompt(**{**arguments, **nothing, "do_classifier_free_guidance": True})[1::2]
        return tuple(encoded)

    def _for_images(self, prompts: str | Sequence[str]) -> list[str]:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return [prompt for prompt in prompts for _ in range(self.num_images // len(prompts))]

    def _rewrite(self) -> bool:
        """Rewrite the images' prompts, in the chain's order. Returns whether there was anything to rewrite."""
        rewriting = [mitigation for mitigation in self.mitigations if isinstance(mitigation, PromptMitigation)]
        if rewriting and not self.prompts:
            names = ", ".join(mitigation.name for mitigation in rewriting)
            warnings.warn(f"mitigation {names}: rewrites prompts, but prompt_embeds were given", stacklevel=7)
            return False
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        for mitigation in rewriting:
            for image, seed in enumerate(self.seeds(mitigation.salt)):
                rng = random.Random(seed)
                for prompts in self.prompts.values():
                    prompts[image] = mitigation.rewrite(prompts[image], tokenizer, rng)
        return bool(rewriting)

    @contextmanager
    def apart(self, conditional: slice) -> Iterator[None]:
        """Inside, the denoiser runs without the mitigations' hooks. conditional: rows of its input of that branch."""
        before = self.is_apart, self.conditional
        self.is_apart, self.conditional = True, conditional
        try:
            yield
        finally:
            self.is_apart, self.conditional = before

    def _before_step(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_apart:
            return None
        if _repeats(kwargs) and self.step is not None:  # with the same prompt, of which the pipeline kept a copy
            return args, self.kind.with_prompt(kwargs, self.step.embeddings, self.step.pooled)
        self.step = Step(self, self.steps, args, kwargs)
        self.conditional = self.step.conditional
        self.steps += 1
        for mitigation in self.mitigations:
            mitigation.before_step(self.step)
        return None

    def _after_step(self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.is_apart and not _repeats(kwargs):
            for mitigation in self.mitigations:
                mitigation.after_step(self.step, output[0])

    def guidance_scale(self, scale: Any) -> Any:
        """The guidance scale of the current step, by all mitigations of the chain."""
        for mitigation in self.mitigations if self.step is not None else ():
            scale = mitigation.guidance_scale(scale)
        return scale
