#!/usr/bin/env python
"""Fine-tune Stable Diffusion without memorizing the training set: Diffusers' train_text_to_image.py with IET-AGC+.

Every flag of the official script works as there; ``--mitigation none`` is that script. See ``--help`` and README.md.
"""

from ietagc_diffusers.cli.train import main
from ietagc_diffusers.training.settings import TrainingSettings

if __name__ == "__main__":
    main(kind=TrainingSettings)
