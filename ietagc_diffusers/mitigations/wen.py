"""Text-conditional noise (Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", 2024):
its magnitude, and prompt embeddings optimised for a smaller one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ..errors import UsageError
from .base import Mitigation, non_negative, option, real, whole
from .call import Step
from .pipeline import with_mitigation


def noise_magnitude(conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
    """||eps_c - eps_u|| of each image: predictions (B, C, h, w) -> (B,) float32.

    The predictions are the denoiser's unchanged output, noise or velocity, as in the authors' code.
    """
    return (conditional - unconditional).float().flatten(1).norm(dim=1)


def optimise_embeddings(
    predict: Callable[[torch.Tensor], torch.Tensor],
    embeddings: torch.Tensor,
    unconditional: torch.Tensor,
    steps: int = 10,
    lr: float = 0.05,
    target_loss: float = 3.0,
) -> torch.Tensor:
    """Lower the text-conditional noise of each image by AdamW on its prompt embedding, all tokens except the first.

    An image stops before the first step at which its magnitude is at or below ``target_loss``. Each has its own loss,
    so that it does not depend on the others in the batch. The arithmetic is in float32, whatever the model's dtype. For
    one image this is the authors' ``aug_prompt``, except that their weight decay also acts on the first token; in their
    code several images of a prompt share an embedding and one norm.

    Args:
        predict: differentiable, (B, L, D) embeddings -> (B, C, h, w) prediction.
        embeddings: (B, L, D).
        unconditional: (B, C, h, w), the prediction to come closer to.
        steps, lr: at most ``steps`` steps of AdamW with torch's default weight decay, as in the authors' code.
        target_loss: in units of the norm, hence for latents of one size.

    Returns:
        (B, L, D), the dtype of ``embeddings``; its first token is unchanged.
    """
    first, rest = embeddings.detach()[:, :1], embeddings.detach()[:, 1:].to(torch.float32, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([rest], lr=lr)
    for _ in range(steps):
        losses = noise_magnitude(predict(torch.cat([first, rest.to(first.dtype)], dim=1)), unconditional)
        active = losses.detach() > target_loss
        if not active.any():
            break
        (rest.grad,) = torch.autograd.grad(losses.sum(), [rest])
        before = rest.detach().clone()
        optimizer.step()
        with torch.no_grad():
            rest.copy_(torch.where(active[:, None, None], rest, before))
    return torch.cat([first, rest.detach().to(first.dtype)], dim=1)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Inside, parameters need no gradient, which saves the memory of their activations."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass
class OptimisedPrompt(Mitigation):
    """Wen: optimise the prompt's embedding so that the text-conditional noise at the first step falls to a target.

    Where guidance is off, the noise is measured against the empty prompt. Pooled embeddings (SDXL, Stable Diffusion 3)
    are not changed, nor are zeros that the pipeline fills up with. Costs up to ``steps`` forward and backward passes of
    the denoiser.
    """

    name: ClassVar[str] = "wen"
    compares: ClassVar[bool] = True
    steps: int = option(10, "Optimisation steps at most.", whole)
    lr: float = option(0.05, "Learning rate of AdamW.", non_negative)
    target_loss: float = option(3.0, "Stop at this text-conditional noise (a norm over latents of 4x64x64).", real)
    target_step: int = option(0, "Denoising step at which the noise is measured.", whole)

    @property
    def acts(self) -> bool:
        return self.steps > 0

    def before_step(self, step: Step) -> None:
        if step.index == 0 and self.target_step >= self.call.pipeline.num_timesteps:
            raise UsageError(
                f"mitigation wen: `target_step` {self.target_step}: must be below the number of denoising steps, "
                f"{self.call.pipeline.num_timesteps}"
            )
        if step.index != self.target_step:
            return
        with torch.inference_mode(False), frozen(self.call.denoiser):
            given = step.embeddings.clone()  # autograd cannot save tensors of inference mode
            with torch.no_grad():
                unconditional = step.predict_unconditional()
            with torch.enable_grad():
                optimised = optimise_embeddings(
                    lambda embeddings: step.predict_conditional(step.unpadded(embeddings, given)),
                    given,
                    unconditional,
                    self.steps,
                    self.lr,
                    self.target_loss,
                )
        step.embeddings.copy_(optimised)


class TextConditionalNoise(NamedTuple):
    """magnitude: (N,) float32, the mean over steps; per_step: (N, steps) float32. Both on the host."""

    magnitude: torch.Tensor
    per_step: torch.Tensor


@dataclass
class NoiseMeter(Mitigation):
    """Records the text-conditional noise of all images at every step in ``magnitudes``, which its copies share."""

    name: ClassVar[str] = "noise meter"

    def __post_init__(self) -> None:
        self.magnitudes: list[torch.Tensor] = []

    def after_step(self, step: Step, prediction: torch.Tensor) -> None:
        unconditional, conditional = prediction.chunk(2)
        self.magnitudes.append(noise_magnitude(conditional, unconditional).cpu())


def text_conditional_noise(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int = 50,
    steps: int = 1,
    guidance_scale: float = 7.5,
    batch_size: int = 16,
    resolution: int | None = None,
) -> TextConditionalNoise:
    """The magnitude of Wen et al.'s detector for each prompt: ||eps_c - eps_u|| over the first steps of generation.

    It is large where the model follows a memorized prompt. Generation ends after ``steps`` steps; nothing is decoded.

    Args:
        pipeline: Stable Diffusion 1.x, 2.x, XL or 3; a mitigated one is measured with its mitigations.
        prompts: N prompts. Repeat a prompt with other seeds for a mean over generations (the authors take 4).
        seeds: N seeds, one for each prompt, of the noise that its generation starts from.
        num_inference_steps: of the whole generation, which sets the timesteps.
        steps: how many of them to measure, 1 to ``num_inference_steps``.
        guidance_scale: over 1; steps after the first depend on it.
        batch_size: prompts at once.
        resolution: height and width of the images in pixels; None is the pipeline's own.

    Raises:
        UsageError: naming a number that is out of range.
    """
    if len(prompts) != len(seeds):
        raise UsageError(f"{len(prompts)} `prompts` and {len(seeds)} `seeds`: give one seed for each prompt")
    if not 1 <= steps <= num_inference_steps:
        raise UsageError(f"`steps` {steps}: must be in 1 to `num_inference_steps`, {num_inference_steps}")
    if not guidance_scale > 1:
        raise UsageError(f"`guidance_scale` {guidance_scale}: must be over 1, or there is no unconditional branch")
    if resolution is not None and (resolution < 8 or resolution % 8):
        raise UsageError(f"`resolution` {resolution}: must be a multiple of 8")

    def stop(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = index + 1 >= steps
        return {}

    measured = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        meter = NoiseMeter()
        metered = with_mitigation(pipeline, meter)
        metered.set_progress_bar_config(disable=True)
        metered(
            list(prompts[rows]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
            output_type="latent",
            callback_on_step_end=stop,
        )
        measured.append(torch.stack(meter.magnitudes, dim=1))
    per_step = torch.cat(measured) if measured else torch.zeros(0, steps)
    return TextConditionalNoise(per_step.mean(dim=1), per_step)
