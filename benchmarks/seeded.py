"""Runs a training script that has no flag for a seed, from one: python benchmarks/seeded.py SEED SCRIPT FLAGS..."""

import runpy
import sys
from pathlib import Path

from accelerate.utils import set_seed

if __name__ == "__main__":
    seed, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    set_seed(seed)
    runpy.run_path(script, run_name="__main__")
