"""Nearest neighbours, MQ and the Gu ratio equal brute force in float64, in whatever memory."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, environment

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.eval import approximate
from ietagc_diffusers.eval.metrics.l2 import l2_ratio, memorization_ratio, memorized_quantity
from ietagc_diffusers.eval.neighbours import CANCELS, _chunk_sizes, _top, most_similar, nearest_l2

KIB = 2**10


def points(seed, n, d=12):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("max_memory", [8 * KIB, 2**30])
def test_nearest_neighbours_equal_brute_force(k, max_memory):
    queries, references = points(0, 33), points(1, 40)
    wanted = torch.cdist(queries.double(), references.double()).sort(dim=1)
    distances, indices = nearest_l2(queries, references, k, max_memory)
    torch.testing.assert_close(distances.double(), wanted.values[:, :k], rtol=1e-5, atol=1e-6)
    assert torch.equal(indices, wanted.indices[:, :k])


def test_a_duplicate_has_distance_zero():
    references = points(2, 200, 3072) * 100
    distances, indices = nearest_l2(references[[7, 90]], references, max_memory=3000 * KIB)
    assert distances.flatten().tolist() == [0.0, 0.0] and indices.flatten().tolist() == [7, 90]


def test_far_from_the_origin_neighbours_are_still_right():
    """Uncentred, the squares of such vectors drown their differences in float32."""
    references = points(3, 300, 64) + 1000
    queries = points(4, 20, 64) + 1000
    wanted = torch.cdist(queries.double(), references.double()).min(dim=1)
    distances, indices = nearest_l2(queries, references)
    assert torch.equal(indices[:, 0], wanted.indices)
    torch.testing.assert_close(distances[:, 0].double(), wanted.values, rtol=1e-4, atol=0)


def test_bytes_count_as_shares_of_255():
    queries, references = (torch.randint(0, 256, (n, 48), dtype=torch.uint8) for n in (10, 30))
    distances, _ = nearest_l2(queries, references, 3)
    wanted, _ = nearest_l2(queries.float() / 255, references.float() / 255, 3)
    torch.testing.assert_close(distances, wanted)


def test_more_neighbours_than_references_are_all_of_them():
    assert nearest_l2(points(0, 4), points(1, 3), 50)[0].shape == (4, 3)


def test_working_memory_stays_within_the_bound():
    for queries, references, dim in ((65_536, 50_000, 3072), (10, 10, 10), (5, 10**6, 12_288)):
        rows, columns = _chunk_sizes(queries, references, dim, 2**28)
        assert rows >= 1 and columns >= 1
        assert 4 * (2 * rows * dim + 2 * columns * dim + 2 * rows * columns) <= 2**28 * 1.01


PEAK = """
import resource, torch
from ietagc_diffusers.eval.neighbours import nearest_l2
queries, references = torch.rand(4000, 8), torch.rand(40_000, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_l2(queries, references, 5, max_memory=2**24)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10
"""


def test_peak_memory_does_not_hold_all_distances():
    """640 MB of them, against a bound of 16 MB. In a process of its own: the peak is the process's."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize("max_memory", [8 * KIB, 2**30])
def test_most_similar_equals_brute_force_and_leaves_itself_out(max_memory):
    vectors = torch.nn.functional.normalize(points(3, 50), dim=1)
    similarity = (vectors.double() @ vectors.double().T).fill_diagonal_(-2)
    values, indices = most_similar(vectors, vectors, exclude_self=True, max_memory=max_memory)
    torch.testing.assert_close(values[:, 0].double(), similarity.max(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(indices[:, 0], similarity.argmax(1))


def test_groups_are_no_neighbours_of_their_own():
    vectors = torch.nn.functional.normalize(points(5, 30) - 0.5, dim=1)
    groups = torch.arange(30) // 3
    similarity = (vectors @ vectors.T).masked_fill(groups[:, None] == groups, -2)
    values, indices = most_similar(vectors, vectors, groups=(groups, groups), max_memory=8 * KIB)
    torch.testing.assert_close(values[:, 0], similarity.max(1).values)
    assert not (groups[indices[:, 0]] == groups).any()


def owned(counts):
    """The owner of each row, of owners with so many rows each; their numbers leave gaps."""
    counts = torch.tensor(counts)
    return (3 * torch.arange(len(counts))).repeat_interleave(counts)


def best_row_of_each(costs, owners):
    """By brute force: of each query the owners in order of their best row's cost, as (costs, rows)."""
    rows = []
    for cost in costs:
        best = [min((owners == owner).nonzero()[:, 0].tolist(), key=cost.__getitem__) for owner in owners.unique()]
        rows.append(sorted(best, key=cost.__getitem__))
    rows = torch.tensor(rows)
    return costs.gather(1, rows), rows


OWNED = {"one to four": [1, 4, 2, 3] * 10, "equal": [3] * 30, "one of many": [2, 60, 1, 1, 5]}


@pytest.mark.parametrize("max_memory", [6 * KIB, 2**30])
@pytest.mark.parametrize("k", [1, 2, 7, 100])
@pytest.mark.parametrize("counts", OWNED.values(), ids=OWNED)
def test_neighbours_are_of_different_owners_each_by_its_best_row(counts, k, max_memory):
    """With little memory the rows of an owner are in several chunks; k = 100 is more than there are owners."""
    owners = owned(counts)
    queries, references = points(0, 21), points(1, len(owners))
    assert max_memory > 2**20 or _chunk_sizes(21, len(owners), 12, max_memory)[1] < 50
    wanted, rows = best_row_of_each(torch.cdist(queries.double(), references.double()), owners)
    distances, indices = nearest_l2(queries, references, k, max_memory, owners=owners)
    assert torch.equal(indices, rows[:, :k])
    torch.testing.assert_close(distances.double(), wanted[:, :k], rtol=1e-5, atol=1e-6)
    queries, references = queries - 0.5, references - 0.5
    wanted, rows = best_row_of_each(-queries.double() @ references.double().T, owners)
    similarity, indices = most_similar(queries, references, k, max_memory=max_memory, owners=owners)
    assert torch.equal(indices, rows[:, :k])
    torch.testing.assert_close(similarity.double(), -wanted[:, :k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_memory", [6 * KIB, 2**30])
def test_no_view_of_a_query_s_own_owner_is_its_neighbour(max_memory):
    owners = owned([1, 4, 2, 3] * 5)
    vectors = points(2, len(owners)) - 0.5
    scores = (vectors @ vectors.T).masked_fill(owners[:, None] == owners, -9)
    wanted, rows = best_row_of_each(-scores, owners)
    for choice in ({"exclude_self": True}, {"groups": owners}, {"groups": (owners, owners)}):
        similarity, indices = most_similar(vectors, vectors, 3, owners=owners, max_memory=max_memory, **choice)
        assert torch.equal(indices, rows[:, :3])
        torch.testing.assert_close(similarity, -wanted[:, :3])
    alone = most_similar(vectors[:1], vectors[:1], owners=owners[:1], exclude_self=True)[0]
    assert alone.tolist() == [[-torch.inf]]


def test_of_nearly_equal_views_the_nearest_is_found():
    """Rounding of the products hides what one value of one view differs by."""
    references = points(2, 200, 3072).repeat_interleave(2, dim=0)
    references[::2, 5] += 1 / 255
    distances, indices = nearest_l2(references[1::2], references, 2, owners=torch.arange(400) // 2)
    assert not distances[:, 0].any() and torch.equal(indices[:, 0], torch.arange(1, 400, 2))


@pytest.mark.parametrize("owners", [torch.tensor([0, 1, 0]), torch.tensor([0, 1])])
def test_owners_that_decrease_or_are_too_few_are_refused(owners):
    for search in (nearest_l2, most_similar):
        with pytest.raises(ValueError, match="owners"):
            search(points(0, 2), points(1, 3), owners=owners)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_the_best_of_blocks_are_the_best(k):
    scores = points(7, 9, 1003)
    values, columns = _top(scores, k)
    assert torch.equal(values.sort(descending=True).values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, columns), values)


def test_the_rounding_of_products_is_far_below_what_is_measured_again():
    """A distance that is not measured again is right to 1e-5: the products' rounding over CANCELS is below 2e-5."""
    queries, references = points(0, 40, 12_288) - 0.5, points(1, 300, 12_288) - 0.5
    exact = torch.cdist(queries.double(), references.double())
    sums = queries.double().square().sum(1)[:, None] + references.double().square().sum(1)
    rounding = (sums - 2 * (queries @ references.T).double() - exact.square()).abs() / sums
    assert rounding.max() < 2e-5 * CANCELS


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is optional")
def test_faiss_finds_clear_neighbours_with_exact_distances():
    references = points(6, 3000, 16)
    queries = references[::50] + 1e-3
    exact, nearest = nearest_l2(queries, references, 1, index="exact")
    distances, indices = nearest_l2(queries, references, 1, index="faiss")
    assert torch.equal(indices, nearest) and torch.equal(distances, exact)
    unit = torch.nn.functional.normalize(references - 0.5, dim=1)
    values, found = most_similar(unit[:40], unit, index="faiss")
    assert torch.equal(found[:, 0], torch.arange(40))
    torch.testing.assert_close(values[:, 0], torch.ones(40))


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is optional")
@pytest.mark.parametrize("number", [1, 5, 20, 60])
def test_faiss_on_a_few_images_is_exact_and_counts_none_twice(number):
    queries, references = points(0, 7), points(1, number)
    distances, indices = nearest_l2(queries, references, 50, index="faiss")
    exact, nearest = nearest_l2(queries, references, 50, index="exact")
    assert torch.equal(indices, nearest)
    torch.testing.assert_close(distances, exact)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is optional")
def test_faiss_looks_into_more_lists_until_it_finds_the_neighbours(monkeypatch):
    """In directions without structure the lists nearest to a query hold few of its neighbours."""
    references, queries = (torch.nn.functional.normalize(points(n, n, 64) - 0.5, dim=1) for n in (4000, 300))
    nearest = most_similar(queries, references)[1]

    def found():
        return (most_similar(queries, references, index="faiss")[1] == nearest).double().mean()

    monkeypatch.setattr(approximate, "PROBES", 1)
    assert found() > 0.96
    monkeypatch.setattr(approximate, "WANTED", 0)
    assert found() < 0.5


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is optional")
@pytest.mark.parametrize("k", [1, 4, 50])
def test_faiss_finds_the_best_views_of_different_owners(k):
    owners = owned([1, 4, 2, 3] * 30)
    queries, references = points(8, 20), points(9, len(owners))
    wanted, rows = nearest_l2(queries, references, k, owners=owners)
    distances, indices = nearest_l2(queries, references, k, owners=owners, index="faiss")
    assert torch.equal(indices, rows)
    torch.testing.assert_close(distances, wanted)


def ratios_of(generated, training, protocol):
    return l2_ratio(*nearest_l2(generated, training, 50), training, protocol)


def brute_force(generated, training, protocol):
    distances = torch.cdist(generated.double(), training.double()).numpy()
    order = np.argsort(distances, axis=1)[:, :50]
    near = np.take_along_axis(distances, order, axis=1)
    if protocol == "gu":
        return near[:, 0] / near[:, 1]
    if protocol == "iet-agc":
        return near[:, 0] ** 2 / (near**2).mean(1)
    among = torch.cdist(training.double(), training.double()).numpy()
    return near[:, 0] / np.array([among[row[0], row].mean() for row in order])


@pytest.mark.parametrize("protocol", ["iet-agc", "paper", "gu"])
def test_ratios_are_their_protocol_s_formula(protocol):
    generated, training = points(4, 9), points(5, 70)
    ratios = ratios_of(generated, training, protocol).numpy()
    np.testing.assert_allclose(ratios, brute_force(generated, training, protocol), rtol=1e-4)


@pytest.mark.parametrize("protocol", ["iet-agc", "paper", "gu"])
def test_a_copy_has_ratio_zero_and_a_fresh_image_does_not(protocol):
    training = points(5, 70)
    ratios = ratios_of(torch.cat([training[:4], points(6, 4)]), training, protocol)
    assert not ratios[:4].any() and (ratios[4:] > 0.2).all()


def test_quantities_count_at_or_under_and_gu_counts_under():
    quantity = memorized_quantity(torch.tensor([0.1, 0.4, 0.45, 0.9]))["memorized_quantity"]
    assert quantity == {"0.4": 0.5, "0.5": 0.75, "0.6": 0.75}
    assert memorization_ratio(torch.tensor([0.1, 1 / 3, 0.4, 0.2]))["memorization_ratio"] == 0.5


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UsageError, match="`l2` l3"):
        ratios_of(points(0, 2), points(1, 3), "l3")


def test_the_paper_s_l2_ratio_allocates_nothing_large_for_each_image():
    """Otherwise the heap fragments: by 4 GB for 32,768 images."""

    def allocated(number):
        training = torch.randint(0, 256, (60, 3072), dtype=torch.uint8)
        nearest = torch.arange(50).expand(number, 50)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            l2_ratio(torch.ones(number, 50), nearest, training, "paper")
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    assert allocated(20) - allocated(10) < 10 * 2**13
