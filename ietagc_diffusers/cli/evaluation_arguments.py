"""The command line of ``python -m eval``."""

import argparse

DESCRIPTION = "Does the model give its training images back?"


def build_parser():
    parser = argparse.ArgumentParser(prog="python -m eval", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_audit,
        _add_generate,
        _add_score,
        _add_report,
        _add_front,
        _add_figures,
        _add_detect,
        _add_benchmark,
    ):
        add(commands)
    return parser


def _command(commands, name, help):
    return commands.add_parser(name, help=help, description=help, allow_abbrev=False)


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
    group.add_argument("--resolution", type=int, help="default: what the model was trained at, as it records")
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
        help="dcr (the paper's tables), sscd (SSCD's authors), or a preprocessing: sscd-288, sscd-320",
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
        "--pixels", type=int, help="side of the images for l2; default: that of most generated images, at most 64"
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
    parser = _command(commands, "audit", "generate, score, report, and exit with 3 over the limits")
    _add_training_images(parser)
    parser.add_argument("--output", default="audit", metavar="DIR", help="default: audit")
    parser.add_argument("--max_copy_rate", type=float, default=0.01, help="default: 0.01")
    parser.add_argument("--max_sim_score", type=float, help="default: 0.5 with SSCD; none with pixel")
    parser.add_argument("--max_patch_copy_rate", type=float, help="of local copies, with --patches; default: none")
    parser.add_argument("--card", action="store_true", help="put the summary into the model folder's README.md")
    parser.add_argument("--github", action="store_true", help="summary and annotation for GitHub Actions")
    _add_generation(parser)
    _add_scoring(parser)
    _add_device(parser)


def _add_generate(commands):
    parser = _command(commands, "generate", "draw images, each from its own seed; goes on where it stopped")
    parser.add_argument("--output", required=True, metavar="DIR")
    _add_training_images(parser, required=False)
    _add_generation(parser)
    _add_device(parser)


def _add_score(commands):
    parser = _command(commands, "score", "compare generated images with the training set")
    parser.add_argument("--generated", required=True, metavar="DIR")
    _add_training_images(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="for scores.json and nearest.parquet")
    _add_scoring(parser)
    _add_device(parser)


def _add_report(commands):
    parser = _command(commands, "report", "one HTML file of one or more scored models")
    parser.add_argument("scores", nargs="+", metavar="[NAME=]DIR", help="folders that score wrote")
    parser.add_argument("--output", default="report.html", metavar="FILE")
    parser.add_argument("--max_pairs", type=int, default=200, help="pairs shown of each model")
    parser.add_argument("--title")


def _add_front(commands):
    parser = _command(commands, "front", "held-out loss against the gap along runs, against plain training")
    parser.add_argument(
        "--run", action="append", required=True, dest="runs", metavar="NAME=DIR[,DIR]", help="run folders, one a seed"
    )
    parser.add_argument("--control", help="the plain run's name; default: the first")
    parser.add_argument("--heldout", required=True, metavar="DIR|ID", help="captioned images that were not trained on")
    _add_training_images(parser, required=False)
    parser.set_defaults(image_column=None, caption_column=None)  # the run's, where it names the training set
    parser.add_argument("--base", metavar="DIR|ID", help="default: what the first run started from")
    parser.add_argument("--resolution", type=int, help="default: the first run's")
    parser.add_argument("--max_images", type=int, default=1000, help="of each set")
    parser.add_argument("--draws", type=int, default=3, help="of noise an image")
    parser.add_argument("--batch_size", type=int, default=8, help="images at once; does not change the losses")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="also draw and score N images at each point")
    parser.add_argument("--points", type=int, help="models of each run, evenly spread; default: all")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--scheduler", choices=["ddim", "ddpm", "dpm", "euler", "pndm"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="front", metavar="DIR")
    _add_scoring(parser)
    _add_device(parser)


def _add_detect(commands):
    parser = _command(commands, "detect", "which prompts are memorized: Wen et al.'s magnitude of each")
    parser.add_argument("--model", required=True, metavar="DIR|ID", help="pipeline folder or Hub id")
    parser.add_argument("--prompts", metavar="FILE", help=".txt, .csv or .jsonl; a column memorized is its labels")
    parser.add_argument("--memorized", metavar="FILE", help="prompts known to be memorized: with --others, AUC and TPR")
    parser.add_argument("--others", metavar="FILE", help="prompts known not to be")
    parser.add_argument("--output", default="detect", metavar="DIR")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps that are averaged")
    parser.add_argument("--generations", type=int, default=4, help="of each prompt, averaged")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--resolution", type=int, help="default: what the model was trained at, as it records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    _add_device(parser)


def _add_benchmark(commands):
    parser = _command(commands, "benchmark", "a matrix of runs, and the paper's tables of it")
    parser.add_argument("--config", required=True, metavar="FILE", help="such as configs/benchmark_demo.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--feature_cache", metavar="DIR|none", help="default: ~/.cache/ietagc/features")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    _add_device(parser)


def _add_figures(commands):
    parser = _command(commands, "figures", "the paper's Figs. 3, 6, 7, 8 and 9, as far as what is given allows")
    parser.add_argument("--scores", nargs="*", default=[], metavar="[NAME=]DIR", help="scored models (Figs. 3, 6, 7)")
    parser.add_argument("--run", metavar="DIR", help="training run (Figs. 3, 8, 9)")
    _add_training_images(parser, required=False)
    parser.add_argument("--output", default="figures", metavar="DIR")
    _add_device(parser)
