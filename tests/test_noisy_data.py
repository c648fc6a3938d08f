"""Training on noisy data at high noise levels is the authors' rule, whatever the model predicts."""

from dataclasses import replace

import pytest
import torch

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.arguments import parse_flags
from ietagc_diffusers.data import Batch, Condition, TrainingSamples, load_training_rows
from ietagc_diffusers.data.settings import ImageSettings
from ietagc_diffusers.families.noisy_data import NoisyData
from ietagc_diffusers.training.prior import Prior
from ietagc_diffusers.training.streams import RandomStreams

KINDS = ["epsilon", "sample", "velocity", "flow"]  # what models predict
CAPTIONS = ["a red picture"]


def said(kind, a, b, x_t, image):
    """What a model of this kind predicts whose image is ``image``: x_t = a image + b noise."""
    noise = (x_t - a * image) / b
    return {"epsilon": noise, "sample": image, "velocity": a * noise - b * image, "flow": noise - image}[kind]


def scales_of(kind, level):
    """(a, b) of a noise level in (0, 1]."""
    return (1 - level, level) if kind == "flow" else ((1 - level**2).sqrt(), level)


def mix(rule, kind, w, n, a, b):
    return rule.mix(w, n, a, b, "v_prediction" if kind in ("velocity", "flow") else kind)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_gradients_are_those_of_the_authors_rule(kind):
    """By their formulas: clean below sigma_n; above it the noisy image, fresh noise, and the prediction of it."""
    torch.manual_seed(0)
    y, n, w, image = torch.randn(4, 6, 3, 4, 4, dtype=torch.float64)  # image: what a model makes of it
    a, b = scales_of(kind, torch.tensor([0.05, 0.3, 0.4, 0.6, 0.9, 0.99], dtype=torch.float64))
    sigma, sigma_n = b / a, 0.5
    mixture = mix(NoisyData(sigma_n, 0), kind, w, n, a, b)
    assert 0 < (sigma < sigma_n).sum() < 6
    for i in range(6):
        x_t = a[i] * y[i] + b[i] * mixture.noise[i]
        if sigma[i] < sigma_n:
            wanted_x, known, target = a[i] * (y[i] + sigma[i] * w[i]), 0.0, y[i]
        else:
            target, known = y[i] + sigma_n * n[i], sigma_n**2 / sigma[i] ** 2
            wanted_x = a[i] * (target + (sigma[i] ** 2 - sigma_n**2).sqrt() * w[i])
        torch.testing.assert_close(x_t, wanted_x, rtol=1e-5, atol=1e-6)
        x_0 = image[i].clone().requires_grad_()
        says = (1 - known) * x_0 + known * wanted_x / a[i]
        # The plain loss of this kind of prediction weighs the error of the image by the square of this.
        one = said(kind, a[i], b[i], x_t, torch.ones(())) - said(kind, a[i], b[i], x_t, torch.zeros(()))
        (wanted,) = torch.autograd.grad((one.square() * (says - target).square()).sum(), x_0)
        prediction, plain = said(kind, a[i], b[i], x_t, x_0), said(kind, a[i], b[i], x_t, y[i])
        of_row = replace(mixture, kept=mixture.kept[i], shift=mixture.shift[i])
        losses = of_row.losses(prediction, plain)
        (found,) = torch.autograd.grad(losses.sum(), x_0)
        torch.testing.assert_close(found, wanted.to(found), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(losses.double(), (prediction - plain).square(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_fresh_noise_the_best_model_is_that_of_plain_training(kind):
    """On a Gaussian, whose best model is known: images N(0, t^2), E[y | x_t] = t^2 / (t^2 + sigma^2) x_t / a."""
    torch.manual_seed(0)
    t, number = 0.7, 200_000
    y, n, w = t * torch.randn(1, number), torch.randn(1, number), torch.randn(1, number)
    a, b = scales_of(kind, torch.tensor([0.6]))
    mixture = mix(NoisyData(0.4, 0), kind, w, n, a, b)
    assert mixture.kept < 1 and abs((mixture.noise * mixture.shift).mean().item()) < 0.01  # independent
    x_t = a * y + b * mixture.noise
    factor = torch.tensor(t**2 / (t**2 + (b / a).item() ** 2), requires_grad=True)
    target = said(kind, a, b, x_t, y)
    losses = mixture.losses(said(kind, a, b, x_t, factor * x_t / a), target)
    (gradient,) = torch.autograd.grad(losses.mean(), factor)
    off = mixture.losses(said(kind, a, b, x_t, (factor + 0.1) * x_t / a), target)
    (elsewhere,) = torch.autograd.grad(off.mean(), factor)
    assert abs(gradient.item()) < 0.05 * abs(elsewhere.item())
    # What the rule reads off it is E[y_n | x_t] = (t^2 + sigma_n^2) / (t^2 + sigma^2) x_t / a.
    k = 1 - mixture.kept.item()
    y_n, x = y + 0.4 * n, x_t / a
    read_off = (1 - k) * factor.item() + k
    assert read_off == pytest.approx(((y_n * x).mean() / x.square().mean()).item(), rel=0.02)


def test_pure_noise_has_a_finite_target():
    mixture = NoisyData(0.5, 0).mix(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1), torch.ones(1), "v_prediction")
    assert torch.equal(mixture.noise, torch.ones(1, 2)) and torch.equal(mixture.shift, torch.full((1, 2), -0.5))


def objective_of(kind, sigma):
    rule = {} if sigma is None else {"noisy_data": NoisyData(sigma, 7)}
    makers = {
        "pixels": testing.random_unconditional_pipeline,
        "latents": lambda: testing.random_pipeline(CAPTIONS),
        "xl": lambda: testing.random_xl_pipeline(CAPTIONS, prediction_type="sample"),
        "flow": lambda: testing.random_sd3_pipeline(CAPTIONS),
    }
    return testing.family_of_pipeline(makers[kind](), **rule)


def loss_and_gradient(family, batch, seed=0):
    torch.manual_seed(seed)
    drawn = family.objective.draw(family.objective.encode(batch))
    loss, losses = (
        compute(family.denoiser, drawn) for compute in (family.objective.plain_loss, family.objective.losses)
    )
    gradients = torch.autograd.grad(
        loss, [p for p in family.denoiser.parameters() if p.requires_grad], allow_unused=True
    )
    return drawn, loss, losses, [g for g in gradients if g is not None]


@pytest.mark.parametrize("kind", ["pixels", "latents", "xl", "flow"])
def test_without_noise_it_is_plain_training_bit_for_bit(kind):
    texts = CAPTIONS * 4
    images = torch.linspace(-1, 1, 4 * 3 * 256).view(4, 3, 16, 16)
    plain = loss_and_gradient(family := objective_of(kind, None), family.batch(images, texts))
    for sigma, ids in ((0.0, [3, 4, 5, 6]), (1e-9, [3, 4, 5, 6]), (0.5, None)):  # without ids: prior pictures, audits
        family = objective_of(kind, sigma)
        _, loss, losses, gradients = loss_and_gradient(family, replace(family.batch(images, texts), ids=ids))
        if sigma == 1e-9:
            torch.testing.assert_close(losses, plain[2])
            continue
        assert torch.equal(loss, plain[1]) and torch.equal(losses, plain[2])
        assert all(map(torch.equal, gradients, plain[3]))
    batch = replace(objective_of(kind, 0.5).batch(images, texts), ids=[3, 4, 5, 6])
    drawn, loss, losses, gradients = loss_and_gradient(objective_of(kind, 0.5), batch)
    assert not all(map(torch.equal, gradients, plain[3]))
    torch.testing.assert_close(drawn[1:3].own["noise"], drawn.own["noise"][1:3])
    assert drawn.own["noise"].shape == (drawn.noise.shape)


def test_an_image_keeps_its_noise_in_any_batch():
    rule = NoisyData(0.5, 7)
    one = rule.own_noise([5, 9, 5], (3, 32, 32))
    assert torch.equal(one[0], one[2]) and torch.equal(one[1], rule.own_noise([9], (3, 32, 32))[0])
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], NoisyData(0.5, 8).own_noise([5], (3, 32, 32))[0])
    assert one.std().item() == pytest.approx(1, rel=0.05) and rule.own_noise([-1], (1,)).isfinite().all()


def test_batches_say_which_images_they_are_of(pictures):
    settings = ImageSettings(train_data_dir=str(pictures), max_train_samples=9, seed=3)
    rows = load_training_rows(settings)
    family = testing.family_of_pipeline(testing.random_unconditional_pipeline())
    samples = TrainingSamples(rows, "image", family.view(settings), Condition())
    batch = samples.__getitems__([(4, 1), (2, 2)])
    assert batch.ids == [rows["sample_id"][4], rows["sample_id"][2]] and batch.to("cpu").ids == batch.ids


def test_prior_pictures_are_denoised_as_usual():
    batch, asked = Batch(torch.zeros(2, 3, 4, 4), samples=torch.arange(2), ids=[0, 1]), []

    class Loader:
        taken = 0

        def next(self):
            return batch, False

    class Objective:
        def encode(self, batch):
            asked.append(batch.ids)

        def draw(self, encoded):
            return encoded

        def plain_loss(self, model, drawn):
            return torch.ones(())

    Prior(Loader(), 1.0, (0, 0), RandomStreams(), "prior").loss(None, Objective(), torch.device("cpu"))
    assert asked == [None]


@pytest.mark.parametrize("other", ["--noise_offset=0.1", "--input_perturbation=0.1", "--dream_training"])
def test_other_noise_is_refused(other):
    with pytest.raises(UsageError, match="`noisy_data_sigma`: takes the noise to be standard normal"):
        parse_flags(["--pretrained_model_name_or_path=b", "--train_data_dir=d", "--noisy_data_sigma=0.5", other])
