"""``ietagc figures``."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..console import say
from ..errors import UsageError, with_flags
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
    common.check_apart(args, "train", model=args.run)
    from ietagc_diffusers.eval.paper_figures import draw_all
    from ietagc_diffusers.eval.report import Scored

    run = args.run if args.run and Path(args.run).is_dir() else None  # which says how its training images are read
    training = common.training_set(args, run).images if args.train else None
    device = common.device_of(args)
    scored = [Scored.load(folder, name) for name, folder in scores]
    folder, output = Path(args.run) if args.run else None, Path(args.output)
    drawn = draw_all(output, scored, folder, training, device)
    for name, reason in drawn.items():
        say(f"{name} not drawn: {with_flags(reason, vars(args))}" if reason else output / name)
    if all(drawn.values()):
        raise UsageError("no figure could be drawn")
