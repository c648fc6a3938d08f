"""The method's numbers, in one validated place: ``MitigationConfig``, its presets, and YAML recipes."""

import difflib
import math
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path

import yaml

from ..errors import UsageError

DEFAULT_ROUNDS = 25  # the paper's LAION-10k run; used when neither --epochs_per_round nor --steps_per_round is given
VISITS_PER_BUCKET = 100
MIN_BUCKETS = 10
CAPTION_PROBABILITY = 0.1  # Somepalli et al.'s, for all but MC, which has none

_OFF = {"num_shards": 1, "skip_threshold": 0.0, "augment_range": 1.0, "redistribute_fraction": 0.0}
_AGC, _IET, _TAA, _MSR = (
    {"skip_threshold": 0.8},
    {"num_shards": 4},
    {"augment_range": math.inf},
    {"redistribute_fraction": 0.25},
)

# Rows of the paper's Tables III and IV, with its LAION-10k numbers.
PRESETS = {
    "none": _OFF,
    "agc": _OFF | _AGC,
    "iet": _OFF | _IET,
    "iet-agc": _OFF | _IET | _AGC,
    "iet-agc-taa": _OFF | _IET | _AGC | _TAA,
    "iet-agc+": _OFF | _IET | _AGC | _TAA | _MSR,
}
DEFAULT_PRESET = "iet-agc+"


def bank_buckets(value):
    """Parse ``--bank_buckets``: a number of buckets, or ``auto``."""
    return value if value == "auto" else int(value)


def _option(default, help, **argparse_options):
    return field(default=default, metadata={"help": help, **argparse_options})


@dataclass(frozen=True)
class MitigationConfig:
    """Everything the method is told, each field a flag of the same name.

    Construct it with ``MitigationConfig.preset(name, **overrides)``. Raises ``UsageError`` naming the flag when a
    value is out of range.
    """

    mitigation: str = _option(
        DEFAULT_PRESET, "Preset for the flags below, each a row of the paper's Table IV.", choices=list(PRESETS)
    )
    num_shards: int = _option(1, "K: parts of the training set; each trains one proxy.", type=int)
    epochs_per_round: int | None = _option(
        None,
        f"E: epochs a proxy trains on its shard before the proxies are averaged. Default: {DEFAULT_ROUNDS} rounds.",
        type=int,
    )
    steps_per_round: int | None = _option(
        None, "Steps that each proxy takes in a round, instead of --epochs_per_round.", type=int
    )
    bank_decay: float = _option(0.8, "eta: decay of the memory bank's moving average (eq. 3).", type=float)
    bank_bias_correction: bool = _option(
        True, "Divide a bank entry by 1 - eta^n after n visits; off is the paper's literal zero-initialised bank."
    )
    bank_buckets: int | str = _option(
        "auto",
        f"Timestep buckets of the memory bank. 'auto' gives each about {VISITS_PER_BUCKET} visits a shard.",
        type=bank_buckets,
    )
    skip_threshold: float = _option(
        0.0, "lambda: skip samples whose loss ratio is below it; 0 turns AGC off (eq. 8).", type=float
    )
    augment_range: float = _option(
        1.0,
        "R: augment kept samples whose loss ratio is below R * lambda ('inf' allowed); 1 turns TAA off (eq. 5).",
        type=float,
    )
    augment_decay: float = _option(
        5.0, "A: augmentation strength is exp(-A |r - lambda| / lambda) (eq. 7).", type=float
    )
    randaugment_magnitude: int = _option(5, "M: RandAugment magnitude (0 to 30) at strength 1.", type=int)
    randaugment_num_ops: int = _option(2, "RandAugment operations per augmented image.", type=int)
    randaugment_operations: str = _option(
        "all",
        "'all' of torchvision's; 'graded' leaves out those whose effect does not grow with the magnitude.",
        choices=["all", "graded"],
    )
    redistribute_fraction: float = _option(
        0.0,
        "P: share of a shard, most skipped first, that goes to the next shard after a round; 0 turns MSR off (eq. 10).",
        type=float,
    )
    redistribute_mode: str = _option(
        "move", "'move' keeps the shards' sizes; 'copy' is the literal union of eq. 11.", choices=["move", "copy"]
    )
    redistribute_by: str = _option(
        "skips",
        "What is redistributed: the most skipped samples, or 'random' ones (Table V).",
        choices=["skips", "random"],
    )
    optimizer_state: str = _option(
        "keep", "Whether a proxy keeps its optimizer moments over rounds.", choices=["keep", "reset"]
    )
    random_skip_rate: float = _option(
        0.0, "Control experiment: skip this share of samples at random instead of by loss.", type=float
    )
    random_augment_rate: float = _option(
        0.0, "Control experiment: augment this share of samples at random instead of by loss.", type=float
    )
    random_augment_strength: float = _option(0.5, "Strength of --random_augment_rate, 0 to 1.", type=float)
    # The rivals; None is off, so that a run without them records nothing of them.
    wen_threshold: float | None = _option(
        None,
        "Wen et al.: skip samples whose text-conditional noise magnitude reaches this; theirs is 2 at 512 px, which is "
        "1 at 256 px: the norm grows with the resolution. One more forward a step.",
        type=float,
    )
    embedding_noise: float | None = _option(
        None, "GN: scale of the Gaussian noise added to the captions' embeddings; 0.1 is usual.", type=float
    )
    caption_mitigation: str | None = _option(
        None,
        "Somepalli et al.: 'mc' draws one of several captions (needs a column of lists), 'rc' replaces the caption by "
        "4 random words, 'rt' adds 2 random words, 'cwr' repeats 2 of its own.",
        choices=["mc", "rc", "rt", "cwr"],
    )
    caption_mitigation_probability: float | None = _option(
        None,
        f"Share of visits in which rc, rt or cwr acts. Default: {CAPTION_PROBABILITY}. mc acts in all.",
        type=float,
    )

    @classmethod
    def preset(cls, name, **overrides):
        """The preset ``name``; overrides that are None leave its value."""
        if name not in PRESETS:
            raise UsageError(f"--mitigation {name}: not one of {', '.join(PRESETS)}")
        given = {key: value for key, value in overrides.items() if value is not None}
        if given.get("caption_mitigation", "mc") != "mc":
            given.setdefault("caption_mitigation_probability", CAPTION_PROBABILITY)
        return cls(**{**PRESETS[name], **given, "mitigation": name})

    def __post_init__(self):
        _require(self.num_shards >= 1, "--num_shards", self.num_shards, "at least 1")
        if self.epochs_per_round is not None and self.steps_per_round is not None:
            raise UsageError("--epochs_per_round and --steps_per_round were both given: give one of them")
        for flag in ("epochs_per_round", "steps_per_round"):
            value = getattr(self, flag)
            _require(value is None or value >= 1, f"--{flag}", value, "at least 1")
        _require(0 <= self.bank_decay < 1, "--bank_decay", self.bank_decay, "in [0, 1)")
        _require(
            self.bank_buckets == "auto" or self.bank_buckets >= 1,
            "--bank_buckets",
            self.bank_buckets,
            "at least 1, or 'auto'",
        )
        _require(
            0 <= self.skip_threshold <= 1,
            "--skip_threshold",
            self.skip_threshold,
            "in [0, 1]; the paper uses 0.5 to 0.8",
        )
        _require(self.augment_range >= 1, "--augment_range", self.augment_range, "over 1 (or 1 to turn TAA off)")
        if self.augment_range > 1 and self.skip_threshold == 0:
            raise UsageError(
                f"--augment_range {self.augment_range} needs a --skip_threshold over 0, where augmentation starts"
            )
        _require(self.augment_decay >= 0, "--augment_decay", self.augment_decay, "at least 0")
        _require(
            0 <= self.randaugment_magnitude <= 30, "--randaugment_magnitude", self.randaugment_magnitude, "in 0 to 30"
        )
        _require(self.randaugment_num_ops >= 1, "--randaugment_num_ops", self.randaugment_num_ops, "at least 1")
        for flag in ("redistribute_fraction", "random_augment_rate", "random_augment_strength"):
            _require(0 <= getattr(self, flag) <= 1, f"--{flag}", getattr(self, flag), "in [0, 1]")
        _require(0 <= self.random_skip_rate < 1, "--random_skip_rate", self.random_skip_rate, "in [0, 1)")
        if (self.random_skip_rate or self.random_augment_rate) and self.skip_threshold > 0:
            raise UsageError(
                "--random_skip_rate and --random_augment_rate replace the control by loss: "
                "give --skip_threshold 0 (or --mitigation none)"
            )
        self._check_rivals()

    def _check_rivals(self):
        threshold, scale, share = self.wen_threshold, self.embedding_noise, self.caption_mitigation_probability
        _require(threshold is None or threshold > 0, "--wen_threshold", threshold, "over 0; Wen et al. use 2")
        _require(scale is None or 0 <= scale < math.inf, "--embedding_noise", scale, "at least 0, and finite")
        _require(share is None or 0 <= share <= 1, "--caption_mitigation_probability", share, "in [0, 1]")
        if share is not None and self.caption_mitigation in (None, "mc"):
            raise UsageError(
                f"--caption_mitigation_probability {share}: belongs to --caption_mitigation rc, rt or cwr"
                f"{'; mc draws a caption at every visit' if self.caption_mitigation else ''}"
            )

    @property
    def augments(self):
        return self.augment_range > 1 or self.random_augment_rate > 0

    @property
    def is_plain(self):
        """Whether steps and order of samples are the official training's: whether all samples are kept as they are.
        Captions and their embeddings may differ.
        """
        decides = self.skip_threshold or self.random_skip_rate or self.random_augment_rate or self.wen_threshold
        return self.num_shards == 1 and not decides

    def resolve_bank_buckets(self, visits_per_shard, num_timesteps):
        """Number of buckets for a shard's bank: ``auto`` is visits / 100, in [10, T]."""
        wanted = (
            max(visits_per_shard // VISITS_PER_BUCKET, MIN_BUCKETS)
            if self.bank_buckets == "auto"
            else self.bank_buckets
        )
        return min(wanted, num_timesteps)

    def to_dict(self):
        return asdict(self)


def _require(condition, flag, value, wanted):
    if not condition:
        raise UsageError(f"{flag} {value}: must be {wanted}")


METHOD_FIELDS = fields(MitigationConfig)


def recipe_path(name):
    """The file of a recipe: the path itself, or, if there is no such file, the recipe of that name in this package."""
    path = Path(name)
    shipped = Path(str(files("ietagc_diffusers.configs") / f"{path.stem}.yaml"))
    return shipped if path.parent == Path() and not path.exists() and shipped.is_file() else path


def read_recipe(path, known_keys):
    """Read a YAML recipe, whose keys are the flags' names. ``path`` may be the name of one of the package's recipes.

    Returns a dict. Raises ``UsageError`` naming the file and, for an unknown key, the nearest known one.
    """
    try:
        recipe = yaml.safe_load(recipe_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UsageError(f"--config {path}: expected 'flag: value' lines, found a {type(recipe).__name__}")
    check_keys(recipe, known_keys, f"--config {path}")
    return recipe


def check_keys(given, known, where):
    """Raise ``UsageError`` for the first of ``given`` that is not among ``known``, naming the nearest known one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), map(str, known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"{where}: unknown key '{key}'{hint}")
