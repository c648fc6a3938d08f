"""How well does a gate find copies, and how often does it accuse innocent pictures?

    python -m benchmarks.gate --set photographs=DIR --set subjects=DIR [--descriptor pixel] [--images 60] [--patches]

Half of the pictures of each set are trained on, the other half are innocent. Copies are what a model draws that
reproduces what it was shown: a random crop of a training picture at 256 pixels. They are made of each set as it is, and
of sets derived from the first: squares, panoramas (the middle third of the height), and stickers with transparent
surroundings. Everything is scored by the product's own ``score``, with all views. Prints a Markdown row for each set:
the share of copies found, by kind of copy, and of innocent pictures called copies; with ``--patches`` local copies too.
"""

import argparse
import io
import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from ietagc_diffusers.eval.image_sets import ImageSet, load_images
from ietagc_diffusers.eval.score import Protocol, Tools, score

SIZE = 256
KINDS = ("exact view", "mirrored", "shifted crop", "recompressed")


def in_memory(name: str, pictures: list[Image.Image]) -> ImageSet:
    """A set of PNG files that are nowhere."""

    def read_bytes(index):
        buffer = io.BytesIO()
        pictures[index].save(buffer, "png")
        return buffer.getvalue()

    numbers = range(len(pictures))
    return ImageSet(name, [f"{n}.png" for n in numbers], [None] * len(pictures), [{} for _ in numbers], read_bytes)


def view(picture: Image.Image, rng: random.Random, share: float = 1.0) -> Image.Image:
    """What training shows: resized, a random square; ``share`` of its side, for crops that training does not show."""
    scale = SIZE / share / min(picture.size)
    large = picture.resize([round(edge * scale) for edge in picture.size], Image.Resampling.LANCZOS)
    left, top = (rng.randint(0, edge - SIZE) for edge in large.size)
    return large.crop((left, top, left + SIZE, top + SIZE))


def copy_of(kind: str, picture: Image.Image, rng: random.Random) -> Image.Image:
    shown = view(picture, rng, 0.9 if kind == "shifted crop" else 1.0)
    if kind == "mirrored":
        return ImageOps.mirror(shown)
    if kind == "recompressed":
        buffer = io.BytesIO()
        shown.save(buffer, "jpeg", quality=30)
        return Image.open(buffer).convert("RGB")
    return shown


def pasted(picture: Image.Image, scene: Image.Image, rng: random.Random) -> Image.Image:
    """The middle of a training view, half as wide, at the same place of another scene or in its middle."""
    scene, quarter = view(scene, rng), SIZE // 4
    middle = view(picture, rng).crop((quarter, quarter, 3 * quarter, 3 * quarter))
    scene.paste(middle, (rng.choice((0, quarter, 2 * quarter)), rng.choice((0, quarter, 2 * quarter))))
    return scene


def sticker(picture: Image.Image) -> Image.Image:
    """An ellipse of the picture; around it transparent, with black under the transparency."""
    mask = Image.new("L", picture.size)
    width, height = picture.size
    ImageDraw.Draw(mask).ellipse((width // 10, height // 10, width * 9 // 10, height * 9 // 10), fill=255)
    cut = Image.new("RGBA", picture.size)
    cut.paste(picture, mask=mask)
    return cut


def panorama(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    return picture.crop((0, height // 3, width, height // 3 + min(height, width) // 3))


def square(picture: Image.Image) -> Image.Image:
    return ImageOps.fit(picture, (min(picture.size),) * 2)


def measure(name: str, pictures: list[Image.Image], tools: Tools, cache: Path) -> None:
    """Print the row of a set."""
    rng = random.Random(0)
    half = len(pictures) // 2
    training, others = in_memory("train", pictures[:half]), in_memory("others", pictures[half:])
    seen, unseen = ([each.image(n) for n in range(len(each))] for each in (training, others))

    def shares(drawn):
        with tempfile.TemporaryDirectory() as folder:
            scores = score(in_memory("drawn", drawn), training, folder, tools, cache)
        local = scores["patch_copy_rate"] if tools.protocol.patches else None
        return scores["copy_rate"], local

    found = {kind: shares([copy_of(kind, picture, rng) for picture in seen]) for kind in KINDS}
    innocent = shares([view(picture, rng) for picture in unseen])
    cells = [f"{found[kind][0]:.0%}" for kind in KINDS] + [f"{innocent[0]:.1%}"]
    if tools.protocol.patches:
        local = shares([pasted(*pair, rng) for pair in zip(seen, unseen, strict=False)])[1]
        cells += [f"{local:.0%}", f"{innocent[1]:.1%}"]
    print(f"| {tools.descriptor.name} | {name} ({half}) | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", action="append", required=True, metavar="NAME=DIR", dest="sets")
    parser.add_argument("--descriptor", default="pixel")
    parser.add_argument("--copy_similarity", type=float)
    parser.add_argument("--images", type=int, default=60, help="pictures of each set, half of them trained on")
    parser.add_argument("--patches", action="store_true")
    args = parser.parse_args()
    protocol = Protocol(
        descriptor=args.descriptor,
        copy_similarity=args.copy_similarity,
        patches=args.patches,
        views="training",
        fid="none",
    )
    tools = Tools(protocol)
    local = ["pasted, found locally", "innocent, called local copies"] if args.patches else []
    print("| descriptor | set (training images) | " + " | ".join([*KINDS, "innocent, called copies", *local]) + " |")
    print("|" + "---|" * (len(KINDS) + 3 + len(local)))
    with tempfile.TemporaryDirectory() as cache:
        for number, named in enumerate(args.sets):
            name, _, folder = named.partition("=")
            images = load_images(folder, "set").files()
            order = random.Random(1).sample(range(len(images)), min(args.images, len(images)))
            pictures = [images.image(n) for n in order]
            derived = {"squares": square, "panoramas": panorama, "stickers": sticker} if number == 0 else {}
            measure(name, pictures, tools, Path(cache))
            for kind, change in derived.items():
                measure(f"{kind} of {name}", [change(picture) for picture in pictures], tools, Path(cache))


if __name__ == "__main__":
    main()
