"""Images for prompts, each from a seed of its own."""

import torch
from tqdm.auto import tqdm


@torch.no_grad()
def generate(pipeline, prompts, seeds, num_inference_steps=20, guidance_scale=3.0, batch_size=50, desc="Generating"):
    """One image a prompt. Each image's noise comes from its own seed, so that neither batch size nor order shows in it.

    Returns uint8 (N, 3, H, W).
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=desc):
        rows = slice(start, start + batch_size)
        result = pipeline(
            list(prompts[rows]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
            output_type="pt",
        ).images
        images.append((result.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(images)
