"""The objective draws once, and its losses are the plain formulas."""

import pytest
import torch

from ietagc_diffusers import TextToImageObjective, UsageError, tiny


@pytest.fixture(scope="module")
def pipelines():
    return {kind: tiny.random_pipeline(["a red picture"], prediction_type=kind) for kind in ("epsilon", "v_prediction")}


def make(pipeline, **options):
    return TextToImageObjective(pipeline.vae, pipeline.text_encoder, pipeline.scheduler, **options)


def make_batch(pipeline, size=4):
    tokens = pipeline.tokenizer(["a red picture"] * size, padding="max_length", return_tensors="pt").input_ids
    return {"pixel_values": torch.linspace(-1, 1, size * 3 * 256).view(size, 3, 16, 16), "input_ids": tokens}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_are_the_mean_squared_errors(pipelines, kind):
    pipeline = pipelines[kind]
    objective = make(pipeline)
    drawn = objective.draw(make_batch(pipeline))
    alphas = pipeline.scheduler.alphas_cumprod[drawn.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * drawn.latents + (1 - alphas).sqrt() * drawn.noise
    target = drawn.noise if kind == "epsilon" else alphas.sqrt() * drawn.noise - (1 - alphas).sqrt() * drawn.latents
    with torch.no_grad():
        prediction = pipeline.unet(noisy, drawn.timesteps, drawn.condition).sample
        losses = objective.losses(pipeline.unet, drawn)
        plain = objective.plain_loss(pipeline.unet, drawn)
    torch.testing.assert_close(losses, (prediction - target).pow(2).flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain, losses.mean())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_formula(pipelines, kind):
    pipeline = pipelines[kind]
    timesteps = torch.tensor([0, 10, 500, 999])
    alphas = pipeline.scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    wanted = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(make(pipeline, snr_gamma=5.0).weights(timesteps), wanted, rtol=1e-4, atol=1e-6)
    assert make(pipeline).weights(timesteps) is None


def test_a_shared_batch_draws_what_the_whole_one_does(pipelines):
    pipeline = pipelines["epsilon"]
    objective = make(pipeline, noise_offset=0.1, input_perturbation=0.1)
    batch = make_batch(pipeline, 5)
    torch.manual_seed(0)
    whole = objective.draw(batch)
    for rows in (slice(0, 3), slice(3, 5)):
        torch.manual_seed(0)
        part = objective.draw({key: value[rows] for key, value in batch.items()} | {"rows": rows, "batch_rows": 5})
        for name in ("noise", "added_noise", "posterior_noise", "timesteps"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
        torch.testing.assert_close(part.latents, whole.latents[rows])


def test_new_images_change_their_latents_alone(pipelines):
    pipeline = pipelines["epsilon"]
    objective = make(pipeline)
    drawn = objective.draw(make_batch(pipeline))
    changed = objective.with_images(drawn, [1, 3], torch.zeros(2, 3, 16, 16))
    same = (changed.latents == drawn.latents).flatten(1).all(dim=1)
    assert same.tolist() == [True, False, True, False]
    assert changed.noise is drawn.noise and changed.timesteps is drawn.timesteps
    unchanged = objective.with_images(drawn, [2], make_batch(pipeline)["pixel_values"][2:3])
    torch.testing.assert_close(unchanged.latents, drawn.latents, rtol=1e-4, atol=1e-5)


def test_wrong_prediction_types_are_named(pipelines):
    with pytest.raises(UsageError, match="--dream_training works with prediction type epsilon alone"):
        make(pipelines["v_prediction"], dream_detail_preservation=1.0)
    odd = tiny.random_pipeline(["x"], prediction_type="sample")
    with pytest.raises(UsageError, match="--prediction_type sample"):
        make(odd)
