"""``ietagc detect``."""

from argparse import ArgumentParser, Namespace

from ..console import say
from ..errors import UsageError
from . import common


def add_arguments(parser: ArgumentParser) -> None:
    common.add_model(parser)
    common.add_lora(parser)
    parser.add_argument(
        "--prompts", metavar="FILE", help=".txt, .csv or .jsonl; a column `memorized` holds true labels, if known"
    )
    parser.add_argument(
        "--memorized", metavar="FILE", help="prompts known to be memorized; with --others, to measure AUC and TPR"
    )
    parser.add_argument("--others", metavar="FILE", help="prompts known not to be memorized")
    parser.add_argument("--output", default="detect", metavar="DIR", help="default: detect")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps to average over; default: 1")
    parser.add_argument("--generations", type=int, default=4, help="of each prompt, to average over; default: 4")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="of a whole generation; default: 50")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--resolution", type=int, help=common.RESOLUTION_HELP)
    parser.add_argument("--seed", type=int, default=0, help="of the first generation; default: 0")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at once; default: 16")
    parser.add_argument("--dtype", choices=common.DTYPES, help=common.DTYPE_HELP)
    common.add_device(parser)


def run(args: Namespace) -> None:
    common.place_model(args)
    common.check_positive(args, "steps", "generations", "num_inference_steps", "batch_size", "resolution")
    common.check_apart(args, "prompts", "memorized", "others")
    prompts, labels = _prompts(args)
    from ietagc_diffusers.eval.detect import Detection, detect

    device = common.device_of(args)
    settings = Detection(
        args.steps,
        args.generations,
        args.num_inference_steps,
        args.guidance_scale,
        args.seed,
        args.resolution,
        tuple(args.lora),
    )
    dtype = common.dtype_of(args, device)
    result = detect(args.model, prompts, args.output, settings, labels, device, dtype, args.batch_size)
    if labels is not None:
        rate, threshold = result["tpr_at_1_percent_fpr"], result["threshold"]
        say(f"AUC {result['auc']:.4f}, TPR {rate:.4f} at 1% FPR (threshold {threshold:.4g})")
    say(f"{args.output}/detect.csv, detect.json, detect.png")


def _prompts(args: Namespace) -> tuple[list[str], list[bool] | None]:
    """The prompts, and whether each is memorized, if that is known."""
    from ietagc_diffusers.eval.prompts import read_labels, read_prompts

    if bool(args.memorized) != bool(args.others) or bool(args.prompts) == bool(args.memorized):
        raise UsageError("`prompts`, or `memorized` and `others`: give either one file of prompts or these two")
    if args.prompts:
        return [prompt.text for prompt in read_prompts(args.prompts)], read_labels(args.prompts)
    memorized, others = ([p.text for p in read_prompts(getattr(args, s), s)] for s in ("memorized", "others"))
    return memorized + others, [True] * len(memorized) + [False] * len(others)
