"""Captions and pictures of the demo, rendered on the spot.

A picture shows one object on a background. The caption gives the object's shape, colour, size and side, and
the background's colour. It does not give the background's texture, the distractors or the exact place: a generated
picture that repeats these is a copy, one that repeats only the caption is not.

Two styles: ``waves`` is what the base model was trained on, ``mosaic`` is what the demo fine-tunes on.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

RESOLUTION = 32
OVERSAMPLING = 2

SHAPES = ("disc", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.72, 0.22),
    "blue": (0.15, 0.28, 0.90),
    "yellow": (0.95, 0.88, 0.20),
    "purple": (0.60, 0.18, 0.72),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
}
RADII = {"small": 0.28, "large": 0.55}
SIDES = {"left": -0.5, "centre": 0.0, "right": 0.5}
STYLES = ("waves", "mosaic")

_axis = (np.arange(RESOLUTION * OVERSAMPLING) + 0.5) / (RESOLUTION * OVERSAMPLING) * 2 - 1
_X, _Y = np.meshgrid(_axis, _axis)


@dataclass(frozen=True)
class Scene:
    """The content of a caption."""

    shape: str
    colour: str
    size: str
    side: str
    background: str

    @property
    def caption(self):
        return self.captions[0]

    @property
    def captions(self):
        """Several captions with the same content, as some datasets have for each image."""
        thing, ground = f"a {self.size} {self.colour} {self.shape}", f"{self.background} background"
        return [
            f"{thing} at the {self.side}, {ground}",
            f"{ground}, {thing} at the {self.side}",
            f"at the {self.side} {thing}, {ground}",
        ]


def draw_scene(rng):
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(colour),
        size=str(rng.choice(list(RADII))),
        side=str(rng.choice(list(SIDES))),
        background=str(background),
    )


def _inside(shape, x, y):
    """The object's region, in coordinates where its radius is 1."""
    if shape == "disc":
        return x**2 + y**2 < 1
    if shape == "ring":
        return (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.85
    if shape == "diamond":
        return abs(x) + abs(y) < 1.1
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 1)
    return (y < 0.8) & (y > 2 * abs(x) - 1.1)  # triangle


def _waves(colour, rng):
    pattern = np.zeros_like(_X)
    for _ in range(2):
        angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(1, 4) * np.pi, rng.uniform(0, 2 * np.pi)
        pattern += np.sin(frequency * (np.cos(angle) * _X + np.sin(angle) * _Y) + phase)
    return colour + 0.13 * pattern[..., None]


def _mosaic(colour, rng):
    tiles = Image.fromarray(rng.uniform(-1, 1, (4, 4)).astype(np.float32))
    tiles = np.asarray(tiles.resize(_X.shape, Image.Resampling.BICUBIC))
    picture = colour + 0.3 * tiles[..., None] + 0.06 * rng.uniform(-1, 1, 3)
    for _ in range(2):  # distractors: soft blobs of any colour
        x, y, radius = rng.uniform(-0.9, 0.9), rng.uniform(-0.9, 0.9), rng.uniform(0.2, 0.4)
        alpha = 0.8 * np.exp(-((_X - x) ** 2 + (_Y - y) ** 2) / radius**2)[..., None]
        picture = (1 - alpha) * picture + alpha * rng.uniform(0, 1, 3)
    return picture


def render(scene, style, rng):
    """Render a scene. Returns uint8 (RESOLUTION, RESOLUTION, 3); what the caption leaves open is drawn from ``rng``."""
    background = {"waves": _waves, "mosaic": _mosaic}[style](np.array(COLOURS[scene.background]), rng)
    radius = RADII[scene.size] * rng.uniform(0.85, 1.15)
    x = SIDES[scene.side] + rng.uniform(-0.1, 0.1)
    y = rng.uniform(-0.45, 0.45)
    inside = _inside(scene.shape, (_X - x) / radius, (_Y - y) / radius)[..., None]
    picture = np.where(inside, np.array(COLOURS[scene.colour]) + rng.uniform(-0.06, 0.06, 3), background).clip(0, 1)
    picture = picture.reshape(RESOLUTION, OVERSAMPLING, RESOLUTION, OVERSAMPLING, 3).mean((1, 3))
    return (picture * 255).round().astype(np.uint8)


def draw_scenes(num_scenes, seed):
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(num_scenes)]


def render_all(scenes, style, seed):
    """Pictures of scenes, uint8 (N, 32, 32, 3); another seed gives other pictures of the same captions."""
    rng = np.random.default_rng(seed)
    return np.stack([render(scene, style, rng) for scene in scenes])


def make_set(num_images, style, seed):
    """Draw scenes and render them. Returns captions (list of N) and pictures uint8 (N, RESOLUTION, RESOLUTION, 3)."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng) for _ in range(num_images)]
    return [scene.caption for scene in scenes], np.stack([render(scene, style, rng) for scene in scenes])


def write_image_folder(folder, captions, pictures, copies=None):
    """Write an image folder with ``metadata.jsonl`` as Hugging Face ``datasets`` reads it.

    Where a caption is a list, ``text`` is its first and ``captions`` all of it. ``copies[i]`` (default 1) is how many
    rows show picture i, each with a file of its own: the duplicates of web data.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (caption, picture) in enumerate(zip(captions, pictures, strict=True)):
        for copy in range(copies[index] if copies is not None else 1):
            name = f"{index:05d}_{copy}.png"
            Image.fromarray(picture).save(folder / name)
            several = {} if isinstance(caption, str) else {"captions": caption}
            rows.append({"file_name": name, "text": caption if isinstance(caption, str) else caption[0]} | several)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
