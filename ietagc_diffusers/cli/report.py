"""``ietagc report``."""

from argparse import ArgumentParser, Namespace

from . import common


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("scores", nargs="+", metavar="[NAME=]DIR", help="folders that score wrote")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="default: report.html")
    parser.add_argument("--max_pairs", type=int, default=200, help="pairs shown of each model; default: 200")
    parser.add_argument("--title", help="of the page")


def run(args: Namespace) -> None:
    from ietagc_diffusers.eval.report import Scored, write_report

    from ..files import check_output

    common.check_positive(args, "max_pairs")
    check_output(args.output, "output", file=True)
    scored = [Scored.load(folder, name) for name, folder in common.named_folders(args.scores, "scores")]
    print(write_report(scored, args.output, args.max_pairs, args.title))
