"""Forty runs killed at random moments and resumed: the same weights, forty times."""

import pytest

from benchmarks.faults import campaign


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights():
    table = campaign(kills=48, seed=1)
    assert sum(killed for *_, killed, _, _ in table) >= 40
    assert all(identical for *_, identical in table)
