"""Shards are a partition, in equal parts; redistribution passes the most skipped on and keeps the partition."""

import numpy as np
import pytest

from ietagc_diffusers import ShardPlan, UsageError
from ietagc_diffusers.method import sharding
from ietagc_diffusers.method.sharding import SkipHistory


def ids(plan):
    return np.sort(np.concatenate(plan.shards)).tolist()


@pytest.mark.parametrize(("n", "k"), [(10, 1), (10, 3), (100, 7), (5, 5)])
def test_split_is_a_seeded_partition_in_equal_parts(n, k):
    plan = ShardPlan.split(n, k, seed=3)
    assert ids(plan) == list(range(n))
    sizes = [len(shard) for shard in plan.shards]
    assert max(sizes) - min(sizes) <= 1
    again, other = ShardPlan.split(n, k, seed=3), ShardPlan.split(n, k, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(plan.shards, again.shards, strict=True))
    if 1 < k < n:
        assert any(not np.array_equal(a, b) for a, b in zip(plan.shards, other.shards, strict=True))


def test_labels_are_dealt_evenly():
    labels = np.repeat(["cat", "dog", "newt"], [40, 20, 8])
    plan = ShardPlan.split(68, 4, seed=0, labels=labels)
    for name, count in (("cat", 10), ("dog", 5), ("newt", 2)):
        assert [int((labels[shard] == name).sum()) for shard in plan.shards] == [count] * 4


def test_groups_stay_together_through_splits_and_moves():
    groups = np.concatenate([np.arange(30), np.repeat(np.arange(10), 3)])
    plan = ShardPlan.split(60, 4, seed=1, groups=groups)
    rng = np.random.default_rng(0)
    for round_index in range(6):
        assert ids(plan) == list(range(60))
        homes = [set(groups[shard]) for shard in plan.shards]
        assert sum(map(len, homes)) == 30
        plan = plan.redistribute(rng.integers(9, size=60), 0.25, seed=round_index)


def test_without_sharding_each_proxy_holds_everything():
    plan = ShardPlan.whole(5, 3)
    assert [shard.tolist() for shard in plan.shards] == [[0, 1, 2, 3, 4]] * 3
    assert plan.redistribute(np.arange(5), 0.0) is plan


def test_more_shards_than_samples_is_an_error():
    with pytest.raises(UsageError, match="`num_shards` 4: more than the 3 training samples"):
        ShardPlan.split(3, 4, seed=0)
    with pytest.raises(UsageError, match="more than the 2 groups"):
        ShardPlan.split(6, 3, seed=0, groups=[0, 0, 0, 1, 1, 1])


def test_move_passes_the_most_skipped_to_the_next_shard():
    plan = ShardPlan((np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7]), np.array([8, 9, 10, 11])))
    skips = np.array([0, 9, 1, 2, 7, 0, 0, 0, 0, 0, 0, 3])
    moved = plan.redistribute(skips, 0.25)
    assert [shard.tolist() for shard in moved.shards] == [[0, 2, 3, 11], [1, 5, 6, 7], [4, 8, 9, 10]]
    assert moved.num_moved(plan) == 3


def test_copy_is_the_literal_union():
    plan = ShardPlan((np.array([0, 1]), np.array([2, 3])))
    copied = plan.redistribute(np.array([5, 0, 0, 5]), 0.5, mode="copy")
    assert [shard.tolist() for shard in copied.shards] == [[0, 1, 3], [0, 2, 3]]


def test_counts_by_shard_are_used_where_a_sample_is_in_two():
    plan = ShardPlan((np.array([0, 1, 2, 3]), np.array([0, 1, 4, 5])))
    skips = np.array([[9, 0, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0]])
    moved = plan.redistribute(skips, 0.25)
    assert [shard.tolist() for shard in moved.shards] == [[1, 2, 3], [0, 4, 5]]


def test_ties_and_random_choice_follow_the_seed():
    plan = ShardPlan.split(200, 2, seed=0)
    for by in ("skips", "random"):
        skips = np.zeros(200) if by == "skips" else np.arange(200)
        a, b, c = (plan.redistribute(skips, 0.3, by=by, seed=s) for s in ([1, 2], [1, 2], [1, 3]))
        assert np.array_equal(a.shards[0], b.shards[0]) and not np.array_equal(a.shards[0], c.shards[0])
        assert [len(s) for s in a.shards] == [100, 100] and a.num_moved(plan) == 60


def test_nothing_moves_with_one_shard_or_no_fraction():
    one = ShardPlan.split(9, 1, seed=0)
    assert one.redistribute(np.arange(9), 0.5) is one
    two = ShardPlan.split(9, 2, seed=0)
    assert two.redistribute(np.arange(9), 0.0) is two


def test_groups_go_to_the_shard_that_holds_least():
    rng = np.random.default_rng(0)
    for trial in range(50):
        loads = rng.integers(0, 30, size=rng.integers(1, 6))
        count, size = int(rng.integers(0, 40)), int(rng.integers(1, 9))
        filled, wanted, shards = loads.copy(), loads.copy(), []
        for _ in range(count):
            shards.append(int(wanted.argmin()))
            wanted[shards[-1]] += size
        assert sharding._fill(filled, count, size).tolist() == shards, trial
        assert filled.tolist() == wanted.tolist()


def test_histories_of_skips_are_their_definitions():
    rounds = np.random.default_rng(0).integers(0, 5, (4, 3, 10))  # rounds, shards, samples
    histories = {kind: SkipHistory(kind) for kind in SkipHistory.KINDS}
    for number, counts in enumerate(rounds):
        added = {kind: history.add(counts) for kind, history in histories.items()}
        assert added["round"] is counts
        assert np.array_equal(added["total"], rounds[: number + 1].sum(axis=(0, 1)))
        weights = SkipHistory.DECAY ** np.arange(number, -1, -1)
        wanted = (rounds[: number + 1].sum(axis=1) * weights[:, None]).sum(axis=0)
        np.testing.assert_allclose(added["decayed"], wanted)
    resumed = SkipHistory("decayed")
    resumed.load_state_dict(histories["decayed"].state_dict())
    assert np.array_equal(resumed.add(rounds[0]), histories["decayed"].add(rounds[0]))
