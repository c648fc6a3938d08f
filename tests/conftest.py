import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fake_hub import serving
from huggingface_hub import constants
from huggingface_hub.utils import _http
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.arguments import parse_args
from ietagc_diffusers.cli.train import comparer_of
from ietagc_diffusers.training.callbacks import Signals
from ietagc_diffusers.training.run import train
from ietagc_diffusers.training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_text_to_image_ietagc.py"
torch.set_num_threads(1)
FORKS = multiprocessing.get_context("forkserver")

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


@pytest.fixture(scope="module")
def no_page():
    """Drawing the monitor's page takes longer than all else: what it is given stands in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ietagc_diffusers.training.callbacks.monitor.page", lambda *about, **more: str(about[1:]))
        yield


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """A folder of ten other pictures."""
    return write_folder(tmp_path_factory.mktemp("heldout") / "pictures", 10, seed=9)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A folder of 60 pictures, three of which have two files."""
    return write_folder(tmp_path_factory.mktemp("compared") / "training", 60, copies=(0, 1, 2))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder of 12 other pictures."""
    return write_folder(tmp_path_factory.mktemp("compared") / "fresh", 12, seed=9)


def write_index(folder, kind):
    """A folder that says that it holds such a pipeline, and nothing else."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.30.0"}))
    return folder


def scene(seed, size=(96, 80)):
    """A picture with the amplitudes of natural images, which fall with the frequency."""
    rng = np.random.default_rng(seed)
    width, height = size
    noise = np.fft.rfft2(rng.standard_normal((3, height, width)), axes=(1, 2))
    far = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    values = np.fft.irfft2(noise / np.maximum(far, 1 / width), s=(height, width), axes=(1, 2))
    values = 128 + 45 * (values - values.mean()) / values.std()
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random tiny Stable Diffusion with v-prediction."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    testing.random_pipeline([f"a {colour} picture" for colour in COLOURS]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", 22, copies=(0, 1))


@pytest.fixture
def hub(monkeypatch):
    """A Hub that the client is directed to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template)
        yield hub


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited for, by this package and by the Hub's client, none of which pass."""
    waits = []
    clock = types.SimpleNamespace(sleep=waits.append, time=lambda: 1000.0, perf_counter=lambda: 0.0)
    monkeypatch.setattr(_http, "time", clock)
    return waits


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """The folder of a tiny pipeline, by its name in the module's ``MADE``."""
    folders = {}

    def of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("made") / name
            request.module.MADE[name]().save_pretrained(folders[name])
        return folders[name]

    return of


def environment():
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "RANK", "WORLD_SIZE"))}
    return keep | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}


def _as_script(environ, argv, output):
    """In a process of its own: run a script or a module with these words, its output into files."""
    os.environ.clear()
    os.environ.update(environ)
    importlib.reload(constants)  # it read the environment of the process that this one was forked from
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = argv
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """What a process wrote is there for all that follow, whether it has reached the disk or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _forks():
    """Processes start from one that has imported everything: a second instead of ten."""
    FORKS.set_forkserver_preload(["ietagc_diffusers.cli.train", "ietagc_diffusers.training.run", "diffusers"])


def launch(flags, output_dir, processes=1, check=True, during=None, script=SCRIPT, **variables):
    """Run a training script (or another script, or a module) as its user does, in as many processes as a launcher would
    start it in.

    ``output_dir``: a training script's, or None. ``during`` is called with the processes once they have started.

    Returns the exit code, that of the first process that failed, and the output of all.
    """
    argv = [str(script), *map(str, flags), *([] if output_dir is None else [f"--output_dir={output_dir}"])]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        several = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        several |= {"MASTER_PORT": free.getsockname()[1]}
        free.close()
        started = []
        for rank in range(processes):
            own = several | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            environ = environment() | variables | {name: str(value) for name, value in own.items()}
            started.append(FORKS.Process(target=_as_script, args=(environ, argv, f"{folder}/log")))
            started[-1].start()
        if during is not None:
            during(*started)
        for process in started:
            process.join()
        output = [Path(f"{folder}/log.{name}").read_text() for name in ("out", "err")]
    codes = [process.exitcode for process in started]
    if check and any(codes):
        raise AssertionError(f"exit {codes}\n{output[0][-2000:]}\n{output[1][-4000:]}")
    return subprocess.CompletedProcess(argv, next(filter(None, codes), 0), *output)


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
        Signals.should_stop = lambda self, run: setattr(self, "stops", run.global_step >= stop_at) or self.stops
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        settings = parse_args([*map(str, flags), f"--output_dir={output_dir}"], kind)
        train(settings, comparer=comparer_of(settings))
    finally:
        Signals.should_stop = should_stop
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Path(output_dir)


def unet_bytes(folder):
    return (Path(folder) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
