"""``ietagc score``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..files import check_output
from . import common, compared


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--generated", required=True, metavar="DIR", help="generated images")
    common.add_training_images(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="for scores.json and nearest.parquet")
    common.add_heldout(parser)
    common.add_scoring(parser)
    common.add_device(parser)


def run(args: Namespace) -> None:
    check_output(args.output, "output")
    common.check_apart(args, "train", "generated", "heldout", "reference")
    from ietagc_diffusers.eval.image_sets import load_images
    from ietagc_diffusers.eval.score import Tools, score

    tools = Tools(common.protocol_of(args, common.device_of(args)))
    generated, training = load_images(args.generated, "generated"), common.training_set(args)
    reference, heldout = (compared.other_images(args, name, training) for name in ("reference", "heldout"))
    score(generated, training.images, args.output, tools, common.cache_of(args), reference, heldout=heldout)
    say(f"{args.output}/scores.json; for a report: {args.prog} report {args.output}")
