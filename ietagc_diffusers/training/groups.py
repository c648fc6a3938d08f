"""Settings of a training by group: optimization, checkpoints and records, validation, adapters, the Hub."""

import math
from dataclasses import dataclass

from ..settings import Resume, at_least, not_negative, setting


@dataclass(kw_only=True)
class OptimizationSettings:
    """Steps, learning rate, optimizer, precision."""

    train_batch_size: int = setting(
        16,
        "Images per step; with more processes than shards, per step and process.",
        resume=Resume.FIXED,
        type=int,
        **at_least(1),
    )
    num_train_epochs: int = setting(
        100, "Epochs over the training set, all proxies together.", resume=Resume.BUDGET, type=int, **at_least(1)
    )
    max_train_steps: int | None = setting(
        None,
        "Steps, all proxies together; overrides --num_train_epochs. A resumed run may have more.",
        resume=Resume.BUDGET,
        type=int,
        **at_least(1),
    )
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches per step.", resume=Resume.FIXED, type=int, **at_least(1)
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass to save memory.",
        resume=Resume.FREE,
        type=bool,
    )
    learning_rate: float = setting(
        1e-4, "Learning rate after warm-up.", resume=Resume.SAME, type=float, **not_negative()
    )
    scale_lr: bool = setting(
        False,
        "Multiply the learning rate by batch size, accumulation and processes per shard.",
        resume=Resume.SAME,
        type=bool,
    )
    lr_scheduler: str = setting(
        "constant",
        "linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup.",
        resume=Resume.SAME,
    )
    lr_warmup_steps: int = setting(
        500,
        "Warm-up, counted like --max_train_steps: each proxy takes a K-th of it.",
        resume=Resume.SAME,
        type=int,
        **not_negative(),
    )
    use_8bit_adam: bool = setting(False, "8-bit Adam of bitsandbytes.", resume=Resume.FIXED, type=bool)
    fused_adam: bool = setting(
        False,
        "AdamW as one kernel: faster on GPUs, and equal but for rounding.",
        resume=Resume.FREE,  # rounding
        type=bool,
    )
    compile: bool = setting(
        False,
        "Compile the trained module (torch.compile); the first steps then take minutes.",
        resume=Resume.FREE,  # rounding
        type=bool,
    )
    channels_last: bool = setting(
        False,
        "Memory format with the channels last: faster in half precision on GPUs.",
        resume=Resume.FREE,  # rounding
        type=bool,
    )
    adam_beta1: float = setting(
        0.9, "Adam's beta1.", resume=Resume.SAME, type=float, check=lambda b: 0 <= b < 1, wanted="in [0, 1)"
    )
    adam_beta2: float = setting(
        0.999, "Adam's beta2.", resume=Resume.SAME, type=float, check=lambda b: 0 <= b < 1, wanted="in [0, 1)"
    )
    adam_weight_decay: float = setting(1e-2, "Weight decay.", resume=Resume.SAME, type=float, **not_negative())
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.", resume=Resume.SAME, type=float, **not_negative())
    max_grad_norm: float = setting(
        1.0, "Gradient clipping norm; 0 turns clipping off.", resume=Resume.SAME, type=float, **not_negative()
    )
    use_ema: bool = setting(
        False, "Keep a moving average of the weights, and save it as the model.", resume=Resume.FIXED, type=bool
    )
    offload_ema: bool = setting(
        False, "Keep the moving average in host memory between steps.", resume=Resume.FREE, type=bool
    )
    foreach_ema: bool = setting(
        False, "Update the moving average with fused operations.", resume=Resume.FREE, type=bool
    )
    mixed_precision: str | None = setting(
        None,
        "no, fp16 or bf16. Default: as accelerate is configured.",
        resume=Resume.SAME,
        choices=["no", "fp16", "bf16"],
    )
    allow_tf32: bool = setting(
        False,
        "Allow TF32 matrix products on Ampere and newer GPUs.",
        resume=Resume.FREE,  # a matter of the GPU at hand: rounding, not the course of the training
        type=bool,
    )
    enable_xformers_memory_efficient_attention: bool = setting(
        False,
        "Use the attention of xformers (CUDA, optional package).",
        resume=Resume.FREE,  # likewise
        type=bool,
    )
    enable_npu_flash_attention: bool = setting(
        False,
        "Use the flash attention of Ascend NPUs (package torch_npu).",
        resume=Resume.FREE,  # likewise
        type=bool,
    )
    proxy_state: str = setting(
        "auto",
        "Where weights and optimizer states of waiting proxies are: host (memory), disk (files in --output_dir), or "
        "auto: memory if they take at most half of what is free. The result is the same.",
        resume=Resume.FREE,
        choices=["auto", "host", "disk"],
    )
    max_nonfinite: int = setting(
        20,
        "Stop after this many steps in a row with losses or gradients that are not finite.",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    local_rank: int = setting(-1, "Set by the launcher.", resume=Resume.FREE, type=int)


@dataclass(kw_only=True)
class RecordSettings:
    """What a run writes, where, and how often."""

    output_dir: str = setting(
        "sd-model-finetuned", "Where the pipeline, checkpoints and records are written.", resume=Resume.FREE
    )
    checkpointing_steps: int = setting(
        500, "Write a checkpoint every this many steps.", resume=Resume.FREE, type=int, **at_least(1)
    )
    checkpoints_total_limit: int | None = setting(
        None, "Keep at most this many checkpoints.", resume=Resume.FREE, type=int, **at_least(1)
    )
    resume_from_checkpoint: str | None = setting(
        None, "'latest', a checkpoint's name in --output_dir, or its path.", resume=Resume.FREE
    )
    resume_allow: list[str] | tuple[str, ...] = setting(
        (), "Flags that may differ from the checkpoint's.", resume=Resume.FREE, several=True
    )
    logging_dir: str = setting("logs", "Tracker folder inside --output_dir.", resume=Resume.FREE)
    report_to: str = setting(
        "tensorboard",
        "Tracker that accelerate can use (tensorboard, wandb, comet_ml, ...), 'all' that are installed, or 'none'.",
        resume=Resume.FREE,
    )
    tracker_project_name: str = setting("text2image-fine-tune", "Project name for the tracker.", resume=Resume.FREE)
    log_every: int = setting(
        10,
        "Steps of a proxy between two entries of the tracker and the bar.",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    debug_loss: bool = setting(
        False,
        "Log the loss of the batch at each step under the file name of each of its images (loss_for_NAME).",
        resume=Resume.FREE,
        type=bool,
    )
    save_shards: bool = setting(
        False, "Write each shard of the final plan as a dataset to ietagc/shards/.", resume=Resume.FREE, type=bool
    )
    save_rounds: bool = setting(
        False,
        "Save the aggregated model of every round as a pipeline to rounds/.",
        resume=Resume.FREE,
        type=bool,
    )


@dataclass(kw_only=True)
class ValidationSettings:
    """Images that are drawn for prompts along the training."""

    validation_prompts: list[str] | None = setting(
        None,
        "Prompts to draw images for during training.",
        resume=Resume.FREE,
        several=True,
        aliases=["validation_prompt"],
    )
    num_validation_images: int = setting(
        1, "Images drawn for each of them.", resume=Resume.FREE, type=int, **not_negative()
    )
    validation_epochs: int = setting(
        5,
        "Draw them every this many epochs (with several shards: after the next round).",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters instead of all weights."""

    lora_rank: int | None = setting(
        None,
        "Train adapters of this rank (LoRA); 4 is the official scripts'. With several shards Adam's moments start each "
        "round from zero (--optimizer_state reset). Default: train all weights.",
        resume=Resume.FIXED,
        type=int,
        aliases=["rank"],
        **at_least(1),
    )
    lora_alpha: float | None = setting(
        None,
        "The update is scaled by this over the rank. Default: the rank.",
        resume=Resume.FIXED,
        type=float,
        check=lambda alpha: alpha > 0,
        wanted="over 0",
    )
    lora_dropout: float = setting(
        0.0,
        "Dropout of what goes into the adapters.",
        resume=Resume.FIXED,
        type=float,
        check=lambda rate: 0 <= rate < 1,
        wanted="in [0, 1)",
    )
    lora_target_modules: list[str] | None = setting(
        None,
        "Names, or ends of names, of the layers that get adapters. Default: the official scripts', those of attention.",
        resume=Resume.FIXED,
        several=True,
    )
    train_text_encoder: bool = setting(
        False,
        "Train adapters on the attention of the text encoders too, of the same rank.",
        resume=Resume.FIXED,
        type=bool,
    )
    scale_weight_norms: float | None = setting(
        None,
        "Scale the update of each layer down to this norm (the square root of its sum of squares) after each step, as "
        "kohya's scripts do; 1.0 is usual. Limits how far a LoRA moves from the base.",
        resume=Resume.FIXED,
        type=float,
        check=lambda norm: norm > 0,
        wanted="over 0",
    )
    use_dora: bool = setting(
        False, "DoRA: train magnitudes apart from directions; with one shard only.", resume=Resume.FIXED, type=bool
    )
    lora_average: str = setting(
        "svd",
        "The mean of several proxies, which is of their products: svd (the nearest adapter of the same rank after each "
        "round), concatenate (likewise, but the saved one is the exact mean, of rank K r), or fold (exact: folded into "
        "the base after each round; the saved adapter's rank grows with the rounds).",
        resume=Resume.FIXED,
        choices=["svd", "concatenate", "fold"],
    )
    save_merged: bool = setting(
        False, "Save a whole pipeline with the adapter merged in, beside the adapter.", resume=Resume.FREE, type=bool
    )


@dataclass(kw_only=True)
class PrivacySettings:
    """DP-SGD: each image's gradient is clipped by itself, and noise added."""

    dp_noise_multiplier: float | None = setting(
        None,
        "Train by DP-SGD (package opacus): noise on the summed gradients of a step, of this many times "
        "--dp_max_grad_norm as standard deviation; about 1 for privacy, 0 for clipping only. Needs --mitigation none "
        "or iet. The epsilon that is reached is in the log, in rounds.jsonl and on the model card.",
        resume=Resume.FIXED,
        type=float,
        check=lambda multiplier: 0 <= multiplier < math.inf,
        wanted="0 or more, and finite",
    )
    dp_max_grad_norm: float | None = setting(
        None,
        "Norm to which DP-SGD clips the gradient of each image; --max_grad_norm does not act then. Default: 1.",
        resume=Resume.FIXED,
        type=float,
        check=lambda norm: 0 < norm < math.inf,
        wanted="over 0, and finite",
    )
    dp_delta: float | None = setting(
        None,
        "Delta of the epsilon that is told; well under 1 over the number of images. Default: 1e-5.",
        resume=Resume.FREE,
        type=float,
        check=lambda delta: 0 < delta < 1,
        wanted="over 0 and under 1",
    )


@dataclass(kw_only=True)
class HubSettings:
    """Upload of the result."""

    push_to_hub: bool = setting(False, "Upload the result to the Hub.", resume=Resume.FREE, type=bool)
    hub_strategy: str = setting(
        "end",
        "When: at the end, or also along the way: the averaged model after every_round, or of each checkpoint (with "
        "several shards: after the next round). An upload never holds up training; while one is under way the next is "
        "left out.",
        resume=Resume.FREE,
        choices=["end", "every_round", "checkpoint"],
    )
    hub_model_id: str | None = setting(
        None, "Repository on the Hub. Default: the name of the output folder.", resume=Resume.FREE
    )
    hub_revision: str | None = setting(
        None, "Branch of it, made if it is not there. Default: main.", resume=Resume.FREE
    )
    hub_token: str | None = setting(None, "Token for the upload.", resume=Resume.FREE, secret=True)
    hub_private_repo: bool = setting(
        False, "Make the repository private, if the upload creates it.", resume=Resume.FREE, type=bool
    )
