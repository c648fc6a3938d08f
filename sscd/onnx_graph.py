"""What an ONNX graph does to its input before the network proper.

onnxruntime tells only names, types and shapes, so the file itself is read. It is a protobuf message, of which the few
fields that matter here are decoded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Numbers of fields in ONNX's messages.
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_OPERATION, NODE_ATTRIBUTE = 1, 2, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_FLOAT, ATTRIBUTE_TENSOR, ATTRIBUTE_INTS = 1, 2, 5, 8
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_NAME, TENSOR_RAW = 1, 2, 4, 8, 9
# Codes of the types of tensors.
TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Operations that move or convert pixels without scaling them.
PASSING = {
    "Cast", "Clip", "Identity", "Transpose", "Resize", "Upsample", "Pad", "Reshape", "Squeeze", "Unsqueeze", "Slice",
    "Gather", "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
SCALING = {"Add", "Sub", "Mul", "Div"}

Field = tuple[int, int | memoryview]


@dataclass
class Node:
    """One operation: its name, inputs, outputs and the attributes that are needed here."""

    operation: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, memoryview] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What happens to pixels where they enter a graph.

    Attributes:
        scale, shift: pixels are multiplied by the one and the other is added, by channel, before the first layer; None
            where nothing scales them.
        permutation: of the first ``Transpose``; None: there is none.
        unknown: the operation whose operand is not a constant in the file; None: every operand is.
    """

    scale: np.ndarray | None
    shift: np.ndarray | None
    permutation: tuple[int, ...] | None
    unknown: str | None = None

    @property
    def normalises(self) -> bool:
        return self.scale is not None or self.unknown is not None

    @property
    def largest_pixel(self) -> float:
        """What a white pixel is where the graph normalises: 1 or 255, whichever its numbers fit.

        Networks are trained on values around 0 that span a few units: the middle of the right range comes out nearest
        to 0. Where only a factor is applied, both middles are equally far; then the span decides.
        """
        scale, shift = (float(np.mean(x)) for x in (self.scale, self.shift) if x is not None)
        off = {white: abs(scale * white / 2 + shift) / abs(scale * white) for white in (1.0, 255.0)}
        if abs(off[1.0] - off[255.0]) > 0.1:
            return min(off, key=lambda white: off[white])
        return 255.0 if abs(scale) * 255 < 25 else 1.0


def read_entry(path: str | Path, name: str) -> Entry:
    """What the graph of a file does to its input ``name``.

    Raises:
        ValueError: the file is not an ONNX model.
    """
    nodes, constants = _graph(memoryview(Path(path).read_bytes()))
    consumers: dict[str, list[Node]] = {}
    for node in nodes:
        for key in node.inputs:
            consumers.setdefault(key, []).append(node)
        if node.operation == "Constant" and "value" in node.attributes:
            constants[node.outputs[0]] = node.attributes["value"]
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    permutation: tuple[int, ...] | None = None
    while True:
        # The shape of an input is asked for beside its use.
        users = [node for node in consumers.get(name, []) if node.operation != "Shape"]
        if len(users) != 1 or not users[0].outputs:
            break
        node = users[0]
        if node.operation == "Transpose" and permutation is None and "perm" in node.attributes:
            permutation = tuple(_integers(node.attributes["perm"]))
        if node.operation in SCALING or node.operation == "BatchNormalization":
            found = _affine(node, name, constants)
            if found is None:
                return Entry(scale, shift, permutation, node.operation)
            a, b = found
            scale, shift = (a, b) if scale is None or shift is None else (a * scale, a * shift + b)
        elif node.operation not in PASSING or node.inputs[0] != name:
            break
        name = node.outputs[0]
    return Entry(scale, shift, permutation)


def _affine(node: Node, name: str, constants: dict[str, memoryview]) -> tuple[np.ndarray, np.ndarray] | None:
    """(a, b) of the node's a * x + b, each a number or one for each channel; None if it is not of this form."""
    if node.operation == "BatchNormalization":
        values = [_values(constants.get(key)) for key in node.inputs[1:5]]
        if any(value is None for value in values):
            return None
        gain, bias, mean, variance = (value for value in values if value is not None)
        epsilon = float(np.frombuffer(node.attributes["epsilon"], "<f4")[0]) if "epsilon" in node.attributes else 1e-5
        a = gain / np.sqrt(variance + epsilon)
        return a, bias - mean * a
    first, second = node.inputs
    constant = _values(constants.get(second if first == name else first))
    if constant is None:
        return None
    one, none = np.ones_like(constant), np.zeros_like(constant)
    if node.operation == "Add":
        return one, constant
    if node.operation == "Mul":
        return constant, none
    if node.operation == "Sub":
        return (one, -constant) if first == name else (-one, constant)
    return (1 / constant, none) if first == name else None


def _graph(data: memoryview) -> tuple[list[Node], dict[str, memoryview]]:
    """The nodes of a model's graph, and {name: tensor message} of its initializers."""
    graph = next((value for number, value in _fields(data) if number == MODEL_GRAPH), None)
    if not isinstance(graph, memoryview):
        raise ValueError("it holds no graph")
    nodes: list[Node] = []
    constants: dict[str, memoryview] = {}
    for number, value in _fields(graph):
        if number == GRAPH_NODE and isinstance(value, memoryview):
            nodes.append(_node(value))
        elif number == GRAPH_INITIALIZER and isinstance(value, memoryview):
            constants[_text(value, TENSOR_NAME)] = value
    return nodes, constants


def _node(data: memoryview) -> Node:
    node = Node()
    for number, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == NODE_INPUT:
            node.inputs.append(_decoded(value))
        elif number == NODE_OUTPUT:
            node.outputs.append(_decoded(value))
        elif number == NODE_OPERATION:
            node.operation = _decoded(value)
        elif number == NODE_ATTRIBUTE:
            name, content = _attribute(value)
            node.attributes[name] = content
    return node


def _attribute(data: memoryview) -> tuple[str, memoryview]:
    """Name and content of an attribute: a float's bytes, a tensor's message, or integers as varints."""
    content, integers = memoryview(b""), bytearray()
    for number, value in _fields(data):
        if number == ATTRIBUTE_INTS:
            integers += _varint(value) if isinstance(value, int) else bytes(value)
        elif number in (ATTRIBUTE_TENSOR, ATTRIBUTE_FLOAT) and isinstance(value, memoryview):
            content = value
    return _text(data, ATTRIBUTE_NAME), memoryview(bytes(integers)) if integers else content


def _values(tensor: memoryview | None) -> np.ndarray | None:
    """The numbers of a tensor message as float64 (n,); None if they are not in the file."""
    if tensor is None:
        return None
    kind, raw, floats = 0, b"", b""
    for number, value in _fields(tensor):
        if number == TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == TENSOR_RAW and isinstance(value, memoryview):
            raw = bytes(value)
        elif number == TENSOR_FLOATS and isinstance(value, memoryview):
            floats += bytes(value)
    if floats:
        return np.frombuffer(floats, "<f4").astype(np.float64)
    return np.frombuffer(raw, TYPES[kind]).astype(np.float64) if raw and kind in TYPES else None


def _fields(data: memoryview) -> Iterator[Field]:
    """(number, value) of each field of a protobuf message: an integer for a varint, otherwise its bytes."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _read_varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if wire == BYTES:
            length, position = _read_varint(data, position)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError("it is not a protobuf message")
        if position + length > end:
            raise ValueError("it ends too early")
        yield number, data[position : position + length]
        position += length


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """A variable-length integer, and the position after it."""
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("it is not a protobuf message")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integers(data: memoryview) -> list[int]:
    position, values = 0, []
    while position < len(data):
        value, position = _read_varint(data, position)
        values.append(value)
    return values


def _decoded(data: memoryview) -> str:
    return bytes(data).decode("utf-8", "replace")


def _text(data: memoryview, wanted: int) -> str:
    """A message's text field."""
    for number, value in _fields(data):
        if number == wanted and isinstance(value, memoryview):
            return _decoded(value)
    return ""
