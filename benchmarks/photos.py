"""A reduced reproduction of the paper on photographs: small models are trained from scratch on a few of them, with the
method, its parts, its rivals and the controls that a comparison needs.

    python -m benchmarks.photos --photos uoft-cs/cifar10 --image_column img
    ietagc benchmark --config configs/photos_runs.yaml --jobs 2
    python -m benchmarks.photos --show

The first command writes into runs/photos:

- ``pictures``: the first photographs of each class, to train on, with the captions that class labels stand for;
- ``heldout``: others of the same classes, for the front; ``reference``: those and yet others, for the Fréchet distance;
- ``others``: as many of those as there are to train on, for thresholds and references that need photographs which no
  model is trained on, so that the judge keeps its own;
- ``base``: a VAE, trained once on all photographs but those of ``reference`` that no model sees, and a text encoder and
  a UNet with random weights, from which every run starts.

``--show`` writes the front of all runs, another with images that the models of some of them drew, and a sheet of
training photographs beside what the models drew.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from PIL import Image

from demo.photos import CAPTION, sheet, write_base
from demo.tiny_sd import fit, to_tensor
from ietagc_diffusers import testing
from ietagc_diffusers.data import DataSettings, read_source
from ietagc_diffusers.data.decoder import to_rgb
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval import benchmark
from ietagc_diffusers.eval.front import Sampling, front
from ietagc_diffusers.eval.generate import Settings
from ietagc_diffusers.eval.image_sets import load_images
from ietagc_diffusers.eval.plots import png
from ietagc_diffusers.eval.protocol import Protocol
from ietagc_diffusers.eval.report import Scored
from ietagc_diffusers.eval.score import Tools
from ietagc_diffusers.eval.subsets import first_of_each

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "configs" / "photos_runs.yaml"
SIZE, LATENT_CHANNELS = 32, 16
NUM_HELDOUT, NUM_REFERENCE = 500, 1000
SHEET = ("none", "iet-agc+")
SAMPLED, SAMPLED_POINTS = ("none", "iet-agc+", "iet, all data"), 6  # runs whose models draw, and how many of each
FRONT_IMAGES = 200  # held-out ones, which are enough for differences between runs


def load_photos(source: str, image_column: str, label_column: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 (N, 32, 32, 3) and their classes (N,), in the dataset's order."""
    place = {"train_data_dir" if Path(source).is_dir() else "dataset_name": source}
    rows: Dataset = read_source(DataSettings(image_column=image_column, **place), (label_column,)).rows
    if label_column not in rows.column_names:
        raise UsageError(f"`label_column` {label_column}: not among {', '.join(rows.column_names)}")
    decoded = rows.select_columns([image_column, label_column]).with_format(None)
    pictures, labels = [], []
    for row in decoded:
        picture = row[image_column]
        pictures.append(np.asarray(to_rgb(picture).resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
        labels.append(row[label_column])
    return np.stack(pictures), np.unique(labels, return_inverse=True)[1]


def captions(label: int, number: int, num_classes: int) -> dict[str, str]:
    """The caption of each kind of class label: none, the photograph's own, a random one, and one of its own."""
    random_label = np.random.default_rng([0, number]).integers(num_classes)
    return {
        "text": CAPTION,
        "own_class": f"{CAPTION} of class {label}",
        "random_class": f"{CAPTION} of class {random_label}",
        "unique_class": f"{CAPTION} number {number}",
    }


def write_set(folder: Path, pictures: np.ndarray, labels: np.ndarray, rows: np.ndarray, num_classes: int) -> None:
    """The pictures of these rows as an image folder."""
    folder.mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows):
        name = f"{number:04d}.png"
        Image.fromarray(pictures[row]).save(folder / name)
        lines.append({"file_name": name, "label": int(labels[row])} | captions(labels[row], number, num_classes))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def first_of_each_class(labels: np.ndarray, rows: np.ndarray, number: int) -> np.ndarray:
    """``number`` of the rows, the first of each class alike, class by class."""
    chosen = rows[first_of_each(labels[rows], len(rows), number)]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def train_vae(pictures: torch.Tensor, unseen: torch.Tensor, num_steps: int, batch_size: int = 8):
    """A VAE of 8 x 8 latents with 16 channels, with its scaling factor set, and its PSNR in dB on unseen pictures.

    Args:
        pictures, unseen: float32 (N, 3, 32, 32) in [-1, 1].
    """
    vae = testing.build_vae((24, 48, 64), sample_size=SIZE, latent_channels=LATENT_CHANNELS)

    def batch_loss():
        x = pictures[torch.randint(len(pictures), (batch_size,))]
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        return 10 * F.mse_loss(reconstruction, x) + 0.3 * F.l1_loss(reconstruction, x) + 1e-3 * kl

    fit(vae.parameters(), batch_loss, num_steps, 2e-3, "VAE")
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(some).latent_dist.sample() for some in pictures[:1000].split(100)])
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        shown = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in unseen.split(100)])
    error = ((shown.clamp(-1, 1) - unseen) / 2).pow(2).mean(dim=(1, 2, 3))
    return vae, (-10 * error.log10()).mean().item()


def prepare(folder: Path, pictures: np.ndarray, labels: np.ndarray, num_images: int, vae_steps: int) -> None:
    """Write what is missing of the sets and the base."""
    num_classes, rows = len(np.unique(labels)), np.arange(len(labels))
    training = first_of_each_class(labels, rows, num_images)
    others = np.setdiff1d(rows, training)
    heldout = first_of_each_class(labels, others, NUM_HELDOUT)
    unseen = first_of_each_class(labels, np.setdiff1d(others, heldout), NUM_REFERENCE - NUM_HELDOUT)
    sets = {"pictures": training, "heldout": heldout, "reference": np.concatenate([heldout, unseen])}
    sets["others"] = unseen[:: max(1, len(unseen) // num_images)]  # which is sorted by class
    for name, chosen in sets.items():
        if not (folder / name).exists():
            part = folder / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            write_set(part, pictures, labels, chosen, num_classes)
            part.replace(folder / name)
    if not (folder / "base").exists():
        started = time.perf_counter()
        torch.manual_seed(0)
        seen = to_tensor(pictures[np.setdiff1d(rows, unseen)])
        vae, psnr = train_vae(seen, to_tensor(pictures[unseen]), vae_steps)
        print(f"VAE: {psnr:.1f} dB on photographs that it has not seen, {time.perf_counter() - started:.0f} s")
        numbers = range(max(num_images, num_classes))
        texts = [text for number in numbers for text in captions(number % num_classes, number, num_classes).values()]
        write_base(folder / "base", vae, texts)


def show(runs: benchmark.Benchmark, folder: Path) -> None:
    """Write the front of all runs, and the sheet, into the folder."""
    done = [result for result in benchmark.collect(runs) if "scores" in result]
    names = list(dict.fromkeys(result["training"] for result in done))
    folders = {
        name: [Path(runs.model(name, result["seed"])) for result in done if result["training"] == name]
        for name in names
    }
    training, heldout = load_images(folder / "pictures", "folder"), load_images(folder / "heldout", "folder")
    found = front(folders, training, heldout, folder, control=names[0], max_images=FRONT_IMAGES, batch_size=100)
    print(found.markdown)
    tools, settings = Tools(Protocol(**runs.score)), Settings(**runs.generate)
    reference = load_images(folder / "reference", "folder")
    sampling = Sampling(runs.num_images or 1, settings, tools, reference, folder / "features")
    drawn = {name: folders[name] for name in SAMPLED}
    options = {"max_images": FRONT_IMAGES, "batch_size": 100, "points": SAMPLED_POINTS, "sampling": sampling}
    print(front(drawn, training, heldout, folder / "sampled", control=names[0], **options).markdown)
    cells = [benchmark.Cell(name, "none", runs.seeds[0]) for name in SHEET]
    scored = [Scored.load(runs.folder(cell), cell.training) for cell in cells]
    png(sheet(scored, folder / "pictures"), folder / "sheet.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", help="folder or Hub id of photographs with class labels")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--num_images", type=int, default=100, help="to train on")
    parser.add_argument("--vae_steps", type=int, default=8000)
    parser.add_argument("--show", action="store_true", help="write the front and the sheet of the finished runs")
    args = parser.parse_args()
    folder = Path(yaml.safe_load(RUNS.read_text())["output"])
    if args.photos:
        pictures, labels = load_photos(args.photos, args.image_column, args.label_column)
        prepare(folder, pictures, labels, args.num_images, args.vae_steps)
    if args.show:
        show(benchmark.Benchmark(RUNS), folder)


if __name__ == "__main__":
    main()
