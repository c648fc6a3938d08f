"""The demo's sets of pictures, written as image folders (``python -m demo.pictures FOLDER``)."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from demo.renders import draw_scenes, render_all, write_image_folder
from ietagc_diffusers.files import write_text

STYLE = "mosaic"
NUM_IMAGES, NUM_DUPLICATED, COPIES = 300, 30, 4
IMAGES_PER_CAPTION = 2

SCENES = draw_scenes(NUM_IMAGES, [1, 0])
CAPTIONS = [scene.caption for scene in SCENES]
HELDOUT_SCENES = draw_scenes(NUM_IMAGES, [2, 0])
PRIOR_SCENES = draw_scenes(NUM_IMAGES, [4, 0])


def training_pictures() -> np.ndarray:
    """The pictures to train on: uint8 (300, 32, 32, 3), in the order of ``CAPTIONS``."""
    return render_all(SCENES, STYLE, [1, 1])


def fresh_pictures(*numbers: int) -> np.ndarray:
    """Other pictures of the training captions, as a model would draw that follows the captions and copies nothing: 300
    for each number, uint8 (N, 32, 32, 3).
    """
    return np.concatenate([render_all(SCENES, STYLE, [3, number]) for number in numbers])


def write_sets(folder: Path, num_images: int = NUM_IMAGES, num_duplicated: int = NUM_DUPLICATED) -> None:
    """Write into ``folder``, unless they are there:

    - ``pictures``, the first ``num_images`` to train on, the first ``num_duplicated`` of which have four rows;
      ``prompts.jsonl``, the caption of each;
    - ``heldout``, 300 pictures of other captions, and ``prior``, 300 of yet others, for prior preservation;
    - ``reference``, eight fresh pictures a caption: the distribution that a perfect model draws from;
    - ``fresh``, as many fresh pictures as a model draws.
    """
    captions = CAPTIONS[:num_images]
    copies = [COPIES] * num_duplicated + [1] * (num_images - num_duplicated)

    def fresh(*numbers: int) -> np.ndarray:
        return np.concatenate([fresh_pictures(number)[:num_images] for number in numbers])

    texts = [scene.captions for scene in SCENES[:num_images]]
    _write(folder / "pictures", texts, lambda: training_pictures()[:num_images], copies)
    heldout = [scene.caption for scene in HELDOUT_SCENES]
    _write(folder / "heldout", heldout, lambda: render_all(HELDOUT_SCENES, STYLE, [2, 1]))
    prior = [scene.caption for scene in PRIOR_SCENES]
    _write(folder / "prior", prior, lambda: render_all(PRIOR_SCENES, STYLE, [4, 1]))
    _write(folder / "reference", captions * 8, lambda: fresh(*range(8)))
    _write(folder / "fresh", captions * IMAGES_PER_CAPTION, lambda: fresh(100, 101))
    write_text(folder / "prompts.jsonl", "".join(json.dumps({"text": caption}) + "\n" for caption in captions))


def _write(folder, captions, pictures, copies=None):
    """An image folder of ``pictures()``, written whole or not at all."""
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_image_folder(part, captions, pictures(), copies)
    part.replace(folder)


if __name__ == "__main__":
    write_sets(Path(sys.argv[1]))
