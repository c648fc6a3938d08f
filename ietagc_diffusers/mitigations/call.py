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


class Step:
    """One call of the UNet by the pipeline.

    Attributes:
        index: of the call, from 0.
        sample: the UNet's input (2B or B, C, h, w).
        timestep: likewise.
        inputs: the UNet's other arguments.
        guided: whether there are 2B rows, the unconditional B first.
        conditional: the rows (slice) of the conditional branch.
    """

    def __init__(self, call: "Call", index: int, sample: torch.Tensor, timestep: torch.Tensor, inputs: dict[str, Any]):
        self.call, self.index, self.sample, self.timestep, self.inputs = call, index, sample, timestep, inputs
        self.guided = call.pipeline.do_classifier_free_guidance
        self.conditional = slice(len(sample) // 2 if self.guided else 0, len(sample))

    @property
    def embeddings(self) -> torch.Tensor:
        """The conditional prompt embeddings (B, L, D): a view of the pipeline's own tensor, so that changes apply to
        all later steps and are seen by callbacks.
        """
        return self.inputs["encoder_hidden_states"][self.conditional]

    @property
    def pooled(self) -> torch.Tensor | None:
        """SDXL's pooled conditional prompt embeddings (B, D), also a view; None in other models."""
        added = self.inputs.get("added_cond_kwargs") or {}
        return added["text_embeds"][self.conditional] if "text_embeds" in added else None

    def predict_conditional(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The UNet's output (B, C, h, w) with ``embeddings`` (B, L, D) in place of the prompt's."""
        return self._predict(self.conditional, slice(None), {"encoder_hidden_states": embeddings})

    def predict_unconditional(self) -> torch.Tensor:
        """The UNet's output (B, C, h, w) for the negative prompt, or for the empty prompt where guidance is off."""
        if self.guided:
            return self._predict(slice(0, self.conditional.start), slice(0), {})
        embeddings, *pooled = self.call.unconditional
        replaced: dict[str, Any] = {"encoder_hidden_states": embeddings}
        if pooled:
            replaced["added_cond_kwargs"] = {**self.inputs["added_cond_kwargs"], "text_embeds": pooled[0]}
        return self._predict(slice(None), slice(0), replaced)

    def _predict(self, rows: slice, conditional: slice, replaced: dict[str, Any]) -> torch.Tensor:
        inputs = {**_take(self.inputs, rows, len(self.sample)), **replaced, "return_dict": False}
        with self.call.apart(conditional):
            return self.call.pipeline.unet(self.sample[rows], self.timestep, **inputs)[0]


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
        self.generators = generator if isinstance(generator, list) else [generator] if generator else []
        self.mitigations = [copy(mitigation) for mitigation in pipeline.mitigations]
        for position, mitigation in enumerate(self.mitigations):
            mitigation.call, mitigation.salt = self, f"{position}/{mitigation.name}"
        self.mitigations = [mitigation for mitigation in self.mitigations if mitigation.acts]
        self.states = [hashlib.sha256(g.get_state().numpy().tobytes()).digest() for g in self.generators]
        self.num_images = 0
        self.prompts: dict[str, list[str]] = {}  # of each image, by argument: prompt, and SDXL's prompt_2
        self.unconditional: Sequence[torch.Tensor] = ()
        self.conditional = slice(None)
        self.is_apart = False
        self.steps = 0
        self.step: Step | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> "Call":
        self.previous, self.pipeline.current_call = self.pipeline.current_call, self
        if self.mitigations:
            unet = self.pipeline.unet
            try:
                for mitigation in self.mitigations:
                    self.handles += mitigation.attach(unet)
                self.handles.append(unet.register_forward_pre_hook(self._before_unet, with_kwargs=True))
                self.handles.append(unet.register_forward_hook(self._after_unet))
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.pipeline.current_call = self.previous

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
        encoded = list(encode_prompt(**arguments))  # conditional and unconditional in turn, then SDXL's pooled ones
        self.num_images = len(encoded[0])
        given = {"prompt": arguments.get("prompt"), "prompt_2": arguments.get("prompt_2") or None}
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
        """Inside, the UNet runs without the mitigations' hooks. conditional: rows of its input of that branch."""
        before = self.is_apart, self.conditional
        self.is_apart, self.conditional = True, conditional
        try:
            yield
        finally:
            self.is_apart, self.conditional = before

    def _before_unet(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_apart:
            return
        sample, timestep = args
        self.step = Step(self, self.steps, sample, timestep, kwargs)
        self.conditional = self.step.conditional
        self.steps += 1
        for mitigation in self.mitigations:
            mitigation.before_unet(self.step)

    def _after_unet(self, unet: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self.is_apart:
            for mitigation in self.mitigations:
                mitigation.after_unet(self.step, output[0])

    def guidance_scale(self, scale: Any) -> Any:
        """The guidance scale of the current step, by all mitigations of the chain."""
        for mitigation in self.mitigations if self.step is not None else ():
            scale = mitigation.guidance_scale(scale)
        return scale
