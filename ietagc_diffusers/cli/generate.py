"""``ietagc generate``."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from ..console import say
from . import common

if TYPE_CHECKING:
    from ietagc_diffusers.eval.image_sets import ImageSet


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="for the images and their metadata.jsonl")
    common.add_training_images(parser, required=False)
    common.add_generation(parser)
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.place_model(args)
    common.check_apart(args, "train", "prompts")
    from ietagc_diffusers.eval.generate import generate
    from ietagc_diffusers.eval.pipelines import is_unprompted

    state, device = common.processes(common.device_of(args))
    settings = common.settings_of(args, device)
    training = None
    if not args.prompts and not is_unprompted(args.model):
        training = _training_images(args, state.is_main_process)
    prompts = common.prompts_of(args, training)
    generate(args.model, prompts, args.output, settings, device, state)
    if state.is_main_process:
        say(f"{args.output}: {len(prompts)} images")


def _training_images(args: Namespace, is_main: bool) -> "ImageSet | None":
    """The images whose captions are drawn; None if there are none."""
    from ietagc_diffusers.eval.trained_on import parts_of

    if not args.train and not parts_of(args.model, args.lora)[0]:
        return None
    return common.training_set(args, args.model, is_main).images
