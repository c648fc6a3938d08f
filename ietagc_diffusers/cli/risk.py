"""``ietagc risk``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..files import check_output
from . import common
from .dedup import add_descriptor, descriptor_of


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="the folder of a training run")
    common.add_training_images(parser, required=False)
    parser.add_argument(
        "--attack", metavar="DIR", help="what `ietagc attack` wrote about this model, for losses beside the base's"
    )
    parser.add_argument(
        "--audit", metavar="DIR", help="what `ietagc audit` or `score` wrote about this model, for copies"
    )
    add_descriptor(parser)
    parser.add_argument(
        "--duplicate_similarity",
        type=float,
        help="training images that are more similar are near duplicates; default: measured on them, as dedup does",
    )
    parser.add_argument("--max_shown", type=int, default=200, help="images on the page; default: 200")
    parser.add_argument("--output", default="risk", metavar="DIR", help="default: risk")
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "max_shown")
    common.check_range(args, -1, 1, "duplicate_similarity")
    check_output(args.output, "output")
    args.model = args.run  # nothing is written into it
    common.check_apart(args, "train", "attack", "audit")
    from ietagc_diffusers.eval.risk import risk, summary
    from ietagc_diffusers.run_folder import RunFolder

    RunFolder(args.run).config()  # refuses what is no run
    descriptor = descriptor_of(args)
    found = risk(
        args.run,
        common.training_set(args, args.run),
        args.output,
        descriptor,
        args.duplicate_similarity,
        args.attack,
        args.audit,
        common.cache_of(args),
        args.max_shown,
    )
    say(f"{summary(found)}\n{args.output}/risk.html, risk.csv")
