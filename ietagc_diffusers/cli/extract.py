"""``ietagc extract``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..errors import with_flags
from ..files import check_output
from . import common

PLAIN_GUIDANCE = 3.0  # a copy of the library's, see ``common``


def add_arguments(parser: ArgumentParser) -> None:
    common.add_model(parser)
    common.add_lora(parser)
    parser.add_argument(
        "--base",
        metavar="DIR|ID",
        help="the pipeline that the model was trained from; default: the one that it records, of a LoRA the model "
        "without it",
    )
    common.add_training_images(parser, required=False)
    parser.add_argument("--output", default="extract", metavar="DIR", help="default: extract")
    group = parser.add_argument_group("drawing images")
    group.add_argument(
        "--guidance", type=float, help="w, how far the model is guided away from its base; default: 3, of a LoRA 5"
    )
    group.add_argument(
        "--correction",
        type=float,
        help="k, the share of the base's noise that is added; default: -0.02, of a LoRA and of flow matching 0",
    )
    group.add_argument(
        "--plain_guidance",
        type=float,
        default=PLAIN_GUIDANCE,
        help="guidance scale of the plain draws from the model and its base; default: 3",
    )
    group.add_argument("--prompts", metavar="FILE", help=".txt, .csv or .jsonl; default: the captions of --train")
    group.add_argument("--num_images", type=int, default=500, help="in each of the three ways; default: 500")
    group.add_argument("--seed", type=int, default=0, help="of the first image; the next image has the next seed")
    group.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps; default: 50")
    group.add_argument("--resolution", type=int, help=common.RESOLUTION_HELP)
    group.add_argument(
        "--scheduler", metavar="NAME[:OPTIONS]", help="see generate; default: ddim, of flow matching the model's own"
    )
    group.add_argument("--batch_size", type=int, default=8, help="images drawn at once; default: 8")
    group.add_argument("--dtype", choices=common.DTYPES, help=common.DTYPE_HELP)
    group = parser.add_argument_group("comparing")
    common.add_descriptor(group)
    group.add_argument("--copy_similarity", type=float, help=common.COPY_HELP)
    common.add_views(group)
    group.add_argument(
        "--num_clusters", type=int, help="of each way's images; default: as many as different training images"
    )
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.check_positive(args, "num_images", "num_inference_steps", "resolution", "batch_size", "num_clusters")
    common.check_range(args, -100, 100, "guidance", "plain_guidance")
    common.check_range(args, -1, 1, "correction", "copy_similarity")
    check_output(args.output, "output")
    common.place_model(args)
    common.check_apart(args, "train", "prompts", "base")
    from ietagc_diffusers.eval.extract import extract, table
    from ietagc_diffusers.eval.fine_tune import FineTune
    from ietagc_diffusers.eval.generate import Settings
    from ietagc_diffusers.eval.protocol import Protocol
    from ietagc_diffusers.eval.tools import Tools

    state, device = common.processes(common.device_of(args))
    settings = Settings(
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        batch_size=args.batch_size,
        resolution=args.resolution,
        scheduler=args.scheduler,
        dtype=common.dtype_of(args, device),
    )
    training = common.training_set(args, args.model, state.is_main_process)
    record = training.record
    tune = FineTune.of(args.model, args.base, args.lora, record)
    guidance = tune.guidance(args.guidance, args.correction)
    prompts = common.prompts_of(args, training.images)
    if args.views is None and args.protocol is None:
        args.views = "training"
    protocol = Protocol(
        name=args.protocol,
        descriptor=args.descriptor,
        copy_similarity=args.copy_similarity,
        fid="none",
        views=args.views,
        center_crop=None if record is None else record.center_crop,
        random_flip=None if record is None else record.random_flip,
        device=device,
    )
    result = extract(
        tune,
        training,
        prompts,
        args.output,
        settings,
        Tools(protocol) if state.is_main_process else None,
        guidance,
        args.plain_guidance,
        args.num_clusters,
        common.cache_of(args),
        device,
        state,
    )
    if result is not None:  # None: a process that only drew
        files = "extract.json, extract.md, sheet.png, clusters.csv"
        say(with_flags(f"{table(result)}{args.output}/{files}", vars(args)))
