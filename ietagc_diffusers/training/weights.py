"""What is trained: the denoiser's weights and, if there is one, their moving average; and their mean over proxies."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from .. import tensor_files
from ..checkpoint import Checkpoint, Held
from ..families import WEIGHTS_FILE, Family
from ..method.averaging import ModelAverage, disagreement, squared_norm
from ..run_folder import EMA
from ..tensor_files import HostMemory, Place, Tensors

Sets = Mapping[str, Tensors]  # by the name of the folder that a checkpoint keeps a set in


class Weights:
    """The trained tensors of the one model on the device, in named sets: the weights and their moving average.

    On the device are those of the proxy in training or, between rounds, of the aggregated model theta_hat. With several
    shards theta_hat waits in ``place`` too, and the running mean of the next one.

    A subclass for another parametrisation (``LoraWeights``) overrides ``parameters``, ``live``, ``encode``, ``decode``
    and the files: means are taken of what ``encode`` gives, and ``decode`` makes the mean of the models of them.

    Args:
        family: whose ``denoiser`` is trained.
        several: whether there are several shards, hence a mean to keep.
        ema: a diffusers ``EMAModel`` over the same parameters, or None.
        offload_ema: keep the moving average in host memory between steps.
        place: where weights wait that are not on the device.
    """

    def __init__(
        self,
        family: Family,
        several: bool,
        ema: EMAModel | None = None,
        offload_ema: bool = False,
        place: Place | None = None,
    ):
        self.family = family
        self.place = place or HostMemory()
        self.ema: Any = ema
        self.offload_ema = offload_ema
        self.round = 0  # how many times theta_hat was made
        self.notes: dict[str, float | None] = {}  # what the last averaging adds to the round's record
        live = self.live()
        self.aggregated: dict[str, Tensors] | None = None
        self.means: dict[str, ModelAverage] = {}
        if several:
            self.aggregated = {
                key: self.place.keep(f"theta-{key}", tensors, tensors.items()) for key, tensors in live.items()
            }
            self.means = {
                key: ModelAverage(self.encode(tensors), self.place, f"mean-{key}", watched=key == family.denoiser_name)
                for key, tensors in live.items()
            }

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

    def latest(self) -> Tensors:
        """The denoiser on the device as it would be saved: its moving average, if there is one."""
        live = self.live()
        return live.get(self.family.denoiser_name + EMA, live[self.family.denoiser_name])

    def encode(self, tensors: Tensors, shard: int = 0) -> Tensors:
        """The set of a shard's proxy as the tensors whose mean over proxies is taken: here itself."""
        return tensors

    def decode(self, means: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """The tensors of theta_hat, (name, tensor) each, from the means of what ``encode`` gave."""
        return means

    @property
    def added(self) -> int:
        """How many models were added to the mean of this round."""
        return next((mean.count for mean in self.means.values()), 0)

    def added_state(self) -> dict[str, Any]:
        """What a checkpoint needs to know of the models that were added, beside their sums."""
        return {"count": self.added, "squares": {key: mean.squares for key, mean in self.means.items() if mean.watched}}

    @torch.no_grad()
    def put(self, sets: Sets | None = None) -> None:
        """Copy sets onto the device; None is theta_hat."""
        live = self.live()
        for key, tensors in (self.aggregated or {} if sets is None else sets).items():
            for name, tensor in tensors.items():
                live[key][name].copy_(tensor)

    def add_to_mean(self, shard: int = 0) -> None:
        """The proxy of a shard has done its steps of the round: count the weights on the device in."""
        live = self.live()
        for key, mean in self.means.items():
            mean.add(self.encode(live[key], shard))

    def aggregate(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """theta_hat becomes the mean of what was counted in (eq. 9), and the model on the device theta_hat.

        ``total`` sums a tensor over all processes, each of which calls this.
        """
        if self.aggregated is None:
            return
        moved = 0.0

        def compared(means, old):
            """The same tensors; how far they are from the old ones is added up."""
            nonlocal moved
            for name, mean in means:
                moved += squared_norm([mean - old[name]])
                yield name, mean

        for key, like in self.live().items():
            old, mean = self.aggregated[key], self.means[key]
            means = self.decode(mean.mean(total))
            if mean.watched:
                means = compared(means, old)
            self.aggregated[key] = self.place.keep(f"theta-{key}", like, means, old, owned=True)
            if mean.watched:
                self.notes = {"disagreement": disagreement(mean.spread, moved)}
        self.round += 1
        self.put()

    def start_average(self, steps: int) -> None:
        """The moving average goes on at a proxy's own number of steps, which its decay depends on."""
        if self.ema is not None:
            self.ema.optimization_step = steps

    def after_step(self) -> None:
        """What follows an optimizer step: the moving average moves on."""
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
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        """Exchange weights and moving average, one tensor at a time: a copy of all would be another model in memory."""
        for parameter, average in zip(self.parameters, self.ema.shadow_params, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def is_finite(self) -> bool:
        """Whether all weights on the device are finite."""
        return all(bool(t.isfinite().all()) for tensors in self.live().values() for t in tensors.values())

    @property
    def output_bytes(self) -> int:
        """The files that ``save_pipeline`` writes at the end of a run, nearly: their tensors."""
        return self.family.nbytes

    @property
    def unfinished_bytes(self) -> int:
        """The same of a model on its way."""
        return self.output_bytes

    def save_pipeline(self, folder: Path, final: bool = False, earlier: Path | None = None) -> None:
        """The trained pipeline as a folder that diffusers loads, with the moving average's weights if there is one.

        ``final``: whether this is the result of the run, not a model on its way; ``earlier``: the folder of one on its
        way, whose frozen parts need not be written again.
        """
        with self.averaged():
            self.family.save_pipeline(folder, earlier)

    def write_configs(self, folder: Path) -> None:
        """What diffusers and ``EMAModel`` need beside the weights of each set."""
        for key in self.live():
            more = None
            if key.endswith(EMA):
                more = {name: value for name, value in self.ema.state_dict().items() if name != "shadow_params"}
            self.family.save_denoiser_config(folder / key, more)

    def held(self) -> Iterator[Held]:
        """theta_hat, each set as the file that diffusers loads."""
        for key, tensors in self.deployable().items():
            yield Held(f"{key}/{WEIGHTS_FILE}", None if self.aggregated is None else self.round, tensors)

    def held_means(self, process: int) -> Iterator[Held]:
        """What this process added to the means so far."""
        for key, mean in self.means.items():
            if mean.sums is not None:
                yield Held(_mean_file(process, key), (self.round, mean.count), mean.sums)

    def save(self, folder: Path) -> None:
        """Write theta_hat, each set as a folder that diffusers loads; the moving average's as ``EMAModel`` does."""
        self.write_configs(folder)
        for held in self.held():
            tensor_files.write(folder / held.name, held.tensors, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """theta_hat, onto the device and to where it waits, as ``save`` wrote it."""
        saved = {key: tensor_files.TensorFile(folder / key / WEIGHTS_FILE) for key in self.live()}
        self.put(saved)
        if self.aggregated is not None:
            self.aggregated = {key: self.place.adopt(f"theta-{key}", file) for key, file in saved.items()}

    def load_means(self, checkpoint: Checkpoint, added: Mapping[int, Mapping[str, Any]]) -> None:
        """Add what processes had added to the means, whose ``added_state`` it is; earlier versions kept no squares."""
        for process, state in added.items():
            for key, mean in self.means.items():
                sums = checkpoint.held(_mean_file(process, key))
                if sums is not None:
                    mean.adopt(sums, state["count"], state.get("squares", {}).get(key, math.nan))


def _mean_file(process, key):
    return f"ietagc/mean-{process}-{key}.safetensors"
