"""From flags to a run: models, data, proxies and the ensemble around them."""

import math
import secrets
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.import_utils import is_xformers_available
from transformers import CLIPTextModel, CLIPTokenizer

from .. import checkpoint
from ..data import loaders
from ..data import samples as data
from ..errors import UsageError
from ..families.text_to_image import TextToImageObjective
from ..method.augmentation import StrengthRandAugment
from ..method.config import DEFAULT_ROUNDS
from ..method.control import PlainControl, RandomControl, ThresholdAwareControl, WenControl
from ..method.memory_bank import LossMemoryBank
from ..method.sharding import ShardPlan
from .ensemble import IterativeEnsemble, Rounds
from .layout import Layout
from .proxy import Proxy
from .streams import RandomStreams

logger = get_logger(__name__)
WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def agree_on_seed(args):
    """Draw ``--seed`` if it was not given, the same on all processes."""
    if args.seed is None:
        args.seed = broadcast_object_list([secrets.randbelow(2**31)])[0]
        logger.info(f"--seed {args.seed} was drawn")
    set_seed(args.seed)


class Models:
    """The base model's parts, in the official script's order of loading: scheduler, tokenizer, text_encoder, vae, unet,
    ema.
    """

    def __init__(self, args, accelerator):
        base = args.pretrained_model_name_or_path
        self.dtype = WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32)
        pinned = {"revision": args.revision, "cache_dir": args.cache_dir}
        self.scheduler = _load(DDPMScheduler, base, "scheduler", cache_dir=args.cache_dir)
        if args.prediction_type is not None:
            self.scheduler.register_to_config(prediction_type=args.prediction_type)
        self.tokenizer = _load(CLIPTokenizer, base, "tokenizer", **pinned)
        self.text_encoder = _load(CLIPTextModel, base, "text_encoder", variant=args.variant, **pinned)
        self.vae = _load(AutoencoderKL, base, "vae", variant=args.variant, **pinned)
        self.unet = _load(UNet2DConditionModel, base, "unet", revision=args.non_ema_revision, cache_dir=args.cache_dir)
        for frozen in (self.vae, self.text_encoder):
            frozen.requires_grad_(False)
            frozen.to(accelerator.device, dtype=self.dtype)
        self.unet.train()
        self.ema = None
        if args.use_ema:
            ema_unet = _load(UNet2DConditionModel, base, "unet", variant=args.variant, **pinned)
            self.ema = EMAModel(
                ema_unet.parameters(),
                model_cls=UNet2DConditionModel,
                model_config=ema_unet.config,
                foreach=args.foreach_ema,
            )
            if not args.offload_ema:
                self.ema.to(accelerator.device)
            elif accelerator.device.type == "cuda":
                self.ema.pin_memory()
        if args.enable_xformers_memory_efficient_attention:
            self._use_xformers(accelerator.device)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def embed(self, captions):
        """The captions' embeddings (B, L, D)."""
        tokens = data.tokenize(self.tokenizer, captions)
        return self.text_encoder(tokens.to(self.text_encoder.device), return_dict=False)[0]

    def _use_xformers(self, device):
        flag = "--enable_xformers_memory_efficient_attention"
        if device.type != "cuda":
            raise UsageError(f"{flag}: needs a CUDA device, this run is on {device.type}; leave the flag out")
        if not is_xformers_available():
            raise UsageError(f"{flag}: xformers is not installed; `pip install xformers`, or leave the flag out")
        self.unet.enable_xformers_memory_efficient_attention()


def _load(cls, base, subfolder, **options):
    try:
        return cls.from_pretrained(base, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--pretrained_model_name_or_path {base}: no {cls.__name__} in its subfolder '{subfolder}': {reason}"
        ) from error


def optimizer_factory(args, parameters, learning_rate):
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise UsageError("--use_8bit_adam: bitsandbytes is not installed; `pip install bitsandbytes`") from error
    else:
        optimizer_class = torch.optim.AdamW
    return lambda: optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def build_control(config, num_timesteps, visits_per_shard, layout):
    """The control of one shard."""
    if config.is_plain and layout.size == 1:
        return PlainControl()
    control = _method_control(config, num_timesteps, visits_per_shard, layout)
    return control if config.wen_threshold is None else WenControl(config.wen_threshold, control, layout)


def _method_control(config, num_timesteps, visits_per_shard, layout):
    augment = None
    if config.augments:
        augment = StrengthRandAugment(
            config.randaugment_magnitude, config.randaugment_num_ops, config.randaugment_operations
        )
    if config.random_skip_rate or config.random_augment_rate:
        if layout.size > 1:
            raise UsageError("--random_skip_rate and --random_augment_rate: at most as many processes as shards")
        return RandomControl(
            config.random_skip_rate, config.random_augment_rate, config.random_augment_strength, augment, layout
        )
    bank = LossMemoryBank(
        num_timesteps,
        config.bank_decay,
        config.bank_bias_correction,
        config.resolve_bank_buckets(visits_per_shard, num_timesteps),
    )
    return ThresholdAwareControl(
        bank, config.skip_threshold, config.augment_range, config.augment_decay, augment, layout
    )


def load_rows(args, accelerator):
    """The training rows, de-duplicated on request, and their groups of duplicates or None."""
    with accelerator.main_process_first():
        rows = data.load_training_rows(args)
    if args.method.caption_mitigation == "mc":
        data.require_several_captions(rows, args.caption_column)
    groups = None
    if args.deduplicate or args.group_duplicates:
        hashes = data.pixel_hashes(rows, args.image_column)
        num_images = len(np.unique(hashes))
        logger.info(f"{len(rows)} rows show {num_images} different images")
        if args.deduplicate:
            rows = data.deduplicate(rows, hashes)
        elif num_images < len(rows):
            groups = hashes
    return rows, groups


def label_values(rows, column):
    if column is None:
        return None
    if column not in rows.column_names:
        raise UsageError(
            f"--label_column {column}: not a column of the dataset, which has {', '.join(rows.column_names)}"
        )
    return np.asarray(rows[column])


def build_ensemble(args, accelerator, models, rows, groups, callbacks):
    """Everything of the run, at its first step."""
    config = args.method
    layout = Layout(config.num_shards, accelerator.num_processes, accelerator.process_index, accelerator.device)
    plan = ShardPlan.split(len(rows), config.num_shards, args.seed, label_values(rows, args.label_column), groups)
    visits_per_step = args.train_batch_size * layout.size * args.gradient_accumulation_steps
    batches_per_epoch = math.ceil(len(rows) / (args.train_batch_size * layout.size))
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    rounds = Rounds.plan(config, total_steps, steps_per_epoch, DEFAULT_ROUNDS)

    objective = TextToImageObjective(
        models.vae,
        models.text_encoder,
        models.scheduler,
        dtype=models.dtype,
        noise_offset=args.noise_offset,
        input_perturbation=args.input_perturbation,
        snr_gamma=args.snr_gamma,
        dream_detail_preservation=args.dream_detail_preservation if args.dream_training else None,
        embedding_noise=config.embedding_noise or 0.0,
        unconditional=None if config.wen_threshold is None else models.embed([""]),
    )
    transform = data.image_transform(args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode)
    samples = data.TrainingSamples(
        rows,
        args.image_column,
        args.caption_column,
        models.tokenizer,
        transform,
        args.on_bad_sample == "skip",
        config.caption_mitigation,
        config.caption_mitigation_probability,
    )
    streams = RandomStreams(accelerator.device)
    model = accelerator.prepare_model(models.unet, evaluation_mode=True)
    learning_rate = args.learning_rate * (visits_per_step if args.scale_lr else 1)
    new_optimizer = optimizer_factory(args, list(models.unet.parameters()), learning_rate)
    # The official training runs on the process's own streams; everything else on its shard's, which no layout changes.
    official = config.is_plain and layout.num_processes == 1

    def build_proxy(shard):
        if official:
            loader = loaders.StreamLoader(samples, args.train_batch_size, args.dataloader_num_workers, streams)
        else:
            loader = loaders.SeededLoader(
                samples,
                args.train_batch_size,
                args.dataloader_num_workers,
                [args.seed, shard],
                plan.shards[shard],
                layout.size,
                layout.rank,
            )
        optimizer = new_optimizer()
        try:
            schedule = get_scheduler(
                args.lr_scheduler,
                optimizer,
                num_warmup_steps=math.ceil(args.lr_warmup_steps / config.num_shards),
                num_training_steps=rounds.steps_per_proxy,
            )
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(f"--lr_scheduler {args.lr_scheduler}: {error}") from error
        control = build_control(config, objective.num_timesteps, rounds.steps_per_proxy * visits_per_step, layout)
        proxy = Proxy(
            shard, loader, control, optimizer, schedule, len(rows), args.gradient_accumulation_steps, args.max_grad_norm
        )
        if not official:
            proxy.streams_state = streams.fresh([args.seed, shard])
        return proxy

    return IterativeEnsemble(
        model=model,
        unet=models.unet,
        proxies={shard: build_proxy(shard) for shard in layout.shards},
        objective=objective,
        plan=plan,
        rounds=rounds,
        config=config,
        layout=layout,
        streams=streams,
        seed=args.seed,
        ema=models.ema,
        offload_ema=args.offload_ema,
        scaler=accelerator.scaler,
        callbacks=callbacks,
    ), steps_per_epoch


# Flags that shape the course of the training; a resumed run must share them.
FINGERPRINT_FLAGS = (
    "seed",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "num_train_epochs",
    "resolution",
    "center_crop",
    "random_flip",
    "image_interpolation_mode",
    "learning_rate",
    "scale_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "use_8bit_adam",
    "max_grad_norm",
    "use_ema",
    "mixed_precision",
    "prediction_type",
    "snr_gamma",
    "noise_offset",
    "input_perturbation",
    "dream_training",
    "dream_detail_preservation",
    "deduplicate",
    "group_duplicates",
    "label_column",
    "caption_column",
    "max_train_samples",
)


# What the state in a checkpoint is built on: --resume_allow cannot change it.
STRUCTURAL = {
    "data",
    "num_samples",
    "sample_order",
    "num_shards",
    "max_train_steps",
    "num_train_epochs",
    "steps_per_round",
    "epochs_per_round",
    "gradient_accumulation_steps",
    "train_batch_size",
    "use_ema",
    "use_8bit_adam",
    "bank_buckets",
}


def fingerprint(args, rows, ensemble):
    """What a resumed run must share with the run that wrote the checkpoint, as a JSON dict."""
    marks = {name: getattr(args, name) for name in FINGERPRINT_FLAGS} | args.method.to_dict()
    marks["train_batch_size"] *= ensemble.layout.size
    marks["data"] = data.content_hash(rows, args.caption_column)
    marks["num_samples"] = len(rows)
    marks["sample_order"] = type(next(iter(ensemble.proxies.values())).loader).__name__
    return marks


def resume(args, ensemble, marks):
    """Go to the checkpoint that ``--resume_from_checkpoint`` names, if any. Returns whether there was one."""
    if not args.resume_from_checkpoint:
        return False
    folder = checkpoint.find(args.resume_from_checkpoint, Path(args.output_dir))
    if folder is None:
        logger.warning("--resume_from_checkpoint latest: no checkpoint yet, starting a new run")
        return False
    for name in args.resume_allow:
        if name in STRUCTURAL:
            raise UsageError(f"--resume_allow {name}: cannot change within a run; start a new one")
        if name not in marks:
            raise UsageError(f"--resume_allow {name}: not among {', '.join(sorted(marks.keys() - STRUCTURAL))}")
    checkpoint.load(ensemble, folder, marks, args.resume_allow)
    ensemble.layout.barrier()  # none may go on, and in time remove this checkpoint, while another still reads it
    logger.info(f"Resuming from {folder} at step {ensemble.global_step}")
    return True
