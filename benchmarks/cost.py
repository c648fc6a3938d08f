"""What a run takes at real size: memory, checkpoints and disk, by arithmetic on shapes.

    python -m benchmarks.cost               # a table of models x K x moving average x where waiting proxies are
    python -m benchmarks.cost --lora        # the same of adapters
    python -m benchmarks.cost --check       # real runs of an 80 M parameter model beside the arithmetic (minutes)

Models are made on the meta device: they have shapes and no content. Frozen parts are in half precision, as with
``--mixed_precision bf16``; activations are not counted. "written" is what a checkpoint writes that falls into the
turn of the same proxy as the one before; all else of it is linked.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from ietagc_diffusers.families import FAMILIES
from ietagc_diffusers.training.cost import PROCESS, Adapters, Cost
from ietagc_diffusers.training.lora import shape_of, targeted
from ietagc_diffusers.training.rounds import Rounds

from .real_shapes import UNETS
from .tables import print_table

SHARDS = (1, 4, 10)
CHECKED = (192, 384, 512)  # widths of the model of the real runs
# Of --check: K, where waiting proxies are, --calibrate.
RUNS = (
    *((1, "host", "none"), (2, "host", "none"), (2, "disk", "none"), (4, "disk", "none")),
    *((2, "disk", "base"), (1, "host", "past"), (2, "disk", "past")),
)
UNCOUNTED = 0.1e9  # bytes of activations and of the tensor that is being moved, beyond what the arithmetic knows
EVERY, LIMIT = 2000, 2  # checkpoints of the runs in the table
STEPS_PER_ROUND, NUM_ROUNDS = 2000, 2  # enough rounds for what a longer run keeps at a time
# name -> (class, configuration, parameters of the frozen parts)
MODELS = {
    "CIFAR UNet": (
        UNet2DModel,
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "attention_head_dim": None,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        0,
    ),
    "SD 1.5": (UNet2DConditionModel, UNETS["sd15"], 83_653_863 + 123_060_480),
    "SD 2.1": (UNet2DConditionModel, UNETS["sd21"], 83_653_863 + 340_387_840),
    "SDXL UNet": (UNet2DConditionModel, UNETS["sdxl"], 83_653_863 + 123_060_480 + 694_659_840),
    "SD 3 medium": (
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        83_819_683 + 123_650_304 + 694_659_840 + 4_762_310_656,  # with T5
    ),
}


def parameters(name: str) -> int:
    """Of a model's denoiser."""
    kind, config, _ = MODELS[name]
    with torch.device("meta"):
        return sum(p.numel() for p in kind(**config).parameters())


def rows(name: str, precision: int = 2):
    """Rows of the table: a dict each, sizes in GB."""
    count = parameters(name)
    for num_shards in SHARDS:
        for ema in (False, True):
            for kept in ("keep", "average", "reset") if num_shards > 1 else ("keep",):
                cost = Cost(count, MODELS[name][2] * precision, num_shards, ema=ema, optimizer_state=kept)
                disk = Cost(**{**vars(cost), "on_disk": True})
                rounds = Rounds(num_shards, STEPS_PER_ROUND * NUM_ROUNDS, STEPS_PER_ROUND)
                official = cost.sets + cost.moments
                numbers = {
                    "device": cost.device,
                    "host": cost.host,
                    "host, on disk": disk.host,
                    "checkpoint between rounds": sum(cost.files(rounds, rounds.steps_before(1)).values()),
                    "checkpoint at most": cost.checkpoint(rounds, STEPS_PER_ROUND // 4),
                    "written": cost.sets + cost.moments,
                    "disk of a run": disk.disk(rounds, EVERY, LIMIT),
                }
                yield {
                    "model": name,
                    "K": num_shards,
                    "EMA": "yes" if ema else "no",
                    "moments": kept,
                    **{key: f"{value / 1e9:.1f}" for key, value in numbers.items()},
                    "to official": f"{numbers['checkpoint between rounds'] / official:.1f} to "
                    f"{numbers['checkpoint at most'] / official:.1f}",
                }


def adapter_rows(name: str, rank: int = 4, num_rounds: int = 25, precision: int = 2):
    """Rows of the table of adapters on the attention of a model: a dict each, sizes in MB, the device's in GB."""
    kind, config, others = MODELS[name]
    with torch.device("meta"):
        denoiser = kind(**config)
    targets = next(family.denoiser_targets for family in FAMILIES if family.denoiser_kind is kind)
    shapes = tuple(shape_of(layer) for layer in targeted(denoiser, targets).values())
    frozen = (sum(p.numel() for p in denoiser.parameters()) + others) * precision
    for num_shards in SHARDS:
        for average in ("svd", "concatenate", "fold") if num_shards > 1 else ("svd",):
            adapters = Adapters(shapes, rank, average)
            cost = Cost(adapters.parameters(rank), frozen, num_shards, optimizer_state="reset", adapters=adapters)
            rounds = Rounds(num_shards, STEPS_PER_ROUND * num_rounds, STEPS_PER_ROUND)
            numbers = {
                "host beside the process": cost.host - PROCESS,
                "checkpoint between rounds": sum(cost.files(rounds, rounds.steps_before(1)).values()),
                "checkpoint at most": cost.checkpoint(rounds, STEPS_PER_ROUND // 4),
                "saved adapter": cost.output(num_rounds),
            }
            yield {
                "model": name,
                "K": num_shards,
                "mean": average if num_shards > 1 else "–",
                "device (GB)": f"{cost.device / 1e9:.1f}",
                **{key: f"{value / 1e6:.1f}" for key, value in numbers.items()},
            }


def print_rows(table):
    print_table([*table[0]], [[*row.values()] for row in table])


def measure(num_shards: int, place: str, calibrate: str, scratch: Path) -> dict[str, float]:
    """A real run of a model of 80 M parameters on 16 px images: peak memory and disk beside the arithmetic."""
    run = [str(num_shards), place, calibrate]
    command = [sys.executable, "-m", "benchmarks.cost", "--child", *run, str(scratch / "-".join(run))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def child(num_shards: int, place: str, calibrate: str, scratch: Path) -> None:
    """The run itself, in a process of its own; prints its numbers as JSON."""
    from accelerate.state import AcceleratorState

    from ietagc_diffusers import testing
    from ietagc_diffusers.arguments import parse_args
    from ietagc_diffusers.training import cost as costs
    from ietagc_diffusers.training.run import train

    from .faults import make_inputs

    scratch.mkdir(parents=True)
    flags = make_inputs(scratch)
    tiny = ["--num_shards=2", "--max_train_steps=4", "--steps_per_round=1"]
    train(parse_args([*flags, *tiny, f"--output_dir={scratch / 'tiny'}"]))  # loads all that a run loads
    process = _memory("VmRSS")
    AcceleratorState._reset_state(reset_partial_state=True)
    pipeline = testing.random_pipeline(["a red picture"])
    pipeline.unet = testing.build_unet(CHECKED, sample_size=8, text_width=16)
    pipeline.save_pretrained(scratch / "base")
    count = sum(p.numel() for p in pipeline.unet.parameters())
    frozen = testing.family_of_pipeline(pipeline).nbytes - count * costs.FLOAT32
    del pipeline
    per_round = 1 if calibrate == "past" else 2  # a past takes three rounds
    flags += ["--use_ema", f"--calibrate={calibrate}"]
    more = [f"--num_shards={num_shards}", f"--max_train_steps={4 * num_shards}", f"--steps_per_round={per_round}"]
    more += ["--checkpointing_steps=3", "--checkpoints_total_limit=1", f"--proxy_state={place}", "--train_batch_size=1"]
    train(parse_args([*flags, *more, "--augment_range=1", f"--output_dir={scratch / 'out'}"]))
    sizes = {"reference": count * costs.FLOAT32} if calibrate != "none" else {}
    past = calibrate == "past"
    cost = costs.Cost(count, frozen, num_shards, ema=True, on_disk=place == "disk", on_cpu=True, past=past, **sizes)
    rounds = Rounds(num_shards, 4, per_round)
    last = costs.checkpoint_steps(rounds, 3)[-1]
    files = (scratch / "out" / f"checkpoint-{last}").rglob("*")
    numbers = {
        "parameters": count,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory expected": cost.host - costs.PROCESS + process,
        "checkpoint": sum(path.stat().st_size for path in files if path.is_file()),
        "checkpoint expected": sum(cost.files(rounds, last).values()),
        "process": process,
    }
    print(json.dumps(numbers))


def _memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def check() -> bool:
    """Print real runs beside the arithmetic. Returns whether all agree to 5%, and memory to that and ``UNCOUNTED``."""
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        for run in RUNS:
            got = measure(*run, Path(scratch))
            row = dict(zip(("K", "proxy state", "calibrate"), run, strict=True))
            for what in ("memory", "checkpoint"):
                row[what] = f"{got[what] / 1e9:.3f}"
                row[f"{what} expected"] = f"{got[f'{what} expected'] / 1e9:.3f}"
                row[f"{what} ratio"] = f"{got[what] / got[f'{what} expected']:.3f}"
            table.append(row)
    print_rows(table)
    allowed = {"memory": UNCOUNTED / 1e9, "checkpoint": 0.0}
    return all(
        abs(float(row[what]) - float(row[f"{what} expected"])) <= 0.05 * float(row[f"{what} expected"]) + more
        for row in table
        for what, more in allowed.items()
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with real runs")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 4 in runs of 25 rounds")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        num_shards, place, calibrate, scratch = args.child
        child(int(num_shards), place, calibrate, Path(scratch))
    elif args.lora:
        print_rows([row for name in MODELS if name != "CIFAR UNet" for row in adapter_rows(name)])
    elif args.check:
        sys.exit(not check())
    else:
        print_rows([row for name in MODELS for row in rows(name)])


if __name__ == "__main__":
    main()
