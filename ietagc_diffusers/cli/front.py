"""``ietagc front``."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..console import say
from ..errors import UsageError
from ..run_folder import RunFolder
from . import common, compared


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
    parser.add_argument(
        "--heldout",
        metavar="DIR|ID",
        help="images that no run was trained on, captioned or labelled as the others; default: those that the first "
        "run held out (--heldout_share, --heldout_dir)",
    )
    common.add_training_images(parser, required=False)
    parser.add_argument("--base", metavar="DIR|ID", help="default: the model that the first run started from, if any")
    parser.add_argument("--resolution", type=int, help="default: the first run's")
    parser.add_argument("--max_images", type=int, default=1000, help="of each set; default: 1000")
    parser.add_argument("--draws", type=int, default=3, help="noise draws for each image; default: 3")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="images at once; does not change the losses; default: 8"
    )
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="also draw and score N images at each point")
    parser.add_argument(
        "--levels",
        type=int,
        default=10,
        metavar="N",
        help="also give losses and gap by noise level, in N equal parts of the range of levels; 1: only the means; "
        "default: 10",
    )
    parser.add_argument("--points", type=int, help="models of each run, evenly spread; default: all")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps; default: 50")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--scheduler", metavar="NAME[:OPTIONS]", help=common.SCHEDULER_HELP)
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of the first image; default: 0")
    parser.add_argument("--output", default="front", metavar="DIR", help="default: front")
    common.add_scoring(parser)
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "resolution", "max_images", "draws", "levels", "points")
    common.check_positive(args, "num_inference_steps", "batch_size")
    _check_sample(args)
    named = common.named_folders(args.runs, "run")
    from ietagc_diffusers.eval.front import Sampling, front
    from ietagc_diffusers.eval.generate import Settings
    from ietagc_diffusers.eval.score import Tools

    device = common.device_of(args)
    runs = {name: [Path(folder) for folder in folders.split(",")] for name, folders in named}
    first = next(iter(runs.values()))[0]
    folders = [folder for some in runs.values() for folder in some]
    configs = [RunFolder(folder).config() for folder in folders]
    label_column = next((column for config in configs if (column := config.get("label_column"))), None)
    for folder in folders:
        common.check_apart(args, "train", "heldout", "reference", model=folder)
    training = common.training_set(args, first, label_column=label_column)
    heldout = compared.heldout_or_left_out(args, training, label_column)
    training = compared.in_common(args, training, heldout, {str(one): one for one in folders}, label_column)
    sampling = None
    if args.sample:
        settings = Settings(
            seed=args.seed,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            scheduler=args.scheduler,
            batch_size=args.batch_size,
            dtype="float16" if device.startswith("cuda") else "float32",
        )
        tools = Tools(common.protocol_of(args, device))
        reference = compared.other_images(args, "reference", training)
        sampling = Sampling(args.sample, settings, tools, reference, common.cache_of(args))
    output = Path(args.output)
    result = front(
        runs,
        training.images,
        heldout,
        output,
        base=args.base,
        control=args.control,
        resolution=args.resolution,
        max_images=args.max_images,
        points=args.points,
        draws=args.draws,
        seed=args.seed,
        batch_size=args.batch_size,
        levels=args.levels,
        device=device,
        sampling=sampling,
    )
    by_level = ", front_levels.png, front_levels.csv" if args.levels > 1 else ""
    say(f"{result.markdown}\n{output}/front.png, front.csv, front.md{by_level}")


def _check_sample(args: Namespace) -> None:
    """Raise ``UsageError`` if what is drawn could not be compared at equal Fréchet distance."""
    if args.sample < 0:
        raise UsageError(f"`sample` {args.sample}: must be 0 (draw nothing), or at least 2")
    if args.sample == 1:
        raise UsageError("`sample` 1: one image has no Fréchet distance, over which scores are shown; give at least 2")
    if args.sample and args.fid == "none":
        raise UsageError(
            f"`fid` none: `sample` shows scores over the Fréchet distance; leave `fid` out (pixel-8), or `sample` "
            f"{args.sample}"
        )
