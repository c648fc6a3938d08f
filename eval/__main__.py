"""``python -m eval``: does the model give its training images back?"""

import argparse
import sys
from pathlib import Path

from ietagc_diffusers.config import UsageError
from sscd import DescriptorError

WRONG_USE = 2


def build_parser():
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def _command(commands, name, help, handler):
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(handler=handler)
    return parser


def _add_device(parser):
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")


def _add_generation(parser):
    group = parser.add_argument_group("drawing")
    group.add_argument("--model", required=True, metavar="DIR|ID", help="pipeline folder or Hub id")
    group.add_argument("--prompts", metavar="FILE", help=".txt, .csv or .jsonl; default: the captions of --train")
    group.add_argument("--num_images", type=int, help="default: one a prompt")
    group.add_argument("--seed", type=int, default=0, help="of the first image; the next one has the next seed")
    group.add_argument("--num_inference_steps", type=int, default=50)
    group.add_argument("--guidance_scale", type=float, default=7.5)
    group.add_argument("--resolution", type=int, help="default: the model's own")
    group.add_argument("--scheduler", choices=["ddim", "ddpm", "dpm", "euler", "pndm"], help="default: the model's own")
    group.add_argument("--negative_prompt")
    group.add_argument("--mitigation", metavar="CHAIN", help="at inference, such as rt:num_words=4+gni")
    group.add_argument("--batch_size", type=int, default=8)
    group.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on cuda, else float32"
    )


def _add_scoring(parser):
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--protocol",
        help="dcr (the paper's tables; default), sscd (SSCD's authors), or a preprocessing: sscd-288, sscd-320",
    )
    group.add_argument(
        "--descriptor",
        default="auto",
        help="sscd_disc_large or sscd_disc_mixup (downloaded if need be), a TorchScript file, pixel; auto (default) is "
        "the protocol's SSCD if it is on this machine, else pixel",
    )
    group.add_argument(
        "--copy_similarity", type=float, help="over it an image is a copy; default: 0.5 (SSCD), 0.9 (pixel)"
    )
    group.add_argument("--l2", default="iet-agc", choices=["iet-agc", "paper"], help="MQ's l2 ratio")
    group.add_argument(
        "--pixels", type=int, help="side of the images for l2; default: the generated images', at most 64"
    )
    group.add_argument("--clip", metavar="MODEL:TAG|FILE", help="CLIP score by open_clip, such as ViT-B-16:openai")
    group.add_argument("--clip_preprocess", choices=["own", "dcr"], help="default: dcr under protocol dcr")
    group.add_argument("--fid", default="pixel-8", help="inception, inception:FILE, pixel-8 (default) or none")
    group.add_argument("--fid_antialias", action="store_true", help="shrink with antialiasing (torchmetrics' default)")
    group.add_argument("--reference", metavar="DIR|ID", help="images for the Fréchet distance; default: --train")
    group.add_argument("--patches", action="store_true", help="also look for local copies: crops against crops")
    group.add_argument("--distinct", action="store_true", help="count exact duplicates among training images once")
    group.add_argument("--index", default="auto", choices=["auto", "exact", "faiss"], help="nearest-neighbour search")
    group.add_argument("--scoring_batch_size", type=int, default=32)
    group.add_argument("--max_memory", type=float, default=2.0, metavar="GIB", help="working memory of the search")
    group.add_argument("--feature_cache", metavar="DIR|none", help="default: ~/.cache/ietagc/features")


def _add_training_images(parser, required=True):
    parser.add_argument("--train", required=required, metavar="DIR|ID", help="training images: a folder, or a dataset")
    parser.add_argument("--image_column", default="image", help="of a dataset")
    parser.add_argument("--caption_column", default="text", help="of metadata.jsonl or a dataset")


def _add_audit(commands):
    parser = _command(commands, "audit", "generate, score, report, and exit with 3 over the limits", _audit)
    _add_training_images(parser)
    parser.add_argument("--output", default="audit", metavar="DIR", help="default: audit")
    parser.add_argument("--max_copy_rate", type=float, default=0.01, help="default: 0.01")
    parser.add_argument("--max_sim_score", type=float, help="default: 0.5 with SSCD; none with pixel")
    parser.add_argument("--github", action="store_true", help="summary and annotation for GitHub Actions")
    _add_generation(parser)
    _add_scoring(parser)
    _add_device(parser)


def _add_generate(commands):
    parser = _command(commands, "generate", "draw images, each from its own seed; goes on where it stopped", _generate)
    parser.add_argument("--output", required=True, metavar="DIR")
    _add_training_images(parser, required=False)
    _add_generation(parser)
    _add_device(parser)


def _add_score(commands):
    parser = _command(commands, "score", "compare generated images with the training set", _score)
    parser.add_argument("--generated", required=True, metavar="DIR")
    _add_training_images(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="for scores.json and nearest.parquet")
    _add_scoring(parser)
    _add_device(parser)


def _add_report(commands):
    parser = _command(commands, "report", "one HTML file of one or more scored models", _report)
    parser.add_argument("scores", nargs="+", metavar="[NAME=]DIR", help="folders that score wrote")
    parser.add_argument("--output", default="report.html", metavar="FILE")
    parser.add_argument("--max_pairs", type=int, default=200, help="pairs shown of each model")
    parser.add_argument("--title")


def _add_front(commands):
    parser = _command(commands, "front", "held-out loss against the gap along runs, against plain training", _front)
    parser.add_argument(
        "--run", action="append", required=True, dest="runs", metavar="NAME=DIR[,DIR]", help="run folders, one a seed"
    )
    parser.add_argument("--control", help="the plain run's name; default: the first")
    parser.add_argument("--heldout", required=True, metavar="DIR|ID", help="captioned images that were not trained on")
    _add_training_images(parser, required=False)
    parser.add_argument("--base", metavar="DIR|ID", help="default: what the first run started from")
    parser.add_argument("--resolution", type=int, help="default: the first run's")
    parser.add_argument("--max_images", type=int, default=1000, help="of each set")
    parser.add_argument("--draws", type=int, default=3, help="of noise an image")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="also draw and score N images at each point")
    parser.add_argument("--points", type=int, help="models of each run, evenly spread; default: all")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--scheduler", choices=["ddim", "ddpm", "dpm", "euler", "pndm"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="front", metavar="DIR")
    _add_scoring(parser)
    _add_device(parser)


def _add_benchmark(commands):
    parser = _command(commands, "benchmark", "a matrix of runs, and the paper's tables of it", _benchmark)
    parser.add_argument("--config", required=True, metavar="FILE", help="such as configs/benchmark_demo.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--feature_cache", metavar="DIR|none", help="default: ~/.cache/ietagc/features")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    _add_device(parser)


def _add_figures(commands):
    parser = _command(
        commands, "figures", "the paper's Figs. 3, 6, 7, 8 and 9, as far as what is given allows", _figures
    )
    parser.add_argument("--scores", nargs="*", default=[], metavar="[NAME=]DIR", help="scored models (Figs. 3, 6, 7)")
    parser.add_argument("--run", metavar="DIR", help="training run (Figs. 3, 8, 9)")
    _add_training_images(parser, required=False)
    parser.add_argument("--output", default="figures", metavar="DIR")
    _add_device(parser)


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
        if value is not None and value <= 0:
            raise UsageError(f"--{flag} {value}: must be more than 0")


def _settings(args, device):
    from .generate import Settings

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
        mitigation=args.mitigation,
        dtype=dtype,
    )


def _protocol(args, device):
    from .score import Protocol

    _positive(args, "pixels", "scoring_batch_size", "max_memory")
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
    from .features import default_cache

    if args.feature_cache == "none":
        return None
    return Path(args.feature_cache) if args.feature_cache else default_cache()


def _training_images(args):
    from .images import load_images

    return load_images(args.train, "--train", args.image_column, args.caption_column)


def _prompts(args, training):
    from .prompts import caption_prompts, choose, read_prompts

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
    from .generate import generate

    state, device = _processes(_device(args))
    training = _training_images(args) if args.train else None
    generate(args.model, _prompts(args, training), args.output, _settings(args, device), device, state)


def _tools(protocol):
    from .score import Tools

    return Tools(protocol)


def _score(args):
    from .images import load_images
    from .score import score

    tools = _tools(_protocol(args, _device(args)))
    generated = load_images(args.generated, "--generated")
    reference = load_images(args.reference, "--reference") if args.reference else None
    score(generated, _training_images(args), args.output, tools, _cache(args), reference)
    print(f"{args.output}/scores.json; `python -m eval report {args.output}` shows it")


def _named(values, flag):
    """[(name or None, folder)] of NAME=DIR."""
    pairs = []
    for value in values:
        name, equals, folder = value.partition("=")
        pairs.append((name, folder) if equals else (None, value))
        if not pairs[-1][1]:
            raise UsageError(f"{flag} {value}: should be NAME=DIR")
    return pairs


def _report(args):
    from .report import Scored, write_report

    _positive(args, "max_pairs")
    scored = [Scored.load(folder, name) for name, folder in _named(args.scores, "report")]
    print(write_report(scored, args.output, args.max_pairs, args.title))


def _audit(args):
    from .audit import Limits, audit, report_to_github

    state, device = _processes(_device(args))
    training = _training_images(args)
    prompts, settings, protocol = _prompts(args, training), _settings(args, device), _protocol(args, device)
    tools = _tools(protocol) if state.is_main_process else None
    max_sim_score = args.max_sim_score
    if max_sim_score is None and tools is not None and tools.descriptor.name != "pixel":
        max_sim_score = 0.5
    limits = Limits(args.max_copy_rate, max_sim_score)
    output = Path(args.output)
    verdict = audit(args.model, training, prompts, output, settings, tools, limits, _cache(args), device, state)
    if verdict is None:
        return 0
    if args.github:
        report_to_github((output / "summary.md").read_text(encoding="utf-8"), verdict)
    print(f"{verdict.sentence}\n{output / 'report.html'}")
    return verdict.exit_code


def _front(args):
    from .front_command import run

    _positive(args, "resolution", "max_images", "draws", "points", "num_inference_steps")
    device = _device(args)
    return run(args, device, lambda: _tools(_protocol(args, device)), _cache(args), _named(args.runs, "--run"))


def _benchmark(args):
    import json

    from .benchmark import Benchmark, Cell, run

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
    from .paper_figures import draw_all

    training = _training_images(args) if args.train else None
    draw_all(_named(args.scores, "--scores"), args.run, training, Path(args.output), _device(args))


COMMANDS = (_add_audit, _add_generate, _add_score, _add_report, _add_front, _add_figures, _add_benchmark)


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        return args.handler(args) or 0
    except (UsageError, DescriptorError) as error:
        print(f"python -m eval {args.command}: error: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
