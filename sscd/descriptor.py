"""Descriptors: callables from images to unit vectors whose dot product is the similarity."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ietagc_diffusers.errors import UsageError

from .preprocess import PREPROCESS

ADDRESS = "https://dl.fbaipublicfiles.com/sscd-copy-detection/{}.torchscript.pt"
# Dimensions of the published checkpoints.
CHECKPOINTS = {"sscd_disc_mixup": 512, "sscd_disc_large": 1024}
FOLDER_VARIABLE = "SSCD_HOME"
# A protocol is a checkpoint and a preprocessing: `dcr` is that of the paper's tables, `sscd` that of SSCD's authors.
PROTOCOLS = {"dcr": ("sscd_disc_large", "dcr"), "sscd": ("sscd_disc_mixup", "sscd-288")}
# The papers' threshold. SSCD's authors give 0.75 for a precision of 90%.
SSCD_COPY = 0.5
# Measured on photographs: see docs/evaluation.md. Pixels of unrelated pictures are often similar, up to 0.8.
PIXEL_COPY = 0.9


class DescriptorError(UsageError):
    """A descriptor that cannot be loaded; the message says what would help."""


@dataclass(frozen=True)
class Descriptor:
    """Images uint8 (N, 3, H, W) -> float32 (N, D) of unit length.

    Args:
        name: for reports.
        transform: uint8 (N, 3, H, W) -> the network's input.
        network: that input -> (N, D).
        copy_similarity: an image above it counts as a copy.
        record: JSON values that identify the descriptor, for scores and caches.
        device: where the network runs.
    """

    name: str
    transform: Callable[[torch.Tensor], torch.Tensor]
    network: Callable[[torch.Tensor], torch.Tensor]
    copy_similarity: float
    record: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values: descriptors with equal ones compute equal vectors."""
        return {"descriptor": self.name} | self.record

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        vectors = self.network(self.transform(images.to(self.device)))
        return F.normalize(vectors.float(), dim=1).cpu()


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

    return Descriptor("pixel", transform, centred_pixels, PIXEL_COPY, {"size": size})


def load_descriptor(path_or_name: str = "auto", protocol: str | None = None, device: str = "cpu") -> Descriptor:
    """A descriptor by name or checkpoint file.

    Args:
        path_or_name: ``pixel``; ``sscd_disc_mixup`` or ``sscd_disc_large``, which are looked for in ``$SSCD_HOME`` and
            in torch's hub cache, then downloaded into the latter; a TorchScript file; or ``auto``: the protocol's SSCD
            checkpoint if it is on this machine, otherwise ``pixel``. ``auto`` downloads nothing.
        protocol: ``dcr`` or ``sscd``; or a preprocessing: ``sscd-288``, ``sscd-320``. Default: the protocol that the
            named checkpoint belongs to, otherwise ``dcr``.
        device: where the network runs.

    Raises:
        DescriptorError: unknown name, no file and no network, a file that is not a TorchScript descriptor, or one that
            changed since its hash was recorded.
    """
    protocol = protocol or protocol_of(path_or_name)
    checkpoint, preprocess = PROTOCOLS.get(protocol, ("sscd_disc_mixup", protocol))
    if preprocess not in PREPROCESS:
        known = ", ".join({**PROTOCOLS, **PREPROCESS})
        raise DescriptorError(f"`protocol` {protocol}: unknown; the known ones are {known}")
    if path_or_name == "auto":
        found = _local_file(checkpoint)
        return pixel_descriptor() if found is None else _from_file(found, checkpoint, preprocess, device, known=True)
    if path_or_name == "pixel":
        return pixel_descriptor()
    if path_or_name in CHECKPOINTS:
        found = _local_file(path_or_name)
        path = found or _download(path_or_name)
        try:
            return _from_file(path, path_or_name, preprocess, device, known=True)
        except DescriptorError as error:
            if found is not None:
                raise
            path.unlink()
            raise DescriptorError(f"{error}; the download was removed") from error
    path = Path(path_or_name)
    if not path.is_file():
        near = get_close_matches(path_or_name, ["pixel", "auto", *CHECKPOINTS], 1)
        hint = f"; did you mean {near[0]}?" if near else f" (names: pixel, auto, {', '.join(CHECKPOINTS)})"
        raise DescriptorError(f"`descriptor` {path_or_name}: neither a known name nor a file{hint}")
    return _from_file(path, path.name.split(".")[0], preprocess, device)


def protocol_of(path_or_name: str) -> str:
    """The protocol that a checkpoint's name belongs to; ``dcr`` for any other name."""
    name = Path(path_or_name).name.split(".")[0]
    return next((protocol for protocol, (checkpoint, _) in PROTOCOLS.items() if checkpoint == name), "dcr")


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _local_file(name: str) -> Path | None:
    folders = [Path(os.environ[FOLDER_VARIABLE])] if os.environ.get(FOLDER_VARIABLE) else []
    candidates = [folder / f"{name}.torchscript.pt" for folder in [*folders, _hub_folder()]]
    return next((path for path in candidates if path.is_file()), None)


def _download(name: str) -> Path:
    address, path = ADDRESS.format(name), _hub_folder() / f"{name}.torchscript.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(address, str(path), progress=True)
    except OSError as error:
        raise DescriptorError(
            f"`descriptor` {name}: not on this machine, and {address} cannot be reached ({error}); download that file "
            f"elsewhere and put it into {path.parent}, or into a folder named by the environment variable "
            f"{FOLDER_VARIABLE}"
        ) from error
    return path


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _checked_hash(path: Path) -> str:
    """The file's SHA-256, which must equal the one in ``<file>.sha256`` beside it, if there is one."""
    found, beside = file_hash(path), _hash_file(path)
    if beside.is_file():
        recorded = beside.read_text().split()[0] if beside.read_text().strip() else ""
        if recorded != found:
            raise DescriptorError(
                f"{path}: its SHA-256 is {found}, but {beside.name} says {recorded}: the file changed or is damaged; "
                f"download it again, or remove {beside.name} if the change was intended"
            )
    return found


def _record_hash(path: Path, sha256: str) -> None:
    """Write ``<file>.sha256`` at the first use of a file that works, because its publisher names no hash."""
    beside = _hash_file(path)
    if not beside.is_file() and os.access(path.parent, os.W_OK):
        part = beside.with_suffix(f".{os.getpid()}.part")
        part.write_text(f"{sha256}  {path.name}\n")
        part.replace(beside)


def _from_file(path: Path, name: str, preprocess: str, device: str, known: bool = False) -> Descriptor:
    """The descriptor of a TorchScript file; ``known``: one of the published checkpoints, whose hash is kept."""
    sha256 = _checked_hash(path) if known else file_hash(path)
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise DescriptorError(f"{path}: not a TorchScript file, such as {ADDRESS.format('sscd_disc_mixup')}") from error
    transform = PREPROCESS[preprocess]
    descriptor = Descriptor(
        name, transform, network, SSCD_COPY, {"preprocess": preprocess, "sha256": sha256}, str(device)
    )
    _try_out(descriptor, path, CHECKPOINTS.get(name))
    if known:
        _record_hash(path, sha256)
    return descriptor


def _try_out(descriptor: Descriptor, path: Path, dimensions: int | None) -> None:
    """Raise unless the network computes a vector of an image, of the published length if that is known."""
    try:
        vectors = descriptor((torch.arange(3 * 320 * 320) % 251).to(torch.uint8).view(1, 3, 320, 320))
        shape, finite = tuple(vectors.shape), bool(vectors.isfinite().all())
    except Exception as error:  # TorchScript raises exceptions of any kind
        raise DescriptorError(f"{path}: does not run on images: {str(error).splitlines()[-1][:200]}") from error
    if len(shape) != 2 or shape[0] != 1 or not finite or (dimensions or shape[1]) != shape[1]:
        wanted = f"a finite vector of {dimensions} dimensions" if dimensions else "a finite vector"
        raise DescriptorError(f"{path}: should return {wanted} for an image, returns {shape}: is it the right file?")
