"""Settings of the base model, of captions and of the objective."""

from dataclasses import dataclass

from ..settings import CacheSettings, Resume, not_negative, setting


@dataclass(kw_only=True)
class BaseModelSettings(CacheSettings):
    """The model that training starts from."""

    pretrained_model_name_or_path: str = setting(
        None, "Base model: a folder, a Hub id, or a whole checkpoint in a .safetensors file.", resume=Resume.SAME
    )
    model_config: str | None = setting(
        None,
        "For a base in a single file: folder or Hub id of a pipeline of the same kind, for its configuration and the "
        "parts that the file lacks. Default: the one that Diffusers has for the kind.",
        resume=Resume.FREE,
    )
    revision: str | None = setting(None, "Hub revision of the base model.", resume=Resume.SAME)
    non_ema_revision: str | None = setting(
        None,
        "Hub revision of only the trained module; deprecated upstream, use --variant=non_ema.",
        resume=Resume.SAME,
    )
    variant: str | None = setting(None, "Variant of the weight files, such as fp16.", resume=Resume.SAME)


@dataclass(kw_only=True)
class CaptionSettings:
    """Captions of the training rows."""

    caption_column: str = setting(
        "text",
        "Column that holds the caption, or a list of captions (one is drawn at each visit).",
        resume=Resume.SAME,
    )


@dataclass(kw_only=True)
class ObjectiveSettings:
    """The loss."""

    prediction_type: str | None = setting(
        None,
        "epsilon or v_prediction. Default: the base model's.",
        resume=Resume.SAME,
        choices=["epsilon", "v_prediction"],
    )
    snr_gamma: float | None = setting(None, "min-SNR loss weighting; 5.0 is usual.", resume=Resume.SAME, type=float)
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
