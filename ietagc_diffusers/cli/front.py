"""``ietagc front``."""

from argparse import ArgumentParser, Namespace

from . import common


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        dest="runs",
        metavar="NAME=DIR[,DIR]",
        help="a run's folder, or several of one kind with other seeds; repeat the flag for other runs",
    )
    parser.add_argument("--control", help="name of the plain run; default: the first")
    parser.add_argument("--heldout", required=True, metavar="DIR|ID", help="captioned images that were not trained on")
    common.add_training_images(parser, required=False)
    parser.set_defaults(image_column=None, caption_column=None)  # as the run has them, where it names its training set
    parser.add_argument("--base", metavar="DIR|ID", help="default: the model that the first run started from")
    parser.add_argument("--resolution", type=int, help="default: the first run's")
    parser.add_argument("--max_images", type=int, default=1000, help="of each set; default: 1000")
    parser.add_argument("--draws", type=int, default=3, help="noise draws for each image; default: 3")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="images at once; does not change the losses; default: 8"
    )
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="also draw and score N images at each point")
    parser.add_argument("--points", type=int, help="models of each run, evenly spread; default: all")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps; default: 50")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--scheduler", choices=common.SCHEDULERS, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of the first image; default: 0")
    parser.add_argument("--output", default="front", metavar="DIR", help="default: front")
    common.add_scoring(parser)
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "resolution", "max_images", "draws", "points", "num_inference_steps", "batch_size")
    runs = common.named_folders(args.runs, "run")
    from ietagc_diffusers.eval.front_command import run as run_front
    from ietagc_diffusers.eval.score import Tools

    device = common.device_of(args)
    run_front(args, device, lambda: Tools(common.protocol_of(args, device)), common.cache_of(args), runs)
