"""Guidance away from the base: against the formula in print, by hand, for each kind of model."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from mitigated import PROMPTS, denoiser, generate, generators, is_clean, is_sd3, make, same
from peft import LoraConfig

from ietagc_diffusers import testing
from ietagc_diffusers.eval.base_guidance import BaseGuidance, guide_away

PLAIN = {"guidance_scale": 1.0, "num_inference_steps": 3}
SEEDS = (1, 2)


def other(pipeline, seed=7, text=True):
    """A copy of a pipeline whose denoiser, and text encoders unless told otherwise, have other weights."""
    changed = copy.deepcopy(pipeline)
    parts = [denoiser(changed)]
    if text:
        parts += [part for name, part in changed.components.items() if name.startswith("text_encoder") and part]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for part in parts:
            for parameter in part.parameters():
                parameter.add_(0.3 * parameter.std().nan_to_num(0) * torch.randn_like(parameter))
    return changed


def pair(kind):
    base = make(kind)
    if not is_sd3(base):
        base.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    return other(base), base


def told(pipeline, prompts):
    """What the denoiser is told of prompts, and of none, by Diffusers' own pipeline."""
    more = {"prompt_2": None, "prompt_3": None} if is_sd3(pipeline) else {}
    embeds, nothing, *pooled = pipeline.encode_prompt(
        prompts, **more, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    if is_sd3(pipeline):
        names = "pooled_projections"
        return tuple({"encoder_hidden_states": e, names: p} for e, p in zip((embeds, nothing), pooled, strict=True))
    if not pooled:
        return {"encoder_hidden_states": embeds}, {"encoder_hidden_states": nothing}
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(len(prompts), -1)
    added = ({"text_embeds": p, "time_ids": ids} for p in pooled)
    return tuple(
        {"encoder_hidden_states": e, "added_cond_kwargs": a} for e, a in zip((embeds, nothing), added, strict=True)
    )


@torch.no_grad()
def by_hand(model, base, w, k):
    """Images in [0, 1] by e_base("") + w (e(c) - e_base("")) + k e_base(""), in a loop of its own."""
    scheduler, flow = copy.deepcopy(model.scheduler), is_sd3(model)
    scheduler.set_timesteps(3)
    z = randn_tensor((2, denoiser(model).config.in_channels, 8, 8), generator=generators(*SEEDS))
    prompt, nothing = told(model, PROMPTS)[0], told(base, [""] * 2)[1]
    for t in scheduler.timesteps:
        call = {"timestep": t.expand(2), "hidden_states" if flow else "sample": z}
        ours, theirs = denoiser(model)(**call, **prompt).sample, denoiser(base)(**call, **nothing).sample
        if flow or scheduler.config.prediction_type == "epsilon":
            out = theirs + w * (ours - theirs) + k * theirs
        else:  # v = a e - b x, so that e = a v + b z
            a, b = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
            ours, theirs = a * ours + b * z, a * theirs + b * z
            out = theirs + w * (ours - theirs) + k * theirs
            out = (out - b * z) / a
        z = scheduler.step(out, t, z).prev_sample
    vae = model.vae.config
    images = model.vae.decode(z / vae.scaling_factor + (vae.shift_factor or 0)).sample
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("kind", "w", "k"), [("sd", 3.0, -0.02), ("xl", 3.0, -0.02), ("xl", 5.0, 0), ("sd3", 4.0, 0)])
def test_a_sampling_is_the_formula_in_print(kind, w, k):
    model, base = pair(kind)
    guided = guide_away(model, base, BaseGuidance("base", w, k))
    images = generate(guided, seeds=SEEDS, **PLAIN)
    torch.testing.assert_close(images, by_hand(model, base, w, k), atol=2e-4, rtol=0)
    assert not same(images, generate(model, seeds=SEEDS, **PLAIN)) and is_clean(guided) and is_clean(base)


class Velocity(torch.nn.Module):
    """A denoiser that says the velocity where ``inner`` says the noise."""

    def __init__(self, inner, alphas_cumprod):
        super().__init__()
        self.inner, self.alphas_cumprod = inner, alphas_cumprod
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device

    def forward(self, sample, timestep, **inputs):
        alpha_bar = self.alphas_cumprod[timestep]
        noise = self.inner(sample, timestep, **inputs)[0]
        return ((noise - (1 - alpha_bar) ** 0.5 * sample) / alpha_bar**0.5,)


@pytest.mark.parametrize("k", [0.0, -0.05])
def test_models_of_noise_and_of_velocity_that_say_the_same_draw_the_same(k):
    base = testing.random_pipeline(PROMPTS, prediction_type="epsilon")
    base.set_progress_bar_config(disable=True)
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    images = []
    for kind in ("epsilon", "v_prediction"):
        model, start = other(base), copy.deepcopy(base)
        for pipeline in (model, start) if kind == "v_prediction" else ():
            pipeline.scheduler = DDIMScheduler.from_config(base.scheduler.config, prediction_type=kind)
            pipeline.unet = Velocity(pipeline.unet, pipeline.scheduler.alphas_cumprod)
        images.append(generate(guide_away(model, start, BaseGuidance("b", 3.0, k)), **PLAIN))
    assert same(*images)


def test_the_base_of_an_adapter_is_the_model_without_it():
    base = make("sd")
    adapted = copy.deepcopy(base)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    torch.manual_seed(0)
    adapted.unet.add_adapter(config)
    adapted.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    merged = copy.deepcopy(adapted)
    merged.fuse_lora(components=["unet", "text_encoder"])
    merged.unload_lora_weights()
    before = generate(adapted, **PLAIN)
    guided = generate(guide_away(adapted, None, BaseGuidance(None, 5.0)), **PLAIN)
    assert same(guided, generate(guide_away(merged, base, BaseGuidance("base", 5.0)), **PLAIN))
    assert not same(guided, before)
    assert torch.equal(before, generate(adapted, **PLAIN))  # the adapters are on again
