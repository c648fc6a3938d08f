"""Is ``--mitigation none`` the official training, bit for bit?

    python -m benchmarks.parity --official path/to/diffusers/examples/text_to_image/train_text_to_image.py
    python -m benchmarks.parity --official_lora path/to/diffusers/examples/text_to_image/train_text_to_image_lora.py

Runs Diffusers' own script and ours on the demo's pictures, under the same flags, and compares the UNet files byte by
byte; of adapters, whose files have other headers, the tensors. On CPU, on two bases: the demo's, and one of random
weights whose VAE has the real shape (widths 128, 256, 512, 512, with attention) and which predicts noise. The memory
layout of latents is another for such a VAE, and with it the order in which noise is drawn.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from demo.renders import make_set, write_image_folder
from ietagc_diffusers import testing
from ietagc_diffusers.run_folder import ADAPTER_FILE

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "train_text_to_image_ietagc.py"
DEMO, REAL = "demo's base", "VAE of the real shape"

# Base, name, flags. On each base every combination must give other weights than all others, or it could not fail.
COMBINATIONS = [
    (DEMO, "plain", []),
    (DEMO, "flip and EMA", ["--random_flip", "--use_ema"]),
    (DEMO, "random crop, EMA (foreach)", ["--use_ema", "--foreach_ema", "--resolution", "24"]),
    (
        DEMO,
        "min-SNR, noise offset, accumulation",
        [
            "--snr_gamma=5", "--noise_offset=0.1", "--gradient_accumulation_steps=2",
            "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=4",
        ],
    ),
    (
        DEMO,
        "input perturbation, cosine schedule",
        ["--input_perturbation=0.1", "--lr_scheduler=cosine", "--lr_warmup_steps=3"],
    ),
    (DEMO, "DREAM, epsilon prediction", ["--dream_training", "--prediction_type=epsilon"]),
    (
        DEMO,
        "epsilon prediction, gradient checkpointing",
        ["--prediction_type=epsilon", "--gradient_checkpointing"],
    ),
    (
        DEMO,
        "epochs, fewer samples, two workers",
        ["--max_train_samples=21", "--num_train_epochs=3", "--dataloader_num_workers=2"],
    ),
    (REAL, "plain", []),
    (REAL, "flip, EMA, min-SNR", ["--random_flip", "--use_ema", "--snr_gamma=5"]),
    (
        REAL,
        "v-prediction, input perturbation, noise offset",
        ["--prediction_type=v_prediction", "--input_perturbation=0.1", "--noise_offset=0.05"],
    ),
]  # fmt: skip

LORA = [
    (DEMO, "LoRA", ["--rank=4"]),
    (DEMO, "LoRA, flip, min-SNR, accumulation", ["--rank=2", "--random_flip", "--snr_gamma=5",
                                                 "--gradient_accumulation_steps=2"]),
    (DEMO, "LoRA, epsilon prediction, cosine schedule", ["--rank=8", "--prediction_type=epsilon",
                                                         "--lr_scheduler=cosine", "--lr_warmup_steps=3"]),
    (REAL, "LoRA, noise offset", ["--rank=4", "--noise_offset=0.05"]),
]  # fmt: skip
# The official LoRA script has used up the iterator of its parameters before it clips their gradients, so that its
# max_grad_norm does nothing. Ours does what it says, and is off here.
UNCLIPPED = ["--max_grad_norm=0"]


def write_real_base(folder):
    """A base whose VAE has the real shape; the UNet and the text encoder are small."""
    torch.manual_seed(0)
    tokenizer = testing.build_tokenizer(make_set(38, "mosaic", [7])[0])
    testing.assemble(
        vae=testing.build_vae((128, 256, 512, 512), sample_size=64, attention=True),
        text_encoder=testing.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=testing.build_unet(),
        scheduler=testing.build_scheduler("epsilon"),
    ).save_pretrained(folder)
    return folder


def run(script, flags, output_dir):
    """SHA-256 of the UNet file that a script trains, or of the tensors of its adapter."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, *flags, f"--output_dir={output_dir}"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-2000:]}")
    adapter = Path(output_dir) / ADAPTER_FILE
    if adapter.is_file():
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(adapter).items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()
    weights = Path(output_dir) / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", help="Diffusers' train_text_to_image.py")
    parser.add_argument("--official_lora", help="Diffusers' train_text_to_image_lora.py")
    args = parser.parse_args()
    combinations = [(args.official, [], *one) for one in COMBINATIONS if args.official]
    combinations += [(args.official_lora, UNCLIPPED, *one) for one in LORA if args.official_lora]
    if not combinations:
        parser.error("give --official or --official_lora")
    equal, seen = 0, set()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        captions, pictures = make_set(38, "mosaic", [7])
        write_image_folder(scratch / "pictures", captions, pictures)
        bases = {DEMO: ROOT / "demo" / "tiny-sd", REAL: write_real_base(scratch / "base")}
        for number, (script, ours_only, base, name, flags) in enumerate(combinations):
            common = [
                f"--pretrained_model_name_or_path={bases[base]}", f"--train_data_dir={scratch / 'pictures'}",
                f"--resolution={32 if base == DEMO else 64}", "--train_batch_size=5", "--learning_rate=1e-3",
                "--seed=11",
            ]  # fmt: skip
            if not any(flag.startswith("--num_train_epochs") for flag in flags):
                common.append(f"--max_train_steps={12 if base == DEMO else 6}")
            official = run(script, common + flags, scratch / f"official-{number}")
            ours = run(OURS, ["--mitigation=none", *common, *flags, *ours_only], scratch / f"ours-{number}")
            verdict = "identical" if official == ours else "DIFFERENT"
            if official in seen:
                verdict = "CANNOT FAIL: equals another combination"
            seen.add(official)
            equal += verdict == "identical"
            print(f"{verdict:10} {base:22} {name:47} {official[:12]} {ours[:12]}", flush=True)
    print(f"{equal} of {len(combinations)} identical")
    sys.exit(equal < len(combinations))


if __name__ == "__main__":
    main()
