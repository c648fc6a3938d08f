"""Averaging along one training, the simple relative of averaging over proxies: after each round the mean of the models
of the last rounds (stochastic weight averaging, Izmailov et al. 2018), made from the models that a run has saved.

    python -m benchmarks.average_over_time RUN --last 5 --output AVERAGED
    ietagc front --run none=RUN --run "none, averaged=AVERAGED" --heldout DIR

``--last`` is a number of rounds, or with a % sign a share of those so far: 50% averages the second half at any point.
AVERAGED is a folder that the front reads like a run's, and nothing else; `ietagc average` makes a model of it.
"""

import argparse
import shutil
from pathlib import Path

from tqdm.auto import tqdm

from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.weight_averaging import average_adapters, average_weights, window


def average(run: Path, output: Path, last: str) -> None:
    """Write the averaged models of a run's saved rounds, pipelines with a UNet or adapters, into ``output``."""
    folder, averaged = RunFolder(run), RunFolder(output)
    averaged.records.mkdir(parents=True, exist_ok=True)
    for file in (folder.config_file, folder.rounds_file, folder.training_set_file, folder.training_rows_file):
        shutil.copy2(file, averaged.records / file.name)
    inside, mean = ("", average_adapters) if folder.is_adapter else ("unet", average_weights)
    models = [folder.round(row["round"]) / inside for row in folder.rounds()]
    for number in tqdm(range(1, len(models) + 1), desc="Averaging"):
        mean(models[number - window(last, number) : number], averaged.round(number) / inside)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run that was trained with --save_rounds")
    parser.add_argument("--last", default="5", help="rounds that are averaged, or a share of those so far, as 50%%")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    average(args.run, args.output, args.last)


if __name__ == "__main__":
    main()
