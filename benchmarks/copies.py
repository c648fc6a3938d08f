"""Which altered copies a descriptor knows: every image of a set is altered in one way after another and compared with
the whole set.

Prints, of each alteration, the share of copies that are most similar to their original, and the share whose similarity
is over the copy threshold; before that, the similarity of each image to its nearest other one, which a threshold has
to exceed.

    python -m benchmarks.copies --train my_pictures --descriptor sscd_disc_mixup

With `--edge` all images, the originals too, first become as small as those of a small model.
"""

import argparse
import io

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from tqdm.auto import tqdm

from ietagc_diffusers.eval.image_sets import load_images, to_tensor
from ietagc_diffusers.eval.neighbours import most_similar
from ietagc_diffusers.sscd import load_descriptor


def recompressed(image, quality=20):
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image, share):
    width, height = (round(share * edge) for edge in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def shrunk(image, edge):
    """The image with this small edge."""
    scale = edge / min(image.size)
    return image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.LANCZOS)


ALTERATIONS = {
    "JPEG, quality 20": recompressed,
    "halved in size": lambda image: image.resize((max(1, image.width // 2), max(1, image.height // 2))),
    "brightened by 1.4": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "cropped to 90%": lambda image: cropped(image, 0.9),
    "cropped to 80%": lambda image: cropped(image, 0.8),
    "cropped to 60%": lambda image: cropped(image, 0.6),
    "rotated by 5°": lambda image: image.rotate(5, Image.Resampling.BICUBIC),
    "rotated by 20°": lambda image: image.rotate(20, Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
    "mirrored, cropped to 80%": lambda image: ImageOps.mirror(cropped(image, 0.8)),
    "shrunk to 64 px": lambda image: shrunk(image, 64),
    "shrunk to 48 px": lambda image: shrunk(image, 48),
    "shrunk to 32 px": lambda image: shrunk(image, 32),
}


def describe(images, descriptor, alter, name):
    """Vectors (N, D) of altered images, one after another: they differ in size."""
    rows = tqdm(range(len(images)), desc=name, leave=False)
    return torch.cat([descriptor(to_tensor(alter(images.image(row)))[None]) for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="a folder of images, or a dataset")
    parser.add_argument("--descriptor", default="auto")
    parser.add_argument("--protocol")
    parser.add_argument("--copy_similarity", type=float, help="default: the descriptor's own")
    parser.add_argument("--num_images", type=int, help="the first of the set; default: all")
    parser.add_argument("--edge", type=int, help="shrink all images to this small edge first")
    parser.add_argument("--only", nargs="*", help="alterations whose names contain one of these words; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    images = load_images(args.train, "train")
    images = images.select(range(min(len(images), args.num_images or len(images))))
    descriptor = load_descriptor(args.descriptor, args.protocol, args.device)
    threshold = descriptor.threshold(args.copy_similarity)

    def original(image):
        return image if args.edge is None else shrunk(image, args.edge)

    originals = describe(images, descriptor, original, "originals")
    among = most_similar(originals, originals, exclude_self=True, device=args.device)[0][:, 0].numpy()
    median, high, highest = np.percentile(among, [50, 95, 100])
    print(f"{len(images)} images, descriptor {descriptor.name}")
    print(f"similarity to the nearest other: median {median:.3f}, 95% {high:.3f}, at most {highest:.3f}")
    print(f"over the copy threshold, {threshold}: {(among > threshold).mean():.1%}")
    print(f"\n{'copies that were':26}{'original is nearest':>20}{'over the threshold':>20}")
    wanted = [name for name in ALTERATIONS if args.only is None or any(word in name for word in args.only)]
    for name, alter in ((name, ALTERATIONS[name]) for name in wanted):
        copies = describe(images, descriptor, lambda image, alter=alter: alter(original(image)), name)
        similarity, found = most_similar(copies, originals, device=args.device)
        right = (found[:, 0] == torch.arange(len(images))).float().mean().item()
        over = (similarity[:, 0] > threshold).float().mean().item()
        print(f"{name:26}{right:>20.1%}{over:>20.1%}")


if __name__ == "__main__":
    main()
