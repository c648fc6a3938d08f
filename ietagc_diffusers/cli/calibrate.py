"""``ietagc calibrate``."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..console import say
from ..files import check_output, write_json
from . import common

DESCRIPTION = """
Measure the similarity to the nearest training image that at most a given share of innocent images exceed. Innocent
images are of the same kind and known not to be copies, such as other pictures of the same captions. Without --innocent
each training image is compared with the others; near duplicates are left out. Give the result to score and audit as
--copy_similarity.
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--train", required=True, metavar="DIR|ID", help="training images: a folder or a dataset")
    common.add_columns(parser)
    parser.add_argument(
        "--innocent",
        metavar="DIR|ID",
        help="images of the same kind that are not copies; default: the training images, compared with each other",
    )
    parser.add_argument(
        "--false_positives",
        type=float,
        default=0.01,
        help="share of innocent images that may exceed the threshold; default: 0.01",
    )
    common.add_descriptor(parser)
    common.add_views(parser)
    parser.add_argument("--output", default="calibration.json", metavar="FILE", help="default: calibration.json")
    common.add_device(parser)


def run(args: Namespace) -> None:
    check_output(args.output, "output", file=True)
    from ietagc_diffusers.eval.calibrate import calibrate
    from ietagc_diffusers.eval.image_sets import load_images
    from ietagc_diffusers.eval.views import ALL_VIEWS
    from ietagc_diffusers.sscd import load_descriptor

    training = common.training_set(args).images
    innocent = load_images(args.innocent, "innocent", args.image_column or "image") if args.innocent else None
    descriptor = load_descriptor(args.descriptor, args.protocol, common.device_of(args))
    views = None if args.views == "image" else ALL_VIEWS
    result = calibrate(descriptor, training, innocent, args.false_positives, common.cache_of(args), views)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"version": __version__} | asdict(result))
    say(f"{result.sentence} ({args.output})")
