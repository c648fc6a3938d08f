"""Settings of a training script: a choice of groups, what they have in common, and what must agree between them."""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ..data.settings import DataSettings, ImageSettings, PriorSettings
from ..errors import UsageError
from ..families.settings import BaseModelSettings, CaptionSettings, ObjectiveSettings, PipelineSettings
from ..hub import Repository
from ..hub.repository import check_name, check_revision
from ..method.config import MitigationConfig
from ..settings import Resume, check_values, declared
from .groups import (
    HubSettings,
    LoraSettings,
    OptimizationSettings,
    PrivacySettings,
    RecordSettings,
    ValidationSettings,
)
from .monitor_settings import MonitorSettings


@dataclass(kw_only=True)
class RunSettings(
    PipelineSettings,
    ImageSettings,
    OptimizationSettings,
    PrivacySettings,
    MonitorSettings,
    RecordSettings,
    HubSettings,
):
    """What every script is told, and ``method``. A script's own class adds groups of its own, and names them all.

    Attributes:
        GROUPS: all groups of the script by their title on the command line.
        family: the name of the family that the base must be of; None: of any.
        prior_dir, prior_loss_weight: of a script that has prior preservation.
    """

    GROUPS: ClassVar[dict[str, type]]
    family: ClassVar[str | None] = None
    prompted: ClassVar[bool] = True  # whether the models draw what a prompt says
    schedule_counts_batches: ClassVar[bool] = False  # whether the learning rate's schedule is given in micro-batches
    method: MitigationConfig = field(default_factory=lambda: MitigationConfig.preset("iet-agc+"))
    prior_dir: str | None = field(default=None, init=False)
    prior_loss_weight: float | None = field(default=None, init=False)

    def __post_init__(self):
        if self.dataset_name is None and self.train_data_dir is None:
            raise UsageError("`dataset_name` or `train_data_dir` is needed")
        stores_commands = self.report_to == "wandb" or (self.report_to == "all" and find_spec("wandb"))
        if stores_commands and self.hub_token is not None:
            raise UsageError(
                f"`hub_token` with `report_to` {self.report_to} would store the token in the tracker: use `hf auth "
                "login` instead"
            )
        check_values(self)
        self._check_hub()
        for name in ("save_shards", "group_duplicates"):
            if getattr(self, name) and not self.method.shard_data:
                raise UsageError(f"`{name}`: without `shard_data` there are no shards; leave it out")
        if self.deduplicate_similarity is not None and self.deduplicate != "near":
            raise UsageError(
                f"`deduplicate_similarity` {self.deduplicate_similarity}: is for `deduplicate` near; give that too, or "
                "leave this out"
            )
        self._check_heldout()
        self._check_canary()
        if self.use_8bit_adam and self.fused_adam:
            raise UsageError("`fused_adam`: 8-bit Adam has kernels of its own; leave out this or `use_8bit_adam`")
        self._check_privacy()

    def _check_heldout(self):
        """Images that are held out need a purpose, and what is compared with them needs them."""
        if self.heldout_dir is not None and self.heldout_share is not None:
            raise UsageError("`heldout_dir` and `heldout_share` were both given: give one of them")
        if self.method.skip_false_rate and not self.holds_out:
            raise UsageError(
                f"`skip_false_rate` {self.method.skip_false_rate}: is of images that are not trained on; give their "
                "folder as `heldout_dir`, or a `heldout_share`"
            )
        self._check_monitor(self.holds_out)
        if self.holds_out and not (self.method.skip_false_rate or self.is_monitored):
            name = "heldout_dir" if self.heldout_share is None else "heldout_share"
            raise UsageError(
                f"`{name}` {getattr(self, name)}: is for `monitor_every`, `monitor_steps` and `skip_false_rate`; give "
                "one of them, or leave it out"
            )

    def _check_canary(self):
        if self.canary is None:
            if self.canary_border is not None:
                raise UsageError(
                    f"`canary_border` {self.canary_border}: is of canaries; give their number as `canary` too, or "
                    "leave this out"
                )
            return
        self.canary_border = self.canary_border or max(1, self.resolution // 16)
        if 4 * self.canary_border > self.resolution:
            raise UsageError(
                f"`canary_border` {self.canary_border}: must leave half of `resolution` {self.resolution} to the "
                f"picture; at most {self.resolution // 4}"
            )

    def _check_hub(self):
        """Names that the Hub would refuse when the training is done."""
        if not self.push_to_hub:
            for name, usual in (("hub_strategy", "end"), ("hub_revision", None)):
                if getattr(self, name) != usual:
                    raise UsageError(
                        f"`{name}` {getattr(self, name)}: is for `push_to_hub`; give that too, or leave this out"
                    )
            return
        if self.hub_model_id is not None:
            check_name(self.hub_model_id, "hub_model_id")
        else:
            try:
                check_name(self._repository_name, "output_dir")
            except UsageError as error:
                raise UsageError(f"{error}; give another as `hub_model_id`") from error
        check_revision(self.hub_revision, "hub_revision")

    @property
    def _repository_name(self):
        return self.hub_model_id or Path(self.output_dir).resolve().name

    @property
    def repository(self) -> Repository:
        """Where the result is uploaded."""
        return Repository(
            self._repository_name,
            self.hub_revision,
            self.hub_private_repo or None,  # None: as the account has it
            self.hub_token,
        )

    def _check_privacy(self):
        """DP-SGD accounts for samples that are judged by nothing but themselves, and opacus for plain layers."""
        if self.dp_noise_multiplier is None:
            for name in ("dp_max_grad_norm", "dp_delta"):
                if getattr(self, name) is not None:
                    raise UsageError(f"`{name}`: belongs to `dp_noise_multiplier`; give that too, or leave it out")
            return
        method = self.method
        if not (method.keeps_all and method.shard_data and method.redistribute_fraction == 0):
            raise UsageError(
                "`dp_noise_multiplier`: does not account for images that are skipped, augmented or moved because of "
                "others, or that several proxies see; give `mitigation` none or iet, and leave those flags out"
            )
        refused: dict[str, Any] = {"channels_last": False, "compile": False, "gradient_checkpointing": False}
        refused |= {"prior_dir": None, "train_text_encoder": False, "use_dora": False, "on_bad_sample": "error"}
        for name, usual in refused.items():
            if getattr(self, name, usual) != usual:
                raise UsageError(f"`{name}`: cannot be combined with `dp_noise_multiplier`; leave out one of the two")
        self.dp_max_grad_norm = self.dp_max_grad_norm or 1.0
        self.dp_delta = self.dp_delta or 1e-5

    @property
    def adapters(self) -> LoraSettings | None:
        """The settings of adapters, if adapters are trained."""
        return None

    @property
    def drawn(self) -> list[str]:
        """What validation draws along the training, as prompts; [] for nothing."""
        return []

    @property
    def validation(self) -> tuple[int, int]:
        """How many images are drawn for each of them, and every how many epochs."""
        return 0, 1

    @property
    def saved_every(self) -> int | None:
        """Every how many epochs the model of then is saved as a pipeline; None: never."""
        return None

    @property
    def ema_options(self) -> dict[str, Any]:
        """Options of ``EMAModel`` that the script's moving average has."""
        return {}

    def values(self) -> dict[str, Any]:
        """All effective values by flag, JSON- and YAML-ready, without secrets; the method's too."""
        shown = [entry.name for entry in declared(type(self)) if not entry.metadata["secret"]]
        return _plain({name: getattr(self, name) for name in shown}) | self.method.to_dict()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What each of the values is where nothing else is said and no preset says otherwise."""
        return _plain({entry.name: entry.default for entry in [*declared(cls), *declared(MitigationConfig)]})

    def shaping(self, resume: Resume) -> set[str]:
        """Names of the settings, the method's too, that a resumed run treats as ``resume`` says."""
        entries = [*declared(type(self)), *declared(MitigationConfig)]
        return {entry.name for entry in entries if entry.metadata["resume"] is resume}


@dataclass(kw_only=True)
class TrainingSettings(
    BaseModelSettings,
    DataSettings,
    PriorSettings,
    CaptionSettings,
    ObjectiveSettings,
    LoraSettings,
    ValidationSettings,
    RunSettings,
):
    """All that ``train_text_to_image_ietagc.py`` is told: every flag of Diffusers' script, ours, and ``method``."""

    GROUPS: ClassVar[dict[str, type]] = {
        "model": BaseModelSettings,
        "data": DataSettings,
        "prior preservation": PriorSettings,
        "captions": CaptionSettings,
        "training": OptimizationSettings,
        "differential privacy (DP-SGD)": PrivacySettings,
        "LoRA": LoraSettings,
        "objective": ObjectiveSettings,
        "monitor": MonitorSettings,
        "checkpoints and records": RecordSettings,
        "validation": ValidationSettings,
        "Hub": HubSettings,
    }

    def __post_init__(self):
        if self.pretrained_model_name_or_path is None:
            raise UsageError("`pretrained_model_name_or_path` is needed: a base model's folder or Hub id")
        super().__post_init__()
        self._check_lora()
        self._check_prior()
        if self.cache_latents is not None and not self.center_crop:
            raise UsageError(
                "`cache_latents`: without `center_crop` each visit crops the image at another place, and a cache holds "
                "one; set `center_crop`, or leave `cache_latents` out"
            )
        if self.cache_latents is not None and self.method.pixel_noise is not None:
            raise UsageError(
                "`pixel_noise`: each visit has another noise before the VAE, and `cache_latents` holds one encoding of "
                "an image; leave out one of the two"
            )
        if self.method.ambient_corruption is not None:
            raise UsageError(
                "`ambient_corruption`: hides pixels from models of pixels, which train_unconditional_ietagc.py trains; "
                "leave it out"
            )
        for name in ("noise_offset", "input_perturbation", "dream_training"):
            if self.method.noisy_data_sigma is not None and getattr(self, name):
                raise UsageError(
                    f"`noisy_data_sigma`: takes the noise to be standard normal, which `{name}` changes; leave out one "
                    "of the two"
                )
        if self.non_ema_revision is None:
            self.non_ema_revision = self.revision

    @property
    def adapters(self):
        return self if self.lora_rank is not None else None

    @property
    def drawn(self):
        return self.validation_prompts or []

    @property
    def validation(self):
        return self.num_validation_images, self.validation_epochs

    def _check_lora(self):
        if self.lora_rank is None:
            for entry in declared(LoraSettings):
                given = getattr(self, entry.name)
                given = tuple(given) if isinstance(given, list) else given
                if given != entry.default:
                    raise UsageError(f"`{entry.name}`: is for a LoRA; give `lora_rank` too, or leave it out")
            return
        several = self.method.num_shards > 1
        if self.use_ema:
            raise UsageError(
                "`use_ema`: the moving average of an adapter's factors is not that of the models, and there is no "
                "other for `lora_rank`; leave it out"
            )
        if self.use_dora and several:
            raise UsageError(
                f"`use_dora`: the mean of the models of `num_shards` {self.method.num_shards} is not a DoRA; give "
                "`num_shards` 1, or leave it out"
            )
        if self.scale_weight_norms is not None and self.use_dora:
            raise UsageError(
                "`scale_weight_norms`: DoRA's update is not the product that this limits; leave out this or `use_dora`"
            )
        if self.scale_weight_norms is not None and several and self.lora_average == "fold":
            raise UsageError(
                "`scale_weight_norms`: with `lora_average` fold the updates of all rounds add up, beyond any limit on "
                "each; give svd or concatenate, or leave it out"
            )
        if self.method.calibrate == "past":
            raise UsageError(
                "`calibrate` past: an adapter has a better reference, the model without it, which takes no memory; "
                "give base"
            )
        if self.method.calibrate == "base" and several and self.lora_average == "fold":
            raise UsageError(
                "`calibrate` base: with `lora_average` fold the base changes with every round; give svd or "
                "concatenate, or leave it out"
            )
        if self.train_text_encoder and self.method.embedding_noise:
            raise UsageError(
                "`embedding_noise`: is noise on embeddings that do not change, and `train_text_encoder` changes them; "
                "leave out one of the two"
            )
        if several and self.method.optimizer_state == "average":
            raise UsageError(
                "`optimizer_state` average: with `lora_rank` the mean has other factors than the proxies, so that "
                "moments do not fit them; give reset"
            )
        if several:  # for the same reason none are kept
            self.method = replace(self.method, optimizer_state="reset")
        self.lora_alpha = self.lora_alpha or float(self.lora_rank)

    def _check_prior(self):
        if self.prior_dir is None and self.prior_loss_weight is not None:
            raise UsageError(
                f"`prior_loss_weight` {self.prior_loss_weight}: weighs the pictures of `prior_dir`; give that too, or "
                "leave this out"
            )
        if self.prior_dir is not None and self.prior_loss_weight is None:
            self.prior_loss_weight = 1.0


def _plain(values):
    """The values as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
