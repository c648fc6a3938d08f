"""Kill training runs with SIGKILL and see that they end with the same weights all the same.

    python -m benchmarks.faults [--kills 48] [--seed 0] [--lora]

Each run of a tiny model is killed once, at a random moment or at a chosen stage, resumed with
``--resume_from_checkpoint latest`` and compared byte for byte with the run that was not killed: the trained files,
rounds (but their seconds) and skip counts. Every other run has two processes; about half keep waiting proxies on the
disk. With ``--lora`` the runs train adapters on the UNet and the text encoder, folded into the base after each round.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

STAGES = ("any time", "step", "averaging", "half a file", "before rename", "after rename", "cleanup", "final save")
METHOD = [
    "--num_shards=2", "--steps_per_round=4", "--max_train_steps=32", "--skip_threshold=0.9", "--augment_range=1.3",
    "--bank_buckets=2", "--checkpointing_steps=3", "--checkpoints_total_limit=2", "--resolution=16",
    "--train_batch_size=4", "--learning_rate=1e-3", "--lr_warmup_steps=0", "--seed=5", "--random_flip",
]  # fmt: skip

FULL = ["--use_ema"]
LORA = ["--lora_rank=2", "--lora_average=fold", "--lora_dropout=0.1", "--train_text_encoder", "--save_merged"]
# The latest occurrence of a stage at which a run is killed.
LATEST = {"averaging": 6, "half a file": 90}
LATEST_LORA = {"averaging": 3, "half a file": 50}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage, count):
    """Make this process kill itself at the ``count``-th time that it reaches a stage."""
    from ietagc_diffusers import tensor_files
    from ietagc_diffusers.checkpoint import writing
    from ietagc_diffusers.families import stable_diffusion
    from ietagc_diffusers.method import averaging
    from ietagc_diffusers.training import proxy

    left = count

    def countdown():
        nonlocal left
        left -= 1
        if left == 0:
            die()

    def before(module, name):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            countdown()
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    if stage == "step":
        before(proxy.torch.nn.utils, "clip_grad_norm_")
    elif stage == "averaging":
        mean = averaging.ModelAverage.mean

        def dying_mean(self, total):
            for number, item in enumerate(mean(self, total)):
                if number == 5:
                    countdown()
                yield item

        averaging.ModelAverage.mean = dying_mean
    elif stage == "half a file":
        write = tensor_files.write

        def half(path, *more, **options):
            written = write(path, *more, **options)
            nonlocal left
            if left == 1:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
            countdown()
            return written

        tensor_files.write = half
    elif stage in ("before rename", "after rename"):
        rename = writing._rename

        def renamed(folder, final):
            if stage == "before rename":
                countdown()
            rename(folder, final)
            if stage == "after rename":
                countdown()

        writing._rename = renamed
    elif stage == "cleanup":
        rmtree = writing.shutil.rmtree

        def half_removed(path, **options):
            if re.fullmatch(r"checkpoint-\d+", Path(path).name):
                next(Path(path).rglob("*.safetensors")).unlink()
                countdown()
            rmtree(path, **options)

        writing.shutil.rmtree = half_removed
    elif stage == "final save":
        before(stable_diffusion.StableDiffusionPipeline, "save_config")


def child(flags, log, stage, count, rank, world, port):
    """One process of a run, in a fork that has everything imported already."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1",
        )  # fmt: skip
    try:
        from accelerate.state import AcceleratorState

        from ietagc_diffusers.arguments import parse_args
        from ietagc_diffusers.training.run import train

        AcceleratorState._reset_state(reset_partial_state=True)  # what the parent found
        if stage is not None:
            arm(stage, count)
        train(parse_args(flags))
        assert AcceleratorState().num_processes == world
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(flags, log, world, stage=None, count=0, victim=0, kill_after=None):
    """Run to the end or to the kill. Returns whether all processes ended well."""
    port, children = free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            child(flags, log, stage if rank == victim else None, count, rank, world, port)
        children.append(pid)
    started, well, left = time.monotonic(), True, set(children)
    while left:
        if kill_after is not None and time.monotonic() - started > kill_after:
            os.kill(children[victim], signal.SIGKILL)
            kill_after = None
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if status:  # as a launcher does: one down, all down
                    if well and not os.WIFSIGNALED(status):
                        sys.exit(f"a process failed:\n{Path(log).read_text()[-3000:]}")
                    well = False
                    for other in left:
                        os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return well


def outcome(folder):
    """What must be equal: bytes of what was trained and the skip counts, and the rounds but their seconds."""
    rows = [json.loads(line) for line in (folder / "ietagc" / "rounds.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    trained = ("*.safetensors", "unet/*.safetensors", "text_encoder/*.safetensors")
    files = [path for pattern in trained for path in sorted(folder.glob(pattern))]
    return [path.read_bytes() for path in [*files, folder / "ietagc" / "skip_counts.parquet"]], figures


def make_inputs(scratch):
    from ietagc_diffusers import testing

    captions = [f"a {colour} picture" for colour in ("red", "green", "blue")]
    testing.random_pipeline(captions).save_pretrained(scratch / "base")
    (scratch / "pictures").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index in range(22):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(scratch / "pictures" / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": captions[index % 3]})
    (scratch / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--pretrained_model_name_or_path={scratch / 'base'}", f"--train_data_dir={scratch / 'pictures'}", *METHOD]


def campaign(kills, seed, report=print, lora=False):
    """Returns rows (number, processes, stage, killed, resumed from, identical)."""
    import torch

    torch.set_num_threads(1)
    rng, table = random.Random(seed), []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        flags = [*make_inputs(scratch), *(LORA if lora else FULL)]
        whole = scratch / "whole"
        if not run([*flags, f"--output_dir={whole}"], scratch / "whole.log", 1):
            sys.exit((scratch / "whole.log").read_text()[-3000:])
        wanted = outcome(whole)
        for number in range(kills):
            world, stage = 1 + number % 2, STAGES[number // 2 % len(STAGES)]
            folder, log = scratch / f"run-{number}", scratch / f"run-{number}.log"
            mine = [
                *flags,
                f"--proxy_state={rng.choice(['host', 'disk'])}",
                f"--output_dir={folder}",
                "--resume_from_checkpoint=latest",
            ]
            count = (
                1
                if stage == "final save"
                else rng.randint(1, {"step": 30 // world, **(LATEST_LORA if lora else LATEST)}.get(stage, 9))
            )
            timed = {"kill_after": rng.uniform(0.5, 4.0)} if stage == "any time" else {"stage": stage, "count": count}
            # Files are renamed, removed and saved by the first process alone.
            victim = rng.randrange(world) if stage in ("any time", "step", "averaging", "half a file") else 0
            killed = not run(mine, log, world, victim=victim, **timed)
            found = sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit())
            ended = run(mine, log, world)
            identical = ended and outcome(folder) == wanted
            table.append((number + 1, world, stage, killed, found[-1] if found else 0, identical))
            report(
                f"{number + 1:3} {world} process{'es' if world > 1 else '  '} {stage:14} "
                f"{'killed' if killed else 'not reached':12} newest checkpoint {found[-1] if found else 0:3} "
                f"{'identical' if identical else 'DIFFERENT ' + log.read_text()[-1500:]}"
            )
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true", help="kill runs that train adapters")
    args = parser.parse_args()
    table = campaign(args.kills, args.seed, lora=args.lora)
    killed = [row for row in table if row[3]]
    print(f"{sum(row[5] for row in table)} of {len(table)} identical, {len(killed)} of them were killed")
    for stage in STAGES:
        rows = [row for row in killed if row[2] == stage]
        print(f"| {stage} | {len(rows)} | {sum(row[5] for row in rows)} |")
    sys.exit(not all(row[5] for row in table))


if __name__ == "__main__":
    main()
