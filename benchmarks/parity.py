"""Is ``--mitigation none`` the official training, bit for bit?

    python -m benchmarks.parity --official path/to/diffusers/examples/text_to_image/train_text_to_image.py
    python -m benchmarks.parity --official_lora path/to/diffusers/examples/text_to_image/train_text_to_image_lora.py

and likewise ``--official_sdxl`` and ``--official_lora_sdxl``.

Runs Diffusers' own script and ours on the demo's pictures, under the same flags, and compares the UNet files byte by
byte; of adapters, whose files have other headers, the tensors. On CPU, on two bases: the demo's (for Stable Diffusion
XL a tiny one of random weights), and one of random weights whose VAE has the real shape (widths 128, 256, 512, 512,
with attention). The memory layout of latents is another for such a VAE, and with it the order in which noise is drawn.

The official script of Stable Diffusion XL draws the latents, flips and captions of the whole set once, before training,
and then crop corners at each visit that are not those of its latents. Ours draws all of it at each visit. So both run
here with nothing left to draw: latents are the mean of the VAE's posterior (``benchmarks/posterior_mean.py``), crops
are at the centre, nothing is flipped, and an epoch ends with a whole batch.
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
XL, XL_REAL = "tiny XL", "XL, VAE of the real shape"
CENTRED = ["--center_crop"]
SDXL = [
    (XL, "plain", CENTRED),
    (XL, "EMA, min-SNR", [*CENTRED, "--use_ema", "--snr_gamma=5"]),
    (XL, "noise offset, cosine schedule", [*CENTRED, "--noise_offset=0.1", "--lr_scheduler=cosine",
                                           "--lr_warmup_steps=3"]),
    (XL, "v-prediction, later timesteps", [*CENTRED, "--prediction_type=v_prediction",
                                           "--timestep_bias_strategy=later", "--timestep_bias_multiplier=3"]),
    (XL, "image prediction, a range of timesteps, accumulation", [
        *CENTRED, "--prediction_type=sample", "--timestep_bias_strategy=range", "--timestep_bias_begin=100",
        "--timestep_bias_end=700", "--timestep_bias_multiplier=2", "--gradient_accumulation_steps=2",
        "--lr_scheduler=constant"]),
    (XL_REAL, "plain", CENTRED),
]  # fmt: skip
LORA_SDXL = [
    (XL, "LoRA", ["--rank=4"]),
    (XL, "LoRA, flip, random crop", ["--rank=2", "--random_flip", "--resolution=24"]),
    (XL, "LoRA, min-SNR, accumulation, two workers", [
        "--rank=8", "--snr_gamma=5", "--gradient_accumulation_steps=2", "--lr_scheduler=constant",
        "--dataloader_num_workers=2"]),
    (XL_REAL, "LoRA, noise offset", ["--rank=4", "--noise_offset=0.05", "--random_flip"]),
    # The last layer of the first encoder has no part in the loss. Its update is zero either way; weight decay shrinks
    # the other factor here and not there.
    (XL, "LoRA on the text encoders too", ["--rank=4", "--train_text_encoder", "--adam_weight_decay=0"]),
]  # fmt: skip
# The official LoRA script has used up the iterator of its parameters before it clips their gradients, so that its
# max_grad_norm does nothing. Ours does what it says, and is off here.
UNCLIPPED = ["--max_grad_norm=0"]
BATCH = 5
POSTERIOR_MEAN = (str(ROOT / "benchmarks" / "posterior_mean.py"), str(BATCH))


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


def write_xl(folder, real):
    """A tiny Stable Diffusion XL of random weights; ``real``: with a VAE of the real shape."""
    torch.manual_seed(0)
    pipeline = testing.random_xl_pipeline(make_set(38, "mosaic", [7])[0])
    if real:
        pipeline.register_modules(vae=testing.build_vae((128, 256, 512, 512), sample_size=64, attention=True))
    pipeline.save_pretrained(folder)
    return folder


def run(script, flags, output_dir, before=()):
    """SHA-256 of the UNet file that a script trains, or of the tensors of its adapter. ``before``: of the command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *before, script, *flags, f"--output_dir={output_dir}"],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
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
    kinds = {
        "official": ("train_text_to_image.py", COMBINATIONS, [], ()),
        "official_lora": ("train_text_to_image_lora.py", LORA, UNCLIPPED, ()),
        "official_sdxl": ("train_text_to_image_sdxl.py", SDXL, [], POSTERIOR_MEAN),
        "official_lora_sdxl": ("train_text_to_image_lora_sdxl.py", LORA_SDXL, [], ()),
    }
    for flag, (script, *_) in kinds.items():
        parser.add_argument(f"--{flag}", help=f"Diffusers' {script}")
    args = vars(parser.parse_args())
    combinations = [
        (args[flag], ours_only, before, *one)
        for flag, (_, some, ours_only, before) in kinds.items()
        for one in some
        if args[flag]
    ]
    if not combinations:
        parser.error(f"give one or more of {', '.join('--' + flag for flag in kinds)}")
    equal, seen = 0, set()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for number in (38, 40):  # an epoch ends with a batch of 3, or with a whole one
            write_image_folder(scratch / f"pictures-{number}", *make_set(number, "mosaic", [7]))
        bases = {
            DEMO: ROOT / "demo" / "tiny-sd",
            REAL: write_real_base(scratch / "base"),
            XL: write_xl(scratch / "xl", real=False),
            XL_REAL: write_xl(scratch / "xl-real", real=True),
        }
        for number, (script, ours_only, before, base, name, flags) in enumerate(combinations):
            small = base in (DEMO, XL)
            common = [
                f"--pretrained_model_name_or_path={bases[base]}",
                f"--train_data_dir={scratch / ('pictures-40' if before else 'pictures-38')}",
                f"--resolution={32 if small else 64}",
                f"--train_batch_size={BATCH}",
                "--learning_rate=1e-3",
                "--seed=11",
            ]
            if not any(flag.startswith("--num_train_epochs") for flag in flags):
                common.append(f"--max_train_steps={12 if small else 6}")
            official = run(script, common + flags, scratch / f"official-{number}", before)
            flags = ["--mitigation=none", *common, *flags, *ours_only]
            ours = run(OURS, flags, scratch / f"ours-{number}", before)
            verdict = "identical" if official == ours else "DIFFERENT"
            if official in seen:
                verdict = "CANNOT FAIL: equals another combination"
            seen.add(official)
            equal += verdict == "identical"
            print(f"{verdict:10} {base:25} {name:52} {official[:12]} {ours[:12]}", flush=True)
    print(f"{equal} of {len(combinations)} identical")
    sys.exit(equal < len(combinations))


if __name__ == "__main__":
    main()
