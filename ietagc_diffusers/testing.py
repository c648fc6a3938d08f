"""Tiny pipelines of each kind of Stable Diffusion, made on the spot: the same classes and the same folder layout as the
real ones, a thousandth of their size.
"""

import json
import string
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .families import FAMILIES

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORD_START = "\u2581"  # of T5
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
    channels: tuple[int, ...] = (16, 32, 64), sample_size: int = 32, attention: bool = False, **more: Any
) -> AutoencoderKL:
    """An ``AutoencoderKL`` with 4 latent channels; each width after the first halves the resolution.

    With ``attention``, which every VAE of the real size has, latents lie in memory with their channels last.
    ``more``: of its config.
    """
    groups = min(8, channels[0])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        norm_num_groups=groups,
        sample_size=sample_size,
        mid_block_add_attention=attention,
        **more,
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


def build_t5_tokenizer(captions: Sequence[str]) -> T5Tokenizer:
    """A T5 tokenizer that knows the words of ``captions``; any other text falls back on characters."""
    words = sorted({word for caption in captions for word in caption.split()})
    characters = [WORD_START, *(string.digits + string.ascii_letters + string.punctuation)]
    pieces = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    pieces += [(WORD_START + word, -1.0) for word in words] + [(character, -10.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def build_t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5EncoderModel(config).eval()  # as it is loaded: without dropout


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


def random_sd3_pipeline(captions: Sequence[str], seed: int = 0) -> StableDiffusion3Pipeline:
    """The smallest Stable Diffusion 3: a transformer with joint attention, flow matching, two CLIP encoders and T5.

    As in the real one, the two CLIP encoders together are narrower than T5, and the pipeline fills up with zeros.
    """
    clip_widths, width, latent_channels, sample_size = (16, 8), 32, 16, 8
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, t5_tokenizer = build_tokenizer(captions, num_merges=32), build_t5_tokenizer(captions)
        clip, clip_2 = (build_text_encoder(tokenizer, w, kind=CLIPTextModelWithProjection) for w in clip_widths)
        vae = build_vae(
            (8, 8),
            sample_size=16,
            latent_channels=latent_channels,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
        transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=width,
            caption_projection_dim=16,
            pooled_projection_dim=sum(clip_widths),
            pos_embed_max_size=2 * sample_size,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=clip,
            tokenizer=tokenizer,
            text_encoder_2=clip_2,
            tokenizer_2=tokenizer,
            text_encoder_3=build_t5_encoder(t5_tokenizer, width),
            tokenizer_3=t5_tokenizer,
        )


def family_of_pipeline(pipeline: Any, **objective: Any) -> Any:
    """The family around a pipeline's parts, which it shares. ``objective``: options of its objective."""
    kind: Any = next(family for family in FAMILIES if type(pipeline) in family.pipelines)
    return kind.of_pipeline(pipeline, **objective)
