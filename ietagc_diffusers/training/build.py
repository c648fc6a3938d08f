"""From settings to a run at its first step."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.import_utils import is_torch_npu_available, is_xformers_available

from ..data.conditions import Condition
from ..data.hashes import stored_hashes
from ..data.latent_cache import cache_samples
from ..data.loaders import SeededLoader, StreamLoader
from ..data.rows import label_values
from ..data.samples import TrainingSamples
from ..errors import UsageError
from ..families import Family, family_of
from ..method.config import DEFAULT_ROUNDS
from ..method.control import Reference
from ..method.sharding import ShardPlan
from ..run_folder import RunFolder
from ..tensor_files import Disk, HostMemory, Place
from .controls import build_control, reference_of
from .cost import available_memory, cost_of
from .ensemble import IterativeEnsemble
from .groups import OptimizationSettings
from .heldout import Heldout, HeldoutSet
from .layout import Layout
from .lora import LoraWeights, add_adapter
from .past import PastModel
from .prior import Prior, PriorSet
from .privacy import PrivateGradients
from .processes import of_main
from .proxy import Proxy
from .rounds import Rounds
from .settings import RunSettings
from .streams import RandomStreams
from .views import canary_views, view_of
from .weights import Weights

logger = get_logger(__name__)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def load_family(settings: RunSettings, accelerator: Accelerator) -> Family:
    """The base model, on the device, in the precision of the run."""
    base, revision, cache_dir = settings.pretrained_model_name_or_path, settings.revision, settings.cache_dir
    kind = family_of(base, revision, cache_dir, wanted=settings.family)
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    family = kind.load(settings, accelerator.device, dtype, settings.method)
    if settings.adapters is not None:
        add_adapter(family, settings.adapters)
    if settings.enable_xformers_memory_efficient_attention:
        _use_xformers(family.denoiser, accelerator.device)
    if settings.enable_npu_flash_attention:
        _use_npu_attention(family.denoiser)
    if settings.channels_last:
        family.denoiser.to(memory_format=torch.channels_last)
    if settings.gradient_checkpointing:
        family.checkpoint_gradients()
    return family


def _use_xformers(denoiser, device):
    setting = "`enable_xformers_memory_efficient_attention`"
    if device.type != "cuda":
        raise UsageError(f"{setting}: needs a CUDA device, this run is on {device.type}; leave it out")
    if not is_xformers_available():
        raise UsageError(f"{setting}: xformers is not installed; `pip install xformers`, or leave it out")
    denoiser.enable_xformers_memory_efficient_attention()


def _use_npu_attention(denoiser):
    if not is_torch_npu_available():
        raise UsageError(
            "`enable_npu_flash_attention`: needs an Ascend NPU with the package torch_npu, which is not installed; "
            "leave it out"
        )
    denoiser.enable_npu_flash_attention()


def moving_average(family: Family, settings: RunSettings, device: torch.device) -> EMAModel | None:
    """The EMA of the denoiser's weights, from a second copy of the base's, as in the official script."""
    if not settings.use_ema:
        return None
    start = family.load_average()
    average = EMAModel(
        start.parameters(),
        model_cls=type(start),
        model_config=start.config,
        foreach=settings.foreach_ema,
        **settings.ema_options,
    )
    if not settings.offload_ema:
        average.to(device)
    elif device.type == "cuda":
        average.pin_memory()
    return average


def _cached(samples, rows, settings, accelerator, family, layout, others):
    """The samples, read from the cache of latents; encoders that have nothing left to do leave the device."""
    keys = of_main(accelerator, lambda: stored_hashes(rows, settings.image_column, "Reading images"))
    marks = family.encoder_marks()
    if family.objective.trains_text:
        del marks["inputs"]
    samples = cache_samples(
        samples,
        settings.cache_latents,
        keys,
        rows,
        family.objective,
        marks,
        settings.train_batch_size,
        accelerator.device,
        settings.replaces_bad_samples,
        layout,
    )
    # Augmented, prior and held-out pictures are encoded at each visit.
    alone = not any(others)
    no_images = alone and not (settings.method.augments or settings.method.random_augment_rate)
    family.rest(images=no_images, inputs=alone and samples.texts is not None)
    return samples


def optimizer_factory(
    settings: OptimizationSettings, parameters: list[torch.nn.Parameter], learning_rate: float
) -> Callable[[], torch.optim.Optimizer]:
    """Makes an optimizer for each proxy, all over the same parameters."""
    if settings.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise UsageError("`use_8bit_adam`: bitsandbytes is not installed; `pip install bitsandbytes`") from error
    else:
        optimizer_class = torch.optim.AdamW
    fused = {"fused": True} if settings.fused_adam else {}
    return lambda: optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        **fused,
    )


def waiting_place(settings: RunSettings, family: Family, layout: Layout) -> Place:
    """Where weights and moments wait, see ``--proxy_state``."""
    kind = settings.proxy_state
    if settings.method.optimizer_state == "average" and settings.use_8bit_adam:
        raise UsageError("`optimizer_state` average: quantised moments have no mean; leave out `use_8bit_adam`")
    if kind == "auto":
        cost = cost_of(settings, family, layout)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        kind = "host" if cost.waiting * local <= available_memory() / 2 else "disk"
        if kind == "disk":
            logger.info(
                f"Weights that wait are kept on the disk: {cost.waiting / 1e9:.3g} GB would be much for the memory"
            )
    if kind == "host":
        return HostMemory()
    place = Disk(RunFolder(settings.output_dir).waiting / f"process-{layout.process_index}")
    place.clear()
    return place


@dataclass(frozen=True)
class Budget:
    """How long the run is, in steps of all proxies together."""

    visits_per_step: int
    batches_per_epoch: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, settings: OptimizationSettings, num_rows: int, group_size: int) -> "Budget":
        """As the official script counts. ``group_size``: processes that share a shard."""
        batch, accumulation = settings.train_batch_size * group_size, settings.gradient_accumulation_steps
        batches_per_epoch = math.ceil(num_rows / batch)
        steps_per_epoch = math.ceil(batches_per_epoch / accumulation)
        total_steps = settings.max_train_steps or settings.num_train_epochs * steps_per_epoch
        return cls(batch * accumulation, batches_per_epoch, steps_per_epoch, total_steps)


class ProxyBuilder:
    """Makes the proxy of a shard: its batches, control, optimizer and schedule."""

    def __init__(
        self,
        settings: RunSettings,
        samples: TrainingSamples,
        weights: Weights,
        plan: ShardPlan,
        rounds: Rounds,
        budget: Budget,
        layout: Layout,
        streams: RandomStreams,
        prior: PriorSet | None = None,
        reference: Reference | None = None,
        heldout: HeldoutSet | None = None,
    ):
        if settings.seed is None:
            raise ValueError("a run is built from a seed")
        self.seed, self.reference, self.heldout = settings.seed, reference, heldout
        self.settings, self.samples, self.plan, self.rounds = settings, samples, plan, rounds
        self.budget, self.layout, self.streams, self.prior = budget, layout, streams, prior
        self.num_levels = weights.family.objective.num_levels
        learning_rate = settings.learning_rate * (budget.visits_per_step if settings.scale_lr else 1)
        self.new_optimizer = optimizer_factory(settings, weights.parameters, learning_rate)
        # The official training runs on the process's own streams; everything else on its shard's, which no layout
        # changes.
        self.official = settings.method.is_plain and layout.num_processes == 1
        self.private = PrivateGradients.of(settings, weights.family.denoiser, budget.visits_per_step)

    def __call__(self, shard: int) -> Proxy:
        settings, visits = self.settings, self.rounds.steps_per_proxy * self.budget.visits_per_step
        optimizer = self.new_optimizer()
        proxy = Proxy(
            shard,
            self._loader(shard),
            self._control(shard, visits),
            optimizer,
            self._schedule(optimizer),
            len(self.samples),
            settings.gradient_accumulation_steps,
            math.inf if self.private else settings.max_grad_norm or math.inf,  # 0 is off, as elsewhere in the field
            self._prior_of(shard),
            self.private,
        )
        if not self.official:
            proxy.streams_state = self.streams.fresh([self.seed, shard])
        return proxy

    def _loader(self, shard):
        batch_size, workers = self.settings.train_batch_size, self.settings.dataloader_num_workers
        if self.official:
            return StreamLoader(self.samples, batch_size, workers, self.streams)
        seed, shard_samples = [self.seed, shard], self.plan.shards[shard]
        return SeededLoader(self.samples, batch_size, workers, seed, shard_samples, self.layout.size, self.layout.rank)

    def _control(self, shard, visits):
        heldout, layout = None, self.layout
        if self.heldout is not None:
            batch_size, workers = self.settings.train_batch_size, self.settings.dataloader_num_workers
            seed = (self.seed, shard)
            heldout = Heldout(
                self.heldout, batch_size, workers, seed, self.streams, layout.device, layout.size, layout.rank
            )
        method, private = self.settings.method, self.private is not None
        return build_control(method, self.num_levels, visits, layout, private, self.reference, heldout)

    def _prior_of(self, shard):
        if self.prior is None:
            return None
        batch_size, workers = self.settings.train_batch_size, self.settings.dataloader_num_workers
        size, rank = self.layout.size, self.layout.rank
        return Prior.of_shard(self.prior, batch_size, workers, (self.seed, shard), self.streams, size, rank)

    def _schedule(self, optimizer) -> Any:
        name, warmup, total = self.settings.lr_scheduler, self.settings.lr_warmup_steps, self.rounds.steps_per_proxy
        if self.settings.schedule_counts_batches:  # given in micro-batches, and stepped once a step all the same
            warmup *= self.settings.gradient_accumulation_steps
            total = math.ceil(total * self.budget.batches_per_epoch / self.budget.steps_per_epoch)
        try:
            return get_scheduler(
                name,
                optimizer,
                num_warmup_steps=math.ceil(warmup / self.layout.num_shards),
                num_training_steps=total,
            )
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(f"`lr_scheduler` {name}: {error}") from error


def _warn_of_small_shards(plan, batch):
    smallest = min(map(len, plan.shards))
    if plan.num_shards > 1 and smallest < batch:
        logger.warning(
            f"The smallest of {plan.num_shards} shards has {smallest} samples, a batch {batch}: pictures are repeated "
            f"within a batch. Fewer shards (`num_shards`) or a smaller batch (`train_batch_size`) avoid it"
        )


def build_run(
    settings: RunSettings,
    accelerator: Accelerator,
    family: Family,
    average: EMAModel | None,
    condition: Condition,
    rows: Dataset,
    groups: np.ndarray | None,
    prior: PriorSet | None = None,
    heldout: HeldoutSet | None = None,
    canaries: Mapping[int, int] | None = None,
) -> tuple[IterativeEnsemble, Budget]:
    """Everything of the run, at its first step. ``canaries``: keys of the rows that are some, see ``canary_keys``."""
    if settings.seed is None:
        raise ValueError("a run is built from a seed")
    config = settings.method
    layout = Layout(config.num_shards, accelerator.num_processes, accelerator.process_index, accelerator.device)
    if config.shard_data:
        labels = label_values(rows, settings.label_column)
        plan = ShardPlan.split(len(rows), config.num_shards, settings.seed, labels, groups)
    else:
        plan = ShardPlan.whole(len(rows), config.num_shards)
    budget = Budget.of(settings, len(rows), layout.size)
    rounds = Rounds.plan(config, budget.total_steps, budget.steps_per_epoch, DEFAULT_ROUNDS)
    if config.calibrate == "past" and rounds.num_rounds < 3:
        raise UsageError(
            f"`calibrate` past: there is no past before the third round, and the run has {rounds.num_rounds} in all: "
            "nothing would be skipped; give shorter rounds (`steps_per_round`, `epochs_per_round`) or more "
            "`max_train_steps`"
        )
    view, own_views = view_of(settings, family), canary_views(canaries or {}, settings, family)
    samples = TrainingSamples(rows, settings.image_column, view, condition, settings.decoding, own_views)
    if settings.cache_latents is not None:
        samples = _cached(samples, rows, settings, accelerator, family, layout, (prior, heldout))
    _warn_of_small_shards(plan, settings.train_batch_size * layout.size)
    streams = RandomStreams(accelerator.device)

    def prepare(module):
        prepared = accelerator.prepare_model(module, evaluation_mode=True)
        return torch.compile(prepared) if settings.compile else prepared

    model = prepare(family.denoiser)
    for encoder in [*family.trained.values()][1:]:
        accelerator.prepare_model(encoder, evaluation_mode=True)
    place = waiting_place(settings, family, layout)
    reference = reference_of(settings, family, model, prepare, place)
    if settings.adapters is not None:
        weights: Weights = LoraWeights(family, config.num_shards, settings.adapters, settings.seed)
    else:
        weights = Weights(family, config.num_shards > 1, average, settings.offload_ema, place)
    build = ProxyBuilder(settings, samples, weights, plan, rounds, budget, layout, streams, prior, reference, heldout)
    run = IterativeEnsemble(
        model=model,
        weights=weights,
        proxies={shard: build(shard) for shard in layout.shards},
        objective=family.objective,
        plan=plan,
        rounds=rounds,
        config=config,
        layout=layout,
        streams=streams,
        seed=settings.seed,
        scaler=accelerator.scaler,
        place=place,
        past=reference if isinstance(reference, PastModel) else None,
    )
    return run, budget
