"""The defaults of Diffusers' other training scripts, by which the same settings are theirs."""

from dataclasses import Field, dataclass, field
from typing import Any, ClassVar

from ..data.settings import ImageSettings
from ..errors import UsageError
from ..families.settings import UnconditionalModelSettings
from ..settings import Resume, at_least, declared, not_negative, setting
from .groups import HubSettings, OptimizationSettings, PrivacySettings, RecordSettings
from .monitor_settings import MonitorSettings
from .settings import RunSettings, TrainingSettings


def _default(name: str, value: Any, **about: Any) -> Any:
    """A setting of ``TrainingSettings`` with another default; ``about``: what else is declared otherwise."""
    entry: Field = next(entry for entry in declared(TrainingSettings) if entry.name == name)
    return field(default=value, metadata={**entry.metadata, **about})


@dataclass(kw_only=True)
class LoraScript(TrainingSettings):
    """``train_text_to_image_lora.py``."""

    family: ClassVar[str | None] = "Stable Diffusion"
    lora_rank: int | None = _default("lora_rank", 4)
    output_dir: str = _default("output_dir", "sd-model-finetuned-lora")
    validation_epochs: int = _default("validation_epochs", 1)
    num_validation_images: int = _default("num_validation_images", 4)


@dataclass(kw_only=True)
class SdxlScript(TrainingSettings):
    """``train_text_to_image_sdxl.py``."""

    family: ClassVar[str | None] = "Stable Diffusion XL"
    resolution: int = _default("resolution", 1024)
    output_dir: str = _default("output_dir", "sdxl-model-finetuned")
    validation_epochs: int = _default("validation_epochs", 1)
    num_validation_images: int = _default("num_validation_images", 4)
    tracker_project_name: str = _default("tracker_project_name", "text2image-fine-tune-sdxl")


@dataclass(kw_only=True)
class LoraSdxlScript(LoraScript):
    """``train_text_to_image_lora_sdxl.py``."""

    family: ClassVar[str | None] = "Stable Diffusion XL"
    resolution: int = _default("resolution", 1024)


@dataclass(kw_only=True)
class PreciseImageSettings(ImageSettings):
    """Images that may be shown in the precision of their files."""

    preserve_input_precision: bool = setting(
        False,
        "Show images of 16 or 32 bits in their precision, instead of converted to 8 bits; the first three channels.",
        resume=Resume.SAME,
        type=bool,
    )

    @property
    def decoding(self) -> str:
        return "stored" if self.preserve_input_precision else self.alpha


@dataclass(kw_only=True)
class EpochSettings:
    """What is drawn and saved along the training."""

    eval_batch_size: int = setting(
        16, "Images drawn for the tracker and the model card; 0 for none.", resume=Resume.FREE, type=int,
        **not_negative(),
    )  # fmt: skip
    save_images_epochs: int = setting(
        10,
        "Draw them every this many epochs (with several shards: after the next round).",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    save_model_epochs: int = setting(
        10,
        "Save the model of then every this many epochs (with several shards: after the next round), as a pipeline in "
        "--output_dir/unfinished, which the trained one replaces.",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    overwrite_output_dir: bool = setting(
        False,
        "Changes nothing, as in the official script: what another run left in --output_dir is always set aside.",
        resume=Resume.FREE,
        type=bool,
    )


@dataclass(kw_only=True)
class AverageSettings:
    """How fast the moving average of the weights follows: 1 - (1 + step / inv_gamma)^-power, at most max_decay."""

    ema_inv_gamma: float = setting(
        1.0,
        "Sets the decay of the moving average: at each step it is 1 - (1 + step / inv_gamma)^-power.",
        resume=Resume.SAME,
        type=float,
        check=lambda gamma: gamma > 0,
        wanted="over 0",
    )
    ema_power: float = setting(0.75, "See --ema_inv_gamma.", resume=Resume.SAME, type=float, **not_negative())
    ema_max_decay: float = setting(
        0.9999,
        "At most this much.",
        resume=Resume.SAME,
        type=float,
        check=lambda decay: 0 <= decay <= 1,
        wanted="in [0, 1]",
    )


@dataclass(kw_only=True)
class UnconditionalScript(
    UnconditionalModelSettings, PreciseImageSettings, AverageSettings, EpochSettings, RunSettings
):
    """``train_unconditional.py``."""

    GROUPS: ClassVar[dict[str, type]] = {
        "model": UnconditionalModelSettings,
        "data": PreciseImageSettings,
        "training": OptimizationSettings,
        "differential privacy (DP-SGD)": PrivacySettings,
        "moving average": AverageSettings,
        "monitor": MonitorSettings,
        "checkpoints and records": RecordSettings,
        "along the training": EpochSettings,
        "Hub": HubSettings,
    }
    family: ClassVar[str | None] = "Unconditional"
    prompted: ClassVar[bool] = False
    schedule_counts_batches: ClassVar[bool] = True
    pretrained_model_name_or_path: str = _default(
        "pretrained_model_name_or_path", None, help="Base model: a folder or a Hub id. Default: train from scratch."
    )
    output_dir: str = _default("output_dir", "ddpm-model-64")
    resolution: int = _default("resolution", 64)
    image_interpolation_mode: str = _default("image_interpolation_mode", "bilinear")
    num_train_epochs: int = _default("num_train_epochs", 100, aliases=("num_epochs",))
    lr_scheduler: str = _default("lr_scheduler", "cosine")
    adam_beta1: float = _default("adam_beta1", 0.95)
    adam_weight_decay: float = _default("adam_weight_decay", 1e-6)
    mixed_precision: str | None = _default("mixed_precision", "no")
    report_to: str = _default("report_to", "tensorboard", aliases=("logger",))
    tracker_project_name: str = _default("tracker_project_name", "train_unconditional")

    def __post_init__(self):
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            self.prediction_type = self.prediction_type or "epsilon"
            self.ddpm_num_steps = self.ddpm_num_steps or 1000
            self.ddpm_beta_schedule = self.ddpm_beta_schedule or "linear"
            if self.method.calibrate == "base":
                raise UsageError(
                    "`calibrate` base: a model that is trained from scratch has no base that could tell how difficult "
                    "an image is; give `calibrate` past, or `pretrained_model_name_or_path`"
                )
        elif self.model_config_name_or_path is not None:
            raise UsageError(
                "`model_config_name_or_path` and `pretrained_model_name_or_path` were both given: the first trains "
                "from scratch, the second from a base; give one of them"
            )
        elif self.weight_init != "diffusers":
            raise UsageError(
                f"`weight_init` {self.weight_init}: is for a model from scratch, and `pretrained_model_name_or_path` "
                "has weights; leave out one of the two"
            )
        self._check_classes()
        for name in ("caption_mitigation", "embedding_noise", "wen_threshold"):
            if getattr(self.method, name) is not None:
                raise UsageError(f"`{name}`: acts on captions, and an unconditional model has none; leave it out")

    def _check_classes(self):
        kind = self.class_labels
        if kind == "none" and self.num_classes is not None:
            raise UsageError(f"`num_classes` {self.num_classes}: give `class_labels` too, or leave this out")
        if kind == "column" and self.label_column is None:
            raise UsageError("`class_labels` column: give the column's name as `label_column`")
        if kind == "unique" and self.holds_out:
            raise UsageError(
                "`class_labels` unique: each class is a training image, and images that are held out (`heldout_dir`, "
                "`heldout_share`) have none; leave out one of the two"
            )
        if kind != "none" and self.num_classes is None and self.pretrained_model_name_or_path is None:
            raise UsageError(f"`class_labels` {kind}: say how many classes there are: `num_classes`")

    @property
    def drawn(self):
        """One prompt that says nothing, where someone will see the images."""
        return [""] if self.report_to != "none" or self.push_to_hub else []

    @property
    def validation(self):
        return self.eval_batch_size, self.save_images_epochs

    @property
    def saved_every(self):
        return self.save_model_epochs

    @property
    def ema_options(self):
        return {
            "decay": self.ema_max_decay,
            "use_ema_warmup": True,
            "inv_gamma": self.ema_inv_gamma,
            "power": self.ema_power,
        }


# Each script by the name that `ietagc train --script` and a benchmark's ``script`` have for it: it is
# train_NAME_ietagc.py.
SCRIPTS: dict[str, type[RunSettings]] = {
    "text_to_image": TrainingSettings,
    "text_to_image_lora": LoraScript,
    "text_to_image_sdxl": SdxlScript,
    "text_to_image_lora_sdxl": LoraSdxlScript,
    "unconditional": UnconditionalScript,
}
