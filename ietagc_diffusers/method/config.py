"""The method's numbers, in one validated place: ``MitigationConfig``."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError
from ..settings import Resume, at_least, check_values, setting
from .presets import DEFAULT_PRESET, PRESETS

DEFAULT_ROUNDS = 25  # the paper's LAION-10k run
VISITS_PER_BUCKET = 100
MIN_BUCKETS = 10
CAPTION_PROBABILITY = 0.1  # Somepalli et al.'s, for all but MC, which has none
FURTHER_CORRUPTION = 0.1  # of Ambient Diffusion


def bank_buckets(value: str) -> int | str:
    """Parse a number of buckets, or ``auto``."""
    return value if value == "auto" else int(value)


POSITIVE: dict[str, Any] = {"check": lambda value: 0 < value < math.inf, "wanted": "over 0, and finite"}
SHARE: dict[str, Any] = {"check": lambda value: 0 <= value <= 1, "wanted": "in [0, 1]"}


@dataclass(frozen=True)
class MitigationConfig:
    """The numbers of the method, each field a flag of the same name.

    Construct it with ``MitigationConfig.preset(name, **overrides)``. Raises ``UsageError`` naming the setting when a
    value is out of range.
    """

    mitigation: str = setting(
        DEFAULT_PRESET,
        "Preset for the flags below: the rows of the paper's Table IV, and (beyond the paper) three with --calibrate.",
        resume=Resume.SAME,
        choices=PRESETS,
    )
    num_shards: int = setting(
        1,
        "K: parts of the training set; each trains one proxy.",
        resume=Resume.FIXED,
        type=int,
        **at_least(1),
    )
    shard_data: bool = setting(
        True,
        "Give each proxy a shard of its own; off: each trains on all data, in its own order, so that averaging can be "
        "told apart from sharding. Redistribution has no meaning then, and is off.",
        resume=Resume.FIXED,
        type=bool,
    )
    epochs_per_round: int | None = setting(
        None,
        "E: epochs a proxy trains on its shard (or on all data, see --shard_data) before the proxies are averaged. "
        f"Default: {DEFAULT_ROUNDS} rounds, or as many as a proxy has steps.",
        resume=Resume.FIXED,
        type=int,
        **at_least(1),
    )
    steps_per_round: int | None = setting(
        None,
        "Steps that each proxy takes in a round, instead of --epochs_per_round.",
        resume=Resume.FIXED,
        type=int,
        **at_least(1),
    )
    bank_decay: float = setting(
        0.8,
        "eta: decay of the memory bank's moving average (eq. 3).",
        resume=Resume.SAME,
        type=float,
        check=lambda value: 0 <= value < 1,
        wanted="in [0, 1)",
    )
    bank_bias_correction: bool = setting(
        True,
        "Divide a bank entry by 1 - eta^n after n visits; off is the paper's literal zero-initialised bank.",
        resume=Resume.SAME,
        type=bool,
    )
    bank_buckets: int | str = setting(
        "auto",
        f"Timestep buckets of the memory bank. 'auto' gives each about {VISITS_PER_BUCKET} visits per shard.",
        resume=Resume.FIXED,
        type=bank_buckets,
        check=lambda value: value == "auto" or value >= 1,
        wanted="at least 1, or 'auto'",
    )
    skip_threshold: float = setting(
        0.0,
        "lambda: skip samples whose loss ratio is below it; 0 turns AGC off (eq. 8).",
        resume=Resume.SAME,
        type=float,
        check=lambda value: 0 <= value <= 1,
        wanted="in [0, 1]; the paper uses 0.5 to 0.8",
    )
    skip_rate: float = setting(
        0.0,
        "Instead of --skip_threshold: skip about this share of the samples, those with the lowest loss ratios at their "
        "noise level. lambda is then the quantile of the latest ratios there.",
        resume=Resume.FIXED,
        type=float,
        check=lambda value: 0 <= value < 1,
        wanted="in [0, 1)",
    )
    skip_false_rate: float = setting(
        0.0,
        "Instead of --skip_threshold: skip what is as abnormal as this share of images that are never trained on "
        "(--heldout_dir, --heldout_share). lambda is the quantile of their latest loss ratios at the noise level.",
        resume=Resume.FIXED,
        type=float,
        check=lambda value: 0 <= value < 1,
        wanted="in [0, 1)",
    )
    calibrate: str = setting(
        "none",
        "'base' divides each loss by the base model's on the same noisy image before it is compared, so that images "
        "are judged by what was learned of them and not by how simple they are. 'past' takes for the base the model "
        "that the run itself had after a quarter to a half of its steps so far: for training from scratch. One more "
        "forward pass per step; where all weights are trained, a copy of the other model is kept on the device.",
        resume=Resume.FIXED,
        choices=["none", "base", "past"],
    )
    augment_range: float = setting(
        1.0,
        "R: augment kept samples whose loss ratio is below R * lambda ('inf' allowed); 1 turns TAA off (eq. 5).",
        resume=Resume.SAME,
        type=float,
        check=lambda value: value >= 1,
        wanted="over 1 (or 1 to turn TAA off)",
    )
    augment_decay: float = setting(
        5.0,
        "A: augmentation strength is exp(-A |r - lambda| / lambda) (eq. 7).",
        resume=Resume.SAME,
        type=float,
        **at_least(0),
    )
    randaugment_magnitude: int = setting(
        5,
        "M: RandAugment magnitude (0 to 30) at strength 1.",
        resume=Resume.SAME,
        type=int,
        check=lambda value: 0 <= value <= 30,
        wanted="in 0 to 30",
    )
    randaugment_num_ops: int = setting(
        2, "RandAugment operations per augmented image.", resume=Resume.SAME, type=int, **at_least(1)
    )
    randaugment_operations: str = setting(
        "all",
        "'all' of torchvision's; 'graded' leaves out those whose effect does not grow with the magnitude.",
        resume=Resume.SAME,
        choices=["all", "graded"],
    )
    redistribute_fraction: float = setting(
        0.0,
        "P: share of a shard, most skipped first, that moves to the next after a round; 0 turns MSR off (eq. 10).",
        resume=Resume.SAME,
        type=float,
        **SHARE,
    )
    redistribute_mode: str = setting(
        "move",
        "'move' keeps the shards' sizes; 'copy' is the literal union of eq. 11.",
        resume=Resume.SAME,
        choices=["move", "copy"],
    )
    redistribute_by: str = setting(
        "skips",
        "Which samples are redistributed: the most skipped ones, or 'random' ones (Table V).",
        resume=Resume.SAME,
        choices=["skips", "random"],
    )
    redistribute_counts: str = setting(
        "decayed",
        "Skip counts by which samples are redistributed: of this 'round' (eq. 10), of all rounds with earlier ones "
        "'decayed', or the 'total'.",
        resume=Resume.SAME,
        choices=["round", "decayed", "total"],
    )
    optimizer_state: str = setting(
        "keep",
        "Adam's moments after a round: each proxy keeps its own, all start from their average, or from zero (reset). "
        "The last two need room for one state instead of one a shard.",
        resume=Resume.SAME,
        choices=["keep", "average", "reset"],
    )
    random_skip_rate: float = setting(
        0.0,
        "Control experiment: skip this share of samples at random instead of by loss.",
        resume=Resume.SAME,
        type=float,
        check=lambda value: 0 <= value < 1,
        wanted="in [0, 1)",
    )
    random_augment_rate: float = setting(
        0.0,
        "Control experiment: augment this share of samples at random instead of by loss.",
        resume=Resume.SAME,
        type=float,
        **SHARE,
    )
    random_augment_strength: float = setting(
        0.5, "Strength of --random_augment_rate, 0 to 1.", resume=Resume.SAME, type=float, **SHARE
    )
    # The rivals; None is off, so that a run without them records nothing of them.
    wen_threshold: float | None = setting(
        None,
        "Wen et al.: skip samples whose text-conditional noise magnitude reaches this; theirs is 2 at 512 px, which is "
        "1 at 256 px, because the norm grows with the resolution. One more forward pass per step.",
        resume=Resume.SAME,
        type=float,
        check=lambda value: value > 0,
        wanted="over 0; Wen et al. use 2",
    )
    embedding_noise: float | None = setting(
        None,
        "GN: scale of the Gaussian noise added to the embeddings of the captions; 0.1 is usual.",
        resume=Resume.SAME,
        type=float,
        check=lambda value: 0 <= value < math.inf,
        wanted="at least 0, and finite",
    )
    caption_mitigation: str | None = setting(
        None,
        "Somepalli et al.: 'mc' draws one of several captions (needs a column of lists), 'rc' replaces the caption by "
        "4 random words, 'rt' adds 2 random words, 'cwr' repeats 2 words of the caption.",
        resume=Resume.SAME,
        choices=["mc", "rc", "rt", "cwr"],
    )
    caption_mitigation_probability: float | None = setting(
        None,
        f"Share of visits in which rc, rt or cwr acts. Default: {CAPTION_PROBABILITY}. mc acts in all.",
        resume=Resume.SAME,
        type=float,
        **SHARE,
    )
    pixel_noise: float | None = setting(
        None,
        "Adding noise: standard deviation of Gaussian noise on the training images, whose pixels are from -1 to 1, "
        "drawn anew at each visit; the paper's variance of 0.1 is 0.316.",
        resume=Resume.SAME,
        type=float,
        **POSITIVE,
    )
    noisy_data_sigma: float | None = setting(
        None,
        "Shah et al.: at noise levels from this on, train on images to which Gaussian noise of this standard deviation "
        "was added once and for all; theirs is 0.5. Pixels are from -1 to 1, latents have a deviation of about 1.",
        resume=Resume.SAME,
        type=float,
        **POSITIVE,
    )
    ambient_corruption: float | None = setting(
        None,
        "Ambient Diffusion, for unconditional models of pixels: share of the pixels of each training image that is "
        "never seen; 0.4 in the authors' runs.",
        resume=Resume.FIXED,
        type=float,
        check=lambda share: 0 < share < 1,
        wanted="over 0 and under 1",
    )
    ambient_further_corruption: float | None = setting(
        None,
        "Share of the pixels left by --ambient_corruption that is hidden from the model too, and has to be predicted. "
        f"Default: {FURTHER_CORRUPTION}, the authors'.",
        resume=Resume.FIXED,
        type=float,
        check=lambda share: 0 <= share < 1,
        wanted="in [0, 1)",
    )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MitigationConfig":
        """The preset ``name``; overrides that are None leave its value."""
        if name not in PRESETS:
            raise UsageError(f"`mitigation` {name}: not one of {', '.join(PRESETS)}")
        given = {key: value for key, value in overrides.items() if value is not None}
        if given.get("caption_mitigation", "mc") != "mc":
            given.setdefault("caption_mitigation_probability", CAPTION_PROBABILITY)
        if "ambient_corruption" in given:
            given.setdefault("ambient_further_corruption", FURTHER_CORRUPTION)
        if given.get("shard_data") is False:
            given.setdefault("redistribute_fraction", 0.0)
        if given.get("skip_rate") or given.get("skip_false_rate"):
            given.setdefault("skip_threshold", 0.0)
        return cls(**{**PRESETS[name], **given, "mitigation": name})

    def __post_init__(self):
        check_values(self)
        if self.epochs_per_round is not None and self.steps_per_round is not None:
            raise UsageError("`epochs_per_round` and `steps_per_round` were both given: give one of them")
        if not self.shard_data and self.num_shards == 1:
            raise UsageError(
                "`shard_data` off: one proxy has all data anyway; give `num_shards` over 1, or leave it out"
            )
        if not self.shard_data and self.redistribute_fraction:
            raise UsageError(
                f"`redistribute_fraction` {self.redistribute_fraction}: without `shard_data` every proxy has all "
                "samples, and none can move; leave it out"
            )
        ways = [name for name in ("skip_threshold", "skip_rate", "skip_false_rate") if getattr(self, name)]
        if len(ways) > 1:
            raise UsageError(
                f"`{ways[0]}` and `{ways[1]}` were both given: each says what is skipped; give one of them"
            )
        if self.augment_range > 1 and not self.skips_by_loss:
            raise UsageError(
                f"`augment_range` {self.augment_range} needs a `skip_threshold` or `skip_rate` over 0, where "
                "augmentation starts"
            )
        if self.calibrate != "none" and not self.skips_by_loss:
            raise UsageError(
                f"`calibrate` {self.calibrate}: calibrates the control by loss, which is off; give a `skip_threshold`, "
                "`skip_rate` or `skip_false_rate` over 0, or leave it out"
            )
        if (self.random_skip_rate or self.random_augment_rate) and self.skips_by_loss:
            raise UsageError(
                "`random_skip_rate` and `random_augment_rate` replace the control by loss: "
                "set `skip_threshold` to 0 (or `mitigation` to none)"
            )
        if self.caption_mitigation_probability is not None and self.caption_mitigation in (None, "mc"):
            why = "; mc draws a caption at every visit" if self.caption_mitigation else ""
            raise UsageError(
                f"`caption_mitigation_probability` {self.caption_mitigation_probability}: belongs to "
                f"`caption_mitigation` rc, rt or cwr{why}"
            )
        if self.ambient_corruption is None and self.ambient_further_corruption is not None:
            raise UsageError(
                f"`ambient_further_corruption` {self.ambient_further_corruption}: belongs to `ambient_corruption`; "
                "give that too"
            )
        if self.ambient_corruption is not None and self.noisy_data_sigma is not None:
            raise UsageError(
                "`ambient_corruption` and `noisy_data_sigma` are two ways to hide the images: give one of them"
            )

    @property
    def num_parts(self) -> int:
        """Into how many parts the training set is split: K, or 1 where each proxy has all of it."""
        return self.num_shards if self.shard_data else 1

    @property
    def augments(self) -> bool:
        return self.augment_range > 1 or self.random_augment_rate > 0

    @property
    def is_plain(self) -> bool:
        """Whether steps and order of samples are the official training's: whether all samples are kept as they are.
        Captions and their embeddings may differ.
        """
        return self.num_shards == 1 and self.keeps_all

    @property
    def skips_by_loss(self) -> bool:
        """Whether the loss ratio decides what is skipped."""
        return max(self.skip_threshold, self.skip_rate, self.skip_false_rate) > 0

    @property
    def keeps_all(self) -> bool:
        """Whether no sample is ever skipped or augmented."""
        return not (self.skips_by_loss or self.random_skip_rate or self.random_augment_rate or self.wen_threshold)

    def resolve_bank_buckets(self, visits_per_shard: int, num_timesteps: int) -> int:
        """Number of buckets for a shard's bank: ``auto`` is visits / 100, in [10, T]."""
        wanted = (
            max(visits_per_shard // VISITS_PER_BUCKET, MIN_BUCKETS)
            if isinstance(self.bank_buckets, str)
            else self.bank_buckets
        )
        return min(wanted, num_timesteps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
