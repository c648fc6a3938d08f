"""``ietagc average``."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..console import say
from ..files import check_output


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="DIR", help="a finished run, trained with --save_rounds")
    parser.add_argument(
        "--last", default="5", metavar="N|SHARE", help="how many of its models, or which share (50%%); default: 5"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the averaged pipeline or adapter")


def run(args: Namespace) -> None:
    check_output(args.output, "output")
    from ..training.weight_averaging import average_run

    steps = average_run(Path(args.run), Path(args.output), args.last)
    say(f"The mean of {len(steps)} models, of the steps {', '.join(map(str, steps))}: {args.output}")
