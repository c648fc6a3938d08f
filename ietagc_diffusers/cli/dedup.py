"""``ietagc dedup``."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from ..console import say
from ..files import check_output
from . import common

if TYPE_CHECKING:
    from ietagc_diffusers.sscd import Descriptor

DESCRIPTION = """
Find near duplicates among training images before the training: crops, re-encoded, resized, mirrored, darker or brighter
copies. Writes a table, a page with pictures, and exclude.txt, which the training takes as --exclude_rows.
"""
BUILT_IN = "dct"


def add_descriptor(parser: ArgumentParser) -> None:
    """By what near duplicates are found."""
    parser.add_argument(
        "--descriptor",
        default=BUILT_IN,
        help="dct (default): the low frequencies of an image, built in; or one that score takes, such as "
        "sscd_disc_mixup, which also finds larger crops",
    )
    parser.add_argument("--protocol", help="preprocessing for a descriptor's file, as for score")
    parser.add_argument("--feature_cache", metavar="DIR|none", help=common.CACHE_HELP)


def descriptor_of(args: Namespace) -> "Descriptor":
    """The descriptor that was asked for."""
    from ietagc_diffusers.eval.dedup import dct_descriptor
    from ietagc_diffusers.sscd import load_descriptor

    if args.descriptor == BUILT_IN:
        return dct_descriptor()
    return load_descriptor(args.descriptor, args.protocol, common.device_of(args))


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--train", required=True, metavar="DIR|ID", help="training images: a folder or a dataset")
    common.add_columns(parser)
    add_descriptor(parser)
    parser.add_argument(
        "--similarity",
        type=float,
        help="images that are more similar are near duplicates; default: measured on these images",
    )
    parser.add_argument("--max_shown", type=int, default=100, help="clusters on the page; default: 100")
    parser.add_argument("--output", default="dedup", metavar="DIR", help="default: dedup")
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "max_shown")
    common.check_range(args, 0, 1, "similarity")
    check_output(args.output, "output")
    common.check_apart(args, "train")
    from ietagc_diffusers.eval.dedup import dedup, summary

    descriptor = descriptor_of(args)
    training = common.training_set(args).images
    result = dedup(training, args.output, descriptor, args.similarity, common.cache_of(args), args.max_shown)
    folder = args.output
    say(f"{summary(result)}\n{folder}/dedup.html, duplicates.csv; train with --exclude_rows {folder}/exclude.txt")
