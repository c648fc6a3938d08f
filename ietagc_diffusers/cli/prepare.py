"""``ietagc prepare``."""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

from ..console import say
from ..errors import UsageError, one_line
from ..files import check_output
from . import common

# Copies of the library's lists, whose modules take seconds to import. A test compares them.
FORMATS = ["auto", "folder", "dcr", "kohya", "img2dataset", "webdataset", "parquet"]
CAPTION_LINES = ["whole", "first", "each"]
DESCRIPTION = """
Make a training set of images and captions as they were downloaded: Parquet files with the images as they are stored,
ids that stay the same, and a report of what was left out. Nothing is downloaded. A run that was interrupted continues.
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a tar or Parquet file")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="folder: images with metadata or text files; dcr: images and a JSON file of captions (Somepalli et al.); "
        "kohya: text files, and repeats in the folders' names; img2dataset; webdataset: tar files; parquet; default: "
        "auto, by what lies in SOURCE",
    )
    parser.add_argument("--dataset_split", default="train", help="split of a source that has several; default: train")
    parser.add_argument("--captions", metavar="FILE", help="for dcr: the JSON file; default: the only one in SOURCE")
    parser.add_argument(
        "--images", metavar="DIR", help="the folder that the paths in a Parquet file lie in; default: that of the file"
    )
    parser.add_argument("--image_column", help="of Parquet; default: the first that is known and holds images")
    parser.add_argument("--caption_column", help="of Parquet or metadata; default: captions, text, caption or the like")
    parser.add_argument(
        "--caption_lines",
        choices=CAPTION_LINES,
        default="whole",
        help="of a text file: the whole file is the caption, or the first line, or each line is one; default: whole",
    )
    parser.add_argument(
        "--main_caption",
        type=int,
        default=0,
        metavar="N",
        help="which of an image's captions is in the column text, from 0; all are in captions; default: 0",
    )
    parser.add_argument("--without_captions", action="store_true", help="keep images that have no caption")
    parser.add_argument(
        "--min_side", type=int, default=1, metavar="PIXELS", help="leave out images with a shorter side; default: 1"
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=0.0,
        help="share of the images in the split test, over 0 and under 1; no copy of them is in train; default: none",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw of test images; default: 0")
    parser.add_argument("--shard_size", type=float, default=256.0, metavar="MB", help="of a file; default: 256")
    group = parser.add_argument_group("upload")
    group.add_argument(
        "--push_to_hub",
        metavar="REPO",
        help="dataset on the Hub to upload the set to; made private, if it is not there",
    )
    group.add_argument("--public", action="store_true", help="make that dataset public, if it is made")
    group.add_argument("--token", help="default: HF_TOKEN, or the one that `hf auth login` stored")


def run(args: Namespace) -> int:
    common.check_positive(args, "min_side", "shard_size")
    if not 0 <= args.test_share < 1:
        raise UsageError(f"`test_share` {args.test_share}: must be 0 or more, and under 1")
    if args.main_caption < 0:
        raise UsageError(f"`main_caption` {args.main_caption}: must be 0 or more")
    if args.public and args.push_to_hub is None:
        raise UsageError("`public`: is for `push_to_hub`; name the dataset there")
    check_output(args.output, "output")
    from ..prepare import Options, Settings, prepare, summary

    repository = _repository(args)
    where = f"{args.prog} prepare: {args.output}"
    try:
        report = prepare(args.source, args.output, _made(Options, args), _made(Settings, args))
    except OSError as error:  # of a disk that is full or gone
        print(f"{where}: {one_line(error)}. The same command continues from here", file=sys.stderr)
        return 1
    say(f"{summary(report)}\n{args.output}/report.md")
    if repository is None:
        return 0
    from ..hub import UploadError
    from ..prepare.publish import publish

    try:
        say(f"Uploaded: {publish(args.output, repository)}")
    except (UploadError, OSError) as error:  # of the network, or of a disk
        print(f"{where}: {error}. Nothing is lost: the same command tries again", file=sys.stderr)
        return 1
    return 0


def _repository(args: Namespace) -> Any:
    """The dataset that the set is uploaded to, whose name is checked before anything is read."""
    if args.push_to_hub is None:
        return None
    from ..hub import Repository
    from ..hub.repository import check_name

    check_name(args.push_to_hub, "push_to_hub")
    return Repository(args.push_to_hub, private=not args.public, token=args.token, kind="dataset")


def _made(kind: type, args: Namespace) -> Any:
    return kind(**{entry.name: getattr(args, entry.name) for entry in fields(kind)})
