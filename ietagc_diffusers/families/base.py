"""A family: everything that is particular to one kind of model."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from ..data import Batch, Condition, DataSettings, View
from ..method.config import MitigationConfig
from ..run_folder import ADAPTER_FILE
from .settings import BaseModelSettings

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # in a folder that diffusers loads
Image = Any  # PIL's
Tensors = dict[str, torch.Tensor]


class Objective(ABC):
    """From a batch to per-sample losses. Random draws happen in ``draw`` only.

    ``encode`` and ``draw`` return values of the family's own types. What ``draw`` returns has a length, can be indexed
    by rows, and has ``levels``: int64 (B,), the noise level of each sample in [0, ``num_levels``), drawn uniformly; the
    memory bank has its entries over them.
    """

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """T: how many noise levels there are."""

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
    def losses(self, model: Callable, drawn: Any) -> torch.Tensor:
        """Unweighted loss of each sample: (B,) float32."""

    @abstractmethod
    def plain_loss(self, model: Callable, drawn: Any) -> torch.Tensor:
        """The official script's scalar loss."""

    def weights(self, drawn: Any) -> torch.Tensor | None:
        """Weights (B,) that depend on the level only and so cancel in the loss ratio, or None."""
        return None


class Family(ABC):
    """One kind of model, loaded.

    Attributes:
        denoiser: the trained module.
        objective: ``Objective``.
        device: of all parts; dtype: of the frozen parts and of the images.
    """

    name: ClassVar[str]  # as reports call it
    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]  # those that are of this family
    denoiser_name: ClassVar[str]  # the denoiser's folder in a pipeline
    tags: ClassVar[tuple[str, ...]]  # of the model card

    denoiser: Any  # a diffusers model: a torch.nn.Module with a configuration
    objective: Objective
    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def parts(self) -> list[torch.nn.Module]:
        """All modules, the denoiser among them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters of all parts: the size of the pipeline's files, nearly."""
        return sum(p.nbytes for part in self.parts for p in part.parameters())

    @classmethod
    @abstractmethod
    def load(
        cls,
        settings: BaseModelSettings,
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

    def merge_adapter(self, adapter: str | Path) -> None:
        """Add the adapter of a folder to the denoiser's own weights."""
        self.denoiser.load_lora_adapter(Path(adapter), weight_name=ADAPTER_FILE, prefix=self.denoiser_name)
        self.denoiser.fuse_lora()
        self.denoiser.unload_lora()

    @abstractmethod
    def load_average(self) -> torch.nn.Module:
        """A second copy of the base's denoiser, for the moving average to start from."""

    @abstractmethod
    def condition(self, settings: Any, config: MitigationConfig) -> Condition:
        """What the model is told of a training row."""

    @abstractmethod
    def encoder_marks(self) -> dict[str, dict[str, str]]:
        """What stands for all that ``encode_images`` and ``encode_inputs`` depend on, by "images" and "inputs"."""

    @abstractmethod
    def rest(self, images: bool, inputs: bool) -> None:
        """Move the encoders of images or of inputs, which will not be needed, to the host. They come back for as long
        as images are drawn.
        """

    @abstractmethod
    def view(self, settings: DataSettings) -> View:
        """What one visit shows of a PIL image: float32 (3, H, W) in [-1, 1], and what the model is told of the view."""

    @abstractmethod
    def batch(self, images: torch.Tensor, texts: list[str]) -> Batch:
        """Images, float32 (B, 3, H, W) in [-1, 1], and their texts as the objective takes them."""

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """The base's pipeline with the denoiser as it is now. Raises ``UsageError`` if it cannot be assembled."""

    def save_pipeline(self, folder: Path) -> None:
        """Write the pipeline as diffusers loads it: the denoiser first, so that it is there whatever happens to the
        rest, and model_index.json last, so that it is there only if all else is.
        """
        self.denoiser.save_pretrained(folder / self.denoiser_name)
        pipeline = self.pipeline()
        for name, part in pipeline.components.items():
            if name != self.denoiser_name and part is not None:
                part.save_pretrained(folder / name)
        pipeline.save_config(folder)
        _name_places(folder)

    @abstractmethod
    def draw_images(self, prompts: Sequence[str], seed: int) -> list[Image]:
        """An image for each prompt, from the seed only. Leaves the process's random streams as they are."""

    @abstractmethod
    def save_denoiser_config(self, folder: Path, more: dict[str, Any] | None = None) -> None:
        """Write what diffusers needs beside the denoiser's weights. ``more``: keys for its configuration."""


def drawn_edge(resolution: int) -> int:
    """The height and width at which a model of this resolution draws: pipelines draw multiples of 8."""
    return max(8, resolution // 8 * 8)


def place_name(place: str) -> str:
    """A path of this machine as its last part; anything else, such as a Hub id, as it is."""
    return Path(place).resolve().name if Path(place).exists() else place


def _name_places(folder: Path) -> None:
    """Configurations say where a part came from: not with paths of this machine, which would go to the Hub."""
    for path in [folder / "model_index.json", *folder.glob("*/*.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        where = config.get("_name_or_path") if isinstance(config, dict) else None
        if isinstance(where, str) and place_name(where) != where:
            path.write_text(json.dumps(config | {"_name_or_path": place_name(where)}, indent=2, sort_keys=True) + "\n")
