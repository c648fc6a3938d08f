"""``ietagc audit``."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import UsageError, with_flags
from ..files import check_output
from . import common


def add_arguments(parser: ArgumentParser) -> None:
    common.add_training_images(parser, required=False)
    parser.add_argument("--output", default="audit", metavar="DIR", help="default: audit")
    parser.add_argument(
        "--max_copy_rate", type=float, default=0.01, help="highest share of copies that passes; default: 0.01"
    )
    parser.add_argument(
        "--max_sim_score",
        type=float,
        help=f"highest Sim Score that passes; default: {common.MAX_SIM_SCORE} with SSCD, no limit with pixel",
    )
    parser.add_argument(
        "--max_patch_copy_rate",
        type=float,
        help="with --patches: highest share of images with local copies that passes; default: no limit",
    )
    parser.add_argument("--card", action="store_true", help="put the summary into the README.md of the model's folder")
    parser.add_argument("--github", action="store_true", help="write a summary and annotation for GitHub Actions")
    common.add_generation(parser)
    common.add_scoring(parser)
    common.add_device(parser)


def run(args: Namespace) -> int:
    common.check_range(args, 0, 1, "max_copy_rate", "max_patch_copy_rate")
    common.check_range(args, -1, 1, "max_sim_score")
    if args.max_patch_copy_rate is not None and not args.patches:
        raise UsageError(
            f"`max_patch_copy_rate` {args.max_patch_copy_rate}: without `patches` local copies are not looked for"
        )
    check_output(args.output, "output")
    from ietagc_diffusers.eval.audit import Limits, audit, card_path, report_to_github, write_card
    from ietagc_diffusers.eval.score import Tools

    if args.card:
        card_path(args.model)
    state, device = common.processes(common.device_of(args))
    training = common.training_set(args, args.model, state.is_main_process)
    reference = common.reference_images(args)
    prompts, settings = common.prompts_of(args, training.images), common.settings_of(args, device)
    protocol = common.protocol_of(args, device)
    # Only the process that scores needs the descriptor; it is loaded before anything is drawn, to fail early.
    tools = Tools(protocol) if state.is_main_process else None
    max_sim_score = args.max_sim_score
    if max_sim_score is None and tools is not None and tools.descriptor.name != "pixel":
        max_sim_score = common.MAX_SIM_SCORE
    limits = Limits(args.max_copy_rate, max_sim_score, args.max_patch_copy_rate)
    output, cache = Path(args.output), common.cache_of(args)
    verdict = audit(
        args.model,
        training.images,
        prompts,
        output,
        settings,
        tools,
        limits,
        cache,
        device,
        state,
        reference,
        warnings=training.warnings,
        notes=training.notes,
    )
    if verdict is None:  # a process that only drew
        return 0
    summary = (output / "summary.md").read_text(encoding="utf-8")
    if args.card:
        write_card(args.model, summary)
    if args.github:
        report_to_github(summary, verdict)
    print(f"{with_flags(verdict.sentence, vars(args))}\n{output / 'report.html'}")
    return verdict.exit_code
