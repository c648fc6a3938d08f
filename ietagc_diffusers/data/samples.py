"""The training set: rows with stable sample ids, captions, duplicates, transforms."""

import hashlib
import itertools
import json
import random
from copy import copy
from pathlib import Path

import numpy as np
import torch
from datasets import Image as ImageFeature
from datasets import Sequence, Value, load_dataset, load_from_disk
from torchvision import transforms
from tqdm.auto import tqdm

from ..errors import UsageError
from ..mitigations.prompts import choose_caption, random_words, repeat_words, replace_caption

SAMPLE_ID = "sample_id"


def load_training_rows(args):
    """Load ``--dataset_name`` or ``--train_data_dir``.

    Returns a ``Dataset`` with the image column, the caption column and ``sample_id`` (int64): the row's number in the
    source, whatever is selected later. Raises ``UsageError`` naming the flag or the row.
    """
    if args.dataset_name is not None:
        source = f"--dataset_name {args.dataset_name}"
        load = {"path": args.dataset_name, "name": args.dataset_config_name, "data_dir": args.train_data_dir}
    else:
        source = f"--train_data_dir {args.train_data_dir}"
        folder = Path(args.train_data_dir)
        if not folder.is_dir():
            raise UsageError(f"{source}: no such folder")
        if not any(path.is_file() for path in folder.rglob("*")):
            raise UsageError(f"{source}: the folder is empty; it needs images and a metadata.jsonl")
        load = {"path": "imagefolder", "data_files": {"train": str(folder / "**")}}
    try:
        if args.dataset_name is not None and (Path(args.dataset_name) / "state.json").is_file():
            dataset = {"train": load_from_disk(args.dataset_name)}  # as save_to_disk and --save_shards write it
        else:
            dataset = load_dataset(**load, cache_dir=args.cache_dir)
    except Exception as error:
        raise UsageError(f"{source}: datasets could not read it: {_one_line(error)}") from error
    if "train" not in dataset:
        raise UsageError(f"{source}: has no 'train' split, only {', '.join(dataset)}")
    rows = dataset["train"]
    for flag in ("image_column", "caption_column"):
        column = getattr(args, flag)
        if column not in rows.column_names:
            hint = " (captions come from a metadata.jsonl in the folder)" if flag == "caption_column" else ""
            raise UsageError(
                f"--{flag} {column}: not a column of the dataset, which has {', '.join(rows.column_names)}{hint}"
            )
    if not isinstance(rows.features[args.image_column], ImageFeature):
        raise UsageError(f"--image_column {args.image_column}: holds {rows.features[args.image_column]}, not images")
    if SAMPLE_ID not in rows.column_names:
        rows = rows.add_column(SAMPLE_ID, np.arange(len(rows)))
    _check_captions(rows, args.caption_column, only_type=args.on_bad_sample == "skip")
    if args.on_bad_sample == "error":
        _check_files(rows, args.image_column)
    if args.max_train_samples is not None:
        if args.max_train_samples < 1:
            raise UsageError(f"--max_train_samples {args.max_train_samples}: must be at least 1")
        rows = rows.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(rows))))
    return rows


def _one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_captions(rows, column, only_type=False):
    feature = rows.features[column]
    text = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    if not text and not isinstance(feature, (Sequence, list)):
        raise UsageError(f"--caption_column {column}: should hold strings or lists of strings, holds {feature}")
    if only_type:
        return
    captions = rows.select_columns([column]).with_format("arrow")
    for start in range(0, len(rows), 10_000):
        for offset, caption in enumerate(captions[start : start + 10_000][column].to_pylist()):
            if not _is_caption(caption):
                raise UsageError(f"row {start + offset} has no caption in column '{column}': add one or remove the row")


def _is_caption(value):
    return isinstance(value, str) or (bool(value) and all(isinstance(caption, str) for caption in value))


def require_several_captions(rows, column):
    """Raise ``UsageError`` where ``--caption_mitigation mc`` has nothing to draw from."""
    need = "--caption_mitigation mc: needs several captions an image"
    if isinstance(rows.features[column], Value):
        raise UsageError(f"{need}, and --caption_column {column} holds strings: name a column of lists of strings")
    if not any(captions and len(captions) > 1 for captions in rows[column]):
        raise UsageError(f"{need}, and no row of --caption_column {column} has more than one")


def _check_files(rows, column):
    stored = rows.select_columns([column]).cast_column(column, ImageFeature(decode=False)).with_format("arrow")
    for start in range(0, len(rows), 10_000):
        images = stored[start : start + 10_000][column].combine_chunks()
        inside = images.field("bytes").is_valid().to_pylist()
        for offset, path in enumerate(images.field("path").to_pylist()):
            if not inside[offset] and (path is None or ("://" not in path and not Path(path).is_file())):
                raise UsageError(f"row {start + offset}: its image file {path} does not exist")


def content_hash(rows, caption_column):
    """A short hash of the rows' ids and captions: tells one training set from another without decoding its images."""
    digest = hashlib.blake2b(digest_size=8)
    columns = rows.select_columns([SAMPLE_ID, caption_column]).with_format("arrow")
    for start in range(0, len(rows), 10_000):
        digest.update(json.dumps(columns[start : start + 10_000].to_pydict()).encode())
    return digest.hexdigest()


def image_path(rows, image_column, row):
    """Where a row's image came from, for messages, or None."""
    value = rows.cast_column(image_column, ImageFeature(decode=False))[int(row)][image_column]
    return value.get("path")


def pixel_hashes(rows, image_column):
    """A hash of each row's decoded RGB pixels: equal for rows that show the same image."""
    digests = []
    images = rows.select_columns([image_column])
    for row in tqdm(range(len(rows)), desc="Looking for duplicates", leave=False):
        image = decode(images, image_column, row)
        digests.append(hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest())
    return np.unique(digests, return_inverse=True)[1]


def deduplicate(rows, hashes):
    """One row of each image, the first."""
    first = np.unique(hashes, return_index=True)[1]
    return rows.select(np.sort(first))


def decode(rows, image_column, index):
    """The RGB image of a row. Raises ``UsageError`` naming the row if it does not decode."""
    try:
        return rows[int(index)][image_column].convert("RGB")
    except Exception as error:  # whatever PIL and its plugins raise on broken files
        where = image_path(rows, image_column, index)
        name = f" ({where})" if where else ""
        raise UsageError(
            f"row {index}{name}: the image does not decode: {_one_line(error)}; repair or remove it, "
            "or give --on_bad_sample skip"
        ) from error


def image_transform(resolution, center_crop, random_flip, interpolation):
    """The official script's transform: PIL image -> float32 (3, resolution, resolution) in [-1, 1]."""
    mode = getattr(transforms.InterpolationMode, interpolation.upper())
    return transforms.Compose(
        [
            transforms.Resize(resolution, interpolation=mode),
            (transforms.CenterCrop if center_crop else transforms.RandomCrop)(resolution),
            *([transforms.RandomHorizontalFlip()] if random_flip else []),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


def tokenize(tokenizer, captions):
    """Token ids (B, L) of a list of captions, padded or cut to the model's length L."""
    return tokenizer(
        captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


class TrainingSamples(torch.utils.data.Dataset):
    """Rows as the training sees them.

    A key is a row, whose random crop, flip and choice of caption then come from the process's random streams as in the
    official script; or a pair (row, seed), and they come from the seed alone: the same for any number of workers and
    processes.

    With ``skip_bad``, a row without image or caption is replaced by another of ``pool``, drawn from the key's seed.

    ``caption_mitigation`` (rc, rt or cwr) acts on a share ``caption_mitigation_probability`` of the visits, with the
    numbers of Somepalli et al. (2023): 4 random words instead of the caption, 2 random words added, or 2 of its own
    repeated. mc is what a list of captions does by itself: one is drawn at each visit.
    """

    def __init__(
        self,
        rows,
        image_column,
        caption_column,
        tokenizer,
        transform,
        skip_bad=False,
        caption_mitigation=None,
        caption_mitigation_probability=None,
    ):
        self.images = rows.select_columns([image_column])  # apart, so that reading a caption decodes no image
        self.captions = rows.select_columns([caption_column])
        self.image_column = image_column
        self.caption_column = caption_column
        self.tokenizer = tokenizer
        self.transform = transform
        self.skip_bad = skip_bad
        self.caption_mitigation = caption_mitigation
        self.caption_mitigation_probability = caption_mitigation_probability
        self.pool = np.arange(len(rows))

    def of_shard(self, shard_samples):
        """The same rows, with replacements from this shard."""
        samples = copy(self)
        samples.pool = shard_samples
        return samples

    def __len__(self):
        return len(self.captions)

    def _read(self, row):
        """Image and caption of a row. Raises ``UsageError`` naming it."""
        caption = self.captions[int(row)][self.caption_column]
        if not _is_caption(caption):
            raise UsageError(f"row {row} has no caption in column '{self.caption_column}'")
        return decode(self.images, self.image_column, row), caption

    def _read_or_replace(self, row, seed):
        """Returns image, caption, the row they are of, and [row, reason] for each that was bad."""
        bad = []
        rng = random.Random(seed)
        for candidate in itertools.chain([row], (int(rng.choice(self.pool)) for _ in range(1000))):
            try:
                return *self._read(candidate), candidate, bad
            except UsageError as error:
                if not self.skip_bad:
                    raise
                bad.append([candidate, str(error)])
        raise UsageError(f"row {row}: bad, and so were 1,000 others drawn in its place: {bad[0][1]}")

    def _caption(self, captions, rng):
        """The caption of one visit."""
        caption = choose_caption(captions, rng)
        if self.caption_mitigation in (None, "mc") or rng.random() >= self.caption_mitigation_probability:
            return caption
        if self.caption_mitigation == "rc":
            return replace_caption(self.tokenizer, 4, rng)
        if self.caption_mitigation == "rt":
            return random_words(caption, self.tokenizer, 2, rng)
        return repeat_words(caption, 2, rng)

    def __getitems__(self, keys):
        seeded = isinstance(keys[0], tuple)
        keys = keys if seeded else [(row, row) for row in keys]
        read = [self._read_or_replace(row, seed) for row, seed in keys]
        images, captions, rows, bad = zip(*read, strict=True)
        if seeded:
            pixels = []
            with torch.random.fork_rng(devices=[]):
                for image, (_, seed) in zip(images, keys, strict=True):
                    torch.default_generator.manual_seed(seed)  # not torch's, which seeds the device too
                    pixels.append(self.transform(image))
            captions = [self._caption(c, random.Random(seed)) for c, (_, seed) in zip(captions, keys, strict=True)]
        else:
            pixels = [self.transform(image) for image in images]
            captions = [self._caption(caption, random) for caption in captions]
        batch = {
            "pixel_values": torch.stack(pixels).to(memory_format=torch.contiguous_format).float(),
            "input_ids": tokenize(self.tokenizer, captions),
            "samples": torch.tensor(rows),
            "bad": [entry for entries in bad for entry in entries],
        }
        if seeded:
            batch["seeds"] = [seed for _, seed in keys]
        return batch
