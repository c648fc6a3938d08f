"""A nested state as JSON and named tensors."""

from typing import Any

import numpy as np
import torch

from ..tensor_files import Tensors

State = Any  # a nest of dicts, lists, numbers, strings, None and tensors


def flatten(state: State, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """Move the tensors of a nested dict into ``tensors``; returns the rest, JSON-ready, with ``{"tensor": name}`` in
    their places.
    """
    if torch.is_tensor(state):
        tensors[prefix] = state.detach()
        return {"tensor": prefix}
    if isinstance(state, dict):
        # JSON keys are strings: keep integer keys apart.
        return {"dict": [[key, flatten(value, tensors, f"{prefix}/{key}")] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"list": [flatten(value, tensors, f"{prefix}/{i}") for i, value in enumerate(state)]}
    if isinstance(state, np.generic):
        state = state.item()
    return {"value": state}


def unflatten(state: Any, tensors: Tensors) -> State:
    """The state that ``flatten`` took apart."""
    if "tensor" in state:
        return tensors[state["tensor"]]
    if "dict" in state:
        return {key: unflatten(value, tensors) for key, value in state["dict"]}
    if "list" in state:
        return [unflatten(value, tensors) for value in state["list"]]
    return state["value"]
