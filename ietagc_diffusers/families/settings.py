"""Settings of the base model, of captions and of the objective."""

import math
from dataclasses import dataclass

from ..settings import CacheSettings, Resume, at_least, not_negative, setting


@dataclass(kw_only=True)
class PipelineSettings(CacheSettings):
    """The pipeline that training starts from."""

    pretrained_model_name_or_path: str = setting(
        None, "Base model: a folder, a Hub id, or a whole checkpoint in a .safetensors file.", resume=Resume.SAME
    )
    revision: str | None = setting(None, "Hub revision of the base model.", resume=Resume.SAME)
    variant: str | None = setting(None, "Variant of the weight files, such as fp16.", resume=Resume.SAME)


@dataclass(kw_only=True)
class BaseModelSettings(PipelineSettings):
    """The same of text-to-image models."""

    model_config: str | None = setting(
        None,
        "For a base in a single file: folder or Hub id of a pipeline of the same kind, for its configuration and the "
        "parts that the file lacks. Default: the one that Diffusers has for the kind.",
        resume=Resume.FREE,
    )
    non_ema_revision: str | None = setting(
        None,
        "Hub revision of only the trained module; deprecated upstream, use --variant=non_ema.",
        resume=Resume.SAME,
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "Another VAE than the base model's: a folder or a Hub id. A LoRA of Stable Diffusion XL "
        "in half precision takes one that does not overflow; without it the VAE works in float32.",
        resume=Resume.SAME,
    )
    max_sequence_length: int = setting(
        77,
        "Tokens of a caption for T5, or zeros where a base has no T5 (Stable Diffusion 3); at most 512.",
        resume=Resume.SAME,
        type=int,
        check=lambda length: 1 <= length <= 512,  # what the pipeline takes
        wanted="in [1, 512]",
    )


@dataclass(kw_only=True)
class UnconditionalModelSettings(PipelineSettings):
    """A model of pixels, from scratch or from a base."""

    model_config_name_or_path: str | None = setting(
        None,
        "Train from scratch a UNet of this configuration: a folder with a config.json, such a file, a Hub id, or one "
        "of the package's: unet_ddpm_32 (DDPM's for CIFAR-10), unet_ddpm_64 (the same with a fifth level), unet_emm_32 "
        "(like Gu et al.'s). Default, without a base: the official script's UNet.",
        resume=Resume.SAME,
    )
    weight_init: str = setting(
        "diffusers",
        "First weights of a UNet from scratch: as Diffusers draws them, as the official script does, or 'ddpm': Xavier "
        "uniform, biases zero, and almost zero where a residual block and the UNet end.",
        resume=Resume.SAME,
        choices=["diffusers", "ddpm"],
    )
    prediction_type: str | None = setting(
        None,
        "What the model predicts: epsilon (the noise) or sample (the image). Default: epsilon, or what the base does.",
        resume=Resume.SAME,
        choices=["epsilon", "sample"],
    )
    ddpm_num_steps: int | None = setting(
        None, "Noise levels. Default: 1000, or the base's.", resume=Resume.FIXED, type=int, **at_least(1)
    )
    ddpm_beta_schedule: str | None = setting(
        None,
        "How noise grows over them: linear, scaled_linear, squaredcos_cap_v2, sigmoid. Default: linear, or the base's.",
        resume=Resume.SAME,
        choices=["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
    )
    ddpm_num_inference_steps: int = setting(
        1000,
        "Steps in which images are drawn along the training; at most --ddpm_num_steps are taken.",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    class_labels: str = setting(
        "none",
        "Tell the model a class of each image: of --label_column (column), drawn once for each image (random), or "
        "another for each image (unique).",
        resume=Resume.FIXED,
        choices=["none", "column", "random", "unique"],
    )
    num_classes: int | None = setting(
        None,
        "How many classes there are: labels are 0 to --num_classes - 1. Default: as the base has them.",
        resume=Resume.FIXED,
        type=int,
        **at_least(1),
    )


@dataclass(kw_only=True)
class CaptionSettings:
    """Captions of the training rows."""

    caption_column: str = setting(
        "text",
        "Column that holds the caption, or a list of captions (one is drawn at each visit).",
        resume=Resume.SAME,
    )
    caption_dropout: float = setting(
        0.0,
        "Share of the visits at which the caption is left empty.",
        resume=Resume.SAME,
        type=float,
        aliases=["proportion_empty_prompts"],
        check=lambda share: 0 <= share <= 1,
        wanted="in [0, 1]",
    )


@dataclass(kw_only=True)
class ObjectiveSettings:
    """The loss."""

    prediction_type: str | None = setting(
        None,
        "epsilon, v_prediction, or with Stable Diffusion XL sample. Default: the base model's.",
        resume=Resume.SAME,
        choices=["epsilon", "v_prediction", "sample"],
    )
    snr_gamma: float | None = setting(
        None,
        "min-SNR loss weighting; 5.0 is usual.",
        resume=Resume.SAME,
        type=float,
        check=lambda gamma: gamma > 0,  # at 0 nothing is trained, below it the loss grows
        wanted="over 0",
    )
    noise_offset: float = setting(0.0, "Scale of the noise offset.", resume=Resume.SAME, type=float, **not_negative())
    input_perturbation: float = setting(
        0.0, "Scale of input perturbation; 0.1 is usual.", resume=Resume.SAME, type=float, **not_negative()
    )
    dream_training: bool = setting(
        False, "DREAM (epsilon prediction only): one more forward pass per step.", resume=Resume.SAME, type=bool
    )
    dream_detail_preservation: float = setting(
        1.0, "DREAM's p, over 0.", resume=Resume.SAME, type=float, check=lambda p: p > 0, wanted="over 0"
    )
    timestep_bias_strategy: str = setting(
        "none",
        "Draw the first (earlier) or last (later) --timestep_bias_portion of the timesteps, or those from "
        "--timestep_bias_begin to --timestep_bias_end (range), --timestep_bias_multiplier times as often.",
        resume=Resume.SAME,
        choices=["earlier", "later", "range", "none"],
    )
    timestep_bias_multiplier: float = setting(
        1.0,
        "How many times as often.",
        resume=Resume.SAME,
        type=float,
        check=lambda times: times > 0,
        wanted="over 0",
    )
    timestep_bias_begin: int = setting(
        0, "First timestep of the range.", resume=Resume.SAME, type=int, **not_negative()
    )
    timestep_bias_end: int = setting(
        1000, "End of the range: the timestep after its last.", resume=Resume.SAME, type=int, **at_least(1)
    )
    timestep_bias_portion: float = setting(
        0.25,
        "Share of the timesteps.",
        resume=Resume.SAME,
        type=float,
        check=lambda share: 0 <= share <= 1,
        wanted="in [0, 1]",
    )
    weighting_scheme: str = setting(
        "logit_normal",
        "Stable Diffusion 3: how noise levels are drawn (logit_normal, mode; otherwise uniformly) and losses weighted "
        "(sigma_sqrt, cosmap).",
        resume=Resume.SAME,
        choices=["logit_normal", "mode", "sigma_sqrt", "cosmap", "none"],
    )
    logit_mean: float = setting(
        0.0, "Mean of logit_normal.", resume=Resume.SAME, type=float, check=math.isfinite, wanted="finite"
    )
    logit_std: float = setting(
        1.0,
        "Standard deviation of logit_normal.",
        resume=Resume.SAME,
        type=float,
        check=lambda deviation: 0 < deviation < math.inf,
        wanted="over 0, and finite",
    )
    mode_scale: float = setting(
        1.29,
        "Scale of the scheme mode.",
        resume=Resume.SAME,
        type=float,
        check=lambda scale: -1 <= scale <= 2 / (math.pi - 2),
        wanted="in [-1, 1.75], where the scheme is defined",
    )
    precondition_outputs: int = setting(
        1,
        "Stable Diffusion 3: 1 weighs losses by the squared noise level, 0 does not.",
        resume=Resume.SAME,
        type=int,
        choices=[0, 1],
    )
