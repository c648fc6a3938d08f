"""``ietagc mq``."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..console import say
from ..errors import with_flags
from ..files import check_output, write_json
from . import common

PROTOCOLS = ["iet-agc", "paper", "gu"]  # a copy of the library's, see ``common``


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--generated", required=True, metavar="DIR|ID", help="generated images")
    parser.add_argument("--train", required=True, metavar="DIR|ID", help="training images")
    common.add_columns(parser)
    parser.add_argument(
        "--protocol",
        default="all",
        choices=[*PROTOCOLS, "all"],
        help="definition of the l2 ratio: of IET-AGC's released code, of the paper as printed, of Gu et al.; "
        "default: all",
    )
    parser.add_argument(
        "--thresholds", nargs="+", type=float, default=[0.4, 0.5, 0.6], metavar="RATIO",
        help="of iet-agc and paper; Gu's is 1/3; default: 0.4 0.5 0.6",
    )  # fmt: skip
    parser.add_argument(
        "--pixels", type=int, help="side of the compared images; default: that of most generated images, at most 64"
    )
    parser.add_argument("--distinct", action="store_true", help="count exact duplicates among training images once")
    parser.add_argument(
        "--max_memory", type=float, default=2.0, metavar="GIB", help="working memory of the search; default: 2"
    )
    parser.add_argument("--feature_cache", metavar="DIR|none", help=common.CACHE_HELP)
    parser.add_argument("--output", default="mq.json", metavar="FILE", help="default: mq.json")
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "max_memory", "thresholds")
    common.check_range(args, 2, 4096, "pixels")
    check_output(args.output, "output", file=True)
    common.check_apart(args, "train", "generated")
    from ietagc_diffusers.eval.image_sets import load_images
    from ietagc_diffusers.eval.mq import memorized_quantities, table

    found = memorized_quantities(
        load_images(args.generated, "generated"),
        common.training_set(args).images,
        PROTOCOLS if args.protocol == "all" else [args.protocol],
        args.thresholds,
        args.pixels,
        args.distinct,
        common.cache_of(args),
        common.device_of(args),
        int(args.max_memory * 2**30),
    )
    say(with_flags(table(found), vars(args)))  # before it is written: the search may have taken hours
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, found)
    say(args.output)
