"""What does a cheaper reference for calibrated control give up?

    python -m benchmarks.cheaper_reference RUN RUN ... [--points 4]

RUNs are trained with --save_rounds from the demo's base on its pictures. Nothing is trained: at models along each run,
noisy samples of the training and of the held-out pictures are scored

- by their loss, as without calibration;
- by the loss over the base's on the same noise, the exact reference, which costs a forward pass for each sample;
- by the loss over a fit of the base's loss: of each picture, m losses of the base at other noise in each of B ranges
  of noise levels, taken once before the training. The mean logarithm in each range, relative to that of all pictures,
  is linear between the middles of the ranges and shrunk by one factor for all;
- by the exact reference for a part of the samples only: a random half, or those whose loss, or whose loss over the fit,
  is lowest.

Printed for each: how well it separates training from held-out pictures (AUC at one noise level, the mean of 20), and at
a skip rate of 40% which share of what is skipped the exact reference skips too, and how many held-out samples would
be skipped.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from tqdm.auto import tqdm

from benchmarks.separation import Meter, Scores, auc, auc_error, middles, skipped
from benchmarks.tables import print_table
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.losses import saved_models
from ietagc_diffusers.run_folder import RunFolder

LEVELS = middles(20)
POOL = middles(80)  # the levels of the base's losses that fits are made of
FITS = ((1, 1), (1, 5), (1, 20), (5, 1), (5, 4), (10, 2), (10, 8), (20, 1), (20, 4))  # (B, m)
RATE = 0.4  # of iet-agc+c on these pictures
PARTS = (0.5, 0.7)


def fit(pool: Scores, ranges: int, draws: int) -> Scores:
    """The logarithm of the base's loss of each image at ``LEVELS``, relative to that of all seen images.

    Args:
        pool: losses of the base at ``POOL``.
        ranges, draws: B and m; the m draws are spread evenly over their range.
    """
    size = len(POOL) // ranges
    inside = np.arange(draws) * size // draws + size // (2 * draws)
    chosen = np.arange(ranges)[:, None] * size + inside  # (B, m)
    centre = pool.seen.mean(axis=1, keepdims=True)
    at = middles(ranges)

    def of_set(values):
        found = (values - centre)[chosen].mean(axis=1)  # (B, images)
        return np.stack([np.interp(LEVELS, at, image) for image in found.T], axis=1)

    return Scores(of_set(pool.seen), of_set(pool.unseen))


def shrunk(estimate: Scores, base: Scores) -> Scores:
    """The estimate times the one factor by which it predicts the base's losses of the seen images best."""
    found = estimate.seen - estimate.seen.mean(axis=1, keepdims=True)
    truth = base.seen - base.seen.mean(axis=1, keepdims=True)
    factor = (found * truth).sum() / (found**2).sum()
    return Scores(factor * estimate.seen, factor * estimate.unseen)


def cascade(first: Scores, exact: Scores, part: float) -> tuple[np.ndarray, np.ndarray]:
    """What is skipped if only the share ``part`` of the seen samples with the lowest ``first`` score is compared with
    the reference: bool, like the scores. As many are skipped as of all.
    """
    asked = skipped(first, part)
    threshold = np.quantile(np.where(asked[0], exact.seen, np.inf), RATE, axis=1, keepdims=True, method="lower")
    return tuple(mask & (values < threshold) for mask, values in zip(asked, exact, strict=True))


def decisions(loss: Scores, exact: Scores, fitted: Scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is skipped of the seen and of the unseen samples, by what each way is called."""
    found = {"the loss only": skipped(loss, RATE), "exact": skipped(exact, RATE), "fit": skipped(fitted, RATE)}
    rng = np.random.default_rng(0)
    half = [rng.random(values.shape) < 0.5 for values in loss]
    for name in ("the loss only", "fit"):
        mixed = zip(half, found["exact"], found[name], strict=True)
        found[f"exact for a random half, else {name}"] = tuple(np.where(*which) for which in mixed)
    for name, first in {"loss": loss, "fit": fitted}.items():
        for part in PARTS:
            found[f"exact for the {part:.0%} lowest by {name}"] = cascade(first, exact, part)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--points", type=int, default=4, help="models along each run")
    parser.add_argument("--heldout", default="runs/demo/heldout")
    parser.add_argument("--output", type=Path, default=Path("runs/references"), help="where losses are kept")
    args = parser.parse_args()
    config = RunFolder(args.runs[0]).config()
    base = config["pretrained_model_name_or_path"]
    pictures = load_images(config["train_data_dir"], "train")
    once = pictures.select(row for row, name in enumerate(pictures.names) if name.endswith("_0.png"))
    sets = (once, load_images(args.heldout, "heldout"))
    meter = Meter(base, *sets, LEVELS, args.output / "losses", config["resolution"])
    of_pool = Meter(base, *sets, POOL, args.output / "losses", config["resolution"], seed=1)
    of_base, pool = (measure(Path(base) / measure.family.denoiser_name) for measure in (meter, of_pool))
    print(f"The base, which has seen neither: AUC {auc(of_base).mean():.3f}\n")
    fits = {(ranges, draws): shrunk(fit(pool, ranges, draws), of_base) for ranges, draws in FITS}
    best = fits[FITS[-1]]
    for run in args.runs:
        models = saved_models({run.parent.name: [run]}, meter.family.denoiser_name, args.points)
        losses = [meter(model.folder) for model in tqdm(models, desc=run.parent.name)]
        references: dict[str, Scores | None] = {"the loss only": None, "exact": of_base}
        references |= {f"fit, B = {ranges}, m = {draws}": fits[ranges, draws] for ranges, draws in FITS}
        found = {name: [loss.over(r) if r else loss for loss in losses] for name, r in references.items()}
        steps = [f"step {model.step}" for model in models]
        last = [f"t {LEVELS[i]} to {LEVELS[i + 4]}" for i in range(0, 20, 5)]
        rows = []
        for name, scores in found.items():
            at_levels = auc(scores[-1]).reshape(4, 5).mean(axis=1)
            values = [*(auc(each).mean() for each in scores), *at_levels]
            rows.append([name, *(f"{value:.3f}" for value in values)])
        print(f"\n{run.parent.name}: AUC, and of the last model by timestep; standard error of the last", end=" ")
        print(f"{auc_error(found['exact'][-1]):.3f}\n")
        print_table(["", *steps, *last], rows)
        chosen = [decisions(loss, loss.over(of_base), loss.over(best)) for loss in losses]
        rows = []
        for name in chosen[0]:
            agree = [(each[name][0] & each["exact"][0]).sum() / each[name][0].sum() for each in chosen]
            false = [each[name][1].mean() for each in chosen]
            rows.append([name, *(f"{100 * a:.0f}%, {100 * f:.1f}%" for a, f in zip(agree, false, strict=True))])
        print(f"Skipped by the exact reference too, and held-out samples skipped, at a skip rate of {RATE:.0%}\n")
        print_table(["", *steps], rows)


if __name__ == "__main__":
    main()
