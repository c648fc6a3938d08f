"""Which altered copies `ietagc dedup` finds, at the threshold that it measures on the set.

Prints the threshold, the images of the set itself that are called near duplicates (false ones, if the set has none),
and of each alteration the share of copies that are found.

    python -m benchmarks.near_duplicates --train my_pictures
"""

import argparse

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from benchmarks.copies import cropped, describe, recompressed
from ietagc_diffusers.cli.dedup import add_descriptor, descriptor_of
from ietagc_diffusers.eval.dedup import near_duplicates
from ietagc_diffusers.eval.image_sets import load_training_set


def halved(image):
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)


def corner(image, share):
    """Cropped at the right and the bottom only."""
    return image.crop((0, 0, round(share * image.width), round(share * image.height)))


def captioned(image):
    """With white text on a black bar over the lowest 15%."""
    image, (width, height) = image.copy(), image.size
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, int(0.85 * height), width, height), fill="black")
    font = ImageFont.load_default(max(6, height // 12))
    draw.text((0.05 * width, 0.87 * height), "a caption in the image", fill="white", font=font)
    return image


ALTERATIONS = {
    "JPEG, quality 50": lambda image: recompressed(image, 50),
    "halved in size": halved,
    "brightness 0.8": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "brightness 1.2": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "mirrored": ImageOps.mirror,
    "caption burned in": captioned,
    "cropped to 95%": lambda image: cropped(image, 0.95),
    "cropped to 95%, at a corner": lambda image: corner(image, 0.95),
    "cropped to 90%": lambda image: cropped(image, 0.9),
    "cropped to 90%, at a corner": lambda image: corner(image, 0.9),
    "cropped to 80%": lambda image: cropped(image, 0.8),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="a folder of images, or a dataset")
    add_descriptor(parser)
    parser.add_argument("--similarity", type=float, help="the threshold; default: measured on the set")
    parser.add_argument("--num_images", type=int, help="the first of the set; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    images = load_training_set(args.train)
    images = images.select(range(min(len(images), args.num_images or len(images))))
    descriptor = descriptor_of(args)
    found = near_duplicates(images, descriptor, args.similarity)
    print(f"{len(images)} images, {descriptor.name}: threshold {found.similarity:g} {found.calibration or ''}")
    print(f"near duplicates in the set itself: {(~found.clusters.is_kept).sum()}")
    for name, alter in ALTERATIONS.items():
        copies = describe(found.images.images, descriptor, alter, name)
        similarity = torch.stack([(copies * own).sum(dim=1) for own in found.vectors]).amax(dim=0)
        print(f"{name:30}{(similarity > found.similarity).float().mean().item():>8.1%}", flush=True)


if __name__ == "__main__":
    main()
