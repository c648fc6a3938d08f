"""Runs a training script, Diffusers' or ours, whose latents are the mean of the VAE's posterior: nothing is drawn.

python benchmarks/posterior_mean.py SCRIPT FLAGS...
"""

import functools
import runpy
import sys
from pathlib import Path

import torch
from datasets import Dataset
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ietagc_diffusers.families.latent_objective import LatentObjective

DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mean
LatentObjective.posterior_noise = lambda self, draws, mean: torch.zeros_like(mean)

if __name__ == "__main__":
    batch, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    Dataset.map = functools.partialmethod(Dataset.map, batch_size=batch)
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
