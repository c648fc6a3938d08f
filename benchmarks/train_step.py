"""What a step of the method costs, as a ratio to the official script's step: VAE, text encoder, forward, backward,
clipping, AdamW.

The official step is written out below as Diffusers' train_text_to_image.py has it. Official steps and ours are taken in
turn, on one model and one optimizer with random weights; a ratio is the median over such pairs, with the quartiles.
Random weights skip nothing, so the shares of skipped and augmented samples are set: by default as in the demo's last
round. Images are decoded beforehand, as data workers do it; with the cache those that are augmented are decoded within
the step.

    python -m benchmarks.train_step --model tiny --steps 100
    python -m benchmarks.train_step --model sd15 --size 64 --batch 1 --steps 3
    python -m benchmarks.train_step --model sdxl --size 128 --batch 1 --steps 3 --lora 16
"""

import argparse
import copy
import functools
import io
import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from PIL import Image

from ietagc_diffusers import testing
from ietagc_diffusers.data import Batch, image_transform
from ietagc_diffusers.families import StableDiffusion
from ietagc_diffusers.families.text_to_image import TextToImageObjective
from ietagc_diffusers.method.augmentation import StrengthRandAugment
from ietagc_diffusers.method.control import PlainControl, ThresholdAwareControl
from ietagc_diffusers.method.memory_bank import LossMemoryBank
from ietagc_diffusers.training.controls import BaseCopy, WithoutAdapters
from ietagc_diffusers.training.groups import LoraSettings
from ietagc_diffusers.training.layout import Layout
from ietagc_diffusers.training.lora import adapted, adapter_config
from ietagc_diffusers.training.proxy import Proxy

from . import real_shapes

# Whether a variant augments, has a cache, and is calibrated: by a copy of the base or, with adapters, by the model
# without them.
VARIANTS = {
    "none": (False, False, False),
    "agc": (False, False, False),
    "agc-c": (False, False, True),
    "iet-agc+": (True, False, False),
    "iet-agc+c": (True, False, True),
    "iet-agc+ cached": (True, True, False),
    "iet-agc+c cached": (True, True, True),
}


class WithSizes(torch.nn.Module):
    """SDXL's denoiser, told what it is told besides the caption as tensors of one batch."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timesteps, encoder_hidden_states, text_embeds, time_ids, return_dict):
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timesteps, encoder_hidden_states, added_cond_kwargs=added, return_dict=return_dict)


class Texts(torch.nn.Module):
    """The text encoders of a model, together: token ids -> its condition."""

    def __init__(self, encoders, sizes):
        super().__init__()
        self.encoders, self.sizes = torch.nn.ModuleList(encoders), sizes

    def forward(self, inputs):
        told = [encoder(inputs["input_ids"], return_dict=False)[0] for encoder in self.encoders]
        condition = {"encoder_hidden_states": torch.cat(told, dim=-1)}
        if self.sizes is not None:
            batch = len(inputs["input_ids"])
            condition |= {"text_embeds": told[-1][:, 0], "time_ids": self.sizes.to(told[-1]).expand(batch, 6)}
        return condition


class Decoded:
    """Images that are decoded when they are asked for, as with the cache."""

    def __init__(self, files, transform, device):
        self.files, self.transform, self.device = files, transform, device

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        images = [self.transform(Image.open(io.BytesIO(self.files[row])).convert("RGB")) for row in rows]
        return torch.stack(images).to(self.device)

    def to(self, device, non_blocking=False):
        return self


class Batches:
    """A loader that gives one batch again and again."""

    def __init__(self, batch):
        self.batch = batch

    def next(self):
        return self.batch, False


class SetShares(ThresholdAwareControl):
    """The method's control, whose decisions are computed and then replaced: the first samples of a batch are skipped,
    the next augmented with all strength.
    """

    def __init__(self, skip, augment, *options):
        super().__init__(*options)
        self.shares = skip, augment

    def decide(self, losses, levels):
        decision = super().decide(losses, levels)
        skip, augment = (round(share * len(losses)) for share in self.shares)
        row = torch.arange(len(losses), device=losses.device)
        chosen = (row >= skip) & (row < skip + augment)
        return decision._replace(skip=row < skip, augment=chosen, strength=torch.ones_like(losses))


def build(args, device, dtype):
    """Denoiser, objective and tokens of a model with random weights."""
    torch.manual_seed(0)
    if args.model == "tiny":
        tokenizer = testing.build_tokenizer(["a picture"] * 2)
        unet, vae = testing.build_unet((64, 128)), testing.build_vae()
        texts, vocabulary, sizes = [testing.build_text_encoder(tokenizer)], len(tokenizer), None
    else:
        unet, vae = UNet2DConditionModel(**real_shapes.UNETS[args.model]), real_shapes.vae()
        texts = [real_shapes.text_encoder(*size) for size in real_shapes.TEXTS[args.model]]
        vocabulary = real_shapes.NUM_TOKENS
        sizes = torch.tensor([[args.size, args.size, 0, 0, args.size, args.size]]) if args.model == "sdxl" else None
    vae.decoder = None  # half of its memory
    unet.train().to(device)
    if args.lora:
        unet.requires_grad_(False).to(dtype)
        unet.add_adapter(adapter_config(LoraSettings(lora_rank=args.lora), [*StableDiffusion.denoiser_targets]))
        cast_training_params(unet)
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    told = Texts(texts, sizes)
    for frozen in (vae, told):
        frozen.requires_grad_(False).eval().to(device, dtype)
    objective = TextToImageObjective(vae, torch.no_grad()(told), testing.build_scheduler("epsilon"), dtype)
    return WithSizes(unet) if sizes is not None else unet, objective, vocabulary


def pictures(args):
    """JPEG files of a photograph's size: smooth noise of 1.5 times the training size."""
    rng, edge = np.random.default_rng(0), args.size * 3 // 2
    for _ in range(args.batch):
        noise = Image.fromarray(rng.integers(0, 256, (edge // 8, edge // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.resize((edge, edge), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
        yield buffer.getvalue()


def batches(args, objective, vocabulary, device):
    """The batch as it is read without and with the cache, on the device."""
    files = list(pictures(args))
    decoded = Decoded(files, image_transform(args.size, True, False, "lanczos"), device)
    ids = torch.randint(0, vocabulary - 2, (args.batch, 77))
    samples = torch.arange(args.batch)
    plain = Batch(decoded[range(args.batch)], {"input_ids": ids}, samples, samples.tolist()).to(device)
    cached = replace(
        plain,
        images=decoded,
        encoded_images=objective.encode_images(plain.images),
        encoded_inputs=objective.encode_inputs(plain.inputs),
    )
    return plain, cached


def official_step(model, objective, batch, optimizer, schedule):
    """A step of Diffusers' train_text_to_image.py."""
    vae, scheduler = objective.vae, objective.scheduler
    with torch.no_grad():
        latents = vae.encode(batch.images.to(objective.dtype)).latent_dist.sample()
    latents = latents * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    condition = objective.encode_text(batch.inputs)
    prediction = model(noisy, timesteps, **condition, return_dict=False)[0]
    loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
    loss.item()  # gathered for the log at each step
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def control_of(name, args, num_levels, reference):
    """``reference``: makes that of a calibrated control."""
    if name == "none":
        return PlainControl()
    augments, _, calibrated = VARIANTS[name]
    augment = StrengthRandAugment(5, 2) if augments else None
    options = (LossMemoryBank(num_levels, 0.8, False), 0.8, 1.4 if augments else 1.0, 5.0, augment)
    calibrates = reference() if calibrated else None
    return SetShares(args.skip_share, args.augment_share if augments else 0, *options, None, calibrates)


def timed(step, device, clock):
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["tiny", *real_shapes.UNETS], default="tiny")
    parser.add_argument("--size", type=int, help="of the images, in pixels; default: 32 (tiny), 512, 1024 (sdxl)")
    parser.add_argument("--batch", type=int, help="default: 30 (tiny) or 8")
    parser.add_argument("--steps", type=int, default=30, help="pairs that are measured, after a step to warm up")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--skip_share", type=float, default=0.25)
    parser.add_argument("--augment_share", type=float, default=0.3)
    parser.add_argument("--cpu_time", action="store_true", help="of all threads, for a machine that does other work")
    parser.add_argument("--sgd", action="store_true", help="where AdamW's state does not fit; ratios come out larger")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of the attention layers, as LoRA does")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    for flag in ("compile", "channels_last", "fused_adam", "gradient_checkpointing", "allow_tf32"):
        parser.add_argument(f"--{flag}", action="store_true", help="of the training script; for both steps")
    args = parser.parse_args()
    args.size = args.size or {"tiny": 32, "sdxl": 1024}.get(args.model, 512)
    args.batch = args.batch or (30 if args.model == "tiny" else 8)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = accelerator.device
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    denoiser, objective, vocabulary = build(args, device, dtype)
    model = accelerator.prepare_model(denoiser, evaluation_mode=True)
    if args.compile:
        model = torch.compile(model)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    if args.sgd:
        optimizer = torch.optim.SGD(trained, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, **({"fused": True} if args.fused_adam else {}))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    plain, cached = batches(args, objective, vocabulary, device)

    @functools.cache
    def reference():
        if args.lora:
            return WithoutAdapters(model, [*adapted(denoiser).values()])
        copied = accelerator.prepare_model(
            copy.deepcopy(denoiser).requires_grad_(False).eval().to(dtype), evaluation_mode=True
        )
        return BaseCopy(torch.compile(copied) if args.compile else copied)

    layout, proxies = Layout(1, device=device), {}
    for name in args.variants:
        control = control_of(name, args, objective.num_levels, reference).to(device)
        loader = Batches(cached if VARIANTS[name][1] else plain)
        proxies[name] = Proxy(0, loader, control, optimizer, schedule, args.batch)
        proxies[name]._move(device)
    steps = {"official": lambda: official_step(model, objective, plain, optimizer, schedule)}
    steps |= {name: lambda proxy=proxy: proxy.step(model, objective, layout) for name, proxy in proxies.items()}
    seconds = {name: [] for name in steps}
    for number in range(args.steps + 1):
        for name, step in steps.items():
            took = timed(step, device, time.process_time if args.cpu_time else time.perf_counter)
            if number:
                seconds[name].append(took)
            if args.model != "tiny":
                print(f"step {number}, {name}: {took:.2f} s", file=sys.stderr, flush=True)
    of_all, of_trained = (sum(p.numel() for p in some) / 1e6 for some in (denoiser.parameters(), trained))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    official = statistics.median(seconds["official"])
    clock = "CPU time" if args.cpu_time else "time"
    size = f"{of_all:.0f} M parameters" + (f", {of_trained:.1f} M trained" if args.lora else "")
    print(f"{args.model}: {size}, {args.batch} images of {args.size} px, {where}, {clock}")
    print(
        f"skipped {args.skip_share:.0%}, augmented {args.augment_share:.0%}; the official step takes {official:.3f} s"
    )
    print("| variant | ratio to the official step | quartiles |\n|---|---|---|")
    for name in args.variants:
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds["official"], strict=True)]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
