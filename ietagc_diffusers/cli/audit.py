"""``ietagc audit``."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import say
from ..errors import UsageError, with_flags
from ..files import check_output
from . import common, compared

if TYPE_CHECKING:
    from ietagc_diffusers.eval.verdict import Limits

MAX_COPY_RATE = 0.01


def add_arguments(parser: ArgumentParser) -> None:
    common.add_training_images(parser, required=False)
    parser.add_argument("--output", default="audit", metavar="DIR", help="default: audit")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max_copy_rate",
        type=float,
        help=f"highest share of copies that passes; default: {MAX_COPY_RATE}, no limit with --max_excess_copy_rate",
    )
    group.add_argument(
        "--max_sim_score",
        type=float,
        help=f"highest Sim Score that passes; default: {common.MAX_SIM_SCORE} with SSCD, no limit with others or with "
        "--max_excess_copy_rate",
    )
    group.add_argument(
        "--max_patch_copy_rate",
        type=float,
        help="with --patches: highest share of images with local copies that passes; default: no limit",
    )
    common.add_heldout(group)
    group.add_argument(
        "--max_excess_copy_rate",
        type=float,
        help="with --heldout: how much the share of copies may exceed that of the held-out pictures; default: no limit",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="let the 95%% intervals decide: exit with 4 (inconclusive) where one reaches over its limit",
    )
    parser.add_argument(
        "--local_masks",
        action="store_true",
        help="show in the report where the most similar images depart from the model's base; loads both once more",
    )
    parser.add_argument(
        "--base",
        metavar="DIR|ID",
        help="for --local_masks: the pipeline that the model was trained from; default: the one that it records",
    )
    parser.add_argument("--card", action="store_true", help="put the summary into the README.md of the model's folder")
    parser.add_argument("--github", action="store_true", help="write a summary and annotation for GitHub Actions")
    common.add_generation(parser)
    common.add_scoring(parser)
    common.add_device(parser)


def run(args: Namespace) -> int:
    _check_limits(args)
    if args.base is not None and not args.local_masks:
        raise UsageError(f"`base` {args.base}: is compared with for `local_masks` only; give that too")
    check_output(args.output, "output")
    common.check_descriptor_named(args)
    common.place_model(args)
    common.check_apart(args, "train", "heldout", "reference", "prompts", "base")
    from ietagc_diffusers.eval.audit import audit, card_path, check_plain
    from ietagc_diffusers.eval.score import Tools

    state, device = common.processes(common.device_of(args))
    settings = common.settings_of(args, device)
    if args.card:
        card_path(args.model)
        check_plain(settings)
    training = common.training_set(args, args.model, state.is_main_process)
    masks = None
    if args.local_masks:
        from ietagc_diffusers.eval.fine_tune import FineTune

        masks = FineTune.of(args.model, args.base, args.lora, training.record).targets()
    reference, heldout = (compared.other_images(args, name, training) for name in ("reference", "heldout"))
    prompts = common.prompts_of(args, training.images)
    if args.views is None and args.protocol is None:
        args.views = "training"
    protocol = common.protocol_of(args, device, training.record)
    # Only the process that scores needs the descriptor; it is loaded before anything is drawn, to fail early.
    tools = Tools(protocol) if state.is_main_process else None
    verdict = audit(
        args.model,
        training.images,
        prompts,
        args.output,
        settings,
        tools,
        _limits(args, tools is not None and tools.descriptor.sscd),
        common.cache_of(args),
        device,
        state,
        reference,
        heldout,
        args.strict,
        training.warnings,
        training.notes,
        prompts_file=Path(args.prompts).name if args.prompts else None,
        card=args.card,
        github=args.github,
        masks=masks,
        tell=lambda verdict: say(with_flags(verdict.sentence, vars(args))),
    )
    return 0 if verdict is None else verdict.exit_code  # None: a process that only drew


def _check_limits(args: Namespace) -> None:
    common.check_range(args, 0, 1, "max_copy_rate", "max_patch_copy_rate", "max_excess_copy_rate")
    common.check_range(args, -1, 1, "max_sim_score")
    if args.max_patch_copy_rate is not None and not args.patches:
        raise UsageError(
            f"`max_patch_copy_rate` {args.max_patch_copy_rate}: without `patches` local copies are not looked for"
        )
    if args.max_excess_copy_rate is not None and not args.heldout:
        raise UsageError(
            f"`max_excess_copy_rate` {args.max_excess_copy_rate}: needs pictures to compare with; give `heldout`"
        )


def _limits(args: Namespace, sscd: bool) -> "Limits":
    """The given limits, and the default ones unless the limit is relative to held-out pictures."""
    from ietagc_diffusers.eval.verdict import Limits

    copy_rate, sim_score = args.max_copy_rate, args.max_sim_score
    if args.max_excess_copy_rate is None:
        copy_rate = MAX_COPY_RATE if copy_rate is None else copy_rate
        sim_score = common.MAX_SIM_SCORE if sim_score is None and sscd else sim_score
    return Limits(copy_rate, sim_score, args.max_patch_copy_rate, args.max_excess_copy_rate)
