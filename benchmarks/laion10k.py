"""What the paper's experiment on LAION-10k takes: operations by the models' shapes, hours by an assumed speed.

    python -m benchmarks.laion10k                  # a row for each step of docs/laion10k.md
    python -m benchmarks.laion10k --teraflops 150  # at another speed

Models are made on the meta device, where operations are counted and none is done. What is not counted: AdamW, data
loading, and the descriptors of the scores.
"""

import argparse
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from .cost import MODELS

VISITS = 200_000 * 8  # steps x batch, of the recipes
DRAWN, STEPS = 4000, 50  # images of a row, and denoising steps of an image, each with and without the prompt
AUGMENTED = 0.3  # share of the visits that are augmented; skipped ones, which save work, are not counted
# Forward passes of the UNet and of the VAE's encoder in a visit; a backward pass counts as two.
TRAININGS = {
    "none, mc, rc, cwr, agc, iet-agc": (3, 1),
    "wen: also a pass without the prompt": (4, 1),
    "iet-agc-taa, iet-agc+: also a pass that decides": (4, 1 + AUGMENTED),
}
# Trainings of each of these kinds, and rows of images, in configs/benchmark_laion10k.yaml.
TABLES = {"Table II": ((5, 1, 1), 11), "Tables II, IV, V and VI": ((6, 1, 3), 18)}


def operations(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Floating-point operations of a forward pass; an addition and a multiplication are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


def parts() -> dict[str, float]:
    """Operations of Stable Diffusion 2.1 at 256 pixels, for one image, in units of 10^12."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS["SD 2.1"][1])
        widths = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2}
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae = AutoencoderKL(**widths, **blocks)
        config = CLIPTextConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, vocab_size=49408
        )
        texts = CLIPTextModel(config)
        latents, tokens = torch.empty(1, 4, 32, 32), torch.zeros(1, 77, dtype=torch.long)
        found = {
            "UNet": operations(unet, latents, torch.zeros(1), torch.empty(1, 77, 1024)),
            "VAE encoder": operations(vae.encoder, torch.empty(1, 3, 256, 256)),
            "VAE decoder": operations(vae.decoder, latents),
            "text encoder": operations(texts, tokens),
        }
    return {name: count / 1e12 for name, count in found.items()}


def steps(one: dict[str, float]) -> Iterable[tuple[str, float]]:
    """(step, operations in units of 10^15)."""
    visits = [unet * one["UNet"] + vae * one["VAE encoder"] + one["text encoder"] for unet, vae in TRAININGS.values()]
    trainings = [VISITS * visit / 1e3 for visit in visits]
    images = DRAWN * (2 * STEPS * one["UNet"] + one["VAE decoder"]) / 1e3
    yield from ((f"a training: {name}", count) for name, count in zip(TRAININGS, trainings, strict=True))
    yield f"{DRAWN} images of a row", images
    for name, (numbers, rows) in TABLES.items():
        yield name, sum(number * count for number, count in zip(numbers, trainings, strict=True)) + rows * images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, default=40, help="10^12 operations a second; default: 40")
    speed = parser.parse_args().teraflops
    one = parts()
    print(f"10^12 operations for an image: {', '.join(f'{name} {count:.3f}' for name, count in one.items())}\n")
    print(f"| step | 10^15 operations | GPU hours at {speed:g} TFLOP/s |\n|---|---|---|")
    for name, count in steps(one):
        print(f"| {name} | {count:.0f} | {count / speed * 1e3 / 3600:.1f} |")


if __name__ == "__main__":
    main()
