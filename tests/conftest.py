import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.arguments import parse_args
from ietagc_diffusers.training.callbacks import Signals
from ietagc_diffusers.training.run import train
from ietagc_diffusers.training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_text_to_image_ietagc.py"
torch.set_num_threads(1)

COLOURS = ("red", "green", "blue", "white")


def write_folder(folder, num_images, copies=(), size=20, seed=0):
    """An image folder of noise pictures; ``copies`` lists images that get a second row."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for index in range(num_images):
        picture = Image.fromarray(rng.integers(0, 256, (size, size + 3, 3), dtype=np.uint8))
        for copy in range(2 if index in copies else 1):
            name = f"{index:03d}_{copy}.png"
            picture.save(folder / name)
            rows.append({"file_name": name, "text": f"a {COLOURS[index % 4]} picture", "label": index % 3})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random tiny Stable Diffusion with v-prediction."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    testing.random_pipeline([f"a {colour} picture" for colour in COLOURS]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", 22, copies=(0, 1))


def environment():
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "RANK", "WORLD_SIZE"))}
    return keep | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}


def launch(flags, output_dir, processes=1, check=True):
    """Run the training script as its user does. Returns the finished process."""
    # accelerate's own launcher starts several CPU processes through MPI alone; torchrun does without.
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(several if processes > 1 else []), str(SCRIPT)]
    command += [*map(str, flags), f"--output_dir={output_dir}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def train_flags(base, pictures, *more):
    return [
        f"--pretrained_model_name_or_path={base}",
        f"--train_data_dir={pictures}",
        "--resolution=16",
        "--train_batch_size=4",
        "--learning_rate=1e-3",
        "--lr_warmup_steps=0",
        "--seed=5",
        "--checkpointing_steps=100000",
        *more,
    ]


def train_here(flags, output_dir, stop_at=None, kind=TrainingSettings):
    """Run the training script in this process, optionally stopped as by a signal once ``stop_at`` steps are done.

    Returns the output folder.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    should_stop = Signals.should_stop
    if stop_at is not None:
        Signals.should_stop = lambda self, run: run.global_step >= stop_at
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train(parse_args([*map(str, flags), f"--output_dir={output_dir}"], kind))
    finally:
        Signals.should_stop = should_stop
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Path(output_dir)


def unet_bytes(folder):
    return (Path(folder) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
