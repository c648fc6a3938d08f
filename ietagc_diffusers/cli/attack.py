"""``ietagc attack``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..errors import with_flags
from ..files import check_output
from . import common, compared

ATTACKS = ["loss", "calibrated", "ratio", "sima", "pia", "clid"]  # a copy of the library's, see ``common``


def add_arguments(parser: ArgumentParser) -> None:
    common.add_model(parser)
    common.add_training_images(parser, required=False)
    parser.add_argument(
        "--heldout",
        metavar="DIR|ID",
        help="images that were not trained on and differ from the training images in nothing else, captioned or "
        "labelled as these; default: those that the run held out (--heldout_share, --heldout_dir)",
    )
    parser.add_argument(
        "--base",
        metavar="DIR|ID",
        help="the pipeline that the model was trained from, for calibrated and ratio; default: the one that it records",
    )
    parser.add_argument(
        "--attack",
        action="append",
        choices=ATTACKS,
        default=[],
        dest="attacks",
        help="may be given again; default: all that are defined for the model",
    )
    parser.add_argument("--output", default="attack", metavar="DIR", help="default: attack")
    parser.add_argument("--resolution", type=int, help="default: what the model was trained at, if it records that")
    parser.add_argument("--max_images", type=int, default=1000, help="of each set; default: 1000")
    parser.add_argument("--draws", type=int, default=10, help="noise draws for each image, for losses; default: 10")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="images at once; does not change the scores; default: 8"
    )
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "resolution", "max_images", "draws", "batch_size")
    check_output(args.output, "output")
    common.place_model(args)
    common.check_apart(args, "train", "heldout", "base")
    from ietagc_diffusers.eval.attack import Settings, attack, table

    device = common.device_of(args)
    training = common.training_set(args, args.model)
    heldout = compared.heldout_or_left_out(args, training)
    settings = Settings(tuple(args.attacks), args.draws, args.seed, args.resolution, args.max_images, args.batch_size)
    result = attack(args.model, training, heldout, args.output, settings, args.base, device)
    say(with_flags(f"{table(result)}{args.output}/attack.json, attack.md, roc.png, roc.csv, images.csv", vars(args)))
