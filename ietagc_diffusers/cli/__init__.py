"""``python -m eval``: what each command does."""

import json
import math
import sys
from pathlib import Path

from ietagc_diffusers.errors import UsageError, with_flags
from ietagc_diffusers.sscd import DescriptorError

from .evaluation_arguments import build_parser

WRONG_USE = 2


def _device(args):
    import torch

    if args.device:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
        return args.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _positive(args, *flags):
    for flag in flags:
        value = getattr(args, flag, None)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{flag} {value}: must be more than 0, and finite")


def _within(args, low, high, *flags):
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:  # not a number is not within
            raise UsageError(f"--{flag} {value}: must be from {low} to {high}")


def _settings(args, device):
    from ietagc_diffusers.eval.generate import Settings

    _positive(args, "num_images", "num_inference_steps", "resolution", "batch_size")
    dtype = args.dtype or ("float16" if str(device).startswith("cuda") else "float32")
    return Settings(
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.batch_size,
        resolution=args.resolution,
        scheduler=args.scheduler,
        negative_prompt=args.negative_prompt,
        mitigation=_chain(args.mitigation),
        dtype=dtype,
    )


def _chain(text):
    """The chain as it was given, once it is known to be one."""
    if text is None:
        return None
    from ietagc_diffusers.mitigations import parse_mitigations

    try:
        parse_mitigations(text)
    except UsageError as error:
        raise UsageError(f"--mitigation {text}: {error}") from error
    return text


def _protocol(args, device):
    from ietagc_diffusers.eval.score import Protocol

    _positive(args, "pixels", "scoring_batch_size", "max_memory")
    _within(args, -1, 1, "copy_similarity")
    return Protocol(
        name=args.protocol,
        descriptor=args.descriptor,
        copy_similarity=args.copy_similarity,
        l2=args.l2,
        pixels=args.pixels,
        clip=args.clip,
        clip_preprocess=args.clip_preprocess,
        fid=args.fid,
        fid_antialias=args.fid_antialias,
        patches=args.patches,
        distinct=args.distinct,
        index=args.index,
        device=device,
        batch_size=args.scoring_batch_size,
        max_memory=int(args.max_memory * 2**30),
    )


def _cache(args):
    from ietagc_diffusers.eval.features import default_cache

    if args.feature_cache == "none":
        return None
    return Path(args.feature_cache) if args.feature_cache else default_cache()


def _training_images(args):
    from ietagc_diffusers.eval.image_sets import load_images

    return load_images(args.train, "--train", args.image_column, args.caption_column)


def _reference(args):
    from ietagc_diffusers.eval.image_sets import load_images

    return load_images(args.reference, "--reference") if args.reference else None


def _prompts(args, training):
    from ietagc_diffusers.eval.prompts import caption_prompts, choose, read_prompts

    if args.prompts:
        prompts = read_prompts(args.prompts)
    elif training is not None:
        prompts = caption_prompts(training, "--train")
    else:
        raise UsageError("--prompts or --train: give the prompts, or the training images whose captions serve")
    return choose(prompts, args.num_images or len(prompts), args.seed)


def _processes(device):
    """accelerate's state, and the device of this process."""
    from accelerate import PartialState

    state = PartialState(cpu=not str(device).startswith("cuda"))
    return state, str(state.device) if str(device) == "cuda" else device


def _generate(args):
    from ietagc_diffusers.eval.generate import generate

    state, device = _processes(_device(args))
    training = _training_images(args) if args.train else None
    generate(args.model, _prompts(args, training), args.output, _settings(args, device), device, state)


def _tools(protocol):
    from ietagc_diffusers.eval.score import Tools

    return Tools(protocol)


def _score(args):
    from ietagc_diffusers.eval.image_sets import load_images
    from ietagc_diffusers.eval.score import score
    from ietagc_diffusers.files import check_output

    check_output(args.output, "--output")
    tools = _tools(_protocol(args, _device(args)))
    generated = load_images(args.generated, "--generated")
    score(generated, _training_images(args), args.output, tools, _cache(args), _reference(args))
    print(f"{args.output}/scores.json; `python -m eval report {args.output}` shows it")


def _named(values, flag):
    """[(name, folder)] of NAME=DIR; without a name the folder's own serves."""
    pairs = []
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or Path(value).exists():
            name, folder = Path(value.split(",")[0]).resolve().name, value
        if not folder:
            raise UsageError(f"{flag} {value}: should be NAME=DIR")
        if name in dict(pairs):
            raise UsageError(f"{flag} {value}: two of them are named {name}: write NAME={folder}")
        pairs.append((name, folder))
    return pairs


def _report(args):
    from ietagc_diffusers.eval.report import Scored, write_report
    from ietagc_diffusers.files import check_output

    _positive(args, "max_pairs")
    check_output(args.output, "--output", file=True)
    scored = [Scored.load(folder, name) for name, folder in _named(args.scores, "report")]
    print(write_report(scored, args.output, args.max_pairs, args.title))


def _audit(args):
    from ietagc_diffusers.eval.audit import Limits, audit, card_path, report_to_github, write_card
    from ietagc_diffusers.files import check_output

    _within(args, 0, 1, "max_copy_rate", "max_patch_copy_rate")
    _within(args, -1, 1, "max_sim_score")
    if args.max_patch_copy_rate is not None and not args.patches:
        raise UsageError(
            f"--max_patch_copy_rate {args.max_patch_copy_rate}: local copies are not looked for; add --patches"
        )
    check_output(args.output, "--output")
    if args.card:
        card_path(args.model)
    state, device = _processes(_device(args))
    training, reference = _training_images(args), _reference(args)
    prompts, settings, protocol = _prompts(args, training), _settings(args, device), _protocol(args, device)
    tools = _tools(protocol) if state.is_main_process else None
    max_sim_score = args.max_sim_score
    if max_sim_score is None and tools is not None and tools.descriptor.name != "pixel":
        max_sim_score = 0.5
    limits = Limits(args.max_copy_rate, max_sim_score, args.max_patch_copy_rate)
    output = Path(args.output)
    verdict = audit(
        args.model, training, prompts, output, settings, tools, limits, _cache(args), device, state, reference
    )
    if verdict is None:
        return 0
    summary = (output / "summary.md").read_text(encoding="utf-8")
    if args.card:
        write_card(args.model, summary)
    if args.github:
        report_to_github(summary, verdict)
    print(f"{verdict.sentence}\n{output / 'report.html'}")
    return verdict.exit_code


def _front(args):
    from ietagc_diffusers.eval.front import Sampling, front, training_images
    from ietagc_diffusers.eval.generate import Settings
    from ietagc_diffusers.eval.image_sets import load_images

    _positive(args, "resolution", "max_images", "draws", "points", "num_inference_steps", "batch_size")
    device = _device(args)
    runs = {name: [Path(folder) for folder in folders.split(",")] for name, folders in _named(args.runs, "--run")}
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    named = {key: value for key, value in columns.items() if value is not None}
    if args.train:
        training = load_images(args.train, "--train", **named)
    else:
        training = training_images(next(iter(runs.values()))[0], args.image_column, args.caption_column)
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
        sampling = Sampling(args.sample, settings, _tools(_protocol(args, device)), _reference(args), _cache(args))
    output = Path(args.output)
    result = front(
        runs,
        training,
        load_images(args.heldout, "--heldout", **named),
        output,
        base=args.base,
        control=args.control,
        resolution=args.resolution,
        max_images=args.max_images,
        points=args.points,
        draws=args.draws,
        seed=args.seed,
        batch_size=args.batch_size,
        device=device,
        sampling=sampling,
    )
    print(f"{result.markdown}\n{output}/front.png, front.csv, front.md")


def _detect(args):
    from ietagc_diffusers.eval.detect import Detection, detect
    from ietagc_diffusers.eval.prompts import read_labels, read_prompts

    _positive(args, "steps", "generations", "num_inference_steps", "batch_size", "resolution")
    if bool(args.memorized) != bool(args.others) or bool(args.prompts) == bool(args.memorized):
        raise UsageError("--prompts, or --memorized and --others: give the prompts, or both kinds of known ones")
    if args.prompts:
        prompts, labels = [p.text for p in read_prompts(args.prompts)], read_labels(args.prompts)
    else:
        kinds = [[p.text for p in read_prompts(getattr(args, f), f"--{f}")] for f in ("memorized", "others")]
        prompts, labels = kinds[0] + kinds[1], [True] * len(kinds[0]) + [False] * len(kinds[1])
    device = _device(args)
    dtype = args.dtype or ("float16" if device.startswith("cuda") else "float32")
    settings = Detection(
        args.steps, args.generations, args.num_inference_steps, args.guidance_scale, args.seed, args.resolution
    )
    result = detect(args.model, prompts, args.output, settings, labels, device, dtype, args.batch_size)
    if labels is not None:
        rate, threshold = result["tpr_at_1_percent_fpr"], result["threshold"]
        print(f"AUC {result['auc']:.4f}, TPR at 1% FPR {rate:.4f} over {threshold:.4g}")
    print(f"{args.output}/detect.csv, detect.json, detect.png")


def _benchmark(args):
    from ietagc_diffusers.eval.benchmark import Benchmark, Cell, run

    _positive(args, "jobs")
    device, cache = _device(args), _cache(args)
    if args.cell:
        return Benchmark(args.config).run_cell(Cell(*json.loads(args.cell)), device, cache)
    failed = run(args.config, args.jobs, device, cache, args.tables)
    output = Benchmark(args.config).output
    print((output / "tables.md").read_text(encoding="utf-8"))
    print(f"{output}/tables.md, tables.csv, tables.tex, results.json")
    return int(failed > 0)


def _figures(args):
    from ietagc_diffusers.eval.paper_figures import draw_all
    from ietagc_diffusers.eval.report import Scored

    training = _training_images(args) if args.train else None
    scored = [Scored.load(folder, name) for name, folder in _named(args.scores, "--scores")]
    run, output = args.run and Path(args.run), Path(args.output)
    for name, missing in draw_all(output, scored, run, training, _device(args)).items():
        print(f"{name} not drawn: {with_flags(missing, vars(args))}" if missing else output / name)


COMMANDS = {
    "audit": _audit,
    "generate": _generate,
    "score": _score,
    "report": _report,
    "front": _front,
    "figures": _figures,
    "detect": _detect,
    "benchmark": _benchmark,
}


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args) or 0
    except (UsageError, DescriptorError) as error:
        print(f"python -m eval {args.command}: error: {with_flags(str(error), {*vars(args), 'run'})}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
