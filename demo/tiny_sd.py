"""Train the demo's base model: a tiny Stable Diffusion that draws in the ``waves`` style (``make tiny-sd``).

The VAE sees both styles, as a real one has seen everything; the text encoder and the UNet see only ``waves``, so that
fine-tuning on ``mosaic`` has something to learn. Weights are stored in half precision; ``recipe.json`` beside them
records how they were made.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import trange

from demo.renders import make_set
from ietagc_diffusers import testing

BATCH_SIZE = 32
CAPTION_DROPOUT = 0.1  # teaches the unconditional branch that classifier-free guidance needs


def to_tensor(pictures):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(parameters, batch_loss, num_steps, learning_rate, name):
    """AdamW under a one-cycle schedule; returns the mean loss of the last tenth."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    losses = torch.zeros(num_steps)
    for step in (bar := trange(num_steps, desc=name)):
        loss = batch_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[max(0, step - 100) : step + 1].mean():.4f}")
    return losses[-max(1, num_steps // 10) :].mean().item()


def train_vae(num_steps, seed):
    """Returns the VAE, with its scaling factor set, and its PSNR in dB on pictures it has not seen."""
    pictures = torch.cat(
        [to_tensor(make_set(4000, style, [seed, 1, i])[1]) for i, style in enumerate(("waves", "mosaic"))]
    )
    unseen = to_tensor(make_set(256, "mosaic", [seed, 2])[1])
    vae = testing.build_vae().to(memory_format=torch.channels_last)

    def batch_loss():
        x = pictures[torch.randint(len(pictures), (BATCH_SIZE,))]
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        return F.l1_loss(reconstruction, x) + 2 * F.mse_loss(reconstruction, x) + 1e-3 * kl

    fit(vae.parameters(), batch_loss, num_steps, 2e-3, "VAE")
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pictures[:1000]).latent_dist.sample()
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        reconstruction = vae.decode(vae.encode(unseen).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((reconstruction - unseen) / 2).pow(2).mean(dim=(1, 2, 3))
    return vae, (-10 * error.log10()).mean().item()


def train_text_to_image(vae, num_steps, seed):
    captions, pictures = make_set(8000, "waves", [seed, 3])
    tokenizer = testing.build_tokenizer(captions)
    text_encoder = testing.build_text_encoder(tokenizer)
    unet = testing.build_unet().to(memory_format=torch.channels_last)
    scheduler = testing.build_scheduler()
    tokens = tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids
    tokens, empty = tokens[:-1], tokens[-1]
    with torch.no_grad():
        moments = [vae.encode(x).latent_dist for x in to_tensor(pictures).split(250)]
        mean, std = (torch.cat([getattr(m, k) for m in moments]) * vae.config.scaling_factor for k in ("mean", "std"))

    def batch_loss():
        rows = torch.randint(len(mean), (BATCH_SIZE,))
        latents = mean[rows] + std[rows] * torch.randn_like(mean[rows])
        prompt = torch.where(torch.rand(BATCH_SIZE, 1) < CAPTION_DROPOUT, empty, tokens[rows])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH_SIZE,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text_encoder(prompt)[0]).sample
        return F.mse_loss(prediction, scheduler.get_velocity(latents, noise, timesteps))

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    loss = fit(parameters, batch_loss, num_steps, 2e-3, "UNet and text encoder")
    return testing.assemble(vae, text_encoder.eval(), tokenizer, unet.eval(), scheduler), loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "tiny-sd")
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.perf_counter()
    vae, psnr = train_vae(args.vae_steps, args.seed)
    print(f"VAE: {psnr:.1f} dB on unseen pictures")
    pipeline, loss = train_text_to_image(vae, args.unet_steps, args.seed)
    pipeline.to(torch.float16)
    pipeline.text_encoder.float()  # transformers loads the precision it finds; diffusers loads float32
    pipeline.save_pretrained(args.output_dir)
    flags = f"--vae_steps {args.vae_steps} --unet_steps {args.unet_steps} --seed {args.seed}"
    recipe = {
        "command": f"python -m demo.tiny_sd {flags}",
        "vae_psnr_db": round(psnr, 2),
        "final_loss": round(loss, 4),
        "seconds": round(time.perf_counter() - start),
        "torch": torch.__version__,
    }
    (args.output_dir / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe, indent=2))


if __name__ == "__main__":
    main()
