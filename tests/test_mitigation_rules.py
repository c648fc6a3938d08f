"""Each mitigation's rule, and the detector, against small references."""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from mitigated import (
    KINDS,
    PROMPTS,
    denoiser_inputs,
    generate,
    is_clean,
    is_sd3,
    make,
    rewritten,
    sibling,
)

from ietagc_diffusers import UsageError
from ietagc_diffusers.mitigations import apply_mitigations, mitigate, text_conditional_noise
from ietagc_diffusers.mitigations.wen import noise_magnitude, optimise_embeddings


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request):
    return make(request.param)


@pytest.fixture(scope="module")
def sd():
    return make("sd")


# Prompts


@pytest.mark.parametrize("name", ["rt", "rna", "cwr"])
@pytest.mark.parametrize("prompt", ["a red picture", "", "w " * 80, "красная 画 🐈"])
def test_prompts_are_rewritten_and_negative_ones_are_not(pipeline, name, prompt):
    options = {"prompts": [prompt], "seeds": (1,), "negative_prompt": ["a blue picture"]}
    (changed,) = rewritten(pipeline, f"{name}:num_words=3", **options)
    added = 0 if name == "cwr" and not prompt else 3
    assert len(changed.split()) == len(prompt.split()) + added
    inputs = denoiser_inputs(mitigate(pipeline, name, num_words=3), **options)[0]
    wanted = denoiser_inputs(pipeline, **{**options, "prompts": [changed]})[0]
    assert torch.equal(inputs["encoder_hidden_states"], wanted["encoder_hidden_states"])
    if inputs["pooled"] is not None:
        assert torch.equal(inputs["pooled"], wanted["pooled"])


def test_the_second_prompt_of_sdxl_is_rewritten_too():
    xl = make("xl")
    first, second = rewritten(xl, "rt:num_words=2", ["a"], (1,), prompt_2=["b"])
    assert len(first.split()) == len(second.split()) == 3 and "a" in first.split() and "b" in second.split()
    inputs = denoiser_inputs(mitigate(xl, "rt", num_words=2), ["a"], (1,), prompt_2=["b"])[0]
    wanted = denoiser_inputs(xl, [first], (1,), prompt_2=[second])[0]
    assert torch.equal(inputs["encoder_hidden_states"], wanted["encoder_hidden_states"])
    none = denoiser_inputs(mitigate(xl, "rt", num_words=2), "a", (1,), prompt_2="")[0]
    wanted = denoiser_inputs(xl, first, (1,))[0]
    assert torch.equal(none["encoder_hidden_states"], wanted["encoder_hidden_states"])


def test_prompt_embeds_cannot_be_rewritten_but_everything_else_acts(sd):
    embeds, negative = sd.encode_prompt(PROMPTS, "cpu", 1, True)
    options = {"prompts": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.warns(UserWarning, match="rt, cwr: rewrites prompts, but prompt_embeds were given"):
        assert torch.equal(generate(apply_mitigations(sd, "rt+cwr"), **options), generate(sd, **options))
    kept = embeds.clone()
    for text in ("gni", "wen:target_loss=0", "memattn:scale=5"):
        assert not torch.equal(generate(apply_mitigations(sd, text), **options), generate(sd, **options))
        assert torch.equal(embeds, kept), "the caller's tensor must stay as it is"


# Noise on the embedding


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_gni_adds_noise_of_its_scale_to_the_conditional_branch(pipeline, guidance_scale):
    options = {"prompts": ["a red picture"] * 40, "seeds": range(40), "guidance_scale": guidance_scale}
    mitigated = denoiser_inputs(mitigate(pipeline, "gni", scale=0.3), **options)
    plain = denoiser_inputs(pipeline, **options)
    assert torch.equal(mitigated[0]["encoder_hidden_states"], mitigated[-1]["encoder_hidden_states"])
    tensors = [(mitigated[0]["encoder_hidden_states"], plain[0]["encoder_hidden_states"])]
    if plain[0]["pooled"] is not None:
        tensors.append((mitigated[0]["pooled"], plain[0]["pooled"]))
    for changed, original in tensors:
        noise = changed - original
        if guidance_scale > 1:
            assert torch.equal(changed[:40], original[:40])
            noise = noise[40:]
        if is_sd3(pipeline) and noise.ndim == 3:  # 24 columns of CLIP, 8 of zeros; then T5's tokens
            assert not changed[:, :77, 24:].any()
            noise = torch.cat([noise[:, :77, :24].flatten(1), noise[:, 77:].flatten(1)], dim=1)
        tolerance = 5 * 0.3 / math.sqrt(noise.numel())
        assert noise.mean().abs() < tolerance and abs(noise.std() - 0.3) < tolerance
        assert (noise.std(dim=0) - 0.3).abs().mean() < 0.05, "every image must have noise of its own"


# Wen


def toy(batch, seed=0):
    """A smooth model of embeddings (B, 5, 3) with predictions (B, 4, 2, 2)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(15, 16, generator=generator)
    embeddings = torch.randn(batch, 5, 3, generator=generator)
    unconditional = torch.randn(batch, 4, 2, 2, generator=generator)
    return lambda e: torch.tanh(e.flatten(1) @ weight).view(-1, 4, 2, 2), embeddings, unconditional


def adamw(predict, embedding, unconditional, steps, lr, target):
    """One image, AdamW written out (decay 0.01, betas 0.9 and 0.999). Returns the embedding and the steps taken."""
    x, m, v = embedding.clone(), 0.0, 0.0
    for step in range(1, steps + 1):
        point = x.clone().requires_grad_()
        loss = (predict(point[None])[0] - unconditional).pow(2).sum().sqrt()
        if loss <= target:
            return x, step - 1
        (gradient,) = torch.autograd.grad(loss, point)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        x[1:] = (x * (1 - lr * 0.01) - lr * update)[1:]
    return x, steps


def test_wen_equals_adamw_on_one_image_at_a_time():
    predict, embeddings, unconditional = toy(6)
    start = noise_magnitude(predict(embeddings), unconditional)
    target = start.sort().values[3].item() - 0.5
    given, taken = embeddings.clone(), set()
    optimised = optimise_embeddings(predict, embeddings, unconditional, steps=8, lr=0.05, target_loss=target)
    assert torch.equal(embeddings, given)
    for row in range(6):
        wanted, steps = adamw(predict, embeddings[row], unconditional[row], 8, 0.05, target)
        taken.add(steps)
        torch.testing.assert_close(optimised[row], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(optimised[row], embeddings[row]) == (start[row] <= target)
    assert 0 in taken and 8 in taken and len(taken) > 2, "images must stop at steps of their own"
    assert torch.equal(optimised[:, 0], embeddings[:, 0])
    assert torch.equal(optimise_embeddings(predict, embeddings, unconditional, steps=0), embeddings)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_wen_lowers_the_magnitude_and_leaves_token_0(pipeline, guidance_scale):
    options = {"target_loss": 0, "lr": 0.01, "steps": 6}
    mitigated = mitigate(pipeline, "wen", **options)
    inputs = [denoiser_inputs(each, guidance_scale=guidance_scale) for each in (pipeline, mitigated)]
    plain, changed = (each[0]["encoder_hidden_states"][-2:] for each in inputs)
    assert torch.equal(changed, inputs[1][-1]["encoder_hidden_states"][-2:]), "it must hold for all steps"
    assert torch.equal(plain[:, 0], changed[:, 0]) and not torch.equal(plain[:, 1:], changed[:, 1:])
    if guidance_scale > 1:
        assert torch.equal(inputs[0][0]["encoder_hidden_states"][:2], inputs[1][0]["encoder_hidden_states"][:2])
    # Unguided, the same optimisation against the empty prompt: the embedding does not depend on the guidance scale.
    guided = denoiser_inputs(mitigated)[0]["encoder_hidden_states"][2:]
    torch.testing.assert_close(changed, guided, rtol=1e-3, atol=1e-4)
    before, after = (text_conditional_noise(each, PROMPTS, [1, 2], 4).magnitude for each in (pipeline, mitigated))
    assert (after < 0.95 * before).all()


def test_wen_stops_at_the_target(sd):
    before = text_conditional_noise(sd, PROMPTS, [1, 2], 4).magnitude
    low, high = before.argmin().item(), before.argmax().item()
    between = before.mean().item()
    mitigated = mitigate(sd, "wen", target_loss=between, lr=0.005, steps=50)
    after = text_conditional_noise(mitigated, PROMPTS, [1, 2], 4).magnitude
    assert after[low] == before[low]
    assert 0.8 * between < after[high] <= between * 1.0001
    assert torch.equal(generate(mitigate(sd, "wen", target_loss=before.max() + 1e-3)), generate(sd))


def test_wen_can_wait_for_a_later_step(sd):
    mitigated = mitigate(sd, "wen", target_loss=0, target_step=2)
    plain, changed = denoiser_inputs(sd), denoiser_inputs(mitigated)
    pairs = [[inputs["encoder_hidden_states"] for inputs in pair] for pair in zip(plain, changed, strict=True)]
    assert [torch.equal(*pair) for pair in pairs] == [True, True, False, False]


# The detector


def predict(pipeline, inputs, timestep):
    """The denoiser called by hand."""
    sample, embeddings = inputs["sample"], inputs["encoder_hidden_states"]
    if is_sd3(pipeline):
        return pipeline.transformer(sample, embeddings, inputs["pooled"], timestep.expand(len(sample))).sample
    return pipeline.unet(sample, timestep, embeddings, added_cond_kwargs=inputs["added_cond_kwargs"]).sample


def test_the_detector_measures_the_first_steps_of_generation(pipeline):
    """Against the latents of a generation written out, one prompt at a time."""
    prompts, seeds = [*PROMPTS, ""], [1, 2, 3]
    result = text_conditional_noise(pipeline, prompts, seeds, 5, 3, guidance_scale=4.0, batch_size=2)
    assert result.magnitude.shape == (3,) and result.per_step.shape == (3, 3)
    assert result.magnitude.dtype == result.per_step.dtype == torch.float32
    torch.testing.assert_close(result.magnitude, result.per_step.mean(dim=1))
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        for index, inputs in enumerate(
            denoiser_inputs(pipeline, prompt, (seed,), guidance_scale=4.0, num_inference_steps=5)
        ):
            if index == 3:
                break
            timestep = pipeline.scheduler.timesteps[index]
            with torch.no_grad():
                unconditional, conditional = predict(pipeline, inputs, timestep)
            wanted = (conditional - unconditional).pow(2).sum().sqrt()
            assert result.per_step[row, index].item() == pytest.approx(wanted.item(), rel=1e-3)
    assert pipeline.scheduler.timesteps.numel() == 5 and is_clean(pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "2 `prompts` and 1 `seeds`"),
        ({"steps": 0}, "`steps` 0: must be in 1 to `num_inference_steps`, 50"),
        ({"steps": 51}, "`steps` 51"),
        ({"guidance_scale": 1.0}, "`guidance_scale` 1.0: must be over 1"),
    ],
)
def test_the_detector_refuses_what_it_cannot_measure(sd, options, message):
    with pytest.raises(UsageError, match=message):
        text_conditional_noise(sd, PROMPTS, **{"seeds": [1, 2], **options})


# Guidance


def written_out(sd, prompt, seed, steps, transition, initial, scale):
    """Generation of one image with DDIM, guidance by hand. Returns latents, and the steps at which guidance acted."""
    scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        embeds, negative = sd.encode_prompt([prompt], "cpu", 1, True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        norms, found, acted = [], False, []
        for t in scheduler.timesteps:
            eps_u, eps_c = (sd.unet(latents, t, e).sample for e in (negative, embeds))
            norms.append((eps_c - eps_u).norm().item())
            if transition == "dynamic":
                found = found or (len(norms) > 2 and norms[-2] < norms[-3] and norms[-2] < norms[-1])
            else:
                found = t.item() <= transition
            acted.append(found)
            latents = scheduler.step(eps_u + (scale if found else initial) * (eps_c - eps_u), t, latents).prev_sample
    return latents, acted


@pytest.mark.parametrize(
    ("text", "transition", "initial"),
    [
        ("cfg", 500, 0.0),
        ("cfg:transition=650,initial_scale=-2", 650, -2.0),
        ("cfg:transition=dynamic", "dynamic", 1.0),
        ("cfg:transition=dynamic,initial_scale=0", "dynamic", 0.0),
    ],
)
def test_guidance_is_delayed_for_each_image(sd, text, transition, initial):
    mitigated = apply_mitigations(sd, text)
    mitigated.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    seeds, begun = list(range(10, 15)), set()
    prompts = ["a red picture"] * len(seeds)
    latents = generate(mitigated, prompts, seeds, num_inference_steps=12, output_type="latent", guidance_scale=30.0)
    for row, seed in enumerate(seeds):
        wanted, acted = written_out(sd, prompts[row], seed, 12, transition, initial, 30.0)
        begun.add(sum(acted))
        torch.testing.assert_close(latents[row], wanted[0], rtol=1e-3, atol=1e-3)
    if transition == "dynamic":
        assert len(begun) > 1, "images must find transitions of their own"
    assert begun != {0}


# Cross-attention


class Written:
    """Cross-attention written out, one image: logits of the beginning token scaled in the conditional row (the
    second), tokens from ``length`` on left out in both.
    """

    def __init__(self, scale, length):
        self.scale, self.length = scale, length

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **unused):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = []
        for row, (x, y) in enumerate(zip(hidden_states, context, strict=True)):
            q, k, v = (
                w.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for w in (attn.to_q(x), attn.to_k(y), attn.to_v(y))
            )
            logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            if encoder_hidden_states is not None:
                logits[..., self.length :] = -torch.inf
                logits[..., 0] *= self.scale if row == 1 else 1
            rows.append((logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))
        return attn.to_out[0](torch.stack(rows))


@pytest.mark.parametrize(("scale", "mask"), [(1.25, True), (6.0, False), (6.0, True), (-3.0, True)])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_attention_is_rescaled_as_written_out(kind, scale, mask):
    pipeline = make(kind)
    mitigated = mitigate(pipeline, "memattn", scale=scale, mask=mask)
    images = generate(mitigated, guidance_scale=20.0)
    reference = sibling(pipeline, unet=copy.deepcopy(pipeline.unet))
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (1, 2), strict=True)):
        length = len(pipeline.tokenizer(prompt).input_ids) if mask else 77
        reference.unet.set_attn_processor(Written(scale, length))
        wanted = generate(reference, prompt, (seed,), guidance_scale=20.0)[0]
        torch.testing.assert_close(images[row], wanted, rtol=0, atol=2e-3)
    assert (images - generate(pipeline, guidance_scale=20.0)).abs().max() > 4e-3


def test_attention_is_rescaled_whatever_the_processor(sd):
    mitigated = mitigate(sd, "memattn", scale=6)
    wanted = generate(mitigated)
    attentions = [part for part in sd.unet.modules() if isinstance(part, Attention)]
    before = [attention.processor for attention in attentions]
    sd.unet.set_attn_processor(SlicedAttnProcessor(1))
    torch.testing.assert_close(generate(mitigated), wanted, rtol=0, atol=1e-3)
    for attention, processor in zip(attentions, before, strict=True):
        attention.set_processor(processor)


def test_wen_optimises_against_rescaled_attention(sd):
    """Both branches of every UNet call of Wen's, and the pipeline's own afterwards, against attention written out."""
    reference = sibling(sd, unet=copy.deepcopy(sd.unet))
    prompt, length = PROMPTS[0], len(sd.tokenizer(PROMPTS[0]).input_ids)
    reference.unet.set_attn_processor(Written(6.0, length))
    embeds, negative = (each.detach() for each in sd.encode_prompt([prompt], "cpu", 1, True))
    first = denoiser_inputs(sd, prompt, (1,))[0]["sample"]
    timestep = sd.scheduler.timesteps[0]

    def predict(candidate):
        return reference.unet(first, timestep, torch.cat([negative, candidate])).sample[1:]

    with torch.no_grad():
        unconditional = reference.unet(first, timestep, torch.cat([negative, embeds])).sample[:1]
    wanted = optimise_embeddings(predict, embeds, unconditional, 4, 0.01, 0.0)
    mitigated = apply_mitigations(sd, "memattn:scale=6+wen:target_loss=0,steps=4,lr=0.01")
    optimised = denoiser_inputs(mitigated, prompt, (1,))[0]["encoder_hidden_states"][1:]
    torch.testing.assert_close(optimised, wanted, rtol=1e-3, atol=1e-4)
    image = generate(reference, None, (1,), prompt_embeds=wanted, negative_prompt_embeds=negative, guidance_scale=20.0)
    torch.testing.assert_close(generate(mitigated, prompt, (1,), guidance_scale=20.0), image, rtol=0, atol=2e-3)
