"""Averaging along one training, the simple relative of averaging over proxies: after each round the mean of the models
of the last rounds (stochastic weight averaging, Izmailov et al. 2018), made from the models that a run has saved.

    python -m benchmarks.average_over_time RUN --last 5 --output AVERAGED
    ietagc front --run none=RUN --run "none, averaged=AVERAGED" --heldout DIR

``--last`` is a number of rounds, or with a % sign a share of those so far: 50% averages the second half at any point.
AVERAGED is a folder that the front reads like a run's, and nothing else.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ietagc_diffusers.families import WEIGHTS_FILE
from ietagc_diffusers.run_folder import RunFolder


def mean(files: list[Path]) -> dict[str, torch.Tensor]:
    """The mean of models, summed in float64."""
    sums: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            sums[name] = sums[name] + tensor.double() if name in sums else tensor.double()
    return {name: (total / len(files)).float() for name, total in sums.items()}


def window(last: str, number: int) -> int:
    """How many of the first ``number`` rounds are averaged: the last so many, or the last share of them."""
    if last.endswith("%"):
        return max(1, math.ceil(number * float(last[:-1]) / 100))
    return min(int(last), number)


def average(run: Path, output: Path, last: str, denoiser: str = "unet") -> None:
    """Write the averaged models of a run's saved rounds into ``output``."""
    folder, averaged = RunFolder(run), RunFolder(output)
    averaged.records.mkdir(parents=True, exist_ok=True)
    for file in (folder.config_file, folder.rounds_file, folder.training_set_file, folder.training_rows_file):
        shutil.copy2(file, averaged.records / file.name)
    models = [folder.round(row["round"]) / denoiser for row in folder.rounds()]
    for number, model in enumerate(tqdm(models, desc="Averaging"), start=1):
        some = models[number - window(last, number) : number]
        place = averaged.round(number) / denoiser
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy2(model / "config.json", place / "config.json")
        save_file(mean([each / WEIGHTS_FILE for each in some]), place / WEIGHTS_FILE, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run that was trained with --save_rounds")
    parser.add_argument("--last", default="5", help="rounds that are averaged, or a share of those so far, as 50%%")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    average(args.run, args.output, args.last)


if __name__ == "__main__":
    main()
