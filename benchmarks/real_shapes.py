"""Models of the shapes that people train, with random weights: for what is to be seen at real size.

    python -m benchmarks.real_shapes sd15 FOLDER    # a base to train from; GB in float32: sd15 4.3, sd21 5.2, sdxl 13.9

Nothing is downloaded. The tokenizer is a small one of our own: what it costs to train does not depend on the words.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ietagc_diffusers import testing

ATTENTION, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
# Of UNet2DConditionModel; what is not named has its default.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "down_block_types": (PLAIN, ATTENTION, ATTENTION),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# Width, layers and heads of each text encoder.
TEXTS = {"sd15": [(768, 12, 12)], "sd21": [(1024, 23, 16)], "sdxl": [(768, 12, 12), (1280, 32, 20)]}
NUM_TOKENS = 49408  # of CLIP


def vae() -> AutoencoderKL:
    """That of all three."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def text_encoder(
    width: int, layers: int, heads: int, kind: Callable[[CLIPTextConfig], Any] = CLIPTextModel, **tokens: int
) -> Any:
    """``tokens``: the numbers of the special ones, where they are not CLIP's."""
    config = CLIPTextConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **tokens,
    )
    return kind(config)


def pipeline(name: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A whole pipeline with random weights. ``name``: of ``UNETS``."""
    tokenizer = testing.build_tokenizer(["a photo of a thing"])
    tokens = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    unet, scheduler = UNet2DConditionModel(**UNETS[name]), testing.build_scheduler("epsilon")
    first = text_encoder(*TEXTS[name][0], **tokens)
    if name != "sdxl":
        return testing.assemble(vae(), first, tokenizer, unet, scheduler)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=first,
        text_encoder_2=text_encoder(*TEXTS[name][1], kind=CLIPTextModelWithProjection, **tokens),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=UNETS)
    parser.add_argument("folder")
    args = parser.parse_args()
    torch.manual_seed(0)
    pipeline(args.model).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
