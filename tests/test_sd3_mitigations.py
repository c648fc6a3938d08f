"""Mitigations on Stable Diffusion 3, against its flow matching and its three encoders written out."""

from itertools import pairwise

import pytest
import torch
from mitigated import PROMPTS, denoiser_inputs, encode, generate, make, rewritten, sibling

from ietagc_diffusers.mitigations import apply_mitigations, mitigate, text_conditional_noise
from ietagc_diffusers.mitigations.base import Mitigation
from ietagc_diffusers.mitigations.pipeline import with_mitigation

CLIP_TOKENS, CLIP_WIDTH = 77, 24  # what lies beyond the width among these tokens is filled up with zeros


@pytest.fixture(scope="module")
def sd3():
    return make("sd3")


def predict(sd3, latents, t, embeddings, pooled):
    return sd3.transformer(latents, embeddings, pooled, t.expand(len(latents))).sample


def start(seed):
    return torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_all_three_prompts_are_rewritten(sd3):
    given = {"prompt_2": ["b"], "prompt_3": ["c"]}
    changed = rewritten(sd3, "rt:num_words=2", ["a"], (1,), **given)
    assert [len(prompt.split()) for prompt in changed] == [3, 3, 3]
    assert all(word in prompt.split() for word, prompt in zip("abc", changed, strict=True))
    inputs = denoiser_inputs(mitigate(sd3, "rt", num_words=2), ["a"], (1,), **given)[0]
    wanted = denoiser_inputs(sd3, changed[:1], (1,), prompt_2=changed[1:2], prompt_3=changed[2:])[0]
    assert torch.equal(inputs["encoder_hidden_states"], wanted["encoder_hidden_states"])
    assert torch.equal(inputs["pooled"], wanted["pooled"])


def test_noise_reaches_no_zeros_where_there_is_no_t5():
    without = sibling(make("sd3"), text_encoder_3=None, tokenizer_3=None)
    changed, plain = (
        denoiser_inputs(each)[0]["encoder_hidden_states"][2:] for each in (mitigate(without, "gni"), without)
    )
    assert not changed[:, CLIP_TOKENS:].any() and not changed[:, :, CLIP_WIDTH:].any()
    assert (changed != plain)[:, :CLIP_TOKENS, :CLIP_WIDTH].all()


def first_time(sd3, steps=4):
    sd3.scheduler.set_timesteps(steps)
    return sd3.scheduler.timesteps[0]


@pytest.mark.parametrize(
    ("text", "transition", "initial"),
    [("cfg", 500, 0.0), ("cfg:transition=650,initial_scale=-2", 650, -2.0), ("cfg:transition=dynamic", None, 1.0)],
)
def test_guidance_is_delayed_in_flow_matching(sd3, text, transition, initial):
    """Euler's steps along the velocity, by hand: sigma = 3u / (1 + 2u), t = 1000 sigma."""
    steps, scale, begun = 12, 30.0, set()
    seeds = (3, 4, 5)
    options = {"num_inference_steps": steps, "output_type": "latent", "guidance_scale": scale}
    drawn = generate(apply_mitigations(sd3, text), [PROMPTS[0]] * 3, seeds, **options)
    sigmas = [float(s) for s in sd3.scheduler.sigmas]
    uniform = torch.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), steps)  # Diffusers shifts its lowest level twice
    torch.testing.assert_close(torch.tensor(sigmas[:-1]), 3 * uniform / (1 + 2 * uniform), rtol=1e-4, atol=1e-5)
    embeddings, negative, pooled, negative_pooled = encode(sd3, [PROMPTS[0]])
    for row, seed in enumerate(seeds):
        latents, norms, acts, count = start(seed), [], False, 0
        for sigma, following in pairwise(sigmas):
            t = torch.tensor(1000 * sigma)
            with torch.no_grad():
                v_u = predict(sd3, latents, t, negative, negative_pooled)
                v_c = predict(sd3, latents, t, embeddings, pooled)
            norms.append((v_c - v_u).norm())
            if transition is None:
                acts = acts or (len(norms) > 2 and norms[-2] < norms[-3] and norms[-2] < norms[-1])
            else:
                acts = bool(t <= transition)
            count += acts
            latents = latents + (following - sigma) * (v_u + (scale if acts else initial) * (v_c - v_u))
        begun.add(count)
        torch.testing.assert_close(drawn[row], latents[0], rtol=1e-3, atol=1e-3)
    assert begun != {0} and begun != {steps}


def test_wen_is_adamw_on_what_the_encoders_computed(sd3):
    """Of CLIP's first token, of zeros that fill up and of the pooled embedding it changes nothing."""
    embeddings, negative, pooled, negative_pooled = encode(sd3, [PROMPTS[0]])
    t = first_time(sd3)
    with torch.no_grad():
        wanted_close_to = predict(sd3, start(1), t, negative, negative_pooled)
    free = torch.ones_like(embeddings, dtype=torch.bool)
    free[:, 0] = False
    free[:, :CLIP_TOKENS, CLIP_WIDTH:] = False
    variable = embeddings[free].clone().requires_grad_()
    optimizer = torch.optim.AdamW([variable], lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        candidate = embeddings.masked_scatter(free, variable)
        (predict(sd3, start(1), t, candidate, pooled) - wanted_close_to).norm().backward()
        optimizer.step()
    for parameter in sd3.transformer.parameters():
        parameter.grad = None
    inputs = denoiser_inputs(mitigate(sd3, "wen", target_loss=0, steps=4, lr=0.02), PROMPTS[0], (1,))[0]
    found = inputs["encoder_hidden_states"][1:]
    torch.testing.assert_close(found[free], variable.detach(), rtol=1e-3, atol=1e-3)
    assert torch.equal(found[~free], embeddings[~free]) and torch.equal(inputs["pooled"][1:], pooled)


def test_the_magnitude_is_of_the_velocity(sd3):
    embeddings, negative, pooled, negative_pooled = encode(sd3, PROMPTS)
    measured = text_conditional_noise(sd3, PROMPTS, [1, 2], 4).magnitude
    t = first_time(sd3)
    latents = torch.cat([start(1), start(2)])
    with torch.no_grad():
        conditional = predict(sd3, latents, t, embeddings, pooled)
        unconditional = predict(sd3, latents, t, negative, negative_pooled)
    torch.testing.assert_close(measured, (conditional - unconditional).pow(2).sum((1, 2, 3)).sqrt())


LAYERS = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.8, "skip_layer_guidance_scale": 20.0}


@pytest.mark.parametrize("text", ["gni", "wen:target_loss=0,lr=0.01"])
def test_guidance_by_skipped_layers_follows_the_mitigated_prompt(sd3, text):
    """As if the changed embeddings had been given: the pipeline keeps a copy of them for the skipped layers."""
    mitigated = apply_mitigations(sd3, text)
    inputs = denoiser_inputs(mitigated, **LAYERS)[-1]
    negative, embeddings = inputs["encoder_hidden_states"].chunk(2)
    negative_pooled, pooled = inputs["pooled"].chunk(2)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    images = generate(mitigated, **LAYERS)
    torch.testing.assert_close(images, generate(sd3, None, **given, **LAYERS), rtol=0, atol=1e-5)
    assert (images - generate(sd3, None, **given)).abs().max() > 1e-3, "skipped layers must make a difference"


def test_the_second_call_of_a_step_is_no_step(sd3):
    rows = []

    class Spy(Mitigation):
        name = "spy"

        def after_step(self, step, prediction):
            rows.append((step.index, len(prediction)))

    generate(with_mitigation(sd3, Spy()), **LAYERS)
    assert rows == [(0, 4), (1, 4), (2, 4), (3, 4)]
