"""Unconditional models: a UNet of pixels that is told nothing of an image, or only its class."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.torch_utils import randn_tensor

from ..data import Batch, ClassLabels, Condition, View
from ..errors import UsageError, one_line
from ..files import shipped
from .ambient import Ambient, takes_mask, with_mask
from .base import Family, Image
from .noisy_data import NoisyData
from .parts import part_of
from .pixels import PixelObjective
from .settings import PipelineSettings, UnconditionalModelSettings
from .views import Pixels, PrecisePixels

# The official script's architecture.
WIDTHS = (128, 128, 256, 256, 512, 512)
DOWN_BLOCKS = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4
SMALL_GAIN = 1e-5  # of ``ddpm_weights``


class Unconditional(Family):
    """DDPM, trained from scratch or from a ``DDPMPipeline`` (or ``DDIMPipeline``); saved as a ``DDPMPipeline``.

    Attributes:
        scheduler: with the noise levels of the training.
    """

    name = "Unconditional"
    pipelines = (DDPMPipeline, DDIMPipeline)
    denoiser_name = "unet"
    script = "train_unconditional_ietagc.py"
    tags: ClassVar[tuple[str, ...]] = ("pytorch", "unconditional-image-generation", "diffusion-models-class")
    objective: PixelObjective

    def __init__(
        self,
        settings: PipelineSettings,
        scheduler: DDPMScheduler,
        denoiser: UNet2DModel | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **objective: Any,
    ):
        self.settings, self.scheduler, self.denoiser = settings, scheduler, denoiser
        self.device, self.dtype = torch.device(device), dtype
        self.text_encoders = {}
        self.objective = PixelObjective(scheduler, dtype, **objective)

    @property
    def parts(self):
        return [] if self.denoiser is None else [self.denoiser]

    @classmethod
    def load(cls, settings, device="cpu", dtype=torch.float32, config=None):
        """Load a base, or make a model whose weights are drawn from torch's stream. ``settings``:
        ``UnconditionalModelSettings`` and ``ImageSettings`` in one.
        """
        base = settings.pretrained_model_name_or_path
        if not isinstance(settings, UnconditionalModelSettings):
            raise UsageError(
                f"`pretrained_model_name_or_path` {base}: is an unconditional model, which {cls.script} trains"
            )
        make: Any = cls
        masked = config is not None and config.ambient_corruption is not None
        parts = _fresh(settings, masked) if base is None else _of_base(settings)
        rivals = {"noisy_data": NoisyData.of(config, settings), "ambient": Ambient.of(config, settings)}
        family = make(settings, *parts, device, dtype, **rivals)
        family.denoiser.train()
        _check(family.denoiser, settings, masked)
        return family

    @classmethod
    def load_frozen(cls, base, prediction_type=None, device="cpu", setting="pretrained_model_name_or_path"):
        scheduler = part_of(DDPMScheduler, str(base), "scheduler", setting=setting)
        if prediction_type is not None:
            scheduler.register_to_config(prediction_type=prediction_type)
        return cls(PipelineSettings(pretrained_model_name_or_path=str(base)), scheduler, None, device)

    @classmethod
    def load_denoiser(cls, folder, subfolder=None, **options):
        return UNet2DModel.from_pretrained(folder, **({} if subfolder is None else {"subfolder": subfolder}), **options)

    @classmethod
    def of_pipeline(cls, pipeline: Any, **objective: Any) -> Self:
        """The family around a pipeline's parts, which it shares, in float32 on the CPU."""
        return cls(PipelineSettings(), pipeline.scheduler, pipeline.unet, **objective)

    @classmethod
    def untrained(cls, settings: dict[str, Any], config: Path) -> Self:
        """The model that a run from scratch started from.

        Args:
            settings: of the run, by name.
            config: folder of the configuration of its UNet.
        """
        model = UnconditionalModelSettings(
            model_config_name_or_path=str(config),
            weight_init=settings.get("weight_init", "diffusers"),  # earlier runs do not say
            **{name: settings[name] for name in ("ddpm_num_steps", "ddpm_beta_schedule", "prediction_type")},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            return cls(model, *_fresh(model, masked=False))  # its configuration has the mask's channel, if any

    def load_average(self):
        """A copy, before the training: a model from scratch is nowhere else."""
        return copy.deepcopy(self.denoiser).to("cpu")

    def load_again(self, name):
        assert self.settings.pretrained_model_name_or_path is not None, "a model from scratch has no base"
        _, unet = _of_base(self.settings)
        unet.register_to_config(sample_size=self.denoiser.config.sample_size)
        return unet

    def condition(self, settings: Any, config: Any) -> Condition:
        if settings.class_labels == "none":
            return Condition()
        number = self.denoiser.config.num_class_embeds
        return ClassLabels(settings.class_labels, number, settings.label_column, settings.seed)

    def encoder_marks(self):
        return {"images": {"precision": str(self.dtype)}, "inputs": {}}

    def rest(self, images, inputs):
        """There are no encoders."""

    def view(self, settings: Any) -> View:
        precise = getattr(settings, "preserve_input_precision", False)
        return (PrecisePixels if precise else Pixels).of(settings)

    def batch(self, images, told):
        labels = [label for label in told if isinstance(label, int)]
        if len(labels) == len(told):
            return Batch(images, {"class_labels": torch.tensor(labels)})
        if self.denoiser is not None and self.denoiser.config.num_class_embeds is not None:
            raise UsageError("losses of a model of classes need the label of each image")
        return Batch(images)

    def pipeline(self):
        return DDPMPipeline(self.denoiser, DDPMScheduler.from_config(self.scheduler.config))

    @torch.no_grad()
    def draw_images(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """As many images as there are prompts, which say nothing."""
        generator, number = torch.Generator(self.device).manual_seed(seed), len(prompts)
        classes = self.denoiser.config.num_class_embeds
        labels = None if classes is None else (torch.arange(number) % classes).tolist()
        return self._draw(generator, number, labels)

    @torch.no_grad()
    def draw_told(self, told, seeds, batch_size, steps=None):
        images: list[Image] = []
        for start in range(0, len(told), batch_size):
            # Drawn on the host, so that every device draws the same noise.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            labels = [label for label in told[start : start + batch_size] if label is not None] or None
            images += self._draw(generators, len(generators), labels, steps)
        return images

    def _draw(self, generator, number, labels, steps=None):
        steps = steps or getattr(self.settings, "ddpm_num_inference_steps", self.objective.num_levels)
        was_training = self.denoiser.training
        try:
            return draw(self.pipeline(), generator, number, min(steps, self.objective.num_levels), labels)
        finally:
            self.denoiser.train(was_training)


def _fresh(settings, masked):
    """(scheduler, UNet) with weights from torch's stream; ``masked``: whether the UNet takes a mask (``Ambient``)."""
    scheduler = DDPMScheduler(
        num_train_timesteps=settings.ddpm_num_steps,
        beta_schedule=settings.ddpm_beta_schedule,
        prediction_type=settings.prediction_type,
    )
    unet = _new_unet(settings, masked)
    if settings.weight_init == "ddpm":
        ddpm_weights(unet)
    return scheduler, unet


def _new_unet(settings, masked):
    classes = {} if settings.class_labels == "none" else {"num_class_embeds": settings.num_classes}
    place = settings.model_config_name_or_path
    if place is not None:
        try:
            config = UNet2DModel.load_config(str(shipped(place, ".json")), cache_dir=settings.cache_dir)
            own = {"in_channels": config.get("in_channels", 3) + 1} if masked else {}
            return UNet2DModel.from_config(config, **classes, **own)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"`model_config_name_or_path` {place}: no configuration of a UNet2DModel: {one_line(error)}"
            ) from error
    return UNet2DModel(
        sample_size=settings.resolution,
        in_channels=3 + masked,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=WIDTHS,
        down_block_types=DOWN_BLOCKS,
        up_block_types=UP_BLOCKS,
        **classes,
    )


@torch.no_grad()
def ddpm_weights(unet: UNet2DModel) -> None:
    """Draw the first weights as the public PyTorch code of DDPM does (that of Ho et al.'s has variances of the same
    kind): Xavier uniform with zero biases, with gain 1e-5 for the last convolution of each residual block and of the
    UNet, so that at first blocks pass their input on and the prediction is zero.

    That code also has gain 1e-5 for the last projection of the attention, but then draws it again with gain 1, as part
    of the residual block that holds it. Embeddings of classes keep Diffusers' weights.
    """
    for module in unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.xavier_uniform_(module.conv2.weight, gain=SMALL_GAIN)
    torch.nn.init.xavier_uniform_(unet.conv_out.weight, gain=SMALL_GAIN)


def _of_base(settings):
    """(scheduler, UNet) of a pipeline; what the settings say of the noise levels must be what it was trained with."""
    base, files = settings.pretrained_model_name_or_path, {"cache_dir": settings.cache_dir}
    scheduler = part_of(DDPMScheduler, base, "scheduler", revision=settings.revision, **files)
    found = scheduler.config
    if settings.prediction_type is not None:
        scheduler.register_to_config(prediction_type=settings.prediction_type)
    for name, of_base in (("ddpm_num_steps", found.num_train_timesteps), ("ddpm_beta_schedule", found.beta_schedule)):
        given = getattr(settings, name)
        if given not in (None, of_base):
            raise UsageError(f"`{name}` {given}: the base {base} has {of_base}; leave it out")
    if scheduler.config.prediction_type not in ("epsilon", "sample"):
        raise UsageError(
            f"`pretrained_model_name_or_path` {base}: predicts {scheduler.config.prediction_type}; epsilon and sample "
            "can be trained"
        )
    files |= {"revision": settings.revision, "variant": settings.variant}
    return scheduler, part_of(UNet2DModel, base, "unet", **files)


def _check(unet, settings, masked):
    """Raise ``UsageError`` where model, images and labels do not fit one another."""
    config, size = unet.config, settings.resolution
    if config.out_channels == 3 and masked != takes_mask(unet):
        why = (
            "takes no mask of the pixels that it is shown; train from scratch"
            if masked
            else ("takes such a mask; give the value that it was trained with")
        )
        raise UsageError(f"`ambient_corruption`: the base {why}")
    if (config.in_channels, config.out_channels) != (3 + masked, 3):
        raise UsageError(
            f"the UNet takes {config.in_channels} channels and predicts {config.out_channels}; images have 3, for both"
        )
    factor = 2 ** (len(config.block_out_channels) - 1)
    if size % factor:
        raise UsageError(f"`resolution` {size}: this UNet takes multiples of {factor}")
    classes = config.num_class_embeds
    if classes is None and settings.class_labels != "none":
        raise UsageError(f"`class_labels` {settings.class_labels}: the base was trained without classes; leave it out")
    if classes is not None and settings.class_labels == "none":
        raise UsageError(f"`class_labels`: the model has {classes} classes; say where labels come from")
    if settings.num_classes not in (None, classes):
        raise UsageError(f"`num_classes` {settings.num_classes}: the base has {classes} classes; leave it out")
    unet.register_to_config(sample_size=size)


@torch.no_grad()
def draw(
    pipeline: Any,
    generator: torch.Generator | list[torch.Generator],
    number: int,
    steps: int,
    labels: Sequence[int] | None = None,
) -> list[Image]:
    """PIL images from noise: what a ``DDPMPipeline`` draws, also with other schedulers, and with class labels, which
    it does not take. A model that takes a mask (Ambient Diffusion) is told that it sees all pixels.

    Args:
        generator: of all images, or one for each.
        steps: of denoising.
        labels: ``number`` classes; None for a model without.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (number, unet.config.out_channels, height, width)
    images = randn_tensor(shape, generator=generator, device=unet.device, dtype=unet.dtype)
    scheduler.set_timesteps(steps)
    images = images * scheduler.init_noise_sigma
    told = {} if labels is None else {"class_labels": torch.tensor(labels, device=unet.device)}
    random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    unet.eval()
    for step in scheduler.timesteps:
        predicted = unet(with_mask(unet, scheduler.scale_model_input(images, step)), step, **told).sample
        images = scheduler.step(predicted, step, images, **random).prev_sample
    shown = (images / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy()
    return pipeline.numpy_to_pil(shown)
