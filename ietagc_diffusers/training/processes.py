"""What the main process does before, or for, the others. They wait as long as it takes, and hear if it cannot."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from ..errors import UsageError
from .layout import PATIENCE

T = TypeVar("T")


def of_main(accelerator: Accelerator, compute: Callable[[], T]) -> T:
    """What the main process computes, on all of them, which raise a ``UsageError`` of it too."""
    answer: list[Any] = [None, None]
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if accelerator.num_processes > 1 else None
    if accelerator.is_main_process:
        try:
            answer[0] = compute()
        except UsageError as error:
            answer[1] = UsageError(str(error))
    if group is not None:
        dist.broadcast_object_list(answer, group=group)
    found, refusal = answer
    if refusal is not None:
        raise refusal
    return found


def on_main(accelerator: Accelerator, make: Callable[[], T]) -> T | None:
    """What the main process makes, None on the others. For what cannot be sent from one process to another."""
    made: list[T] = []
    of_main(accelerator, lambda: made.append(make()))
    return made[0] if made else None


def main_first(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What each process makes, the main one first: the others find what it left in caches."""
    made = on_main(accelerator, make)
    return make() if made is None else made
