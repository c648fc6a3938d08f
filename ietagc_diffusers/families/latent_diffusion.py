"""What families of latent text-to-image models have in common: a VAE, text encoders, and a denoiser of latents."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..data import Batch, Captions, ImageSettings, View
from ..errors import UsageError
from ..method.config import MitigationConfig
from ..settings import declared
from .base import Family, Image, Tensors
from .latent_objective import LatentObjective
from .noisy_data import NoisyData
from .parts import Reader, Tokenize, cast, mark_of, mark_of_tokenizer, part_of, scheduler_of
from .settings import BaseModelSettings
from .views import Pixels

VALIDATION_STEPS = 20


class LatentDiffusion(Family):
    """A family whose pipeline has a VAE, one or more text encoders, and a denoiser of latents.

    Attributes:
        settings: of the base.
        tokenizers, text_encoders: those that the base has, by the names of their folders in the pipeline.
        vae: frozen, as the text encoders are.
        resting: parts that wait on the host.
    """

    readers: ClassVar[tuple[Reader, ...]]
    denoiser_kind: ClassVar[Any]
    scheduler_kind: ClassVar[Any]
    foreign: ClassVar[tuple[str, ...]] = ()  # settings that such a model has no use for
    settings: BaseModelSettings
    objective: LatentObjective

    def __init__(
        self,
        settings: BaseModelSettings,
        scheduler: Any,
        tokenizers: Mapping[str, Any],
        text_encoders: Mapping[str, Any],
        vae: AutoencoderKL,
        denoiser: torch.nn.Module | None,
        device: torch.device | str,
        dtype: torch.dtype,
        **objective: Any,
    ):
        self.settings = settings
        self.tokenizers = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
        self.text_encoders = {name: encoder for name, encoder in text_encoders.items() if encoder is not None}
        self.vae, self.denoiser = vae, denoiser
        self.device, self.dtype = torch.device(device), dtype
        self.resting: list[torch.nn.Module] = []
        for frozen, precision in ((vae, self.vae_dtype()), *((text, dtype) for text in self.text_encoders.values())):
            frozen.requires_grad_(False)
            cast(frozen, precision)  # before the move: in float32 T5 by itself would fill a device
            frozen.to(device)
        self.tokenize = Tokenize({r.ids: (self.tokenizers[r.tokenizer_name], self.length(r)) for r in self.present})
        self.objective = self.make_objective(scheduler, **objective)

    @property
    def present(self) -> list[Reader]:
        """The readers that this pipeline has."""
        return [reader for reader in self.readers if reader.encoder_name in self.text_encoders]

    @property
    def parts(self) -> list[torch.nn.Module]:
        return [*self.text_encoders.values(), self.vae, *([] if self.denoiser is None else [self.denoiser])]

    @property
    def adaptable_texts(self):
        """As in the official scripts: CLIP's."""
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        return {name: encoder for name, encoder in self.text_encoders.items() if isinstance(encoder, kinds)}

    @abstractmethod
    def make_objective(self, scheduler: Any, **options: Any) -> LatentObjective:
        """The objective around these parts."""

    @classmethod
    @abstractmethod
    def objective_options(cls, settings: Any, scheduler: Any) -> dict[str, Any]:
        """Options of ``make_objective`` that the settings of a training give."""

    @abstractmethod
    def encode_text(self, inputs: Tensors) -> Tensors:
        """The condition of token ids: named tensors (B, ...)."""

    def fits(self) -> list[tuple[str, int, int]]:
        """What must agree between the parts: a sentence with two gaps for numbers, and both numbers."""
        denoiser, channels = self.denoiser.config, self.vae.config.latent_channels
        name = "UNet" if self.denoiser_name == "unet" else self.denoiser_name
        return [
            (f"the {name} takes latents of {{}} channels, the VAE makes {{}}", denoiser.in_channels, channels),
            (f"the {name} predicts {{}} channels, the VAE's latents have {{}}", denoiser.out_channels, channels),
        ]

    def vae_dtype(self) -> torch.dtype:
        """The precision of the VAE: here that of the other frozen parts."""
        return self.dtype

    def length(self, reader: Reader) -> int:
        """How many tokens of a text a reader is given."""
        return self.tokenizers[reader.tokenizer_name].model_max_length

    @classmethod
    def load(cls, settings, device="cpu", dtype=torch.float32, config=None):
        """Load a base for training. ``settings``: ``TrainingSettings``, or any that have those of the base and of the
        objective.
        """
        cls._refuse_foreign(settings)
        pinned = {"revision": settings.revision, "cache_dir": settings.cache_dir}
        files = pinned | {"variant": settings.variant}
        frozen = {"dtype": dtype}  # read in this precision: in float32 T5 alone takes 19 GB of memory
        scheduler = scheduler_of(
            cls.scheduler_kind, settings.pretrained_model_name_or_path, cache_dir=settings.cache_dir
        )
        options = cls.objective_options(settings, scheduler)
        options["embedding_noise"] = (config and config.embedding_noise) or 0.0
        options["noisy_data"] = NoisyData.of(config, settings)
        options["trains_text"] = getattr(settings, "train_text_encoder", False)
        make: Any = cls
        family = make(
            settings,
            scheduler,
            *cls._load_texts(settings.pretrained_model_name_or_path, pinned, files | frozen),
            cls._load_vae(settings, files),
            part_of(
                cls.denoiser_kind,
                settings.pretrained_model_name_or_path,
                cls.denoiser_name,
                **cls.denoiser_source(settings, files),
                **(frozen if getattr(settings, "lora_rank", None) is not None else {}),
            ),
            device,
            dtype,
            **options,
        )
        family.check_parts()
        family.prepare_denoiser(getattr(settings, "resolution", None))
        family.denoiser.train()
        if config is not None and config.wen_threshold is not None:
            family.objective.unconditional = family.unconditional()
        return family

    @classmethod
    def _refuse_foreign(cls, settings):
        defaults = {entry.name: entry.default for entry in declared(type(settings))}
        for name in cls.foreign:
            if getattr(settings, name, defaults.get(name)) != defaults.get(name):
                raise UsageError(f"`{name}`: does not apply to {cls.name}, which the base is; leave it out")

    @classmethod
    def denoiser_source(cls, settings: Any, files: dict[str, Any]) -> dict[str, Any]:
        """Options for loading the denoiser of a base; ``files``: those of the other parts."""
        return files

    @classmethod
    def _load_texts(cls, base, pinned, files, **options):
        """(tokenizers, text encoders) of a base, by the names of their folders; what it may lack and lacks is None."""
        tokenizers, encoders = {}, {}
        lacking = cls.lacking(base, **pinned)
        for reader in cls.readers:
            there = reader.encoder_name not in lacking or not reader.optional
            tokenizer, encoder = reader.tokenizer_name, reader.encoder_name
            tokenizers[tokenizer] = part_of(reader.tokenizer, base, tokenizer, **pinned, **options) if there else None
            encoders[encoder] = part_of(reader.encoder, base, encoder, **files, **options) if there else None
        return tokenizers, encoders

    @classmethod
    def lacking(cls, base: str, **pinned: Any) -> set[str]:
        """Optional parts that a pipeline's index names as left out."""
        if not any(reader.optional for reader in cls.readers):
            return set()
        try:
            index = cls.pipelines[0].load_config(str(base), **pinned)
        except (OSError, ValueError):
            return set()
        return {name for name, kind in index.items() if isinstance(kind, (list, tuple)) and kind[0] is None}

    @classmethod
    def _load_vae(cls, settings, files):
        own = settings.pretrained_vae_model_name_or_path
        if own is None:
            return part_of(AutoencoderKL, settings.pretrained_model_name_or_path, "vae", **files)
        # A VAE of its own has no revision or variant of the base.
        return part_of(
            AutoencoderKL, own, None, setting="pretrained_vae_model_name_or_path", cache_dir=files["cache_dir"]
        )

    def prepare_denoiser(self, resolution: int | None) -> None:
        """Whatever is to be changed of a denoiser before it is trained at a resolution: here nothing."""

    def check_parts(self) -> None:
        """Raise ``UsageError`` where the parts of the base do not fit one another."""
        base = f"`pretrained_model_name_or_path` {self.settings.pretrained_model_name_or_path}"
        for what, found, wanted in self.fits():
            if found != wanted:
                raise UsageError(f"{base}: {what.format(found, wanted)}: not a base for text-to-image training")
        for reader in self.present:
            tokenizer, text = self.tokenizers[reader.tokenizer_name], self.text_encoders[reader.encoder_name].config
            if len(tokenizer) > text.vocab_size:
                raise UsageError(
                    f"{base}: the {reader.tokenizer_name} has {len(tokenizer)} tokens, the {reader.encoder_name} "
                    f"{text.vocab_size}: they belong to different models"
                )
            limit = getattr(text, "max_position_embeddings", None)  # T5 has none
            if limit is not None and not 0 < self.length(reader) <= limit:
                raise UsageError(
                    f"{base}: tokenizer_config.json of the {reader.tokenizer_name} gives model_max_length "
                    f"{self.length(reader):,}; the {reader.encoder_name} reads {limit} tokens: set it to that"
                )

    @classmethod
    def load_frozen(cls, base, prediction_type=None, device="cpu", setting="pretrained_model_name_or_path"):
        base, where = str(base), {"setting": setting}
        settings = BaseModelSettings(pretrained_model_name_or_path=base)
        scheduler = scheduler_of(cls.scheduler_kind, base, **where)
        make: Any = cls
        family = make(
            settings,
            scheduler,
            *cls._load_texts(base, {}, {"dtype": torch.float32}, **where),
            part_of(AutoencoderKL, base, "vae", dtype=torch.float32, **where),
            None,
            device,
            torch.float32,
            **cls.frozen_options(scheduler, prediction_type),
        )
        family.vae.enable_slicing()  # one image at a time: its encoder has the widest activations
        return family

    @classmethod
    def frozen_options(cls, scheduler: Any, prediction_type: str | None) -> dict[str, Any]:
        """Options of ``make_objective`` for losses that models are compared by."""
        return {}

    @classmethod
    def load_denoiser(cls, folder, subfolder=None, **options):
        where = {} if subfolder is None else {"subfolder": subfolder}
        return cls.denoiser_kind.from_pretrained(folder, **where, **options)

    def load_average(self):
        s = self.settings
        files: dict[str, Any] = {"revision": s.revision, "cache_dir": s.cache_dir, "variant": s.variant}
        return part_of(self.denoiser_kind, s.pretrained_model_name_or_path, self.denoiser_name, **files)

    def condition(self, settings: Any, config: MitigationConfig) -> Captions:
        return Captions(
            settings.caption_column,
            self.tokenize,
            self.tokenizers[self.readers[0].tokenizer_name],
            config.caption_mitigation,
            config.caption_mitigation_probability,
            settings.caption_dropout,
        )

    def unconditional(self) -> Tensors:
        """What captions are compared with: what ``encode_inputs`` gives of the empty one, tensors (1, ...)."""
        return self.objective.encode_inputs(self.tokenize([""]))

    def embeddings(self, condition: Tensors) -> Tensors:
        """What the text encoders made of the caption, of a condition: embeddings of the tokens, and in some families a
        pooled one.
        """
        return {name: condition[name] for name in self.objective.EMBEDDINGS}

    def in_place_of_prompt(self, embeddings: Tensors, nothing: Tensors) -> Tensors:
        """The same, of captions and of the empty one, as arguments that the pipeline takes in the place of prompts."""
        names = ("prompt_embeds", "pooled_prompt_embeds")
        both = ((names, embeddings), ([f"negative_{name}" for name in names], nothing))
        return {name: value for each, told in both for name, value in zip(each, told.values(), strict=False)}

    def view(self, settings: ImageSettings) -> View:
        return Pixels.of(settings)

    def told(self, images: torch.Tensor) -> Tensors:
        """What the model is told of images (B, 3, H, W) that are shown as they are: here nothing."""
        return {}

    def batch(self, images, texts):
        return Batch(images, self.tokenize(texts), told=self.told(images))

    def encoder_marks(self):
        inputs = {"precision": str(self.dtype)}
        inputs |= {f"length{reader.suffix}": str(self.length(reader)) for reader in self.readers}
        for reader in self.present:
            inputs[reader.encoder_name] = mark_of(self.text_encoders[reader.encoder_name])
            inputs[reader.tokenizer_name] = mark_of_tokenizer(self.tokenizers[reader.tokenizer_name])
        return {"images": {"precision": str(self.vae.dtype), "vae": mark_of(self.vae)}, "inputs": inputs}

    def rest(self, images, inputs):
        self.resting = [*([self.vae] if images else []), *(self.text_encoders.values() if inputs else [])]
        for part in self.resting:
            part.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pipeline(self):
        s = self.settings
        try:
            return self.pipelines[0].from_pretrained(
                s.pretrained_model_name_or_path,
                **{reader.encoder_name: self.text_encoders.get(reader.encoder_name) for reader in self.readers},
                **{reader.tokenizer_name: self.tokenizers.get(reader.tokenizer_name) for reader in self.readers},
                **{self.denoiser_name: self.denoiser},
                vae=self.vae,
                revision=s.revision,
                variant=s.variant,
                cache_dir=s.cache_dir,
            )
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"`pretrained_model_name_or_path` {s.pretrained_model_name_or_path}: its pipeline cannot be assembled: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

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

    def _quiet_pipeline(self):
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def draw_images(self, prompts: Sequence[str], seed: int) -> list[Image]:
        with self._awake():
            pipeline = self._quiet_pipeline()
            generator = torch.Generator(device=self.device).manual_seed(seed)
            return [self._draw(pipeline, [prompt], generator)[0] for prompt in prompts]

    @torch.no_grad()
    def draw_told(self, told, seeds, batch_size, steps=None):
        images: list[Image] = []
        with self._awake():
            pipeline = self._quiet_pipeline()
            for start in range(0, len(told), batch_size):
                # Drawn on the host, so that every device draws the same noise.
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
                prompts = list(told[start : start + batch_size])
                images += self._draw(pipeline, prompts, generators, steps or VALIDATION_STEPS)
        return images

    def _draw(self, pipeline, prompts, generator, steps=VALIDATION_STEPS):
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, enabled=half, dtype=self.dtype):
            latents = pipeline(
                prompts,
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
                **self.drawn_size(),
            ).images
        # Outside of the autocast, as some VAEs overflow in half; and one at a time: a VAE has the widest tensors.
        decoded = [self.objective.decoded(one.to(self.vae.dtype)) for one in latents.split(1)]
        return [pipeline.image_processor.postprocess(image)[0] for image in decoded]

    def drawn_size(self) -> dict[str, int]:
        """Height and width of validation images, where they are not the pipeline's own."""
        return {}

    @classmethod
    def of_pipeline(cls, pipeline: Any, settings: BaseModelSettings | None = None, **objective: Any) -> Self:
        """The family around a pipeline's parts, which it shares, in float32 on the CPU. ``objective``: options of
        ``make_objective``.
        """
        return cls(
            settings or BaseModelSettings(),
            pipeline.scheduler,
            {reader.tokenizer_name: getattr(pipeline, reader.tokenizer_name) for reader in cls.readers},
            {reader.encoder_name: getattr(pipeline, reader.encoder_name) for reader in cls.readers},
            pipeline.vae,
            getattr(pipeline, cls.denoiser_name),
            "cpu",
            torch.float32,
            **objective,
        )
