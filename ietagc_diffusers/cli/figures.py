"""``ietagc figures``."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from . import common


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--scores", nargs="*", default=[], metavar="[NAME=]DIR", help="folders that score wrote (Figs. 3, 6, 7)"
    )
    parser.add_argument("--run", metavar="DIR", help="folder of a training run (Figs. 3, 8, 9)")
    common.add_training_images(parser, required=False)
    parser.add_argument("--output", default="figures", metavar="DIR", help="default: figures")
    common.add_device(parser)


def run(args: Namespace) -> None:
    scores = common.named_folders(args.scores, "scores")
    from ietagc_diffusers.eval.paper_figures import draw_all

    training = common.training_images(args) if args.train else None
    draw_all(scores, args.run, training, Path(args.output), common.device_of(args))
