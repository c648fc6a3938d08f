"""Tiny ONNX files, written byte by byte: the package `onnx` would be one more requirement of the tests."""

import numpy as np

FLOAT, UINT8, INT64, FLOAT16 = 1, 2, 7, 10
TYPES = {"float32": FLOAT, "uint8": UINT8, "int64": INT64, "float16": FLOAT16}


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields):
    """A protobuf message of (number, integer, text or bytes)."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            content = value.encode() if isinstance(value, str) else bytes(value)
            out += _varint(number << 3 | 2) + _varint(len(content)) + content
    return out


def tensor(name, values):
    values = np.asarray(values)
    dims = [(1, size) for size in values.shape]
    return message(*dims, (2, TYPES[values.dtype.name]), (8, name), (9, values.tobytes()))


def value(name, kind, shape):
    """An input or output; a text in ``shape`` is an edge of any size."""
    edges = [(1, message((1, edge) if isinstance(edge, int) else (2, edge))) for edge in shape]
    return message((1, name), (2, message((1, message((1, TYPES[kind]), (2, message(*edges)))))))


def integers(name, values):
    return message((1, name), *((8, x) for x in values), (20, 7))


def integer(name, number):
    return message((1, name), (3, number), (20, 2))


def node(operation, inputs, output, *attributes):
    named = [*((1, name) for name in inputs), (2, output), (4, operation)]
    return message(*named, *((5, attribute) for attribute in attributes))


def model(nodes, constants, inputs, outputs):
    graph = message(
        *((1, x) for x in nodes), (2, "g"), *((5, x) for x in constants), *((11, x) for x in inputs),
        *((12, x) for x in outputs),
    )  # fmt: skip
    return message((1, 8), (7, graph), (8, message((2, 13))))


# Of the three colours' means to eight numbers.
WEIGHT = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)


def descriptor(path, kind="float32", channels_last=False, steps=(), size=("h", "w"), batch="n", flat=True, extra=()):
    """A file whose network is the mean of each channel times ``WEIGHT``.

    steps: [(operation, constant)] on the pixels before; kind: of the input; flat: whether the output is 2-D.
    """
    shape = [batch, *size, 3] if channels_last else [batch, 3, *size]
    nodes, constants, name = [], [], "image"
    if kind != "float32":
        nodes.append(node("Cast", [name], "cast", integer("to", FLOAT)))
        name = "cast"
    for number, (operation, constant) in enumerate(steps):
        constant = np.asarray(constant, dtype=np.float32)
        constants.append(
            tensor(f"c{number}", constant if channels_last or not constant.ndim else constant[:, None, None])
        )
        nodes.append(node(operation, [name, f"c{number}"], f"s{number}"))
        name = f"s{number}"
    if channels_last:
        nodes.append(node("Transpose", [name], "turned", integers("perm", [0, 3, 1, 2])))
        name = "turned"
    nodes.append(node("GlobalAveragePool", [name], "pooled"))
    output, dims = "pooled", [batch, 3, 1, 1]
    if flat:
        constants.append(tensor("weight", WEIGHT))
        nodes += [node("Flatten", ["pooled"], "means"), node("MatMul", ["means", "weight"], "vector")]
        output, dims = "vector", [batch, 8]
    inputs = [value("image", kind, shape), *extra]
    path.write_bytes(model(nodes, constants, inputs, [value(output, "float32", dims)]))
    return path
