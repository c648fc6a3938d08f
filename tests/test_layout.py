"""Which numbers of processes fit, and who trains what."""

import pytest

from ietagc_diffusers import Layout, UsageError
from ietagc_diffusers.training.layout import valid_process_counts


@pytest.mark.parametrize(("shards", "processes"), [(4, 1), (4, 2), (4, 4), (6, 3), (1, 1)])
def test_each_shard_belongs_to_one_process(shards, processes):
    layouts = [Layout(shards, processes, rank) for rank in range(processes)]
    assert sorted(shard for layout in layouts for shard in layout.shards) == list(range(shards))
    assert all(layout.size == 1 and len(layout.shards) == shards // processes for layout in layouts)
    assert all(layout.groups == layouts[0].groups for layout in layouts)


@pytest.mark.parametrize(("shards", "processes"), [(4, 3), (4, 6), (3, 2), (10, 4)])
def test_other_numbers_are_refused_with_those_that_fit(shards, processes):
    with pytest.raises(UsageError) as error:
        Layout(shards, processes, 0)
    message = str(error.value)
    assert f"`num_processes` {processes} does not fit `num_shards` {shards}" in message
    listed = [int(word) for word in message.split("that do: ")[1].split(", ")]
    assert listed == valid_process_counts(shards, max(16, 2 * processes))
    assert all(shards % w == 0 or w % shards == 0 for w in listed) and shards in listed


def test_alone_nothing_crosses():
    import torch

    layout = Layout(3)
    value = torch.tensor([1.0, 2.0])
    assert layout.gather(value) is value and layout.sum(value) is value and layout.total(value) is value
