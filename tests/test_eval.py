"""Metrics equal brute force in float64, and say 'copy' of copies."""

import numpy as np
import pytest
import torch
from conftest import train_flags, train_here

from eval.frechet import frechet_distance
from eval.front import FixedLosses, FrontPoint, at_gap, measure, saved_models
from eval.generate import generate
from eval.memorized_quantity import l2_ratio, memorized_quantity
from eval.neighbours import most_similar, nearest_l2
from eval.similarity import copy_rate, sim_score
from ietagc_diffusers import tiny
from sscd import pixel_descriptor


def points(seed, n, d=12):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_nearest_neighbours_equal_brute_force(k):
    queries, references = points(0, 33), points(1, 40)
    exact = torch.cdist(queries.double(), references.double())
    distances, indices = nearest_l2(queries, references, k, chunk=10)
    wanted = exact.sort(dim=1)
    torch.testing.assert_close(distances.double(), wanted.values[:, :k], rtol=1e-5, atol=1e-6)
    assert torch.equal(indices, wanted.indices[:, :k])


def test_a_duplicate_has_distance_zero():
    references = points(2, 200, 3072) * 100
    distances, indices = nearest_l2(references[[7, 90]], references)
    assert distances.flatten().tolist() == [0.0, 0.0] and indices.flatten().tolist() == [7, 90]


def test_most_similar_equals_brute_force_and_leaves_itself_out():
    vectors = torch.nn.functional.normalize(points(3, 50), dim=1)
    similarity = (vectors.double() @ vectors.double().T).fill_diagonal_(-2)
    values, indices = most_similar(vectors, vectors, chunk=7, exclude_self=True)
    torch.testing.assert_close(values.double(), similarity.max(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(indices, similarity.argmax(1))


def test_l2_ratio_is_the_protocol_s_formula():
    generated, training = points(4, 9), points(5, 70)
    squared = np.sort(torch.cdist(generated.double(), training.double()).numpy() ** 2, axis=1)
    wanted = squared[:, 0] / squared[:, :50].mean(1)
    np.testing.assert_allclose(l2_ratio(generated, training).numpy(), wanted, rtol=1e-4)
    assert memorized_quantity(torch.tensor([0.1, 0.4, 0.45, 0.9])) == {"0.4": 0.5, "0.5": 0.75, "0.6": 0.75}


def test_identical_sets_are_copies():
    images = torch.randint(0, 256, (60, 3, 20, 20), dtype=torch.uint8)
    descriptors = pixel_descriptor(images)
    similarity, indices = most_similar(descriptors, descriptors)
    assert sim_score(similarity) == pytest.approx(1, abs=1e-5) and copy_rate(similarity) == 1
    assert torch.equal(indices, torch.arange(60))
    flat = images.float().flatten(1) / 255
    assert memorized_quantity(l2_ratio(flat, flat)) == {"0.4": 1, "0.5": 1, "0.6": 1}
    assert frechet_distance(points(6, 300), points(6, 300)) == pytest.approx(0, abs=1e-6)


def test_sim_score_is_the_95th_percentile():
    values = torch.rand(1001)
    assert sim_score(values) == pytest.approx(float(np.percentile(values.numpy(), 95)), rel=1e-5)


def test_frechet_distance_of_known_normals():
    """Diagonal covariances: the sum of squared differences of means and of standard deviations."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # exactly white
    first, second = z * torch.tensor([1.0, 2.0, 3.0]), z * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([0.5, 0.0, 1.0])
    assert frechet_distance(first, second) == pytest.approx(1 + 0 + 4 + 0.25 + 1, rel=1e-6)


def test_pixel_descriptors_are_unit_vectors_that_know_a_brightened_copy():
    images = torch.randint(0, 200, (20, 3, 32, 32), dtype=torch.uint8)
    descriptors, brighter = pixel_descriptor(images), pixel_descriptor(images + 40)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(20))
    assert torch.equal((brighter @ descriptors.T).argmax(1), torch.arange(20))


@pytest.fixture(scope="module")
def run_dir(base, pictures, tmp_path_factory):
    flags = train_flags(base, pictures, "--mitigation=none", "--max_train_steps=12", "--steps_per_round=4", "--use_ema")
    return train_here([*flags, "--save_rounds", "--checkpointing_steps=6"], tmp_path_factory.mktemp("runs") / "run")


def test_front_starts_at_the_base_with_gap_zero(base, run_dir):
    images, captions = torch.rand(6, 3, 16, 16) * 2 - 1, ["a red picture"] * 6
    heldout = (torch.rand(5, 3, 16, 16) * 2 - 1, ["a blue picture"] * 5)
    torch.manual_seed(0)
    first = measure(base, {"run": run_dir}, (images, captions), heldout)
    torch.manual_seed(1)
    assert measure(base, {"run": run_dir}, (images, captions), heldout) == first
    assert [p.step for p in first] == [0, 4, 8, 12] and first[0].gap == 0
    for p in first[1:]:
        difficulty = first[0].heldout_loss - first[0].train_loss
        assert p.gap == pytest.approx(p.heldout_loss - p.train_loss - difficulty, abs=1e-7)


def test_checkpoints_serve_where_no_rounds_were_saved(run_dir, tmp_path):
    import shutil

    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("rounds"))
    assert [(step, path.name) for step, path in saved_models(tmp_path / "run")] == [(6, "unet_ema"), (12, "unet_ema")]


def test_fixed_losses_do_not_depend_on_the_batch_size(base):
    images, captions = torch.rand(7, 3, 16, 16) * 2 - 1, ["a red picture"] * 7
    pipeline = tiny.random_pipeline(["a red picture"])
    losses = FixedLosses(base, images, captions, batch_size=7)(pipeline.unet)
    assert losses.shape == (7,) and losses.isfinite().all()


def test_loss_at_a_gap_is_interpolated():
    run = [FrontPoint("r", s, 0, loss, gap) for s, loss, gap in ((0, 1.0, 0.0), (1, 0.6, 0.2), (2, 0.8, 0.4))]
    assert at_gap(run, 0.1) == pytest.approx(0.8)
    assert at_gap(run, 0.3) == pytest.approx(0.7)
    assert at_gap(run, 0.5) is None


def test_images_depend_on_their_seed_alone(base):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    prompts, seeds = ["a red picture", "a blue picture", "a green picture"], [4, 5, 6]
    together = generate(pipeline, prompts, seeds, num_inference_steps=2, batch_size=3)
    apart = generate(pipeline, prompts, seeds, num_inference_steps=2, batch_size=2)
    assert together.shape == (3, 3, 16, 16) and together.dtype == torch.uint8
    assert (together.int() - apart.int()).abs().max() <= 1
