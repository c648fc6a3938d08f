"""The command line: every flag of Diffusers' ``train_text_to_image.py`` with its meaning, the method's flags, and
recipes.
"""

import argparse
import os
import sys

from torchvision import transforms

from .errors import UsageError
from .method.config import METHOD_FIELDS, MitigationConfig, read_recipe

INTERPOLATION_MODES = sorted(mode.name.lower() for mode in transforms.InterpolationMode)
SECRET_FLAGS = ("hub_token",)

# Flags of the official script: name -> (default, type or "flag", help).
# A "flag" is on or off; "--no-..." overrides a recipe.
OFFICIAL = {
    "model": {
        "pretrained_model_name_or_path": (None, str, "Base model: a folder or a Hub id."),
        "revision": (None, str, "Hub revision of the base model."),
        "non_ema_revision": (None, str, "Hub revision of the UNet alone; deprecated upstream, use --variant=non_ema."),
        "variant": (None, str, "Variant of the weight files, such as fp16."),
        "cache_dir": (None, str, "Where downloaded models and datasets are kept."),
    },
    "data": {
        "dataset_name": (None, str, "Training set: a Hub id, or a local path that datasets can read."),
        "dataset_config_name": (None, str, "Configuration of the dataset, if it has several."),
        "train_data_dir": (
            None,
            str,
            "Training set: an image folder with a metadata.jsonl. With --dataset_name: its data_dir.",
        ),
        "image_column": ("image", str, "Column that holds the image."),
        "caption_column": (
            "text",
            str,
            "Column that holds the caption, or a list of captions (one is drawn at each visit).",
        ),
        "max_train_samples": (None, int, "Train on this many rows, drawn with --seed."),
        "resolution": (512, int, "Images are resized (short side) and cropped to this size."),
        "center_crop": (False, "flag", "Crop at the centre instead of at random."),
        "random_flip": (False, "flag", "Flip images horizontally at random."),
        "image_interpolation_mode": ("lanczos", str, "Interpolation of the resize."),
        "dataloader_num_workers": (0, int, "Worker processes that read images; 0 reads in the training process."),
    },
    "training": {
        "output_dir": ("sd-model-finetuned", str, "Where the pipeline, checkpoints and records are written."),
        "seed": (None, int, "Seed of everything random. Default: drawn, and recorded in config.yaml."),
        "train_batch_size": (16, int, "Images a step; with more processes than shards, a step and process."),
        "num_train_epochs": (100, int, "Epochs over the training set, all proxies together."),
        "max_train_steps": (None, int, "Steps, all proxies together; overrides --num_train_epochs."),
        "gradient_accumulation_steps": (1, int, "Micro-batches a step."),
        "gradient_checkpointing": (False, "flag", "Recompute activations in the backward pass to save memory."),
        "learning_rate": (1e-4, float, "Learning rate after warm-up."),
        "scale_lr": (False, "flag", "Multiply the learning rate by batch size, accumulation and processes a shard."),
        "lr_scheduler": (
            "constant",
            str,
            "linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup.",
        ),
        "lr_warmup_steps": (500, int, "Warm-up, counted like --max_train_steps: each proxy takes its K-th part."),
        "use_8bit_adam": (False, "flag", "8-bit Adam of bitsandbytes."),
        "adam_beta1": (0.9, float, "Adam's beta1."),
        "adam_beta2": (0.999, float, "Adam's beta2."),
        "adam_weight_decay": (1e-2, float, "Weight decay."),
        "adam_epsilon": (1e-8, float, "Adam's epsilon."),
        "max_grad_norm": (1.0, float, "Gradient clipping norm."),
        "use_ema": (False, "flag", "Keep a moving average of the weights and save that."),
        "offload_ema": (False, "flag", "Keep the moving average in host memory between steps."),
        "foreach_ema": (False, "flag", "Update the moving average with fused operations."),
        "mixed_precision": (None, str, "no, fp16 or bf16. Default: what accelerate is configured for."),
        "allow_tf32": (False, "flag", "Allow TF32 matrix products on Ampere and newer GPUs."),
        "enable_xformers_memory_efficient_attention": (
            False,
            "flag",
            "Use xformers' attention (CUDA, optional package).",
        ),
        "local_rank": (-1, int, "Set by the launcher."),
    },
    "objective": {
        "prediction_type": (None, str, "epsilon or v_prediction. Default: the base model's."),
        "snr_gamma": (None, float, "min-SNR loss weighting; 5.0 is usual."),
        "noise_offset": (0.0, float, "Scale of the noise offset."),
        "input_perturbation": (0.0, float, "Scale of input perturbation; 0.1 is usual."),
        "dream_training": (False, "flag", "DREAM (epsilon prediction only): one more forward a step."),
        "dream_detail_preservation": (1.0, float, "DREAM's p, over 0."),
    },
    "checkpoints and records": {
        "checkpointing_steps": (500, int, "Write a checkpoint every so many steps."),
        "checkpoints_total_limit": (None, int, "Keep at most this many checkpoints."),
        "resume_from_checkpoint": (None, str, "'latest', a checkpoint's name in --output_dir, or its path."),
        "logging_dir": ("logs", str, "Tracker folder inside --output_dir."),
        "report_to": ("tensorboard", str, "Tracker: tensorboard, wandb, comet_ml or all."),
        "tracker_project_name": ("text2image-fine-tune", str, "Project name for the tracker."),
        "validation_prompts": (None, str, "Prompts to draw images for during training."),
        "validation_epochs": (5, int, "Draw them every so many epochs (with several shards: after the next round)."),
        "push_to_hub": (False, "flag", "Upload the result to the Hub."),
        "hub_model_id": (None, str, "Repository on the Hub. Default: the output folder's name."),
        "hub_token": (None, str, "Token for the upload."),
    },
}

OURS = {
    "config": (None, str, "YAML recipe with flags as keys; the command line wins."),
    "deduplicate": (None, str, "'exact' trains on one row of each image, by decoded pixels. Recommended."),
    "group_duplicates": (False, "flag", "Keep rows that show the same image in one shard, and move them together."),
    "label_column": (None, str, "Column of class labels to deal evenly over the shards."),
    "on_bad_sample": (
        "error",
        str,
        "A row without image or caption: 'error' stops, 'skip' trains on another of its shard.",
    ),
    "max_nonfinite": (20, int, "Stop after this many steps in a row with losses that are not finite."),
    "log_every": (10, int, "Steps between log lines; the device is read only then."),
    "save_shards": (False, "flag", "Write each shard of the final plan as a dataset to ietagc/shards/."),
    "save_rounds": (False, "flag", "Save the aggregated model of every round as a pipeline to rounds/."),
    "resume_allow": ((), str, "Flags that may differ from the checkpoint's."),
}

CHOICES = {
    "mixed_precision": ["no", "fp16", "bf16"],
    "prediction_type": ["epsilon", "v_prediction"],
    "image_interpolation_mode": INTERPOLATION_MODES,
    "deduplicate": ["exact"],
    "on_bad_sample": ["error", "skip"],
}
LISTS = ("validation_prompts", "resume_allow")


class FlagParser(argparse.ArgumentParser):
    """Raises ``UsageError`` where argparse would exit."""

    def error(self, message):
        raise UsageError(message)


def build_parser():
    parser = FlagParser(
        description="Fine-tune Stable Diffusion without memorizing the training set (IET-AGC+).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    method = parser.add_argument_group("mitigation")
    for option in METHOD_FIELDS:
        extra = {key: value for key, value in option.metadata.items() if key != "help"}
        if option.name == "mitigation":
            method.add_argument("--mitigation", default=option.default, help=option.metadata["help"], **extra)
        elif option.type is bool:
            method.add_argument(
                f"--{option.name}", default=None, action=argparse.BooleanOptionalAction, help=option.metadata["help"]
            )
        else:
            # None means: what the preset says.
            method.add_argument(f"--{option.name}", default=None, help=option.metadata["help"], **extra)
    for title, flags in {**OFFICIAL, "more": OURS}.items():
        group = parser.add_argument_group(title)
        for name, (default, kind, text) in flags.items():
            if kind == "flag":
                group.add_argument(f"--{name}", default=default, action=argparse.BooleanOptionalAction, help=text)
            else:
                nargs = {"nargs": "+"} if name in LISTS else {}
                group.add_argument(
                    f"--{name}", default=default, type=kind, choices=CHOICES.get(name), help=text, **nargs
                )
    return parser


def recipe_to_argv(recipe):
    """A recipe as command-line words, so that argparse checks both alike."""
    words = []
    for key, value in recipe.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif value is not None:
            words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def parse_flags(argv):
    """The flags of a list of words, with ``method`` a ``MitigationConfig``. Raises ``UsageError``."""
    parser = build_parser()
    config_only = FlagParser(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config")
    path = config_only.parse_known_args(argv)[0].config
    args = parser.parse_args(recipe_to_argv(read_recipe(path, recipe_keys()) if path else {}) + argv)
    given = {option.name: getattr(args, option.name) for option in METHOD_FIELDS if option.name != "mitigation"}
    args.method = MitigationConfig.preset(args.mitigation, **given)
    _check(args)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    if args.non_ema_revision is None:
        args.non_ema_revision = args.revision
    return args


def recipe_keys():
    """The keys that a recipe may have: all flags but ``--config`` itself."""
    flags = [*(name for group in OFFICIAL.values() for name in group), *OURS]
    return [option.name for option in METHOD_FIELDS] + [name for name in flags if name != "config"]


def parse_args(argv=None):
    """Parse the command line, see ``parse_flags``. Wrong use exits with 2 and a line that says what is wrong."""
    try:
        return parse_flags(sys.argv[1:] if argv is None else list(argv))
    except UsageError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _check(args):
    if args.pretrained_model_name_or_path is None:
        raise UsageError("--pretrained_model_name_or_path is needed: a base model's folder or Hub id")
    if args.dataset_name is None and args.train_data_dir is None:
        raise UsageError("--dataset_name or --train_data_dir is needed")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise UsageError(
            "--hub_token with --report_to=wandb would store the token in the tracker: use `hf auth login` instead"
        )
    for name in (
        "resolution",
        "train_batch_size",
        "num_train_epochs",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "validation_epochs",
        "log_every",
        "max_nonfinite",
    ):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("max_train_steps", "checkpoints_total_limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed {args.seed}: must be in 0 to 2^32 - 1")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be in [0, 1)")
    for name in (
        "dataloader_num_workers",
        "lr_warmup_steps",
        "learning_rate",
        "noise_offset",
        "input_perturbation",
        "adam_epsilon",
        "adam_weight_decay",
    ):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must not be negative")
    if args.dream_detail_preservation <= 0:
        raise UsageError(f"--dream_detail_preservation {args.dream_detail_preservation}: must be over 0")


def effective_flags(args):
    """All effective values, JSON- and YAML-ready, without secrets."""
    flags = {key: value for key, value in vars(args).items() if key not in (*SECRET_FLAGS, "method")}
    return flags | args.method.to_dict()
