"""What is trained: the denoiser's weights and, if there is one, their moving average; and their mean over proxies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from ..families import WEIGHTS_FILE, Family
from ..method.averaging import ModelAverage
from ..run_folder import EMA

Tensors = dict[str, torch.Tensor]
Sets = dict[str, Tensors]  # by the name of the folder that a checkpoint keeps a set in


class Weights:
    """The trained tensors of the one model on the device, in named sets: the weights and their moving average.

    On the device are those of the proxy in training or, between rounds, of the aggregated model theta_hat. With several
    shards the host holds theta_hat too, and the running mean of the next one.

    A subclass for another parametrisation (adapters) overrides ``live``, ``encode`` and ``decode``: means are taken of
    what ``encode`` gives, the space in which the mean of models is a model.

    Args:
        family: whose ``denoiser`` is trained.
        several: whether there are several shards, hence a mean to keep.
        ema: a diffusers ``EMAModel`` over the same parameters, or None.
        offload_ema: keep the moving average in host memory between steps.
    """

    def __init__(self, family: Family, several: bool, ema: EMAModel | None = None, offload_ema: bool = False):
        self.family = family
        self.ema = ema
        self.offload_ema = offload_ema
        live = self.live()
        self.aggregated: Sets | None = {key: _host_copy(tensors) for key, tensors in live.items()} if several else None
        self.means = {key: ModelAverage(self.encode(tensors)) for key, tensors in live.items()} if several else {}

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer steps."""
        return list(self.family.denoiser.parameters())

    def live(self) -> Sets:
        """The sets on the device; writing into a tensor changes the model."""
        own = {name: p.detach() for name, p in self.family.denoiser.named_parameters()}
        live = {self.family.denoiser_name: own}
        if self.ema is not None:
            live[self.family.denoiser_name + EMA] = dict(zip(own, self.ema.shadow_params, strict=True))
        return live

    def deployable(self) -> Sets:
        """theta_hat, as far as it is known: that of the last round, or with one shard the model as it is."""
        return self.live() if self.aggregated is None else self.aggregated

    def encode(self, tensors: Tensors) -> Tensors:
        """A set as the tensors whose mean over proxies is taken: here itself."""
        return tensors

    def decode(self, name: str, mean: torch.Tensor) -> Tensors:
        """The tensors of a set that a mean stands for, by name."""
        return {name: mean}

    @torch.no_grad()
    def put(self, sets: Sets | None = None) -> None:
        """Copy sets onto the device; None is theta_hat."""
        live = self.live()
        for key, tensors in (self.aggregated if sets is None else sets).items():
            for name, tensor in tensors.items():
                live[key][name].copy_(tensor)

    def add_to_mean(self) -> None:
        """A proxy has done its steps of the round: count the weights on the device in."""
        live = self.live()
        for key, mean in self.means.items():
            mean.add(self.encode(live[key]))

    def aggregate(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """theta_hat becomes the mean of what was counted in (eq. 9), and the model on the device theta_hat.

        ``total`` sums a tensor over all processes, each of which calls this.
        """
        for key, means in self.means.items():
            for name, mean in means.mean(total):
                for part, tensor in self.decode(name, mean).items():
                    self.aggregated[key][part].copy_(tensor)
        if self.aggregated is not None:
            self.put()

    def start_average(self, steps: int) -> None:
        """The moving average goes on at a proxy's own number of steps, which its decay depends on."""
        if self.ema is not None:
            self.ema.optimization_step = steps

    def update_average(self) -> None:
        """After an optimizer step."""
        if self.ema is None:
            return
        if self.offload_ema:
            self.ema.to(device=self.parameters[0].device)
        self.ema.step(self.parameters)
        if self.offload_ema:
            self.ema.to(device="cpu")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the denoiser has the moving average's weights, if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def save_pipeline(self, folder: Path) -> None:
        """The trained pipeline as a folder that diffusers loads, with the moving average's weights if there is one."""
        with self.averaged():
            self.family.save_pipeline(folder)

    def save(self, folder: Path) -> None:
        """Write theta_hat, each set as a folder that diffusers loads; the moving average's as ``EMAModel`` does."""
        for key, tensors in self.deployable().items():
            more = None
            if key.endswith(EMA):
                more = {name: value for name, value in self.ema.state_dict().items() if name != "shadow_params"}
            self.family.save_denoiser(folder / key, tensors, more)

    def load(self, folder: Path) -> None:
        """theta_hat, on the device and on the host, as ``save`` wrote it."""
        saved = {key: load_file(folder / key / WEIGHTS_FILE) for key in self.live()}
        self.put(saved)
        if self.aggregated is not None:
            self.aggregated = saved

    def mean_state(self) -> dict:
        """What was counted into the means so far, as a nested dict of tensors and numbers."""
        return {key: {"count": mean.count, "sums": mean.sums} for key, mean in self.means.items()}

    def add_mean_state(self, state: dict) -> None:
        """Count in what a process had counted in when it was saved."""
        for key, mean in self.means.items():
            mean.count += state[key]["count"]
            for name, total in mean.sums.items():
                total += state[key]["sums"][name]


def _host_copy(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
