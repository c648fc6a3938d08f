"""The objective draws once, and its losses are the plain formulas."""

from dataclasses import replace

import pytest
import torch

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.data import Batch

TOLD = "encoder_hidden_states"


@pytest.fixture(scope="module")
def pipelines():
    return {
        kind: testing.random_pipeline(["a red picture"], prediction_type=kind) for kind in ("epsilon", "v_prediction")
    }


def make(pipeline, **options):
    return testing.family_of_pipeline(pipeline, **options).objective


def draw(objective, batch):
    return objective.draw(objective.encode(batch))


def make_batch(pipeline, size=4):
    tokens = pipeline.tokenizer(["a red picture"] * size, padding="max_length", return_tensors="pt").input_ids
    return Batch(torch.linspace(-1, 1, size * 3 * 256).view(size, 3, 16, 16), {"input_ids": tokens})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_are_the_mean_squared_errors(pipelines, kind):
    pipeline = pipelines[kind]
    objective = make(pipeline)
    drawn = draw(objective, make_batch(pipeline))
    alphas = pipeline.scheduler.alphas_cumprod[drawn.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * drawn.latents + (1 - alphas).sqrt() * drawn.noise
    target = drawn.noise if kind == "epsilon" else alphas.sqrt() * drawn.noise - (1 - alphas).sqrt() * drawn.latents
    with torch.no_grad():
        prediction = pipeline.unet(noisy, drawn.timesteps, **drawn.condition).sample
        losses = objective.losses(pipeline.unet, drawn)
        plain = objective.plain_loss(pipeline.unet, drawn)
    torch.testing.assert_close(losses, (prediction - target).pow(2).flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain, losses.mean())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_formula(pipelines, kind):
    pipeline = pipelines[kind]
    timesteps = torch.tensor([0, 10, 500, 999])
    drawn = replace(draw(make(pipeline), make_batch(pipeline)), timesteps=timesteps)
    alphas = pipeline.scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    wanted = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(make(pipeline, snr_gamma=5.0).weights(drawn), wanted, rtol=1e-4, atol=1e-6)
    assert make(pipeline).weights(drawn) is None


def test_a_shared_batch_draws_what_the_whole_one_does(pipelines):
    pipeline = pipelines["epsilon"]
    objective = make(pipeline, noise_offset=0.1, input_perturbation=0.1, embedding_noise=0.1)
    batch = make_batch(pipeline, 5)
    torch.manual_seed(0)
    whole = draw(objective, batch)
    for rows in (slice(0, 3), slice(3, 5)):
        torch.manual_seed(0)
        inputs = {key: value[rows] for key, value in batch.inputs.items()}
        part = draw(objective, Batch(batch.images[rows], inputs, share=(rows, 5)))
        for name in ("noise", "added_noise", "posterior_noise", "timesteps"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
        torch.testing.assert_close(part.latents, whole.latents[rows])
        torch.testing.assert_close(part.condition[TOLD], whole.condition[TOLD][rows])


def test_embedding_noise_has_its_scale_and_leaves_the_other_draws(pipelines):
    pipeline = pipelines["epsilon"]
    batch = make_batch(pipeline, 32)
    drawn, streams = [], []
    for options in ({}, {"embedding_noise": 0.0}, {"embedding_noise": 0.1}):
        torch.manual_seed(0)
        drawn.append(draw(make(pipeline, **options), batch))
        streams.append(torch.get_rng_state())
    plain, off, noisy = drawn
    assert torch.equal(off.condition[TOLD], plain.condition[TOLD]) and torch.equal(streams[0], streams[1])
    for name in ("latents", "posterior_noise", "noise", "added_noise", "timesteps"):
        assert torch.equal(getattr(noisy, name), getattr(plain, name))
    noise = noisy.condition[TOLD] - plain.condition[TOLD]
    assert noise.std().item() == pytest.approx(0.1, rel=0.02) and abs(noise.mean().item()) < 2e-3
    assert len({sample[0, 0].item() for sample in noise}) == 32


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("epsilon", {}),
        ("v_prediction", {}),
        ("v_prediction", {"input_perturbation": 0.1, "embedding_noise": 0.1}),
        ("epsilon", {"dream_detail_preservation": 1.0}),
    ],
)
def test_magnitudes_are_the_norms_of_the_text_conditional_noise(pipelines, kind, options):
    """By hand, sample by sample, from the model's output as it is."""
    pipeline = pipelines[kind]
    nothing = pipeline.text_encoder(pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids)[0]
    objective = make(pipeline, unconditional={TOLD: nothing.detach()}, **options)
    drawn = draw(objective, make_batch(pipeline, 6))
    shown = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: shown.append(inputs))
    losses, magnitudes = objective.losses_and_magnitudes(pipeline.unet, drawn)
    hook.remove()
    noisy = shown[-1][0]  # what the model was shown last: DREAM changes it
    for i, t in enumerate(drawn.timesteps):
        predicted = []
        for condition in (drawn.condition[TOLD][i : i + 1], nothing):
            with torch.no_grad():
                predicted.append(pipeline.unet(noisy[i : i + 1], t, condition).sample[0])
        wanted = (predicted[0] - predicted[1]).pow(2).sum().sqrt()
        assert magnitudes[i].item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-5)
    torch.testing.assert_close(losses, objective.losses(pipeline.unet, drawn))
    assert losses.requires_grad and not magnitudes.requires_grad


def test_new_images_change_their_latents_alone(pipelines):
    pipeline = pipelines["epsilon"]
    objective = make(pipeline)
    drawn = draw(objective, make_batch(pipeline))
    changed = objective.with_images(drawn, [1, 3], torch.zeros(2, 3, 16, 16))
    same = (changed.latents == drawn.latents).flatten(1).all(dim=1)
    assert same.tolist() == [True, False, True, False]
    assert changed.noise is drawn.noise and changed.timesteps is drawn.timesteps
    unchanged = objective.with_images(drawn, [2], make_batch(pipeline).images[2:3])
    torch.testing.assert_close(unchanged.latents, drawn.latents, rtol=1e-4, atol=1e-5)


def test_wrong_prediction_types_are_named(pipelines):
    with pytest.raises(UsageError, match="`dream_training` works only with prediction type epsilon"):
        make(pipelines["v_prediction"], dream_detail_preservation=1.0)
    odd = testing.random_pipeline(["x"], prediction_type="sample")
    with pytest.raises(UsageError, match="`prediction_type` sample"):
        make(odd)
