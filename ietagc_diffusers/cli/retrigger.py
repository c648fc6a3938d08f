"""``ietagc retrigger``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..errors import with_flags
from ..files import check_output
from . import common, compared

STARTS = ["caption", "empty", "noise"]  # copies of the library's, see ``common``
DTYPES = ["float32", "bfloat16"]


def add_arguments(parser: ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=DIR|FILE|ID",
        help="another model, to compare with --model, which may have a NAME= too, on images that both were trained on; "
        "may be given again",
    )
    common.add_training_images(parser, required=False)
    parser.add_argument(
        "--heldout",
        metavar="DIR|ID",
        help="images that were not trained on and differ from the training images in nothing else, captioned as these; "
        "default: those that the run held out (--heldout_share, --heldout_dir)",
    )
    parser.add_argument("--output", default="retrigger", metavar="DIR", help="default: retrigger")
    parser.add_argument("--max_images", type=int, default=20, help="of each set; default: 20")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--start",
        choices=STARTS,
        default="caption",
        help="from the embedding of the image's caption (default), of the empty caption, or from noise of the same "
        "mean and spread",
    )
    search.add_argument("--max_steps", type=int, default=200, help="after which a search ends; default: 200")
    search.add_argument("--check_every", type=int, default=10, help="steps between drawn images; default: 10")
    search.add_argument(
        "--learning_rate",
        type=float,
        default=0.1,
        help="of Adam, in standard deviations of the caption's embedding; default: 0.1",
    )
    search.add_argument("--draws", type=int, default=8, help="noise draws in a step; default: 8")
    search.add_argument(
        "--gradient_checkpointing", action="store_true", help="less memory, for about a third more time"
    )
    drawing = parser.add_argument_group("drawing images")
    drawing.add_argument(
        "--images_per_check", type=int, default=1, help="drawn each time; the most similar one counts; default: 1"
    )
    drawing.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps; default: 50")
    drawing.add_argument("--guidance_scale", type=float, default=7.5, help="default: 7.5")
    drawing.add_argument("--scheduler", metavar="NAME[:OPTIONS]", help=common.SCHEDULER_HELP)
    drawing.add_argument("--resolution", type=int, help="default: what the model was trained at, if it records that")
    drawing.add_argument("--seed", type=int, default=0, help="of all noise, and of which images are taken; default: 0")
    drawing.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the model's arithmetic; default: float32"
    )
    similarity = parser.add_argument_group("similarity")
    common.add_descriptor(similarity, cached=False)
    similarity.add_argument(
        "--copy_similarity",
        type=float,
        help="an image above it counts as drawn, see calibrate; default: 0.5 (SSCD), 0.9 (pixel), none for other files",
    )
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(
        args, "max_images", "max_steps", "check_every", "learning_rate", "draws", "images_per_check",
        "num_inference_steps", "guidance_scale", "resolution",
    )  # fmt: skip
    common.check_range(args, -1, 1, "copy_similarity")
    check_output(args.output, "output")
    models = dict(common.named_folders([args.model, *args.compare], "compare"))
    first, args.model = next(iter(models.items()))
    common.place_model(args)
    models[first] = args.model
    for place in models.values():
        common.check_apart(Namespace(**vars(args) | {"model": place}), "train", "heldout")
    from ietagc_diffusers.eval.generate import Settings
    from ietagc_diffusers.eval.retrigger import retrigger, table
    from ietagc_diffusers.eval.trigger_search import Search
    from ietagc_diffusers.sscd import load_descriptor

    device = common.device_of(args)
    drawing = Settings(
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.images_per_check,
        resolution=args.resolution,
        scheduler=args.scheduler,
        dtype=args.dtype,
    )
    names = ("start", "learning_rate", "max_steps", "check_every", "draws", "images_per_check")
    search = Search(
        **{name: getattr(args, name) for name in names},
        gradient_checkpointing=args.gradient_checkpointing,
        drawing=drawing,
    )
    descriptor = load_descriptor(args.descriptor, args.protocol, device)
    training = common.training_set(args, args.model)
    heldout = compared.heldout_or_left_out(args, training)
    training = compared.in_common(args, training, heldout, models)
    result = retrigger(
        models,
        training,
        heldout,
        args.output,
        descriptor,
        search,
        args.copy_similarity,
        args.resolution,
        args.max_images,
        device,
    )
    written = "retrigger.json, retrigger.md, retrigger.png, sheet.png, images.csv, drawn/"
    say(with_flags(f"{table(result)}{args.output}/{written}", vars(args)))
