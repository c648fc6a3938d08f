"""Low-rank adapters (LoRA, by peft) as what is trained: put onto the model, averaged by their products, saved."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.state_dict_utils import StateDictType
from peft import LoraConfig
from torch import nn

from .. import tensor_files
from ..checkpoint import Held
from ..errors import UsageError
from ..families import Family
from ..method.averaging import disagreement
from ..method.factors import Factors, changes, shrinking, total, truncate
from ..run_folder import ADAPTER_FILE
from ..tensor_files import TensorFile, Tensors
from .groups import LoraSettings
from .weights import Sets, Weights

NAME = "default"  # peft's, of the adapter in training
KEY = "lora"  # of the one set of tensors
SUPPORTED = (nn.Linear, nn.Conv2d)


def add_adapter(family: Family, settings: LoraSettings) -> None:
    """Freeze the trained modules, in the precision of the family, and put adapters in float32 onto their targeted
    layers, module by module.

    The draws are the official LoRA scripts': ``down`` is normal with deviation 1 / rank, ``up`` zero. Settings that
    name no layers of the denoiser afterwards name the family's own, so that records and checkpoints have them.

    Raises ``UsageError`` where the settings do not fit the modules.
    """
    if settings.train_text_encoder and len(family.trained) == 1:
        raise UsageError(f"`train_text_encoder`: not for {family.name}; leave it out")
    settings.lora_target_modules = targets_of(family.denoiser_name, family, settings)
    for name, module in family.trained.items():
        _check_fit(name, module, family, settings)
        module.requires_grad_(False)
        module.train()
        if module.dtype != family.dtype:  # diffusers warns of a cast even where there is none
            module.to(dtype=family.dtype)
        try:
            module.add_adapter(adapter_config(settings, targets_of(name, family, settings)))
        except (ValueError, NotImplementedError) as error:
            raise UsageError(f"`lora_target_modules`: {' '.join(str(error).split())[:300]}") from error
        for parameter in _trained(module):
            parameter.data = parameter.data.float()


def targets_of(name: str, family: Family, settings: LoraSettings) -> list[str]:
    """Names, or ends of names, of the layers of a trained module that get adapters."""
    of_denoiser = settings.lora_target_modules or family.denoiser_targets
    return list(of_denoiser if name == family.denoiser_name else family.text_targets)


def size_of(settings: LoraSettings) -> tuple[int, float]:
    """Rank and alpha of settings that have them."""
    if settings.lora_rank is None:
        raise ValueError("these settings have no `lora_rank`")
    return settings.lora_rank, settings.lora_alpha or float(settings.lora_rank)


def adapter_config(settings: LoraSettings, targets: list[str]) -> LoraConfig:
    """The adapter of a module for peft."""
    rank, alpha = size_of(settings)
    options: dict[str, Any] = {"lora_alpha": alpha}  # peft calls it an int, and takes any number
    return LoraConfig(
        **options,
        r=rank,
        lora_dropout=settings.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=targets,
        use_dora=settings.use_dora,
    )


def _trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def adapted(module: nn.Module) -> dict[str, Any]:
    """The layers of a module that have adapters, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


def adapted_layers(family: Family) -> dict[str, Any]:
    """The layers that have adapters, by the names of their module and in it."""
    return {f"{part}.{name}": layer for part, m in family.trained.items() for name, layer in adapted(m).items()}


def trained_parameters(family: Family) -> dict[str, nn.Parameter]:
    """The parameters of all adapters, by the names of their module and in it: the denoiser's first."""
    return {
        f"{part}.{name}": parameter
        for part, module in family.trained.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def saved_names(family: Family) -> dict[str, str]:
    """The names of the adapters' parameters in a file that diffusers loads, see ``trained_parameters``.

    They are the official LoRA scripts', which have adapters on attention only, or else peft's: diffusers reads the
    names of a module in one way or the other.
    """
    names: dict[str, str] = {}
    for part, module in family.trained.items():
        names |= {f"{part}.{name}": f"{part}.{saved}" for name, saved in _saved_names(module).items()}
    return names


def _saved_names(module):
    named = [name for name, p in module.named_parameters() if p.requires_grad]
    of_peft = [name.replace(f".{NAME}", "") for name in named]
    of_peft = [name.removesuffix(".weight") if "lora_magnitude_vector" in name else name for name in of_peft]
    converted = convert_state_dict_to_diffusers(dict.fromkeys(of_peft), StateDictType.PEFT)
    names = of_peft if any("lora_A" in name for name in converted) else converted
    return dict(zip(named, names, strict=True))


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(O, I) of a layer's weight as a matrix; a convolution's kernel lies in I."""
    weight: Any = layer.weight
    return weight.shape[0], math.prod(weight.shape[1:])


def targeted(denoiser: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """The layers that peft would put adapters onto, by name: those whose name is a target or ends with one."""
    found = {}
    for name, module in denoiser.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            found[name] = module
    return found


def _check_fit(part, whole, family, settings):
    """Raise ``UsageError`` where adapters do not fit a module of a family."""
    targets = targets_of(part, family, settings)
    layers = {name: m for name, m in whole.named_modules() if isinstance(m, SUPPORTED)}
    for target in targets:
        fits = targeted(whole, [target])
        wrong = [name for name, module in fits.items() if not isinstance(module, SUPPORTED)]
        if fits and not wrong:
            continue
        known = ", ".join(sorted({_last(name) for name in layers})[:20])
        why = "fits no layer of the model"
        if wrong:
            why = f"{wrong[0]} is a {type(fits[wrong[0]]).__name__}, not a layer"
        setting = f"`lora_target_modules` {target}"
        if part != family.denoiser_name:
            setting, why = "`train_text_encoder`", why.replace("the model", f"the {part}, which needs {target}")
        raise UsageError(f"{setting}: {why}; its linear and convolutional layers are {known}")
    for name, layer in targeted(whole, targets).items():
        rows, columns = shape_of(layer)
        if settings.lora_rank > min(rows, columns):
            where = name if part == family.denoiser_name else f"{part}.{name}"
            raise UsageError(
                f"`lora_rank` {settings.lora_rank}: larger than {where}, which is {rows} x {columns}; give "
                f"{min(rows, columns)} or less"
            )


def _last(name):
    """The last part of a name that is not a number, and what follows it."""
    parts = name.split(".")
    start = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[start:])


class LoraWeights(Weights):
    """Adapters as what is trained; the rest of the denoiser, and of the text encoders that have some, is frozen.

    Each adapter is an update ``scaling * up @ down`` of its layer. The mean of K models is the base with the mean of K
    updates, which is not the product of the mean factors: means are taken of the products. What waits between rounds
    are the factors of all proxies of a round, by shard, so that neither processes nor the order of shards show.

    ``average`` says what theta_hat is and where the next round starts:

    * ``svd``: both are the update of the adapter's rank that is nearest to the mean.
    * ``concatenate``: theta_hat is the mean itself, of rank K r; a round starts from its nearest update of rank r.
    * ``fold``: theta_hat is the sum of all rounds' means; the base has it, and each round starts with fresh adapters.

    With one shard none of this happens: theta_hat is the adapter on the device.

    Args:
        family: whose trained modules have adapters, see ``add_adapter``.
        num_shards: K.
        settings: of the adapter.
        seed: of the fresh adapters.
    """

    def __init__(self, family: Family, num_shards: int, settings: LoraSettings, seed: int = 0):
        self.settings, self.num_shards, self.seed = settings, num_shards, seed
        self.rank, alpha = size_of(settings)
        self.scaling = alpha / self.rank
        self.layers = adapted_layers(family)
        self.names = saved_names(family)
        self.start: dict[str, torch.Tensor] = {}  # the adapters that a round starts from
        super().__init__(family, several=num_shards > 1)
        self.base: dict[str, torch.Tensor] = {}  # with fold: the targeted weights before training
        if self.folds:
            for name, layer in self.layers.items():
                layer.base_layer.weight.data = layer.base_layer.weight.data.float()
                self.base[name] = layer.base_layer.weight.detach().cpu().clone()
        if self.aggregated is not None:
            self._prepare_round()
            self.put()

    @property
    def folds(self) -> bool:
        """Whether updates are folded into the base after each round."""
        return self.num_shards > 1 and self.settings.lora_average == "fold"

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(trained_parameters(self.family).values())

    def live(self) -> Sets:
        return {KEY: {self.names[name]: p.detach() for name, p in trained_parameters(self.family).items()}}

    @torch.no_grad()
    def after_step(self) -> None:
        """Scale each layer's update down to the norm that ``scale_weight_norms`` allows."""
        limit = self.settings.scale_weight_norms
        if limit is None:
            return
        for layer in self.layers.values():
            up, down = layer.lora_B[NAME].weight, layer.lora_A[NAME].weight
            scale = shrinking(Factors(up.flatten(1), down.flatten(1)), limit / self.scaling)
            up.mul_(scale)
            down.mul_(scale)

    def _names(self, layer):
        """Of a layer's factors: up, down."""
        return [self.names[f"{layer}.lora_{side}.{NAME}.weight"] for side in "BA"]

    def _factors(self, tensors: Tensors, layer: str) -> Factors:
        """A layer's factors in a set, as matrices."""
        up, down = (tensors[name] for name in self._names(layer))
        return Factors(up.flatten(1), down.flatten(1))

    def _tensors(self, factors, layer):
        """(name, tensor) of a layer's factors, in the shapes of its parameters, which are 4-d for convolutions."""
        like = self.layers[layer]
        up, down = like.lora_B[NAME].weight, like.lora_A[NAME].weight
        names = self._names(layer)
        yield names[0], factors.up.float().reshape(-1, factors.rank, *up.shape[2:]).contiguous()
        yield names[1], factors.down.float().reshape(factors.rank, *down.shape[1:]).contiguous()

    def encode(self, tensors: Tensors, shard: int = 0) -> Tensors:
        """A proxy's factors in its own place of (K, ...) zeros, so that the sum over proxies has the factors of all."""

        def alone(tensor):
            places = torch.zeros(self.num_shards, *tensor.shape)
            places[shard] = tensor
            return places

        return {name: alone(tensor) for name, tensor in tensors.items()}

    def decode(self, means: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The factors of theta_hat from those of the proxies, which come divided by K, as a mean over K."""
        found = dict(means)
        energy = discarded = spread = moved = 0.0
        for layer in self.layers:
            ups, downs = (found[name] for name in self._names(layer))
            # The mean is up/K of the first shard, of the second, ... beside down.
            parts = [Factors(u.flatten(1), (d.double() * self.num_shards).float().flatten(1))
                     for u, d in zip(ups, downs, strict=True)]  # fmt: skip
            around, way = changes(self._factors(self.start, layer), parts)
            spread, moved = spread + around, moved + way
            made, all_of_it, lost = self._theta(layer, total(parts))
            energy, discarded = energy + all_of_it, discarded + lost
            yield from self._tensors(made, layer)
        self.notes = {
            "disagreement": disagreement(spread, moved),
            "lora_discarded": discarded / energy if energy else 0.0,
        }

    def _theta(self, layer, mean):
        """theta_hat of a layer, with the energy of the mean and of what the next round's start has lost of it."""
        if self.settings.lora_average != "fold":
            nearest = truncate(mean, self.rank)
            return nearest if self.settings.lora_average == "svd" else nearest._replace(factors=mean)
        assert self.aggregated is not None
        earlier = [self._factors(self.aggregated[KEY], layer)] if self.round else []  # before, up is zero
        full = min(shape_of(self.layers[layer].base_layer))
        return truncate(total([*earlier, mean]), full)._replace(energy=0.0, discarded=0.0)  # of full rank: exact

    def aggregate(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.aggregated is None:
            return
        self.aggregated = {KEY: dict(self.decode(self.means[KEY].mean(total)))}
        self.round += 1
        self._prepare_round()
        self.put()

    def put(self, sets: Sets | None = None) -> None:
        super().put({KEY: self.start} if sets is None and self.aggregated is not None else sets)

    @torch.no_grad()
    def _prepare_round(self):
        """``start``, and the base, from theta_hat."""
        assert self.aggregated is not None
        theta, self.start = self.aggregated[KEY], {}
        for number, (layer, module) in enumerate(self.layers.items()):
            factors = self._factors(theta, layer)
            if self.folds:
                update = (self.scaling * factors.product()).reshape(self.base[layer].shape)
                module.base_layer.weight.copy_((self.base[layer].double() + update).float())
                factors = self._fresh(number, layer)
            self.start |= self._tensors(truncate(factors, self.rank).factors, layer)

    def _fresh(self, number, layer):
        """A layer's adapter as it starts a round: drawn as peft does, from the seed, the round and the layer."""
        rows, columns = shape_of(self.layers[layer].base_layer)
        state = np.random.SeedSequence([self.seed, self.round, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        down = torch.empty(self.rank, columns).normal_(std=1 / self.rank, generator=generator)
        return Factors(torch.zeros(rows, self.rank), down)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the trained modules are as they are used, without dropout; adapters have no moving average."""
        training = [module for module in self.family.trained.values() if module.training]
        for module in training:
            module.eval()
        try:
            yield
        finally:
            for module in training:
                module.train()

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for tensors in self.deployable().values() for t in tensors.values())

    @property
    def output_bytes(self) -> int:
        return self.unfinished_bytes + (self.family.merged_nbytes if self.settings.save_merged else 0)

    @property
    def unfinished_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.deployable()[KEY].values())

    def metadata(self) -> dict[str, str]:
        """The header of the file: what peft must know of the adapter, as diffusers writes it."""
        about: dict[str, Any] = {}
        for part in self.family.trained:
            about |= {f"{part}.{key}": value for key, value in self._config(part).items()}
        return {"format": "pt", "lora_adapter_metadata": json.dumps(about, indent=2, sort_keys=True, default=str)}

    def _config(self, part):
        """What peft must know of the adapters of a module."""
        theta = self.deployable()[KEY]
        ranks = {name: self._factors(theta, f"{part}.{name}").rank for name in adapted(self.family.trained[part])}
        config = adapter_config(self.settings, targets_of(part, self.family, self.settings)).to_dict()
        config = {key: value for key, value in config.items() if not isinstance(value, dict)}
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        usual = max(ranks.values())
        config |= {"r": usual, "lora_alpha": self.scaling * usual, "inference_mode": True}
        config["rank_pattern"] = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
        config["alpha_pattern"] = {name: self.scaling * rank for name, rank in config["rank_pattern"].items()}
        return config

    def save_pipeline(self, folder: Path, final: bool = False, earlier: Path | None = None) -> None:
        """The adapter as ``load_lora_weights`` takes it; the result of a run on request as a whole pipeline too."""
        self.save(folder)
        if final and self.settings.save_merged:
            with self.family.merged(folder):
                self.family.save_pipeline(folder)

    def write_configs(self, folder: Path) -> None:
        """The file of the adapter has it all."""

    def held(self) -> Iterator[Held]:
        version = None if self.aggregated is None else self.round
        yield Held(ADAPTER_FILE, version, self.deployable()[KEY], self.metadata())

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for held in self.held():
            tensor_files.write(folder / held.name, held.tensors, metadata=dict(held.metadata))

    def load(self, folder: Path) -> None:
        saved = TensorFile(folder / ADAPTER_FILE)
        if self.aggregated is None:
            self.put({KEY: saved})
            return
        self.aggregated = {KEY: dict(saved.items())}
        self._prepare_round()
        self.put()
