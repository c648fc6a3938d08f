"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents, told the caption by one CLIP text encoder."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torchvision.transforms import Compose
from transformers import CLIPTextModel, CLIPTokenizer

from ..data import Batch, Captions, DataSettings, fixed_transforms, image_transform
from ..errors import UsageError
from .base import Family, Image, drawn_edge
from .settings import BaseModelSettings
from .text_to_image import Tensors, TextToImageObjective

VALIDATION_STEPS = 20


@dataclass(frozen=True)
class Pixels:
    """A view that tells the model nothing but its pixels.

    ``fixed``: what the transform shows without chance, the image and perhaps its mirror image; () where that is more.
    """

    transform: Compose
    fixed: tuple[Compose, ...] = ()

    def __call__(self, image: Image) -> tuple[torch.Tensor, Tensors]:
        return self.transform(image), {}

    def draw(self) -> int:
        """Which of the fixed views a visit shows, by the draw that the transform makes."""
        return int(torch.rand(1) < 0.5) if len(self.fixed) > 1 else 0


@dataclass(frozen=True)
class Tokenize:
    """Texts to token ids ``input_ids`` (B, L), padded or cut to the model's length L."""

    tokenizer: CLIPTokenizer

    def __call__(self, texts: list[str]) -> Tensors:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        return {"input_ids": tokens.input_ids}


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    name = "Stable Diffusion"
    pipelines = (StableDiffusionPipeline,)
    denoiser_name = "unet"
    tags = ("stable-diffusion", "stable-diffusion-diffusers", "text-to-image")
    objective: TextToImageObjective

    def __init__(
        self,
        settings: BaseModelSettings,
        scheduler: DDPMScheduler,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        denoiser: UNet2DConditionModel | None,
        device: torch.device | str,
        dtype: torch.dtype,
        **objective: Any,
    ):
        self.settings = settings
        self.tokenize = Tokenize(tokenizer)
        self.tokenizer, self.text_encoder, self.vae, self.denoiser = tokenizer, text_encoder, vae, denoiser
        self.device, self.dtype = torch.device(device), dtype
        self.resting: list[torch.nn.Module] = []  # parts that wait on the host
        for frozen in (vae, text_encoder):
            frozen.requires_grad_(False)
            frozen.to(device)
            if frozen.dtype != dtype:  # diffusers warns of a cast even where there is none
                frozen.to(dtype=dtype)
        self.objective = TextToImageObjective(vae, self.encode_text, scheduler, dtype, **objective)

    @classmethod
    def load(cls, settings, device="cpu", dtype=torch.float32, config=None):
        """Load a base for training, in the official script's order. ``settings``: ``TrainingSettings``, or any that
        have those of the base and of the objective.
        """
        base = settings.pretrained_model_name_or_path
        pinned = {"revision": settings.revision, "cache_dir": settings.cache_dir}
        of_denoiser = {"revision": settings.non_ema_revision, "cache_dir": settings.cache_dir}
        if getattr(settings, "lora_rank", None) is not None:  # frozen: as the other parts, also upstream
            of_denoiser = pinned | {"variant": settings.variant}
        family = cls(
            settings,
            _scheduler(base, settings.prediction_type, cache_dir=settings.cache_dir),
            _part(CLIPTokenizer, base, "tokenizer", **pinned),
            _part(CLIPTextModel, base, "text_encoder", variant=settings.variant, **pinned),
            _part(AutoencoderKL, base, "vae", variant=settings.variant, **pinned),
            _part(UNet2DConditionModel, base, "unet", **of_denoiser),
            device,
            dtype,
            noise_offset=settings.noise_offset,
            input_perturbation=settings.input_perturbation,
            snr_gamma=settings.snr_gamma,
            dream_detail_preservation=settings.dream_detail_preservation if settings.dream_training else None,
            embedding_noise=(config and config.embedding_noise) or 0.0,
            trains_text=getattr(settings, "train_text_encoder", False),
        )
        family._check_parts()
        family._draw_at(getattr(settings, "resolution", None))
        family.denoiser.train()
        if config is not None and config.wen_threshold is not None:
            family.objective.unconditional = family.objective.encode_inputs(family.tokenize([""]))
        return family

    def _draw_at(self, resolution):
        """Make the resolution of the training the one at which pipelines draw unless they are told another."""
        if resolution is not None:
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            self.denoiser.register_to_config(sample_size=max(1, drawn_edge(resolution) // factor))

    def _check_parts(self):
        """Raise ``UsageError`` where the parts of the base do not fit one another."""
        base = f"`pretrained_model_name_or_path` {self.settings.pretrained_model_name_or_path}"
        unet, vae, text = self.denoiser.config, self.vae.config, self.text_encoder.config
        for what, found, wanted in (
            ("the UNet takes latents of {} channels, the VAE makes {}", unet.in_channels, vae.latent_channels),
            ("the UNet predicts {} channels, the VAE's latents have {}", unet.out_channels, vae.latent_channels),
            ("the UNet takes embeddings of width {}, the text encoder makes {}", unet.cross_attention_dim,
             text.hidden_size),
        ):  # fmt: skip
            if found != wanted:
                raise UsageError(f"{base}: {what.format(found, wanted)}: not a base for text-to-image training")
        if len(self.tokenizer) > text.vocab_size:
            raise UsageError(
                f"{base}: the tokenizer has {len(self.tokenizer)} tokens, the text encoder {text.vocab_size}: they "
                "belong to different models"
            )
        if not 0 < self.tokenizer.model_max_length <= text.max_position_embeddings:
            raise UsageError(
                f"{base}: tokenizer_config.json gives model_max_length {self.tokenizer.model_max_length:,}; the text "
                f"encoder reads {text.max_position_embeddings} tokens: set it to that"
            )

    @classmethod
    def load_frozen(cls, base, prediction_type=None, device="cpu", setting="pretrained_model_name_or_path"):
        family = cls(
            BaseModelSettings(pretrained_model_name_or_path=str(base)),
            _scheduler(base, prediction_type, setting=setting),
            _part(CLIPTokenizer, base, "tokenizer", setting=setting),
            _part(CLIPTextModel, base, "text_encoder", setting=setting, dtype=torch.float32),
            _part(AutoencoderKL, base, "vae", setting=setting, dtype=torch.float32),
            None,
            device,
            torch.float32,
        )
        family.vae.enable_slicing()  # one image at a time: its encoder has the widest activations
        return family

    @classmethod
    def load_denoiser(cls, folder, subfolder=None, **options):
        where = {} if subfolder is None else {"subfolder": subfolder}
        return UNet2DConditionModel.from_pretrained(folder, **where, **options)

    def load_average(self):
        s = self.settings
        pinned = {"revision": s.revision, "cache_dir": s.cache_dir}
        return _part(UNet2DConditionModel, s.pretrained_model_name_or_path, "unet", variant=s.variant, **pinned)

    @property
    def text_encoders(self):
        return {"text_encoder": self.text_encoder}

    def encode_text(self, inputs: Tensors) -> Tensors:
        """The captions' embeddings, (B, L, D)."""
        ids = inputs["input_ids"].to(self.text_encoder.device)
        return {"encoder_hidden_states": self.text_encoder(ids, return_dict=False)[0]}

    def condition(self, settings, config):
        return Captions(
            settings.caption_column,
            self.tokenize,
            self.tokenizer,
            config.caption_mitigation,
            config.caption_mitigation_probability,
        )

    def view(self, settings: DataSettings) -> Pixels:
        size, flip, mode = settings.resolution, settings.random_flip, settings.image_interpolation_mode
        fixed = fixed_transforms(size, flip, mode) if settings.center_crop else ()
        return Pixels(image_transform(size, settings.center_crop, flip, mode), fixed)

    def encoder_marks(self):
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            files = sorted(path.read_bytes() for path in Path(folder).iterdir())
        precision = {"precision": str(self.dtype)}
        tokenizer = hashlib.blake2b(b"".join(files), digest_size=8).hexdigest()
        return {
            "images": precision | {"vae": _mark(self.vae)},
            "inputs": precision | {"text_encoder": _mark(self.text_encoder), "tokenizer": tokenizer},
        }

    def rest(self, images, inputs):
        self.resting = [*([self.vae] if images else []), *([self.text_encoder] if inputs else [])]
        for part in self.resting:
            part.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def batch(self, images, texts):
        return Batch(images, self.tokenize(texts))

    def pipeline(self):
        s, size = self.settings, self.denoiser.config.sample_size
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                s.pretrained_model_name_or_path,
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.denoiser,
                revision=s.revision,
                variant=s.variant,
                cache_dir=s.cache_dir,
            )
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"`pretrained_model_name_or_path` {s.pretrained_model_name_or_path}: its pipeline cannot be assembled: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        # diffusers gives denoisers of its first versions the size 64 here, whatever they were trained at.
        self.denoiser.register_to_config(sample_size=size)
        # What the denoiser was trained to predict, which need not be what the base's did.
        pipeline.scheduler.register_to_config(prediction_type=self.objective.scheduler.config.prediction_type)
        return pipeline

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Within it the resting parts are on the device."""
        for part in self.resting:
            part.to(self.device)
        try:
            yield
        finally:
            for part in self.resting:
                part.to("cpu")

    def draw_images(self, prompts: Sequence[str], seed: int) -> list[Image]:
        half = self.dtype != torch.float32
        with self._awake(), torch.autocast(self.device.type, enabled=half, dtype=self.dtype):
            pipeline = self.pipeline()
            pipeline.safety_checker = None
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator(device=self.device).manual_seed(seed)
            return [
                pipeline(prompt, num_inference_steps=VALIDATION_STEPS, generator=generator).images[0]
                for prompt in prompts
            ]

    def save_denoiser_config(self, folder: Path, more: dict[str, Any] | None = None) -> None:
        config = json.loads(self.denoiser.to_json_string())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | (more or {}), indent=2, sort_keys=True) + "\n")


def _scheduler(base, prediction_type, **options):
    scheduler = _part(DDPMScheduler, base, "scheduler", **options)
    if prediction_type is not None:
        scheduler.register_to_config(prediction_type=prediction_type)
    return scheduler


def _mark(module):
    """A hash of a module's configuration and weights, wherever they came from."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    about = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _part(kind, base, subfolder, setting="pretrained_model_name_or_path", **options):
    try:
        return kind.from_pretrained(base, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = ""
        if options.get("variant") is None and any(Path(base, subfolder).glob("*.fp16.*")):
            hint = "; it has weights of the variant fp16 only: set `variant` to fp16"
        raise UsageError(
            f"`{setting}` {base}: no {kind.__name__} in its subfolder '{subfolder}'{hint}: {reason}"
        ) from error
