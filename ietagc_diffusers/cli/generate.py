"""``ietagc generate``."""

from argparse import ArgumentParser, Namespace

from . import common


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="for the images and their metadata.jsonl")
    common.add_training_images(parser, required=False)
    common.add_generation(parser)
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_apart(args, "train", "prompts")
    from ietagc_diffusers.eval.generate import generate

    state, device = common.processes(common.device_of(args))
    training = common.training_images(args) if args.train else None
    prompts, settings = common.prompts_of(args, training), common.settings_of(args, device)
    generate(args.model, prompts, args.output, settings, device, state)
