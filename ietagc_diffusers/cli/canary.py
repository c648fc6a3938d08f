"""``ietagc canary``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..errors import with_flags
from ..files import check_output
from . import common


def add_arguments(parser: ArgumentParser) -> None:
    common.add_model(parser)
    common.add_training_images(parser, required=False)
    parser.add_argument("--output", default="canary", metavar="DIR", help="default: canary")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of a border; default: 50")
    parser.add_argument(
        "--guidance_scale", type=float, default=3.0, help="of the picture's own caption; default: 3, as the authors'"
    )
    parser.add_argument(
        "--remask_every",
        type=int,
        default=10,
        help="encode the picture with the border of then every this many steps, for models of latents; default: 10",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise that borders are drawn from; default: 0")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="pictures at once; does not change the result; default: 8"
    )
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "steps", "guidance_scale", "remask_every", "batch_size")
    check_output(args.output, "output")
    common.place_model(args)
    common.check_apart(args, "train")
    from ietagc_diffusers.eval.canary import Settings, canary, table

    device = common.device_of(args)
    training = common.training_set(args, args.model)
    settings = Settings(args.steps, args.guidance_scale, args.remask_every, args.seed, args.batch_size)
    result = canary(args.model, training, args.output, settings, device)
    say(with_flags(f"{table(result)}{args.output}/canary.json, canary.md, canary.png, canary.csv", vars(args)))
