"""Draw the border around the inside of given images: what a model takes to belong there."""

from typing import Any

import torch

from ietagc_diffusers.families import bordered

from .membership import Opened


@torch.no_grad()
def outpaint(
    model: Opened,
    drawn: Any,
    images: torch.Tensor,
    border: int,
    steps: int = 50,
    guidance_scale: float = 3.0,
    remask_every: int = 10,
) -> torch.Tensor:
    """Images with the inside of ``images`` and the border that the model draws around it: float32 (B, 3, H, W) in
    [-1, 1].

    The border is drawn by DDIM without random steps (Song et al. 2021) from ``drawn.noise``. At each step the model
    says what it takes the noisy image to be, and the inside of that is replaced by the given one before the step is
    taken. Models of latents have no latents of the given inside with a border that is not known yet: these are encoded
    again every ``remask_every`` steps, from the inside with the border of then. A latent that has any pixel of the
    border counts as border.

    Args:
        drawn: the images with any border, and noise, as the model's objective draws them, see ``FixedLosses``.
        images: float32 (B, 3, H, W) in [-1, 1], of which only the inside counts.
        border: its width in pixels.
        steps: noise levels, evenly spread.
        guidance_scale: classifier-free guidance by the caption; 1 is without, and so are models without captions.
    """
    objective: Any = model.family.objective
    nothing = model.family.unconditional() if guidance_scale != 1 else {}
    path = _path(objective, drawn, steps)
    cells = -(-border * drawn.clean.shape[-1] // images.shape[-1])
    noisy, known, painted = drawn.noise.float(), drawn.clean.float(), images
    for number, level in enumerate(path):
        here = _at(objective, drawn, level)
        clean = objective.denoised(model.denoiser, noisy, here)
        if nothing:
            without = objective.denoised(model.denoiser, noisy, here.told(nothing))
            clean = without + guidance_scale * (clean - without)
        last = number == steps - 1
        if number % remask_every == 0 or last:
            painted = torch.where(_outside(images, border), objective.decoded(clean).clamp(-1, 1), images)
        if last:
            break
        if number % remask_every == 0:
            known = objective.with_images(drawn, list(range(len(drawn))), painted).clean.float()
        clean = torch.where(_outside(clean, cells), clean, known)
        signal, spread = _scales(objective, here)
        next_signal, next_spread = _scales(objective, _at(objective, drawn, path[number + 1]))
        noisy = next_signal * clean + next_spread * (noisy - signal * clean) / spread
    return painted


def border_level(images: torch.Tensor, border: int) -> torch.Tensor:
    """The mean of the border's pixels, float64 (B,): of images in [-1, 1], as 0 (black) to 1 (white)."""
    outside = _outside(images, border)
    return (images[..., outside].double().mean(dim=(1, 2)) + 1) / 2


def _outside(images: torch.Tensor, width: int) -> torch.Tensor:
    """Whether a place is in the border: bool (H, W)."""
    nothing = torch.zeros(images.shape[-2:], device=images.device)
    return bordered(nothing, 1.0, width) > 0


def _path(objective: Any, drawn: Any, steps: int) -> list[int]:
    """Noise levels, evenly spread over the range, from the most noise."""
    levels = torch.linspace(0, objective.num_levels - 1, steps).round().long().tolist()
    return sorted(levels, key=lambda level: -_scales(objective, _at(objective, drawn[:1], level))[1].item())


def _at(objective: Any, drawn: Any, level: int) -> Any:
    return objective.at_levels(drawn, torch.full((len(drawn),), level))


def _scales(objective: Any, drawn: Any) -> list[torch.Tensor]:
    """Signal and noise at the level of ``drawn``, float32 (B, 1, 1, 1)."""
    return [scale.float()[:, None, None, None] for scale in objective.scales(drawn)]
