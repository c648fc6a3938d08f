"""Where in an image a fine-tuned model copies, shown by the model itself: where its predictions differ from those of
its base, told the same (the score difference of Kim and Lee, ICML 2026, with the base as the other model).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from ietagc_diffusers.training.fixed_losses import FixedLosses

from .image_sets import ImageSet, to_tensor
from .membership import Target, middles

DRAWS = 8  # noise levels, in the middle of as many equal parts
STRONG = 0.95  # quantile of a mask from which it is shown at full strength
DIMMED = 0.4  # how bright the rest is


@torch.no_grad()
def local_masks(
    model: Target,
    base: Target,
    images: torch.Tensor,
    prompts: Sequence[str],
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
) -> torch.Tensor:
    """How much the predictions of a model and of its base differ at each place of images that noise was added to: the
    mean over the noise levels of the squared difference, summed over the channels.

    Args:
        images: uint8 (N, 3, H, W); prompts: what both models are told of each.
        draws, seed: of the noise, which is the same for both models; each draw is at one level.
        batch_size: images at once; changes nothing else.

    Returns:
        float32 (N, h, w), of the latents' size. The values of different models or prediction types are on different
        scales.
    """
    ours, theirs = (
        _predictions(target, images, prompts, draws, seed, batch_size, device, name)
        for target, name in ((model, "Model"), (base, "Base"))
    )
    return (ours - theirs).square().sum(dim=2).mean(dim=0)


def _predictions(target, images, prompts, draws, seed, batch_size, device, name):
    """(draws, N, C, h, w) on the host; one model is in memory at a time."""
    with target.opened(device) as (family, denoiser):
        levels = middles(draws, family.objective.num_levels)
        fixed = FixedLosses(family, images, prompts, seed=seed, levels=levels)
        found: list[list[torch.Tensor]] = [[] for _ in levels]
        for draw, _, drawn in tqdm(fixed.drawn(), desc=f"{name}: local masks", total=fixed.num_batches):
            for some in torch.arange(len(drawn)).split(batch_size):
                prediction, *_ = family.objective.predict(denoiser, drawn[some])
                found[draw].append(prediction.float().cpu())
    return torch.stack([torch.cat(parts) for parts in found])


def overlay(image: Image.Image, mask: torch.Tensor) -> Image.Image:
    """The image in colour where the mask (h, w) is strong, and dimmed and grey where it is zero."""
    pixels = to_tensor(image).float()
    strong = mask.quantile(STRONG).clamp(min=torch.finfo().tiny)
    strength = F.interpolate((mask / strong).clamp(max=1)[None, None], pixels.shape[1:], mode="bilinear")[0]
    rest = DIMMED * pixels.mean(dim=0, keepdim=True)
    shown = strength * pixels + (1 - strength) * rest
    return TF.to_pil_image(shown.round().to(torch.uint8))


def write_masks(model: Target, base: Target, images: ImageSet, folder: Path, device: str = "cpu") -> None:
    """Write the overlay of each image, which was drawn for its text, into a folder under the image's name."""
    pictures = [images.image(place) for place in range(len(images))]
    prompts = [text or "" for text in images.texts]
    masks = local_masks(model, base, torch.stack([to_tensor(one) for one in pictures]), prompts, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture, mask in zip(images.names, pictures, masks, strict=True):
        overlay(picture, mask).save(folder / name)
