"""Descriptor networks in ONNX files, run by onnxruntime. Layout, type, size and normalisation are read from the
graph.
"""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import DescriptorError
from .onnx_graph import Entry, read_entry
from .preprocess import PREPROCESS, RESIZE, Preprocess

PIXEL_TYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
TO_CHANNELS_FIRST = (0, 3, 1, 2)


@dataclass(frozen=True)
class OnnxNetwork:
    """Images (N, 3, H, W), preprocessed -> vectors (N, D).

    Args:
        session: onnxruntime's.
        output: the name of the 2-D output that is used.
        channels_last: whether the graph takes (N, H, W, 3).
        pixel_type: of the graph's input.
        normalises: whether the graph normalises pixels itself; then it is given uint8 or, scaled to ``white``, floats.
        white: what the graph takes for a white pixel, if it normalises floats.
        size: (height, width) of its input; None: any.
        batch: images that it takes at a time; None: any number.
    """

    session: Any
    output: str
    channels_last: bool
    pixel_type: type
    normalises: bool
    white: float
    size: tuple[int, int] | None
    batch: int | None

    @property
    def record(self) -> dict[str, Any]:
        """How the graph is fed, for the descriptor's identity."""
        range_ = f" to {self.white:g}" if self.normalises and self.pixel_type is not np.uint8 else ""
        layout = f"{'NHWC' if self.channels_last else 'NCHW'} {np.dtype(self.pixel_type).name}{range_}"
        return {"layout": layout, "output": self.output}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            images = images.permute(0, 2, 3, 1)
        if self.normalises and self.pixel_type is not np.uint8:
            images = images.float() * (self.white / 255)
        pixels: np.ndarray = np.ascontiguousarray(images.cpu().numpy().astype(self.pixel_type))
        size = self.batch or len(pixels)
        name = self.session.get_inputs()[0].name
        vectors = []
        for start in range(0, len(pixels), size):
            some = pixels[start : start + size]
            filled = some if len(some) == size else np.concatenate([some, some[-1:].repeat(size - len(some), axis=0)])
            vectors.append(self.session.run([self.output], {name: filled})[0][: len(some)])
        return torch.from_numpy(np.concatenate(vectors).astype(np.float32))

    def preprocess(self, wanted: str, explicit: bool) -> tuple[str, Preprocess]:
        """The name of the preprocessing, and what it does.

        Args:
            wanted: that of the protocol; where it does not fit and nobody asked for it, images are only resized.
            explicit: whether somebody did.

        Raises:
            ValueError: it was asked for and does not fit.
        """
        if self.normalises and wanted not in RESIZE:
            if explicit:
                raise ValueError(
                    f"it normalises pixels by itself, and {wanted} would do so twice: leave `protocol` out, or use "
                    f"{' or '.join(RESIZE)}"
                )
            wanted = "resize-288"
        preprocess = (PREPROCESS | RESIZE)[wanted]
        if self.size is None or preprocess.size == self.size:
            return wanted, preprocess
        height, width = self.size
        if explicit:
            raise ValueError(f"it takes images of {height} x {width} pixels, which {wanted} does not make")
        # The whole image is squashed: a copy in a corner must not be cut off.
        squashed = replace(preprocess, resize=self.size, crop=None)
        return f"resize-{height}x{width}" + ("" if self.normalises else f", normalised as {wanted}"), squashed


def load_onnx(path: Path, device: str) -> OnnxNetwork:
    """The network of an ONNX file.

    Raises:
        DescriptorError: onnxruntime is not installed, or the file is not one with a single input of RGB images and a
            2-D output; the message says what was found.
    """
    if find_spec("onnxruntime") is None:
        raise DescriptorError(f"`descriptor` {path}: ONNX files need onnxruntime: pip install onnxruntime")
    session = _session(path, device)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        raise DescriptorError(f"{path}: should have one input, has {_described(inputs)}")
    (entered,) = inputs
    if entered.type not in PIXEL_TYPES:
        raise DescriptorError(f"{path}: its input should be of uint8 or float, is {_described(inputs)}")
    flat = [output for output in outputs if len(output.shape) == 2]
    if not flat:
        raise DescriptorError(f"{path}: should have a 2-D output (N, D), has {_described(outputs)}")
    try:
        entry = read_entry(path, entered.name)
    except ValueError as error:
        raise DescriptorError(f"{path}: {error}") from error
    if entry.unknown:
        raise DescriptorError(
            f"{path}: its input goes through {entry.unknown} with a value that is not in the file: how pixels are "
            "normalised cannot be read"
        )
    channels_last = _channels_last(path, entered, entry)
    size = entered.shape[1:3] if channels_last else entered.shape[2:]
    if len({isinstance(edge, int) for edge in size}) > 1:
        raise DescriptorError(f"{path}: height and width should both be fixed or both be free: {_described(inputs)}")
    pixel_type = PIXEL_TYPES[entered.type]
    return OnnxNetwork(
        session=session,
        output=flat[0].name,
        channels_last=channels_last,
        pixel_type=pixel_type,
        normalises=pixel_type is np.uint8 or entry.normalises,
        white=entry.largest_pixel if entry.normalises else 255.0,
        size=(size[0], size[1]) if isinstance(size[0], int) else None,
        batch=entered.shape[0] if isinstance(entered.shape[0], int) else None,
    )


def _session(path: Path, device: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # no warnings about the file
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has exceptions of its own for each fault
        raise DescriptorError(f"{path}: onnxruntime cannot load it: {' '.join(str(error).split())[:200]}") from error


def _threads() -> int:
    """One, unless OMP_NUM_THREADS says otherwise: several processes, and torch, share the processors."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else 1


def _channels_last(path: Path, entered: Any, entry: Entry) -> bool:
    """Whether the input is (N, H, W, 3), by its shape or, if that leaves it open, by the graph's own transposition."""
    shape = entered.shape
    if len(shape) == 4:
        first, last = shape[1], shape[3]
        if (first == 3) != (last == 3):
            return bool(last == 3)
        if all(edge == 3 or not isinstance(edge, int) for edge in (first, last)):
            return entry.permutation == TO_CHANNELS_FIRST
    raise DescriptorError(
        f"{path}: its input should be (N, 3, height, width) or (N, height, width, 3), is {_described([entered])}"
    )


def _described(values: list[Any]) -> str:
    """Name, type and shape of inputs or outputs."""
    return ", ".join(f"{value.name} {value.type} {[*value.shape]}" for value in values) or "none"
