"""``ietagc report``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..errors import UsageError
from ..files import check_output
from . import common


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("scores", nargs="+", metavar="[NAME=]DIR", help="folders that score wrote")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="default: report.html")
    parser.add_argument("--max_pairs", type=int, default=200, help="pairs shown of each model; default: 200")
    parser.add_argument("--title", help="of the page")


def run(args: Namespace) -> None:
    common.check_positive(args, "max_pairs")
    check_output(args.output, "output", file=True)
    named = common.named_folders(args.scores, "scores")
    from ietagc_diffusers.eval.report import Scored, write_report

    scored = [Scored.load(folder, name) for name, folder in named]
    try:
        say(write_report(scored, args.output, args.max_pairs, args.title))
    except OSError as error:
        raise UsageError(f"`output` {args.output}: cannot be written: {error}") from error
