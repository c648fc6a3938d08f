"""Which model could be the reference for calibrated control where there is no base, in a training from scratch?

    python -m benchmarks.scratch_reference PLAIN ENSEMBLE      # runs of configs/photos_runs.yaml; 8 minutes on a core

A reference is good if losses over its losses on the same noise tell images that were trained on from others better than
the losses by themselves do (AUC at one noise level, the mean of ten). On the photographs of benchmarks.photos:

1. plain training (of configs/photos_runs.yaml) over models of its own past;
2. proxies of IET-AGC+ at the end of a round, as their control sees them, each on the images of its own shard: over
   their common start, and over proxies of other shards, which have not seen these images in this round. Runs do not
   keep proxies, so the model of a saved round is trained for one round more.

In both, a plain training on ``runs/photos/others`` says what a reference that has never seen the images would do;
--others 0 leaves it out. What is trained is kept in the folder --output.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from tqdm.auto import tqdm

from benchmarks.separation import Meter, Scores, auc, auc_error, middles, skipped
from benchmarks.tables import print_table
from ietagc_diffusers import Callback, RunFolder, train
from ietagc_diffusers.arguments import parse_flags, recipe_to_argv
from ietagc_diffusers.eval.benchmark import Benchmark
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.files import read_json, write_json
from ietagc_diffusers.training.weight_averaging import average_weights

RUNS = Path(__file__).resolve().parent.parent / "configs" / "photos_runs.yaml"
OTHERS = Path("runs/photos/others")  # no other run is trained on these
LEVELS = middles(10)
RATE = 0.25  # about what IET-AGC+ skips here
SHARDS, ROUND = 4, 120  # steps of all proxies in a round, and of plain training between its models
Saved = Callable[[int], Path]  # the denoiser's folder of a run after a step


class SavedProxies(Callback):
    """Keeps the last round's proxies and the samples of their shards."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_retire(self, run, proxy):
        folder = proxy_folder(self.folder, proxy.shard)
        run.weights.family.denoiser.save_pretrained(folder)
        write_json(folder / "samples.json", run.plan.shards[proxy.shard].tolist())


def proxy_folder(run: RunFolder, shard: int) -> Path:
    return run.path / "proxies" / f"shard-{shard}"


def trained(runs: Benchmark, name: str, output: Path, **own) -> RunFolder:
    """A run of the benchmark with other flags, which keeps its proxies; a finished run is not trained again."""
    folder = RunFolder(output)
    if not folder.is_finished:
        flags = runs.flags(name) | own | {"seed": 0, "output_dir": str(output), "checkpointing_steps": 100_000}
        train(parse_flags(recipe_to_argv(flags)), callbacks=[SavedProxies(folder)])
    return folder


def saved_by(run: RunFolder, name: str) -> Saved:
    folders = dict(run.saved_models(name))
    return lambda step: folders[step]


def mean_of_first_half(run: Saved, step: int, output: Path) -> Path:
    """The mean of the models up to half the steps, made once."""
    folder = output / "means" / f"step-{step}"
    if not folder.exists():
        average_weights([run(s) for s in range(ROUND, step // 2 + 1, ROUND)], folder)
    return folder


def report(found: dict[str, list[Scores]], steps: list[int], title: str) -> None:
    """Print AUC of each candidate at each step, of the last step in three parts of the noise levels, and which share of
    what it skips there the last candidate skips too.
    """
    parts = [slice(0, 3), slice(3, 7), slice(7, 10)]
    head = ["", *(f"step {step}" for step in steps)]
    head += [f"t {LEVELS[part][0]} to {LEVELS[part][-1]}" for part in parts] + ["skipped alike"]
    *_, best = found.values()
    rows = []
    for name, scores in found.items():
        at_levels = auc(scores[-1])
        masks = skipped(scores[-1], RATE)[0], skipped(best[-1], RATE)[0]
        alike = (masks[0] & masks[1]).sum() / masks[0].sum()
        values = [*(auc(each).mean() for each in scores), *(at_levels[part].mean() for part in parts)]
        rows.append([name, *(f"{value:.3f}" for value in values), f"{alike:.0%}"])
    print(f"\n{title}; standard error of the last {auc_error(best[-1]):.3f}\n")
    print_table(head, rows)


def joined(parts: list[Scores]) -> Scores:
    """Scores of several models, each of its own images, side by side. Each is relative to the model's unseen images,
    so that models may be compared.
    """
    centred = [Scores(*(v - p.unseen.mean(axis=1, keepdims=True) for v in p)) for p in parts]
    return Scores(*(np.concatenate(values, axis=1) for values in zip(*centred, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", type=Path, help="the folder of a run of the arm none")
    parser.add_argument("ensemble", type=Path, help="the folder of a run of the arm iet-agc+")
    parser.add_argument("--output", type=Path, default=Path("runs/references"))
    parser.add_argument("--at", type=int, nargs="+", default=[480, 960, 1440, 2040], help="steps that are looked at")
    parser.add_argument("--others", type=int, default=2040, help="steps of the training on other photographs")
    args = parser.parse_args()
    runs = Benchmark(RUNS)
    plain, ensemble = RunFolder(args.plain), RunFolder(args.ensemble)
    pictures, heldout = load_images(runs.train, "train"), load_images(runs.heldout, "heldout")
    few, size = heldout.select(range(0, len(heldout), 4)), plain.config()["resolution"]
    meter = Meter(runs.base, pictures, few, LEVELS, args.output / "losses", size)
    name = meter.family.denoiser_name
    before, models = saved_by(plain, name), saved_by(ensemble, name)
    never = {}
    if args.others:
        never["other photographs, as many steps"] = train_elsewhere(runs, args.output, args.others, name)
    candidates = {
        "the loss only": None,
        "120 steps ago": lambda step: before(step - ROUND),
        "half the steps": lambda step: before(step // 2 // ROUND * ROUND),
        "a quarter of the steps": lambda step: before(step // 4 // ROUND * ROUND),
        "mean of the models up to half the steps": lambda step: mean_of_first_half(before, step, args.output),
        **never,
    }
    found = {}
    for title, place in tqdm(candidates.items(), desc="Plain training"):
        found[title] = [meter(before(s)).over(meter(place(s))) if place else meter(before(s)) for s in args.at]
    report(found, args.at, "Plain training: AUC")
    found = {}
    for step in tqdm(args.at, desc="Proxies"):
        start = models(step - ROUND)
        once = trained(runs, "iet-agc+", args.output / f"round-of-{step}", **own_of_a_round(start.parent))
        places = [proxy_folder(once, shard) for shard in range(SHARDS)]
        proxies = [meter(place) for place in places]
        shared = {
            "the loss only": None,
            "the round's start": meter(start),
            "half the steps": meter(models(step // 2 // ROUND * ROUND)),
        }
        by_name = {title: [one] * SHARDS for title, one in shared.items()}
        by_name["one other proxy of the round"] = [proxies[shard - 1] for shard in range(SHARDS)]
        by_name["mean loss of the other proxies"] = [mean_loss(proxies, shard) for shard in range(SHARDS)]
        by_name |= {title: [meter(place(step))] * SHARDS for title, place in never.items()}
        for title, references in by_name.items():
            pairs = zip(proxies, references, places, strict=True)
            parts = [(p.over(r) if r else p).of_seen(read_json(f / "samples.json")) for p, r, f in pairs]
            found.setdefault(title, []).append(joined(parts))
    report(found, args.at, "Proxies of IET-AGC+, images of their own shards: AUC")


def train_elsewhere(runs: Benchmark, output: Path, steps: int, name: str) -> Saved:
    """The models of plain training on photographs that no other run has."""
    own = {"train_data_dir": str(OTHERS), "cache_latents": str(output / "latents")}
    return saved_by(trained(runs, "none", output / "none-others", **own, max_train_steps=steps), name)


def own_of_a_round(start: Path) -> dict:
    """Flags of a training that is one round from a saved model. The optimizer starts anew, hence a short warm-up."""
    return {"pretrained_model_name_or_path": str(start), "max_train_steps": ROUND, "lr_warmup_steps": ROUND // 6} | {
        "use_ema": False, "save_rounds": False, "cache_latents": None,
    }  # fmt: skip


def mean_loss(proxies: list[Scores], left_out: int) -> Scores:
    """The logarithm of the mean loss of all proxies but one."""
    rest = [proxy for shard, proxy in enumerate(proxies) if shard != left_out]
    return Scores(*(np.log(np.mean([np.exp(v) for v in values], axis=0)) for values in zip(*rest, strict=True)))


if __name__ == "__main__":
    main()
