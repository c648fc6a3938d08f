"""Scores of a folder of images against another, by the smallest protocol."""

from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.score import Protocol, Tools, score

PIXEL = Protocol(descriptor="pixel", batch_size=5)


def scored(generated, training, output, protocol=PIXEL, **options):
    images = [load_images(folder, "x") for folder in (generated, training)]
    return score(*images, output, Tools(protocol), **options)
