"""What waits of the proxies' optimizers while another proxy is on the device: their moments."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..checkpoint import Checkpoint, Held
from ..method.averaging import ModelAverage
from ..tensor_files import HostMemory, Place, Tensors


def _states(optimizer):
    """(index, state) of every parameter that has a state."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [(index, optimizer.state[p]) for index, p in enumerate(parameters) if p in optimizer.state]


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state that have the size of parameters, by ``<index>/<name>``."""
    return {
        f"{index}/{key}": value
        for index, state in _states(optimizer)
        for key, value in state.items()
        if torch.is_tensor(value) and value.ndim
    }


def scalars(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor | float]:
    """The rest of the state, such as Adam's step counters."""
    large = moments(optimizer)
    return {
        name: value
        for index, state in _states(optimizer)
        for key, value in state.items()
        if (name := f"{index}/{key}") not in large
    }


def put(optimizer: torch.optim.Optimizer, values: Tensors, device: torch.device | None = None) -> None:
    """Set entries of an optimizer's state, on ``device`` if it is given. Tensors that are there already are shared.

    Step counters go where the optimizer wants them: fused ones beside the parameters, others on the host.
    """
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for name, value in values.items():
        index, _, key = name.partition("/")
        parameter, group = parameters[int(index)]
        beside = device
        if key == "step":
            beside = parameter.device if group.get("fused") or group.get("capturable") else None
        optimizer.state[parameter][key] = value if beside is None or not torch.is_tensor(value) else value.to(beside)


def _take(optimizer):
    """Remove the moments from an optimizer and return them."""
    found = moments(optimizer)
    for index, state in _states(optimizer):
        for key in [key for key in state if f"{index}/{key}" in found]:
            del state[key]
    return found


class Moments:
    """Where a proxy's moments come from when it goes onto the device, and what becomes of them when it is done.

    Args:
        kind: ``keep``: each proxy has its own; ``average``: all start the round from their mean over the last one;
            ``reset``: all start the round without.
        place: where moments wait.
        alone: whether there is one proxy in this process, whose moments may stay on the device.
    """

    def __init__(self, kind: str = "keep", place: Place | None = None, alone: bool = False):
        self.kind, self.place, self.alone = kind, place or HostMemory(), alone
        self.own: dict[int, Tensors] = {}  # by shard, of the proxies that wait
        self.mean: ModelAverage | None = None  # of this round, over the proxies that are done
        self.shared: Tensors | None = None
        self.round = 0

    def activate(self, proxy: Any) -> None:
        """Put a proxy's moments onto the device."""
        own = self.own.pop(proxy.shard, None)
        if own is not None:
            put(proxy.optimizer, own, proxy.device)
        elif self.shared is not None and not moments(proxy.optimizer):
            for name in self.shared:
                put(proxy.optimizer, {name: self.shared[name].to(proxy.device, copy=True)})

    def retire(self, proxy: Any, leads: bool = True) -> None:
        """A proxy has done its steps of the round. ``leads``: whether this process counts for its group."""
        if self.kind == "average":
            found = _take(proxy.optimizer)
            self.mean = self.mean or ModelAverage(found, self.place, "mean-moments")
            if leads:
                self.mean.add(found)
        elif self.kind == "reset":
            proxy.optimizer.state.clear()
        elif not self.alone:
            self.wait(proxy)

    def wait(self, proxy: Any) -> None:
        """Move a proxy's moments off the device."""
        found = _take(proxy.optimizer)
        if found:
            name = f"optimizer-{proxy.shard}"
            self.own[proxy.shard] = self.place.keep(name, found, found.items(), owned=True)

    def end_round(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """All proxies are done. Every process calls this; ``total`` sums a tensor over them."""
        self.round += 1
        if self.kind == "average" and self.mean is not None:
            self.shared = self.place.keep(
                "moments", self.mean.like, self.mean.mean(total), self.shared, torch.float32, owned=True
            )

    def of(self, proxy: Any) -> Tensors:
        """A proxy's moments, wherever they are."""
        return self.own.get(proxy.shard) or moments(proxy.optimizer)

    def held(self, proxies: dict[int, Any], layout: Any) -> Iterator[Held]:
        """What a checkpoint keeps of all this."""
        for shard, proxy in proxies.items():
            if layout.leads and (found := self.of(proxy)):
                yield Held(_own_file(shard), (proxy.steps, self.round), found)
        if layout.is_main and self.shared is not None:
            yield Held("ietagc/moments.safetensors", self.round, self.shared)
        if self.mean is not None and self.mean.count and self.mean.sums is not None:
            yield Held(_mean_file(layout.process_index), (self.round, self.mean.count), self.mean.sums)

    def resume(self, checkpoint: Checkpoint, proxies: dict[int, Any], counts: dict[int, int], is_main: bool) -> None:
        """``counts``: how many models each process that wrote the checkpoint had added to its means."""
        for shard in proxies:
            file = checkpoint.held(_own_file(shard))
            if file is not None:
                self.own[shard] = self.place.adopt(f"optimizer-{shard}", file)
        shared = checkpoint.held("ietagc/moments.safetensors")
        self.shared = None if shared is None else self.place.adopt("moments", shared)
        for process, count in counts.items():
            sums = checkpoint.held(_mean_file(process))
            if sums is not None:
                self.mean = self.mean or ModelAverage(sums, self.place, "mean-moments")
                if is_main:
                    self.mean.adopt(sums, count)


def _own_file(shard):
    return f"ietagc/optimizer-{shard}.safetensors"


def _mean_file(process):
    return f"ietagc/mean-{process}-moments.safetensors"
