"""``make demo-lora``: adapters of two ranks, with plain training and with the method, from one tiny base model.

Everything is written to runs/demo-lora. Finished parts are kept: the same command continues an interrupted demo.
"""

import argparse
import html
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two trainings of one thread each beat one of two on a small model
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot as plt
import yaml

from demo import page
from demo.pictures import write_sets
from demo.run import ROOT, fill, measured_front, scored_models, write_runs
from ietagc_diffusers.eval.benchmark import Benchmark
from ietagc_diffusers.eval.curves import FrontPoint, table
from ietagc_diffusers.eval.front import TITLES, Front, Sampling
from ietagc_diffusers.eval.generate import Settings
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.plots import COLOURS, inline_svg, plot_front, plot_sampled, png
from ietagc_diffusers.eval.protocol import Protocol
from ietagc_diffusers.eval.report import Scored, write_report
from ietagc_diffusers.eval.score import Tools

RUNS = ROOT / "configs" / "demo_lora_runs.yaml"
NUM_IMAGES, NUM_DUPLICATED = 90, 10  # people train LoRAs on few images
SAMPLED_POINTS = 5  # models of each run that draw a picture for each caption


def main_runs(runs: Benchmark) -> list[str]:
    """The variants of the first table."""
    return [row["training"] for row in next(iter(runs.tables.values()))["rows"]]


def plain_runs(runs: Benchmark) -> list[str]:
    """Plain training of each rank: what the other runs of the first table are compared with."""
    return [name for name in main_runs(runs) if runs.effective[name]["mitigation"] == "none"]


def sampled_front(runs: Benchmark, folder: Path) -> Front:
    """Pictures drawn along all runs: copies against quality."""
    settings = Settings(**runs.generate)
    reference = load_images(folder / "reference", "folder")
    sampling = Sampling(NUM_IMAGES, settings, Tools(Protocol(**runs.score)), reference, folder / "features")
    return measured_front(runs, folder, output=folder / "sampled", points=SAMPLED_POINTS, sampling=sampling)


def reading(runs: Benchmark, losses: list[FrontPoint], sampled: list[FrontPoint]) -> str:
    """All runs against plain training of each rank, in Markdown: losses, then copies at equal Fréchet distance."""
    copy_rate = {"copy_rate": TITLES["copy_rate"]}
    parts = []
    for control in plain_runs(runs):
        of_samples = table(sampled, control, copy_rate).split("\n\n")[-1]
        parts += [table(losses, control, {}), of_samples]
    return "\n".join(parts)


def _colours(runs: Benchmark) -> dict[str, str]:
    """A colour for each run, the same in all plots."""
    return dict(zip(runs.training, itertools.cycle(COLOURS), strict=False))


def _picture(runs: Benchmark, losses: list[FrontPoint], sampled: list[FrontPoint]) -> plt.Figure:
    """Both fronts of the first table's runs."""
    shown, colours = main_runs(runs), _colours(runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6))
    plot_front(left, [point for point in losses if point.run in shown], colours=colours)
    left.legend(fontsize=8)
    plot_sampled(right, [p for p in sampled if p.run in shown], "copy_rate", TITLES["copy_rate"], colours=colours)
    figure.tight_layout()
    return figure


def write_page(
    folder: Path, runs: Benchmark, losses: list[FrontPoint], sampled: list[FrontPoint], scored: list[Scored]
) -> Path:
    """Write index.html and figure.png into ``folder``; returns the page's path."""
    colours = _colours(runs)
    png(_picture(runs, losses, sampled), folder / "figure.png")
    figures = [
        inline_svg(lambda axes: plot_front(axes, losses, colours=colours), (8, 4.6)),
        inline_svg(
            lambda axes: plot_sampled(axes, sampled, "copy_rate", TITLES["copy_rate"], colours=colours), (8, 4.6)
        ),
    ]
    intro = f"""
<p>Adapters were trained on {NUM_IMAGES} small pictures, {NUM_DUPLICATED} of which have four rows, with
{len(runs.seeds)} seeds each. {html.escape(page.copies(scored, NUM_IMAGES, NUM_DUPLICATED))} A copy is more similar to
a training picture (descriptor: pixel, threshold {scored[0].scores["protocol"]["copy_similarity"]:.3f}) than 99% of
fresh pictures of the same captions are.</p>
<h2>The fronts</h2>
<figure>{figures[0]}<figcaption>Each point is an adapter saved during a run. Plain training stopped at any point is the
control: a method is useful where its curve is below the control's.</figcaption></figure>
<figure>{figures[1]}<figcaption>What {SAMPLED_POINTS} adapters of each run draw: to the left fewer copies, below
nearer to fresh pictures.</figcaption></figure>
<pre>{html.escape(reading(runs, losses, sampled))}</pre>"""
    return write_report(scored, folder / "index.html", title="IET-AGC+ on adapters", intro=intro)


def main() -> None:
    known = list(yaml.safe_load(RUNS.read_text())["tables"])
    parser = argparse.ArgumentParser(description="Train adapters with and without the method, and measure them.")
    parser.add_argument("--tables", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-lora"), help="default: %(default)s")
    args = parser.parse_args()
    if not (ROOT / "demo" / "tiny-sd").exists():
        sys.exit("demo/tiny-sd is missing: `make tiny-sd` trains it")
    started = time.perf_counter()
    run(args.folder, args.seeds, args.tables)
    print(f"{time.perf_counter() - started:.0f} s")


def run(folder: Path, seeds: list[int], tables: Sequence[str]) -> None:
    """Train, draw, measure and write the page."""
    write_sets(folder, NUM_IMAGES, NUM_DUPLICATED)
    runs = fill(write_runs(folder, RUNS, seeds, tables, load_images(folder / "reference", "folder")), folder)
    losses, sampled = measured_front(runs, folder).points, sampled_front(runs, folder).points
    scored = scored_models(runs, folder, main_runs(runs))
    shown = write_page(folder, runs, losses, sampled, scored)
    print(f"{page.copies(scored, NUM_IMAGES, NUM_DUPLICATED)}\n\n{reading(runs, losses, sampled)}\nThe page: {shown}")


if __name__ == "__main__":
    main()
