#!/usr/bin/env python
"""Diffusers' train_unconditional.py with IET-AGC+: a model of images without prompts, from scratch or from a base.

Its flags and defaults are those of the official script; ``--mitigation none`` is its training. See ``--help``.
"""

from ietagc_diffusers.cli.train import main
from ietagc_diffusers.training.scripts import UnconditionalScript

if __name__ == "__main__":
    main(kind=UnconditionalScript)
