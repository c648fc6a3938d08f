"""The one decoder: what is read of an image here is what training sees and what an audit compares with."""

import io
import os
from typing import Any

import numpy as np
from datasets import Image as ImageFeature
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..errors import one_line

# Formats that Pillow opens and calls images: it also opens videos, PostScript, and the headers of scientific data.
SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
}
VERSION = 1  # of the pixels that are made of a file; a change makes caches of them stale
NO_NAME = "has no image (no file_name in the metadata)"
HEAD, TAIL = 32, 64  # bytes that `damage` looks at


class BadImage(ValueError):
    """An image that cannot be used, and why."""


def decoder_mark(alpha: str) -> dict[str, Any]:
    """JSON values that stand for the decoder; with others the pixels of a file may be others."""
    return {"decoder": VERSION, "alpha": alpha}


def to_rgb(image: Image.Image, alpha: str = "white") -> Image.Image:
    """A PIL image as RGB, turned as its EXIF says.

    Args:
        alpha: "white" shows transparent parts on white, and scales deep images (16 bits, or floats in [0, 1]) to 8
            bits. "official" is the reading of Diffusers' scripts, Pillow's plain conversion: the colours that lie
            hidden under transparent parts, and deep images clipped. "stored" leaves an image as the file has it, of
            8, 16 or 32 bits and any number of channels, unless it has a palette.

    Raises ``BadImage``, or what Pillow raises for an image that does not decode.
    """
    image.load()
    image = _turned(image)
    if alpha == "stored" and image.mode != "P":
        return image
    if alpha == "official":
        return image.convert("RGB")
    if image.mode.startswith(("I", "F")):  # 16-bit grey, which Pillow's own conversion clips
        return _of_deep(image)
    if image.mode == "LAB":
        return _of_lab(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of damaged EXIF data; the pixels are whole
        return image


def _of_deep(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    floats = image.mode.startswith("F")
    if floats and not (np.isfinite(values).all() and values.max() <= 1):
        raise BadImage("floating-point pixels over 1")
    scale = 255 if floats else 255 / 65535
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _of_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    if converted is None:
        raise BadImage("its LAB colours cannot be converted")
    return converted


def decode_bytes(encoded: bytes, alpha: str = "white") -> Image.Image:
    """The RGB image of a file's bytes. Raises ``BadImage``."""
    try:
        return to_rgb(Image.open(io.BytesIO(encoded)), alpha)
    except BadImage:
        raise
    except Exception as error:  # Pillow and its plugins raise exceptions of any kind on broken files
        raise BadImage(f"does not decode: {_reason(error)}") from error


def read_file(path: str) -> bytes:
    """A file's bytes, also where the file system's encoding lacks characters of the name."""
    with open(native(path), "rb") as file:
        return file.read()


def native(path: str) -> str | bytes:
    """A path that the system can open: names that its encoding lacks are taken for UTF-8."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode("utf-8", "surrogateescape")
    return path


def is_file(path: str) -> bool:
    """Whether there is a file."""
    return os.path.isfile(native(path))


def read_stored(stored: dict[str, Any] | None) -> bytes | None:
    """The bytes of an image as a row stores it, ``{"bytes", "path"}``; None if they are nowhere on this machine.

    Raises ``BadImage`` for a row without an image, and for a file that cannot be read.
    """
    if stored is None or (stored.get("bytes") is None and stored.get("path") is None):
        raise BadImage(NO_NAME)
    if stored.get("bytes") is not None:
        return stored["bytes"]
    if "://" in stored["path"]:
        return None
    try:
        return read_file(stored["path"])
    except FileNotFoundError as error:
        raise BadImage(f"its image file {stored['path']} does not exist") from error
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot be read: {one_line(error)}") from error


def decode_stored(stored: dict[str, Any] | None, alpha: str = "white") -> Image.Image:
    """The RGB image of a row. Raises ``BadImage``."""
    encoded = read_stored(stored)
    if encoded is not None:
        return decode_bytes(encoded, alpha)
    try:
        return to_rgb(ImageFeature().decode_example(stored), alpha)
    except Exception as error:  # whatever datasets raises where an address cannot be read
        raise BadImage(f"does not decode: {_reason(error)}") from error


def damage(head: bytes, tail: bytes, size: int) -> bool | None:
    """Whether a file's first ``HEAD`` and last ``TAIL`` bytes let fear that it does not decode; None for a format whose
    files do not show it. What this fears may be whole, so that only decoding decides.

    Args:
        size: of the file, in bytes.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return not tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        return b"IEND" not in tail[-12:] or width * height > 2 * (Image.MAX_IMAGE_PIXELS or width * height)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return not tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 > size
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") > size
    return None


def look(stored: dict[str, Any]) -> None:
    """Look at the ends of an image's file, and decode it if they let fear damage. Raises ``BadImage``.

    ``stored``: ``{"bytes": bytes or Arrow buffer, "path"}``; an image that is nowhere on this machine is passed over.
    """
    inside, path = stored["bytes"], stored["path"]
    if inside is None and path is None:
        raise BadImage(NO_NAME)
    if inside is not None:
        view = memoryview(inside)
        head, tail, size = bytes(view[:HEAD]), bytes(view[-TAIL:]), len(view)
    elif path is not None and "://" not in path:
        try:
            head, tail, size = _ends(path)
        except FileNotFoundError as error:
            raise BadImage(f"its image file {path} does not exist") from error
        except (OSError, ValueError) as error:
            raise BadImage(f"cannot be read: {one_line(error)}") from error
    else:
        return
    fear = damage(head, tail, size)
    if fear is None:
        _look_at_header(inside, path)
    elif fear:
        decode_bytes(bytes(inside) if inside is not None else read_file(path))


def _ends(path: str) -> tuple[bytes, bytes, int]:
    with open(native(path), "rb", buffering=0) as file:
        head = file.read(HEAD)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        return head, file.read(TAIL), size


def _look_at_header(inside: Any, path: Any) -> None:
    try:
        with io.BytesIO(inside) if inside is not None else open(native(path), "rb") as file:
            Image.open(file)
    except Exception as error:
        raise BadImage(f"does not decode: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Why an image does not decode; Pillow's own words name an object in memory, another in every run."""
    return "not an image that Pillow reads" if isinstance(error, UnidentifiedImageError) else one_line(error)
