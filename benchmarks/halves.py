"""A judge that needs no held-out loss: do two models that were trained on disjoint halves of the pictures agree?

    python -m benchmarks.halves                # after make demo: about 45 minutes on a core

Models that generalize learn the same function from either half, models that memorize learn different ones (Kadkhodaie
et al., ICLR 2024). Every second of the demo's pictures, with its duplicates, is in the first half, the others are in
the second. Each arm of configs/demo_beyond_runs.yaml is trained on each half, with as many visits to a picture as in
the demo. Along the runs the two models of an arm are compared

- by what they predict of the same noisy held-out latents. With f the model of a half and f0 the base: *disagreement* is
  half the mean squared difference of both, which is how much the choice of the half adds to the held-out loss (the
  variance in bias plus variance); *agreement* is the cosine between their changes f - f0;
- with a third model, of the first half and another seed: its disagreement with the first is the seed's part;
- by what they draw from the same noise and caption: how much more similar it is than what they draw from other noise,
  and how much more often than by chance an image is nearer to a picture of its model's own half than to all of the
  other half.

The gap is between the losses of the half that a model has not seen and of its own, the mean of both models: both halves
take both parts, so that neither is more difficult. Finished parts are kept; --show only prints and draws.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from tqdm.auto import tqdm

from benchmarks.separation import middles
from benchmarks.tables import print_table
from ietagc_diffusers.eval.benchmark import Benchmark
from ietagc_diffusers.eval.configuration import slug
from ietagc_diffusers.eval.curves import crossing
from ietagc_diffusers.eval.features import embed
from ietagc_diffusers.eval.generate import Settings, generate
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.jobs import run_jobs, train
from ietagc_diffusers.eval.losses import shown, spread
from ietagc_diffusers.eval.plots import COLOURS, GREY, png
from ietagc_diffusers.eval.prompts import Prompt
from ietagc_diffusers.families import family_of
from ietagc_diffusers.files import read_json, write_json, write_text
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.sscd import pixel_descriptor
from ietagc_diffusers.training.fixed_losses import FixedLosses

RUNS = Path(__file__).resolve().parent.parent / "configs" / "demo_beyond_runs.yaml"
SEED = 2  # of the third model
ARMS = ("none", "iet-agc+", "iet-agc+c", "iet, all data", "iet-agc+c, all data")
HALVES = (0, 1)
FLAGS = {"max_train_steps": 400, "lr_warmup_steps": 20, "checkpointing_steps": 400, "report_to": "none"}
LEVELS = middles(8)  # of the held-out latents


@dataclass(frozen=True)
class Point:
    """The two models of an arm after a step.

    heldout: mean held-out loss of both. gap: see the module. moved: mean squared change of what they predict since the
    base. disagreement, agreement: see the module; agreement_at: in four equal parts of the noise levels. of_seeds: the
    disagreement of two models of the first half, None without the third. excess: mean similarity of images from the
    same noise, less that of images from other noise; preferred: how much more often than by chance an image is nearer
    to its model's own half, from -1 to 1; both None where nothing was drawn.
    """

    arm: str
    step: int
    heldout: float
    gap: float
    moved: float
    disagreement: float
    agreement: float
    agreement_at: list[float]
    of_seeds: float | None = None
    excess: float | None = None
    preferred: float | None = None


def number_of(name: str) -> int:
    """Of a picture, all of whose copies have it: 00017_2.png is the third copy of picture 17."""
    return int(name.split("_")[0])


def write_halves(pictures: Path, output: Path) -> None:
    """The halves as image folders."""
    lines = (pictures / "metadata.jsonl").read_text().splitlines(keepends=True)
    for half in HALVES:
        folder, part = output / f"half-{half}", output / f"half-{half}.part"
        if folder.exists():
            continue
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        chosen = {path.name for path in pictures.glob("*.png") if number_of(path.name) % 2 == half}
        for name in chosen:
            shutil.copy2(pictures / name, part / name)
        own = [line for line in lines if json.loads(line)["file_name"] in chosen]
        write_text(part / "metadata.jsonl", "".join(own))
        part.replace(folder)


def benchmark_of(half: int, output: Path) -> Benchmark:
    """The arms, trained on a half, whose number is the seed: the two models of an arm share nothing but the base. The
    first half is also trained on with ``SEED``.
    """
    config = yaml.safe_load(RUNS.read_text())
    config |= {
        "train": str(output / f"half-{half}"),
        "output": str(output / f"runs-{half}"),
        "seeds": [0, SEED] if half == 0 else [half],
    }
    config["common"] |= FLAGS
    config["training"] = {arm: config["training"][arm] for arm in ARMS}
    config["tables"] = {"halves": {"title": "Halves", "rows": [{"training": arm} for arm in ARMS]}}
    path = output / f"half-{half}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return Benchmark(path)


def train_all(runs: list[Benchmark], arms: list[str]) -> None:
    """Train what is missing of the arms, one run after another. Raises ``SystemExit`` if one failed."""
    failed = []

    def work(half, seed, arm, bar, processes):
        run, folder = runs[half], Path(runs[half].model(arm, seed))
        why = train(run.training_command(arm, seed), run.values(arm), folder, processes)
        failed.extend([f"{arm}: {why}"] if why else [])
        bar.update()

    works = [partial(work, half, seed, arm) for arm in arms for half in HALVES for seed in runs[half].seeds]
    run_jobs(works, 1, len(works), "Training")
    if failed:
        raise SystemExit("\n".join(failed))


class Judge:
    """Predictions on fixed noise, and images, of the models of both halves.

    Args:
        base: the pipeline that all runs started from.
        output: of the study.
        heldout: pictures that neither half has.
    """

    def __init__(self, base: str, output: Path, heldout: Path, resolution: int):
        self.base, self.output = base, output
        self.family = family_of(base).load_frozen(base)
        self.halves = [load_images(output / f"half-{half}", "folder") for half in HALVES]
        once = [s.select(i for i, name in enumerate(s.names) if name.endswith("_0.png")) for s in self.halves]

        def fixed(images, levels):
            return FixedLosses(self.family, *shown(images, resolution, len(images)), len(levels), levels=levels)

        self.heldout = fixed(load_images(heldout, "heldout"), LEVELS)
        self.of_halves = [fixed(images, LEVELS) for images in once]
        self.start = self._predictions(self.load(Path(base) / self.family.denoiser_name))[0]
        # Captions of half of the pictures, as many of each half, each twice: with one noise and with another.
        captions = {number_of(name): text for s in once for name, text in zip(s.names, s.texts, strict=True)}
        texts = [text for number, text in sorted(captions.items()) if number // 2 % 2 == 0]
        self.prompts = [Prompt(text) for text in texts * 2]

    def load(self, folder: Path) -> torch.nn.Module:
        return self.family.load_denoiser(folder).eval()

    @torch.no_grad()
    def _predictions(self, model):
        """Of each held-out sample what the model says, float32 (draws, N, C h w), and the mean loss."""
        said, losses = [], []
        for _, _, drawn in self.heldout.drawn():
            prediction, target, _ = self.family.objective.predict(model, drawn)
            said.append(prediction.flatten(1))
            losses.append((prediction - target).square().flatten(1).mean(dim=1))
        return torch.cat(said).view(len(LEVELS), -1, said[0].shape[1]), torch.cat(losses).mean().item()

    def compare(self, arm: str, step: int, folders: list[Path], third: Path | None = None) -> Point:
        """The models in two folders, one of each half, and the third model if it is there."""
        models = [self.load(folder) for folder in folders]
        (first, loss_0), (second, loss_1) = map(self._predictions, models)
        # own[i][j]: loss of the model of half i on half j
        own = np.array([[fixed(model).mean().item() for fixed in self.of_halves] for model in models])
        change, other = first - self.start, second - self.start
        pairs = (change, other), (change, change), (other, other)
        products = torch.stack([(a * b).mean(dim=(1, 2)) for a, b in pairs])  # (3, draws)
        parts = products.view(3, 4, -1).sum(dim=2)
        return Point(
            arm,
            step,
            (loss_0 + loss_1) / 2,
            float(own[0, 1] + own[1, 0] - own[0, 0] - own[1, 1]) / 2,
            products[1:].mean().item(),
            _disagreement(first, second),
            _cosine(products.sum(dim=1)).item(),
            _cosine(parts).tolist(),
            None if third is None else _disagreement(first, self._predictions(self.load(third))[0]),
        )

    def draw(self, name: str, folder: Path, settings: Settings) -> Path:
        """The folder of the images that a denoiser draws; those that are there are kept."""
        images = self.output / "drawn" / name
        generate(self.base, self.prompts, images, settings, denoiser=folder, desc=name)
        return images

    def of_images(self, folders: list[Path]) -> dict[str, float]:
        """``excess`` and ``preferred`` of the images in two folders, one of each half."""
        drawn = [
            self._described(load_images(folder, "output")).view(2, len(self.prompts) // 2, -1) for folder in folders
        ]
        similar = torch.einsum("and,bnd->abn", *drawn)  # by the noise of the first, the noise of the second, caption
        same, other = (similar[0, 0] + similar[1, 1]) / 2, (similar[0, 1] + similar[1, 0]) / 2
        pictures = [self._described(images) for images in self.halves]
        own = [_is_nearer(drawn[half].flatten(0, 1), pictures[half], pictures[1 - half]) for half in HALVES]
        return {
            "excess": (same - other).mean().item(),
            "preferred": 2 * torch.cat(own).float().mean().item() - 1,
        }

    def _described(self, images):
        return embed(images, {"pixel": pixel_descriptor()}, desc="Describing").features["pixel"]


def _is_nearer(images, own, others):
    """Of each image whether one of the first pictures is more similar to it than all others."""
    return (images @ own.T).amax(dim=1) > (images @ others.T).amax(dim=1)


def _disagreement(first, second):
    return (first - second).square().mean().item() / 2


def _cosine(products):
    """From the mean products of two vectors with one another and with themselves, (3, ...)."""
    return products[0] / (products[1] * products[2]).sqrt()


def measure(
    judge: Judge, runs: list[Benchmark], arms: list[str], points: int, drawn: list[int], settings: Settings
) -> None:
    """Write the points of the arms into halves.json; those that are there are kept."""
    path = judge.output / "halves.json"
    known = {(row["arm"], row["step"]): Point(**row) for row in read_json(path)} if path.exists() else {}
    name = judge.family.denoiser_name
    for arm in tqdm(arms, desc="Arms"):
        saved = [dict(RunFolder(runs[half].model(arm, half)).saved_models(name)) for half in HALVES]
        third = dict(RunFolder(runs[0].model(arm, SEED)).saved_models(name))
        common = sorted(saved[0].keys() & saved[1].keys())
        steps = sorted({*spread(common, points), *(step for step in drawn if step in common)})
        for step in steps:
            folders = [of_half[step] for of_half in saved]
            point = known.get((arm, step)) or judge.compare(arm, step, folders, third.get(step))
            if step in drawn and point.excess is None:
                images = [judge.draw(f"{slug(arm)}-{step}-{half}", folders[half], settings) for half in HALVES]
                point = replace(point, **judge.of_images(images))
            known[arm, step] = point
            write_json(path, [asdict(each) for each in known.values()])


def at(points: list[Point], x: str, value: float, y: str) -> str:
    """A field of one run where another first reaches a value, or a dash."""
    points = [p for p in points if getattr(p, y) is not None]
    found = crossing(points, lambda p: getattr(p, x), lambda p: getattr(p, y), value)
    return "–" if found is None else f"{found:.4f}"


def show(points: list[Point], output: Path) -> None:
    """Print the tables and draw the figure."""
    of_arm = {arm: run for arm in ARMS if (run := sorted((p for p in points if p.arm == arm), key=lambda p: p.step))}
    named = [field.name for field in fields(Point)][1:]
    rows = []
    for arm, run in of_arm.items():
        for p in run:
            values = [getattr(p, name) for name in named]
            cells = [", ".join(f"{v:.2f}" for v in x) if isinstance(x, list) else x for x in values]
            rows.append([arm, *("" if c is None else f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells)])
    print_table(["arm", *named], rows)
    matched = ("heldout", "gap", "disagreement", "of_seeds", "agreement")
    for x, value in (("gap", 0.013), ("gap", 0.015), ("heldout", 0.34), ("heldout", 0.338)):
        head = [f"at {x} {value}", *(y for y in matched if y != x)]
        print_table(head, [[arm, *(at(run, x, value, y) for y in head[1:])] for arm, run in of_arm.items()])
    png(figure(of_arm), output / "halves.png")


def figure(of_arm: dict[str, list[Point]]):
    """Agreement along the training, and disagreement against the gap."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    panels: list[tuple[str, str, Callable[[Point], tuple[float, float]]]] = [
        ("step", "agreement (generalization →)", lambda p: (p.step, p.agreement)),
        ("gap (memorization →)", "disagreement (memorization →)", lambda p: (p.gap, p.disagreement)),
    ]
    for panel, (x, y, of) in zip(axes, panels, strict=True):
        for (arm, run), colour in zip(of_arm.items(), (GREY, *COLOURS), strict=False):
            panel.plot(*zip(*map(of, run), strict=True), color=colour, marker="o", markersize=3.5, label=arm)
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, default=Path("runs/demo/pictures"))
    parser.add_argument("--heldout", type=Path, default=Path("runs/demo/heldout"))
    parser.add_argument("--output", type=Path, default=Path("runs/halves"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--points", type=int, default=5, help="models of each run that predict")
    parser.add_argument("--drawn", type=int, nargs="*", default=[400], help="steps at which models draw")
    parser.add_argument(
        "--no_training", action="store_true", help="measure models that are there, also of unfinished runs"
    )
    parser.add_argument("--show", action="store_true", help="only print and draw what is measured")
    args = parser.parse_args()
    if not args.show:
        write_halves(args.pictures, args.output)
        runs = [benchmark_of(half, args.output) for half in HALVES]
        if not args.no_training:
            train_all(runs, args.arms)
        resolution = RunFolder(runs[0].model(args.arms[0], 0)).config()["resolution"]
        judge = Judge(runs[0].base, args.output, args.heldout, resolution)
        settings = Settings(**runs[0].generate, resolution=resolution)
        measure(judge, runs, args.arms, args.points, args.drawn, settings)
    show([Point(**row) for row in read_json(args.output / "halves.json")], args.output)


if __name__ == "__main__":
    main()
