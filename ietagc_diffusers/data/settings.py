"""Settings of the training set."""

import math
from dataclasses import dataclass, field

from torchvision.transforms import InterpolationMode

from ..settings import CacheSettings, Resume, at_least, not_negative, setting

ALPHA = ("white", "official")
CAPTION_LINES = ("whole", "first", "each")
INTERPOLATION_MODES = sorted(mode.name.lower() for mode in InterpolationMode)


@dataclass(kw_only=True)
class ImageSettings(CacheSettings):
    """Which rows are trained on, and how their images are shown.

    Attributes:
        caption_lines, cache_latents: of a script that has them, see ``DataSettings``.
    """

    dataset_name: str | None = setting(
        None,
        "Training set: a Hub id, or a local path that datasets can read.",
        resume=Resume.FREE,  # the content of the rows must agree, wherever they lie
    )
    dataset_config_name: str | None = setting(
        None, "Configuration of the dataset, if it has several.", resume=Resume.FREE
    )
    train_data_dir: str | None = setting(
        None,
        "Training set: an image folder with a metadata.jsonl, or with a .txt file beside each image. With "
        "--dataset_name: its data_dir.",
        resume=Resume.FREE,
    )
    dataset_split: str = setting(
        "train",
        "Split of the dataset. Folders named train, test, validation or the like are splits of an image folder.",
        resume=Resume.FREE,
    )
    alpha: str = setting(
        "white",
        "'white' shows transparent parts on white, and scales 16-bit images; 'official' reads the hidden colours, as "
        "the official script does.",
        resume=Resume.SAME,
        choices=ALPHA,
    )
    image_column: str = setting("image", "Column that holds the image.", resume=Resume.SAME)
    exclude_rows: str | None = setting(
        None,
        "A text file of rows that are left out, a file name or sample_id a line, such as the exclude.txt of ietagc "
        "dedup.",
        resume=Resume.FREE,  # the rows that are left must agree
    )
    max_train_samples: int | None = setting(
        None, "Train on this many rows, drawn with --seed.", resume=Resume.FIXED, type=int, **at_least(1)
    )
    resolution: int = setting(
        512,
        "Images are resized (short side) and cropped to this size.",
        resume=Resume.SAME,
        type=int,
        **at_least(1),
    )
    center_crop: bool = setting(
        False, "Crop at the centre instead of at a random place.", resume=Resume.SAME, type=bool
    )
    random_flip: bool = setting(False, "Flip images horizontally at random.", resume=Resume.SAME, type=bool)
    image_interpolation_mode: str = setting(
        "lanczos", "Interpolation of the resize.", resume=Resume.SAME, choices=INTERPOLATION_MODES
    )
    dataloader_num_workers: int = setting(
        0,
        "Worker processes that read images; 0 reads in the training process.",
        resume=Resume.FREE,  # but with the official order of samples, see the loader's `order`
        type=int,
        **not_negative(),
    )
    deduplicate: str | None = setting(
        None,
        "'exact' trains on one row of each image, compared by decoded pixels. Recommended. 'near' trains on one row of "
        "each cluster of near duplicates, such as crops and re-encoded copies; see ietagc dedup.",
        resume=Resume.FIXED,
        choices=["exact", "near"],
    )
    deduplicate_similarity: float | None = setting(
        None,
        "With --deduplicate near: images that are more similar are near duplicates. Default: measured on the training "
        "set, and recorded in config.yaml.",
        resume=Resume.FIXED,
        type=float,
        check=lambda similarity: 0 < similarity <= 1,
        wanted="over 0, and at most 1",
    )
    group_duplicates: bool = setting(
        False,
        "Keep rows that show the same image in one shard, and move them together.",
        resume=Resume.FIXED,
        type=bool,
    )
    label_column: str | None = setting(
        None, "Column of class labels; each class is spread evenly over the shards.", resume=Resume.FIXED
    )
    heldout_dir: str | None = setting(
        None,
        "A folder of images like the training images that are never trained on, captioned or labelled like "
        "--train_data_dir; for --monitor_every, --monitor_steps and --skip_false_rate.",
        resume=Resume.FREE,  # the content of the images must agree, wherever they lie
    )
    heldout_share: float | None = setting(
        None,
        "Instead of --heldout_dir: hold this share of the training images out, with all rows that show them.",
        resume=Resume.FIXED,
        type=float,
        check=lambda share: 0 < share < 1,
        wanted="over 0 and under 1",
    )
    canary: int | None = setting(
        None,
        "Measure memorization with this many canaries (SolidMark), to be read back by `ietagc canary`: training rows, "
        "drawn with --seed, whose pictures are only ever shown with a border of a random grey of their own. The model "
        "learns these borders: give 30 to 100 rows, and at most a few in a hundred of a model that is to be used.",
        resume=Resume.FIXED,
        type=int,
        **at_least(4),  # the interval of a correlation needs as many
    )
    canary_border: int | None = setting(
        None,
        "Width of that border in pixels, of --resolution. Default: a sixteenth of it, as the authors have it.",
        resume=Resume.FIXED,
        type=int,
        **at_least(1),
    )
    on_bad_sample: str = setting(
        "error",
        "A row without image or caption: 'error' stops (in training after the step, with a checkpoint), 'skip' trains "
        "on another row of its shard instead.",
        resume=Resume.FREE,  # which rows are bad is the data's, and those that are good are trained on either way
        choices=["error", "skip"],
    )
    seed: int | None = setting(
        None,
        "Seed of everything random. Default: drawn, and recorded in config.yaml.",
        resume=Resume.SAME,
        type=int,
        check=lambda value: 0 <= value < 2**32,
        wanted="in 0 to 2^32 - 1",
    )

    caption_lines: str = field(default="whole", init=False)
    cache_latents: str | None = field(default=None, init=False)

    @property
    def holds_out(self) -> bool:
        """Whether there are images that are only measured."""
        return self.heldout_dir is not None or self.heldout_share is not None

    @property
    def decoding(self) -> str:
        """How training reads images, see ``decoder.to_rgb``."""
        return self.alpha

    @property
    def replaces_bad_samples(self) -> bool:
        return self.on_bad_sample == "skip"


@dataclass(kw_only=True)
class DataSettings(ImageSettings):
    """The same of images that have captions and are encoded."""

    caption_lines: str = setting(
        "whole",
        "Of a .txt file beside an image: the whole file is its caption, or the first line, or each line is one of "
        "several.",
        resume=Resume.FREE,  # captions are part of the content
        choices=CAPTION_LINES,
    )
    cache_latents: str | None = setting(
        None,
        "Folder in which the frozen encoders' results are kept, computed once before training: a step then needs "
        "neither VAE nor text encoder. Needs --center_crop.",
        resume=Resume.FREE,  # the numbers are the same
    )


@dataclass(kw_only=True)
class PriorSettings:
    """Prior preservation: pictures of the same class that are not the user's, trained on beside those that are."""

    prior_dir: str | None = setting(
        None,
        "Prior preservation (DreamBooth): a folder of other pictures of the class, captioned like --train_data_dir. "
        "Each step also trains on as many of them as it has training pictures, which about doubles its time.",
        resume=Resume.FREE,  # the content of the pictures must agree, wherever they lie
    )
    prior_loss_weight: float | None = setting(
        None,
        "Weight of the mean loss of the --prior_dir pictures, added to the loss. Default: 1.",
        resume=Resume.SAME,
        type=float,
        check=lambda weight: 0 <= weight < math.inf,
        wanted="0 or more, and finite",
    )
