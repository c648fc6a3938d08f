"""What the demo measures of a run: its front, and what its last model draws for the training captions."""

import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from ietagc_diffusers.eval.front import measure
from ietagc_diffusers.eval.generate import Settings, generate
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.neighbours import most_similar
from ietagc_diffusers.eval.prompts import Prompt
from ietagc_diffusers.eval.score import NEAREST, SCORES, Protocol, Tools, score
from ietagc_diffusers.sscd import pixel_descriptor

from demo.renders import draw_scenes, render_all, write_image_folder
from ietagc_diffusers.files import write_json

BASE = Path(__file__).parent / "tiny-sd"
STYLE = "mosaic"
NUM_IMAGES, NUM_DUPLICATED, COPIES = 300, 30, 4
IMAGES_PER_CAPTION = 2
SETTINGS = Settings(num_inference_steps=20, guidance_scale=3.0, batch_size=100, scheduler="ddim")


class Pictures:
    """The demo's pictures; every set is a function of its seed.

    ``training``: 300 of them, the first 30 of which have four rows. ``heldout``: 300 of other captions. ``fresh``:
    other pictures of the training captions, what a model would draw that follows the caption and copies nothing. All
    uint8 (N, 3, 32, 32).
    """

    @cached_property
    def scenes(self):
        return draw_scenes(NUM_IMAGES, [1, 0])

    @cached_property
    def heldout_scenes(self):
        return draw_scenes(NUM_IMAGES, [2, 0])

    @cached_property
    def training(self):
        return _tensor(render_all(self.scenes, STYLE, [1, 1]))

    @cached_property
    def heldout(self):
        return _tensor(render_all(self.heldout_scenes, STYLE, [2, 1]))

    def fresh(self, number):
        return _tensor(render_all(self.scenes, STYLE, [3, number]))

    @cached_property
    def reference(self):
        """2,400 fresh pictures: the distribution that a perfect model draws from."""
        return torch.cat([self.fresh(number) for number in range(8)])

    @property
    def captions(self):
        return [scene.caption for scene in self.scenes]

    @property
    def prompts(self):
        """Every caption, over and over; the sample id is the picture's number."""
        return [Prompt(caption, number) for number, caption in enumerate(self.captions)] * IMAGES_PER_CAPTION

    def write(self, folder):
        """Image folders in ``folder``: ``pictures`` to train on, ``heldout``, ``reference``, and ``fresh``, which
        stands in for a model that copies nothing.
        """
        copies = [COPIES] * NUM_DUPLICATED + [1] * (NUM_IMAGES - NUM_DUPLICATED)
        write_pictures(folder / "pictures", [scene.captions for scene in self.scenes], self.training, copies)
        write_pictures(folder / "heldout", [scene.caption for scene in self.heldout_scenes], self.heldout)
        write_pictures(folder / "reference", self.captions * 8, self.reference)
        fresh = torch.cat([self.fresh(100 + number) for number in range(IMAGES_PER_CAPTION)])
        write_pictures(folder / "fresh", self.captions * IMAGES_PER_CAPTION, fresh)


def write_pictures(folder, captions, pictures, copies=None):
    """An image folder, written whole or not at all."""
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_image_folder(part, captions, pictures.permute(0, 2, 3, 1).numpy(), copies or [1] * len(captions))
    part.replace(folder)


def _tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def centred(pictures):
    """uint8 to [-1, 1], as the VAE takes it."""
    return pictures.float() / 127.5 - 1


def front(pictures, name, run_dir):
    """The run's ``FrontPoint``s, as dicts."""
    heldout_captions = [scene.caption for scene in pictures.heldout_scenes]
    measured = measure(
        BASE,
        {name: run_dir},
        (centred(pictures.training), pictures.captions),
        (centred(pictures.heldout), heldout_captions),
    )
    return [asdict(point) for point, _ in measured]


def copy_threshold(pictures):
    """A copy is more similar to a training image than 99% of fresh pictures of the same captions are."""
    descriptor = pixel_descriptor()
    similarity, _ = most_similar(descriptor(pictures.fresh(100)), descriptor(pictures.training))
    return torch.quantile(similarity[:, 0], 0.99).item()


def score_folder(pictures, images, output, folder):
    """Score an image folder that shows the prompts in their order against the pictures in the demo's ``folder``."""
    protocol = Protocol(descriptor="pixel", copy_similarity=copy_threshold(pictures), distinct=True)
    generated, training = load_images(images, "demo"), load_images(folder / "pictures", "demo")
    reference = load_images(folder / "reference", "demo")
    scores = score(generated, training, output, Tools(protocol), folder / "features", reference)
    copied = np.array(pq.read_table(output / NEAREST)["copy"].to_pylist())
    duplicated = np.arange(len(copied)) % NUM_IMAGES < NUM_DUPLICATED
    rates = {"copy_rate_duplicated": copied[duplicated].mean(), "copy_rate_single": copied[~duplicated].mean()}
    write_json(output / SCORES, scores | {key: float(rate) for key, rate in rates.items()})


def measure_run(name, run_dir, folder, sample):
    """Measure a finished run; what is already there is kept. Writes front.json and, with ``sample``, ``drawn`` and
    ``scored``.
    """
    pictures = Pictures()
    torch.set_num_threads(1)
    if not (run_dir / "front.json").exists():
        write_json(run_dir / "front.json", front(pictures, name, run_dir))
    if sample and not (run_dir / "scored" / SCORES).exists():
        generate(run_dir, pictures.prompts, run_dir / "drawn", SETTINGS)
        score_folder(pictures, run_dir / "drawn", run_dir / "scored", folder)
