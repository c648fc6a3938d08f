"""``make demo-photos``: train two small models from scratch on 60 photographs, and show what each gives back.

Everything is written to runs/demo-photos. Finished parts are kept: the same command continues an interrupted demo.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two trainings of one thread each beat one of two on a small model
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import AutoencoderKL

from demo.run import fill
from ietagc_diffusers import testing
from ietagc_diffusers.eval.benchmark import Benchmark, Cell
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.plots import png
from ietagc_diffusers.eval.report import Scored, write_report

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "configs" / "demo_photos_runs.yaml"
FOLDER = Path("runs") / "demo-photos"
CONTROL, METHOD = "none", "iet-agc+"
CAPTION = "a photo"
COLUMNS = 12


def write_base(folder: Path, vae: AutoencoderKL, texts: Sequence[str] = (CAPTION,)) -> None:
    """Write the pipeline that runs start from: this VAE, and a text encoder and a UNet with random weights.

    ``texts``: that the tokenizer learns its words from.
    """
    channels = vae.config.latent_channels
    torch.manual_seed(0)
    tokenizer = testing.build_tokenizer(texts)
    pipeline = testing.assemble(
        vae=vae,
        text_encoder=testing.build_text_encoder(tokenizer).eval(),
        tokenizer=tokenizer,
        unet=testing.build_unet((32, 64), in_channels=channels, out_channels=channels),
        scheduler=testing.build_scheduler(),
    )
    part = folder.with_name(folder.name + ".part")
    pipeline.save_pretrained(part)
    part.replace(folder)


def sheet(scored: Sequence[Scored], training: Path) -> plt.Figure:
    """Training photographs in the first line, and in a line for each model the most similar images that it drew.

    The photographs are those that the first model copies best. ``training``: their folder.
    """
    photos = load_images(training, "train")
    nearest = scored[0].nearest
    order = np.argsort(-np.array(nearest["similarity"]), kind="stable")
    chosen = list(dict.fromkeys(nearest["nearest"][row] for row in order))[:COLUMNS]
    lines = {"training": [photos.image(photos.names.index(name)) for name in chosen]}
    for model in scored:
        images, line = load_images(model.scores["generated"], "scores"), []
        for name in chosen:
            rows = [row for row, other in enumerate(model.nearest["nearest"]) if other == name]
            best = max(rows, key=lambda row: model.nearest["similarity"][row], default=None)
            line.append(None if best is None else images.image(images.names.index(model.nearest["file_name"][best])))
        lines[model.name] = line
    size = (len(chosen), 1.08 * len(lines))
    figure, axes = plt.subplots(len(lines), len(chosen), figsize=size, squeeze=False)
    for (label, line), cells in zip(lines.items(), axes, strict=True):
        for cell, picture in zip(cells, line, strict=True):
            cell.set_xticks([])
            cell.set_yticks([])
            if picture is not None:
                cell.imshow(np.asarray(picture), interpolation="nearest")
        cells[0].set_ylabel(label)
    figure.subplots_adjust(left=0.08, right=0.995, top=0.99, bottom=0.01, wspace=0.03, hspace=0.03)
    return figure


def main() -> None:
    started = time.perf_counter()
    if not (FOLDER / "base").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_base(FOLDER / "base", AutoencoderKL.from_pretrained(ROOT / "demo" / "photo-vae"))
    runs: Benchmark = fill(RUNS, FOLDER, "seven")
    scored = [Scored.load(runs.folder(Cell(name, "none", runs.seeds[0])), name) for name in (CONTROL, METHOD)]
    png(sheet(scored, Path(runs.train)), FOLDER / "sheet.png")
    page = write_report(scored, FOLDER / "index.html", title="What two models give back of 60 photographs")
    print(f"{time.perf_counter() - started:.0f} s. The page: {page}. The sheet: {FOLDER / 'sheet.png'}")


if __name__ == "__main__":
    main()
