"""A tiny Stable Diffusion, made on the spot: the same classes and the same folder layout as the real one, a thousandth
of its size.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .families import FAMILIES

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MAX_TOKENS = 77


def build_tokenizer(captions: Sequence[str], num_merges: int = 256) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from ``captions``; any other text falls back on bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + num_merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's own order: bytes, bytes that end a word, merges, the two special tokens.
    tokens = alphabet + [byte + WORD_END for byte in alphabet] + ["".join(merge) for merge in merges] + [BOS, EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_vae(
    channels: tuple[int, ...] = (16, 32, 64), sample_size: int = 32, attention: bool = False
) -> AutoencoderKL:
    """An ``AutoencoderKL`` with 4 latent channels; each width after the first halves the resolution.

    With ``attention``, which every VAE of the real size has, latents lie in memory with their channels last.
    """
    groups = min(8, channels[0])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        norm_num_groups=groups,
        sample_size=sample_size,
        mid_block_add_attention=attention,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 64, layers: int = 2, kind: type = CLIPTextModel) -> Any:
    """``kind``: ``CLIPTextModel``, or ``CLIPTextModelWithProjection`` as SDXL's second."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def build_unet(
    channels: tuple[int, ...] = (32, 64), sample_size: int = 8, text_width: int = 64, **more: Any
) -> UNet2DConditionModel:
    """A ``UNet2DConditionModel`` with cross attention at every resolution but the first; ``more``: of its config."""
    attention = [False] + [True] * (len(channels) - 1)
    return UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=min(16, channels[0] // 2),
        **more,
    )


def build_scheduler(prediction_type: str = "v_prediction") -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
    )


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def random_pipeline(
    captions: Sequence[str], seed: int = 0, prediction_type: str = "v_prediction", attention: bool = False
) -> StableDiffusionPipeline:
    """The smallest Stable Diffusion that the training code can tell from the real one: random weights, 16 px images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(captions, num_merges=32)
        return assemble(
            vae=build_vae((8, 8), sample_size=16, attention=attention),
            text_encoder=build_text_encoder(tokenizer, width=16, layers=1),
            tokenizer=tokenizer,
            unet=build_unet((8, 16), sample_size=8, text_width=16),
            scheduler=build_scheduler(prediction_type),
        )


def random_xl_pipeline(
    captions: Sequence[str], seed: int = 0, prediction_type: str = "epsilon"
) -> StableDiffusionXLPipeline:
    """The smallest Stable Diffusion XL: two text encoders, pooled embeddings and sizes as added conditions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(captions, num_merges=32)
        width, time_width = 16, 8
        return StableDiffusionXLPipeline(
            vae=build_vae((8, 8), sample_size=16),
            text_encoder=build_text_encoder(tokenizer, width),
            text_encoder_2=build_text_encoder(tokenizer, width, kind=CLIPTextModelWithProjection),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=build_unet(
                (8, 16),
                sample_size=8,
                text_width=2 * width,
                addition_embed_type="text_time",
                addition_time_embed_dim=time_width,
                projection_class_embeddings_input_dim=width + 6 * time_width,
            ),
            scheduler=build_scheduler(prediction_type),
        )


def family_of_pipeline(pipeline: Any, **objective: Any) -> Any:
    """The family around a pipeline's parts, which it shares. ``objective``: options of its objective."""
    kind: Any = next(family for family in FAMILIES if type(pipeline) in family.pipelines)
    return kind.of_pipeline(pipeline, **objective)
