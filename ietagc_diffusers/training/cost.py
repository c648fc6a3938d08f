"""What a run takes: memory of the device and the host, and room on the disk, by arithmetic.

All numbers are bytes, of one process where there are several. Activations are not counted: they depend on the batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import gigabytes
from ..families import Family
from .groups import LoraSettings
from .layout import Layout
from .lora import adapted_layers, shape_of, size_of
from .past import kept_after
from .rounds import Rounds
from .settings import RunSettings

FLOAT32, FLOAT64 = 4, 8
MOMENTS, MOMENTS_8BIT = 8, 2  # bytes a parameter: two numbers
PROCESS = 0.75e9  # host memory of Python and its libraries, before a model is loaded; measured, on CPU


@dataclass(frozen=True)
class Adapters:
    """What is trained instead of the denoiser.

    Args:
        shapes: (O, I) of the targeted weights as matrices.
        rank: r.
        average: ``svd``, ``concatenate`` or ``fold``.
        merged: bytes of the pipeline that the result is also saved as; 0: none.
        extra: parameters beside the factors (DoRA's magnitudes).
    """

    shapes: tuple[tuple[int, int], ...]
    rank: int
    average: str = "svd"
    merged: int = 0
    extra: int = 0

    def parameters(self, rank: int) -> int:
        """Of adapters of a rank, or as much of it as a layer can have."""
        return self.extra + sum(min(rank, rows, columns) * (rows + columns) for rows, columns in self.shapes)

    def theta(self, index: int, num_shards: int) -> int:
        """Bytes of theta_hat after ``index`` rounds."""
        if num_shards == 1 or index == 0 or self.average == "svd":
            return self.parameters(self.rank) * FLOAT32
        if self.average == "concatenate":
            return num_shards * self.parameters(self.rank) * FLOAT32
        return self.parameters(num_shards * self.rank * index) * FLOAT32


@dataclass(frozen=True)
class Cost:
    """The numbers of a run.

    Args:
        parameters: that are trained: of the denoiser, or of the adapters.
        frozen: bytes of the other parts of the pipeline, and of the denoiser if adapters are trained.
        num_shards, processes: K and W.
        ema: whether there is a moving average.
        on_disk: whether what waits is on the disk.
        optimizer_state: ``keep``, ``average`` or ``reset``.
        moments_of_one: bytes of a parameter's moments.
        offload_ema: the moving average is in host memory.
        on_cpu: the device is the host.
        adapters: what is trained, if that is not the denoiser.
        reference: bytes of a second, frozen denoiser on the device.
        past: whether that is a model of the run's own past, of which there is another that waits.
        save_rounds: the model of every round is kept.
    """

    parameters: int
    frozen: int = 0
    num_shards: int = 1
    processes: int = 1
    ema: bool = False
    on_disk: bool = False
    optimizer_state: str = "keep"
    moments_of_one: int = MOMENTS
    offload_ema: bool = False
    on_cpu: bool = False
    adapters: Adapters | None = None
    reference: int = 0
    past: bool = False
    save_rounds: bool = False

    @property
    def copy(self) -> int:
        """One copy of what is trained, in float32."""
        return self.parameters * FLOAT32

    @property
    def sets(self) -> int:
        """Weights, and their moving average if there is one."""
        return self.copy * (1 + self.ema)

    def theta(self, index: int) -> int:
        """The aggregated model after ``index`` rounds."""
        return self.sets if self.adapters is None else self.adapters.theta(index, self.num_shards)

    @property
    def moments(self) -> int:
        return self.parameters * self.moments_of_one

    @property
    def sums(self) -> int:
        """Of the running means."""
        of_all = 1 if self.adapters is None else self.num_shards  # the factors of all proxies wait side by side
        means = self.sets * of_all + (self.moments if self.optimizer_state == "average" else 0)
        return means // FLOAT32 * FLOAT64

    @property
    def several(self) -> bool:
        return self.num_shards > 1

    @property
    def proxies(self) -> int:
        """Of this process."""
        return max(1, self.num_shards // self.processes)

    @property
    def coming(self) -> int:
        """The model of the past that waits to become the reference."""
        return self.copy if self.past else 0

    @property
    def device(self) -> int:
        """Weights, gradients, moments, moving average and the frozen parts; activations come on top."""
        ema = 0 if self.offload_ema and not self.on_cpu else self.sets - self.copy
        return 2 * self.copy + self.moments + ema + self.frozen + self.reference

    @property
    def waiting(self) -> int:
        """What waits off the device at most: theta_hat, the running means, moments of other proxies, and the next
        model of the past.
        """
        if not self.several:
            return self.coming
        own = 0
        if self.optimizer_state == "keep" and self.proxies > 1:
            own = (self.proxies - self.on_cpu) * self.moments  # on a GPU all of them wait for a moment
        shared = self.moments if self.optimizer_state == "average" else 0
        return self.sets + self.sums + own + shared + self.coming + self._folded

    @property
    def _folded(self):
        """With adapters folded into the base: its weights before training, and the sum of the updates at most."""
        if self.adapters is None or self.adapters.average != "fold":
            return 0
        return (sum(o * i for o, i in self.adapters.shapes) + self.adapters.parameters(1 << 30)) * FLOAT32

    @property
    def host(self) -> int:
        """Host memory while training; saving needs no more than one tensor on top."""
        offloaded = self.copy if self.ema and self.offload_ema and not self.on_cpu else 0
        return int(PROCESS) + (self.device if self.on_cpu else offloaded) + (0 if self.on_disk else self.waiting)

    def output(self, num_rounds: int) -> int:
        """The files of the trained pipeline or adapter."""
        if self.adapters is None:
            return self.copy + self.frozen
        return self.theta(num_rounds) + self.adapters.merged

    def saved(self, num_rounds: int) -> int:
        """The models of the rounds that are kept; their frozen parts are on the disk once."""
        if not self.save_rounds:
            return 0
        if self.adapters is None:
            return num_rounds * self.copy + self.frozen
        return sum(self.theta(index + 1) for index in range(num_rounds))

    def files(self, rounds: Rounds, step: int) -> dict[tuple, int]:
        """The large files of the checkpoint at a step, by (name, version): equal keys are one file on the disk."""
        index, steps = 0, 0
        while index < rounds.num_rounds and rounds.steps_before(index + 1) <= step:
            index += 1
        files: dict[Any, int] = {}
        if self.past:
            reference, coming = kept_after(index)
            files |= {("reference", reference): self.reference} if reference else {}
            files |= {("next", coming): self.coming} if coming else {}
        if not self.several:
            return files | {("theta", step): self.theta(0), ("moments", 0, step): self.moments}
        if index < rounds.num_rounds:
            steps = (step - rounds.steps_before(index)) // min(self.processes, self.num_shards)
        quota = rounds.steps_in(index) if index < rounds.num_rounds else 1
        done, midway = divmod(steps, quota)  # proxies of each process that are done, and steps of the next
        files["theta", index] = self.theta(index)
        groups = min(self.processes, self.num_shards)
        for number in range(self.num_shards):
            mine = number // groups  # the how-manieth of its process
            taken = quota if mine < done else midway if mine == done else 0
            if (self.optimizer_state == "keep" and (index or taken)) or taken % quota:
                files["moments", number, index, taken] = self.moments
            if taken % quota:
                files["midway", number, index, taken] = self.sets
        if done:
            files |= {("sums", process, index, done): self.sums for process in range(groups)}
        if self.optimizer_state == "average" and index:
            files["shared", index] = self.moments
        return files

    def checkpoint(self, rounds: Rounds, every: int) -> int:
        """The largest checkpoint of a run, by itself."""
        return max(sum(self.files(rounds, step).values()) for step in checkpoint_steps(rounds, every))

    def disk(self, rounds: Rounds, every: int, total_limit: int | None) -> int:
        """Room that a run takes at most: its checkpoints, what waits, models of rounds, and the trained pipeline."""
        groups = min(self.processes, self.num_shards)
        most, kept = self.waiting * groups * self.on_disk, []
        # What waits is part of the next checkpoint, by links, but for the theta_hat and past that other processes have.
        others = (self.sets + self.coming) * (groups - 1) * self.on_disk
        for step in checkpoint_steps(rounds, every):
            kept.append(self.files(rounds, step))
            most = max(most, _together(kept) + others)
            kept = kept[-total_limit:] if total_limit else kept
        return most + self.saved(rounds.num_rounds) + self.output(rounds.num_rounds)


def checkpoint_steps(rounds: Rounds, every: int) -> list[int]:
    return [*range(every, rounds.total_steps + 1, every)] or [rounds.total_steps]


def _together(checkpoints: Iterable[dict[tuple, int]]) -> int:
    """Bytes of several checkpoints, files that they share counted once."""
    return sum({key: size for files in checkpoints for key, size in files.items()}.values())


def cost_of(settings: RunSettings, family: Family, layout: Layout, on_disk: bool = False) -> Cost:
    """The cost of a run that is about to start."""
    trained = [p for module in family.trained.values() for p in module.parameters() if p.requires_grad]
    copied = settings.method.calibrate != "none" and settings.adapters is None
    return Cost(
        parameters=sum(p.numel() for p in trained),
        frozen=family.nbytes - sum(p.nbytes for p in trained),
        num_shards=layout.num_shards,
        processes=layout.num_processes,
        ema=settings.use_ema,
        on_disk=on_disk,
        optimizer_state=settings.method.optimizer_state,
        moments_of_one=MOMENTS_8BIT if settings.use_8bit_adam else MOMENTS,
        offload_ema=settings.offload_ema,
        on_cpu=layout.device.type == "cpu",
        adapters=None if settings.adapters is None else adapters_of(settings.adapters, family),
        reference=sum(p.numel() for p in family.denoiser.parameters()) * family.dtype.itemsize if copied else 0,
        past=settings.method.calibrate == "past",
        save_rounds=settings.save_rounds,
    )


def adapters_of(settings: LoraSettings, family: Family) -> Adapters:
    """The adapters of a family's trained modules, which have them."""
    layers = adapted_layers(family).values()
    shapes = tuple(shape_of(layer.base_layer) for layer in layers)
    magnitudes = sum(shape[0] for shape in shapes) if settings.use_dora else 0
    merged = family.merged_nbytes if settings.save_merged else 0
    return Adapters(shapes, size_of(settings)[0], settings.lora_average, merged, magnitudes)


def describe(cost: Cost, rounds: Rounds, every: int, total_limit: int | None) -> str:
    """The cost in a line, for the log of a run."""
    memory = f"{gigabytes(cost.host)} of host memory"
    if not cost.on_cpu:
        memory = f"{gigabytes(cost.device)} of device memory, {memory}"
    return (
        f"Needs {memory} a process, without activations; checkpoints of {gigabytes(cost.checkpoint(rounds, every))} at "
        f"most, {gigabytes(cost.disk(rounds, every, total_limit))} on the disk in all"
    )


def available_memory() -> int:
    """Bytes of host memory that this process can still take, by the machine and by the limit of its container."""
    free = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        free.append(max(0, int(limit[0]) - int(used[0])))
    return min(free, default=1 << 62)


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
