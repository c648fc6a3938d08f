"""What the demo measures of a run: its front, and what its last model generates for the training captions."""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from demo.renders import draw_scenes, render_all, write_image_folder
from eval.frechet import frechet_distance, pooled_pixels
from eval.front import measure
from eval.generate import generate
from eval.memorized_quantity import l2_ratio, memorized_quantity
from eval.neighbours import most_similar
from eval.similarity import copy_rate, sim_score
from sscd import pixel_descriptor

BASE = Path(__file__).parent / "tiny-sd"
STYLE = "mosaic"
NUM_IMAGES, NUM_DUPLICATED, COPIES = 300, 30, 4
IMAGES_PER_CAPTION = 2


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

    def write(self, folder):
        copies = [COPIES] * NUM_DUPLICATED + [1] * (NUM_IMAGES - NUM_DUPLICATED)
        write_image_folder(folder, self.captions, self.training.permute(0, 2, 3, 1).numpy(), copies)


def _tensor(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def centred(pictures):
    """uint8 to [-1, 1], as the VAE takes it."""
    return pictures.float() / 127.5 - 1


def flat(pictures):
    return pictures.float().flatten(1) / 255


def front(pictures, name, run_dir):
    """The run's ``FrontPoint``s, as dicts."""
    heldout_captions = [scene.caption for scene in pictures.heldout_scenes]
    points = measure(
        BASE,
        {name: run_dir},
        (centred(pictures.training), pictures.captions),
        (centred(pictures.heldout), heldout_captions),
    )
    return [asdict(point) for point in points]


def similarities(pictures, images):
    """Similarity of each image to its nearest training image, and which that is."""
    return most_similar(pixel_descriptor(images), pixel_descriptor(pictures.training))


def copy_threshold(pictures):
    """A copy is more similar to a training image than 99% of fresh pictures of the same captions are."""
    return torch.quantile(similarities(pictures, pictures.fresh(100))[0], 0.99).item()


def score(pictures, images):
    """Numbers for images drawn for the training captions, caption after caption: uint8 (k * 300, 3, 32, 32)."""
    similarity, _ = similarities(pictures, images)
    threshold = copy_threshold(pictures)
    duplicated = torch.arange(len(images)) % NUM_IMAGES < NUM_DUPLICATED
    features = [pooled_pixels(x) for x in (images, pictures.reference)]
    return {
        "sim_score": sim_score(similarity),
        "copy_threshold": threshold,
        "copy_rate": copy_rate(similarity, threshold),
        "copy_rate_duplicated": copy_rate(similarity[duplicated], threshold),
        "copy_rate_single": copy_rate(similarity[~duplicated], threshold),
        "memorized_quantity": memorized_quantity(l2_ratio(flat(images), flat(pictures.training))),
        "frechet_pixel_8": frechet_distance(*features),
        "num_generated": len(images),
        "descriptor": "pixel",
    }


def draw(pictures, model_dir):
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    prompts = pictures.captions * IMAGES_PER_CAPTION
    return generate(pipeline, prompts, range(len(prompts)), batch_size=100, desc=f"Drawing with {Path(model_dir).name}")


def measure_run(name, run_dir, sample):
    """Measure a finished run; what is already there is kept. Writes front.json and, with ``sample``, generated.png and
    scores.json.
    """
    run_dir, pictures = Path(run_dir), Pictures()
    torch.set_num_threads(1)
    front_path, image_path, score_path = (run_dir / f for f in ("front.json", "generated.npy", "scores.json"))
    if not front_path.exists():
        write_json(front_path, front(pictures, name, run_dir))
    if sample and not score_path.exists():
        if not image_path.exists():
            np.save(image_path, draw(pictures, run_dir).numpy())
        write_json(score_path, score(pictures, torch.from_numpy(np.load(image_path))))


def write_json(path, value):
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2))
    part.replace(path)


def to_image(picture):
    return Image.fromarray(picture.permute(1, 2, 0).numpy())
