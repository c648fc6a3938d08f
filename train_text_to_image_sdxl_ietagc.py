#!/usr/bin/env python
"""Diffusers' train_text_to_image_sdxl.py with IET-AGC+: Stable Diffusion XL that does not memorize the training set.

Its flags and defaults are those of the official script; ``--mitigation none`` is its training. See ``--help``.
"""

from ietagc_diffusers.cli.train import main
from ietagc_diffusers.training.scripts import SdxlScript

if __name__ == "__main__":
    main(kind=SdxlScript)
