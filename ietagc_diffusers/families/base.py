"""A family: everything that is particular to one kind of model."""

import copy
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from ..data import Batch, Condition, ImageSettings, View
from ..files import place_name
from ..method.config import MitigationConfig
from ..run_folder import ADAPTER_FILE
from ..tensor_files import link
from .settings import PipelineSettings

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # in a folder that diffusers loads
TOKEN_IDS = "input_ids"  # begins the names of texts among a batch's inputs
Image = Any  # PIL's
Tensors = dict[str, torch.Tensor]


class Objective(ABC):
    """From a batch to per-sample losses. Random draws happen in ``draw`` only.

    ``encode`` and ``draw`` return values of the family's own types. What ``draw`` returns has a length, can be indexed
    by rows, and has ``levels``: int64 (B,), the noise level of each sample in [0, ``num_levels``), drawn uniformly; the
    memory bank has its entries over them. It has ``clean`` (B, ...), what is denoised, and its ``noise``, of the same
    shape.

    With ``trains_text`` the text encoders are trained too: ``encode_inputs`` leaves the inputs as they are, and the
    ``losses`` encode them, with gradient.
    """

    trains_text: bool = False

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """T: how many noise levels there are."""

    @property
    def level_name(self) -> str:
        """What the number of a noise level is, as figures call it."""
        return "timestep"

    @abstractmethod
    def encode_images(self, images: torch.Tensor) -> Tensors:
        """What is the same at each visit of images (B, 3, H, W): named tensors (B, ...), which a cache may keep."""

    @abstractmethod
    def encode_inputs(self, inputs: Tensors) -> Tensors:
        """The same of what the model is told of them besides (a batch's ``inputs``)."""

    @abstractmethod
    def encode(self, batch: Batch) -> Any:
        """What is the same at each visit of these images: latents' distribution and conditioning."""

    @abstractmethod
    def draw(self, encoded: Any) -> Any:
        """Noise, levels and all else that is random."""

    @abstractmethod
    def at_levels(self, drawn: Any, levels: torch.Tensor) -> Any:
        """``drawn`` with other noise levels (B,) and nothing else changed."""

    @abstractmethod
    def with_images(self, drawn: Any, rows: Sequence[int], images: torch.Tensor) -> Any:
        """``drawn`` with the samples ``rows`` showing ``images`` (N, 3, H, W): same noise, level and conditioning."""

    @abstractmethod
    def scales(self, drawn: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise in what the model is shown of each sample: a and b, (B,), of a clean + b noise."""

    @abstractmethod
    def denoised(self, model: Callable, noisy: torch.Tensor, drawn: Any) -> torch.Tensor:
        """What the model takes ``noisy`` (B, ...) to be without its noise, at the levels and told the conditions of
        ``drawn``: float32, like ``drawn.clean``.
        """

    @abstractmethod
    def decoded(self, clean: torch.Tensor) -> torch.Tensor:
        """The images, float32 (B, 3, H, W), that ``clean`` (B, ...) stands for; about in [-1, 1]."""

    @abstractmethod
    def losses(self, model: Callable, drawn: Any) -> torch.Tensor:
        """Unweighted loss of each sample: (B,) float32."""

    @abstractmethod
    def plain_loss(self, model: Callable, drawn: Any) -> torch.Tensor:
        """The official script's scalar loss."""

    def plain(self) -> "Objective":
        """The same without what a training adds to images, noise or conditions, to compare models by its losses."""
        return self

    def weights(self, drawn: Any) -> torch.Tensor | None:
        """Weights (B,) that depend on the level only and so cancel in the loss ratio, or None."""
        return None

    @property
    def predicts_noise(self) -> bool:
        """Whether what the model predicts says which noise it sees, so that there is ``noise_in``."""
        return False

    def noise_in(self, model: Callable, drawn: Any, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The noise that the model sees in what is denoised, float32 (B, ...), at the levels of ``drawn``.

        noise: is added first, as much as these levels say, like what is denoised; None shows it as it is, without
        noise.
        """
        raise NotImplementedError


class Family(ABC):
    """One kind of model, loaded.

    Attributes:
        denoiser: the trained module.
        text_encoders: by their name in a pipeline; {} for a family without.
        objective: ``Objective``.
        settings: what the base was loaded by.
        device: of all parts; dtype: of the frozen parts and of the images.
    """

    name: ClassVar[str]  # as reports call it
    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]  # those that are of this family
    denoiser_name: ClassVar[str]  # the denoiser's folder in a pipeline
    tags: ClassVar[tuple[str, ...]]  # of the model card
    script: ClassVar[str] = "train_text_to_image_ietagc.py"  # that trains every base of this family
    # The layers of the denoiser and of the text encoders that get adapters: the official scripts', those of attention.
    denoiser_targets: ClassVar[tuple[str, ...]] = ("to_k", "to_q", "to_v", "to_out.0")
    text_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")

    text_encoders: dict[str, Any]
    denoiser: Any  # a diffusers model: a torch.nn.Module with a configuration
    objective: Objective
    settings: PipelineSettings
    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def parts(self) -> list[torch.nn.Module]:
        """All modules, the denoiser among them."""

    @property
    def adaptable_texts(self) -> dict[str, Any]:
        """The text encoders that adapters can be trained on, by name."""
        return {}

    @property
    def trained(self) -> dict[str, Any]:
        """The trained modules by their name in a pipeline, the denoiser first."""
        return {self.denoiser_name: self.denoiser} | (self.adaptable_texts if self.objective.trains_text else {})

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters of all parts: the size of the pipeline's files, nearly."""
        return sum(p.nbytes for part in self.parts for p in part.parameters())

    @property
    def merged_nbytes(self) -> int:
        """The same of the pipeline within ``merged``, where the modules with adapters are in float32."""
        own = [parameter for module in self.trained.values() for parameter in module.parameters()]
        merged = sum(4 * parameter.numel() for parameter in own if not parameter.requires_grad)
        return self.nbytes - sum(parameter.nbytes for parameter in own) + merged

    @classmethod
    @abstractmethod
    def load(
        cls,
        settings: PipelineSettings,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        config: MitigationConfig | None = None,
    ) -> "Family":
        """Load a base for training. ``settings`` may also have those of the family's objective."""

    @classmethod
    @abstractmethod
    def load_frozen(
        cls,
        base: str,
        prediction_type: str | None = None,
        device: torch.device | str = "cpu",
        setting: str = "pretrained_model_name_or_path",
    ) -> "Family":
        """Load all but the denoiser, in float32, to compute losses of denoisers that come from elsewhere.

        ``base``: folder or Hub id of a pipeline; ``prediction_type``: if not the base's; ``setting`` names the base in
        messages.
        """

    @classmethod
    @abstractmethod
    def load_denoiser(cls, folder: str | Path, subfolder: str | None = None, **options: Any) -> torch.nn.Module:
        """A denoiser from a folder of its own, or from a subfolder of a pipeline."""

    @classmethod
    def load_adapted(cls, base: str | Path, adapter: str | Path, **options: Any) -> torch.nn.Module:
        """The denoiser of the pipeline ``base`` with the adapter of a folder (``ADAPTER_FILE``)."""
        denoiser: Any = cls.load_denoiser(base, cls.denoiser_name, **options)
        denoiser.load_lora_adapter(Path(adapter), weight_name=ADAPTER_FILE, prefix=cls.denoiser_name)
        return denoiser

    def checkpoint_gradients(self) -> None:
        """Recompute activations of the trained modules in the backward pass."""
        self.denoiser.enable_gradient_checkpointing()
        for encoder in self.adaptable_texts.values() if self.objective.trains_text else ():
            encoder.gradient_checkpointing_enable({"use_reentrant": False})  # as diffusers does it for the denoiser

    @contextmanager
    def text_adapted(self, adapter: str | Path) -> Iterator[bool]:
        """Within it the text encoders have what the adapter of a folder has for them. Gives whether it has anything."""
        with safe_open(Path(adapter) / ADAPTER_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "null"))
        told = {name.partition(".")[0] for name in tensors}
        own = {name: encoder for name, encoder in self.adaptable_texts.items() if name in told}
        loader: Any = self.pipelines[0]
        try:
            for name, encoder in own.items():
                adapted = copy.deepcopy(encoder)
                loader.load_lora_into_text_encoder(tensors, None, adapted, prefix=name, metadata=about)
                self._put({name: adapted})
            yield bool(own)
        finally:
            self._put(own)

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Within it the trained modules are those of the base, loaded again; float32, on the host."""
        own = self.trained
        try:
            self._put({name: self.load_again(name) for name in own})
            yield
        finally:
            self._put(own)

    @contextmanager
    def merged(self, adapter: str | Path) -> Iterator[None]:
        """Within it the trained modules are those of the base, with the adapter of a folder added to their weights."""
        with self.at_base():
            pipeline: Any = self.pipeline()
            pipeline.load_lora_weights(Path(adapter), weight_name=ADAPTER_FILE)
            pipeline.fuse_lora(components=list(self.trained))
            pipeline.unload_lora_weights()
            yield

    def _put(self, modules):
        """Modules, by their name in a pipeline, in the place of those that the family has."""
        for name, module in modules.items():
            if name == self.denoiser_name:
                self.denoiser = module
            else:
                self.text_encoders[name] = module

    def load_again(self, name: str) -> torch.nn.Module:
        """A second copy of a trained module, by its name in a pipeline, as the base has it; float32, on the host."""
        if name == self.denoiser_name:
            return self.load_average()
        s, kind = self.settings, type(self.text_encoders[name])
        return kind.from_pretrained(
            s.pretrained_model_name_or_path,
            subfolder=name,
            dtype=torch.float32,
            variant=s.variant,
            revision=s.revision,
            cache_dir=s.cache_dir,
        )

    @abstractmethod
    def load_average(self) -> torch.nn.Module:
        """A second copy of the base's denoiser, for the moving average to start from."""

    @abstractmethod
    def condition(self, settings: Any, config: MitigationConfig) -> Condition:
        """What the model is told of a training row."""

    def unconditional(self) -> Tensors:
        """The condition that stands for no caption, named tensors (1, ...); {} for a family without captions."""
        return {}

    @abstractmethod
    def encoder_marks(self) -> dict[str, dict[str, str]]:
        """What stands for all that ``encode_images`` and ``encode_inputs`` depend on, by "images" and "inputs"."""

    @abstractmethod
    def rest(self, images: bool, inputs: bool) -> None:
        """Move the encoders of images or of inputs, which will not be needed, to the host. They come back for as long
        as images are drawn.
        """

    @abstractmethod
    def view(self, settings: ImageSettings) -> View:
        """What one visit shows of a PIL image: float32 (3, H, W) in [-1, 1], and what the model is told of the view."""

    @abstractmethod
    def batch(self, images: torch.Tensor, told: list[Any]) -> Batch:
        """Images, float32 (B, 3, H, W) in [-1, 1], and what the model is told of each as the objective takes them: its
        caption, its class (an integer), or nothing (None).
        """

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """The base's pipeline with the denoiser as it is now. Raises ``UsageError`` if it cannot be assembled."""

    def save_pipeline(self, folder: Path, earlier: Path | None = None) -> None:
        """Write the pipeline as diffusers loads it: the denoiser first, so that it is there whatever happens to the
        rest, and model_index.json last, so that it is there only if all else is.

        ``earlier``: a folder that this wrote before. All but the denoiser is still the same, and gets a second name
        instead of being written again.
        """
        self.denoiser.save_pretrained(folder / self.denoiser_name)
        pipeline = self.pipeline()
        for name, part in pipeline.components.items():
            if name == self.denoiser_name or part is None:
                continue
            if earlier is None:
                part.save_pretrained(folder / name)
            else:
                shutil.copytree(earlier / name, folder / name, copy_function=link)
        pipeline.save_config(folder)
        _name_places(folder)

    @abstractmethod
    def draw_images(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """An image for each prompt, from the seed only. Leaves the process's random streams as they are."""

    @abstractmethod
    def draw_told(
        self, told: Sequence[Any], seeds: Sequence[int], batch_size: int, steps: int | None = None
    ) -> list[Image]:
        """An image for each thing that the model is told (see ``batch``), the noise of each from its own seed only.
        Leaves the process's random streams as they are.

        batch_size: images at once; steps: of denoising, by default as many as ``draw_images`` takes.
        """

    def save_denoiser_config(self, folder: Path, more: dict[str, Any] | None = None) -> None:
        """Write what diffusers needs beside the denoiser's weights. ``more``: keys for its configuration."""
        config = json.loads(self.denoiser.to_json_string())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | (more or {}), indent=2, sort_keys=True) + "\n")


def drawn_edge(resolution: int) -> int:
    """The height and width at which a model of this resolution draws: pipelines draw multiples of 8."""
    return max(8, resolution // 8 * 8)


def _name_places(folder: Path) -> None:
    """Configurations say where a part came from: not with paths of this machine, which would go to the Hub."""
    for path in [folder / "model_index.json", *folder.glob("*/*.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        where = config.get("_name_or_path") if isinstance(config, dict) else None
        if isinstance(where, str) and place_name(where) != where:
            path.write_text(json.dumps(config | {"_name_or_path": place_name(where)}, indent=2, sort_keys=True) + "\n")
