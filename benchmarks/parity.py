"""Is ``--mitigation none`` the official training, bit for bit?

    python -m benchmarks.parity --official path/to/diffusers/examples/text_to_image/train_text_to_image.py

Runs Diffusers' own script and ours on the demo's base and pictures, under the same flags, and compares the UNet files
byte by byte. On CPU.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from demo.renders import make_set, write_image_folder

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "train_text_to_image_ietagc.py"

COMBINATIONS = {
    "plain": [],
    "flip and EMA": ["--random_flip", "--use_ema"],
    "random crop, EMA (foreach)": ["--use_ema", "--foreach_ema", "--resolution", "24"],
    "min-SNR, noise offset, accumulation": [
        "--snr_gamma=5", "--noise_offset=0.1", "--gradient_accumulation_steps=2",
        "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=4",
    ],
    "input perturbation, cosine schedule": ["--input_perturbation=0.1", "--lr_scheduler=cosine", "--lr_warmup_steps=3"],
    "DREAM, epsilon prediction": ["--dream_training", "--prediction_type=epsilon"],
    "v-prediction, gradient checkpointing": ["--prediction_type=v_prediction", "--gradient_checkpointing"],
    "epochs, fewer samples, two workers": [
        "--max_train_samples=21", "--num_train_epochs=3", "--dataloader_num_workers=2",
    ],
}  # fmt: skip


def run(script, flags, output_dir):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, *flags, f"--output_dir={output_dir}"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-2000:]}")
    weights = Path(output_dir) / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True, help="Diffusers' train_text_to_image.py")
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        captions, pictures = make_set(38, "mosaic", [7])
        write_image_folder(scratch / "pictures", captions, pictures)
        for number, (name, flags) in enumerate(COMBINATIONS.items()):
            common = [
                f"--pretrained_model_name_or_path={ROOT / 'demo' / 'tiny-sd'}",
                f"--train_data_dir={scratch / 'pictures'}",
                "--resolution=32", "--train_batch_size=5", "--learning_rate=1e-3", "--seed=11",
            ]  # fmt: skip
            if not any(flag.startswith("--num_train_epochs") for flag in flags):
                common.append("--max_train_steps=12")
            official = run(args.official, common + flags, scratch / f"official-{number}")
            ours = run(OURS, ["--mitigation=none", *common, *flags], scratch / f"ours-{number}")
            equal = official == ours
            failures += not equal
            print(f"{'identical' if equal else 'DIFFERENT':10} {name:40} {official[:12]} {ours[:12]}", flush=True)
    print(f"{len(COMBINATIONS) - failures} of {len(COMBINATIONS)} identical")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
