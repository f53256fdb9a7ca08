"""What a sweep keeps, as integers."""

import pytest
from choices import CHECKPOINTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel as bl


@settings(max_examples=50, deadline=None, derandomize=True)
@given(horizon=st.integers(0, 200), checkpointing=st.sampled_from(CHECKPOINTINGS))
def test_blocks_cover_every_step_once_and_in_order(horizon, checkpointing):
    blocks = list(checkpointing.blocks(horizon))
    assert [t for block in blocks for t in block] == list(range(horizon))
    assert all(len(block) > 0 for block in blocks)


def test_the_default_has_blocks_of_one_step_and_graphs_kept_have_one_block():
    assert [len(b) for b in bl.Checkpointing().blocks(5)] == [1] * 5
    assert [len(b) for b in bl.Checkpointing(block=None).blocks(5)] == [5]
    assert not bl.Checkpointing().keeps_graphs
    assert bl.Checkpointing(block=None).keeps_graphs


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", ["snapshots", "block"])
def test_counts_below_one_are_refused(name, value):
    with pytest.raises(bl.ArgumentError, match=f"{name} must be at least 1, or None, got {value}"):
        bl.Checkpointing(**{name: value})


@pytest.mark.parametrize(
    "fields", [{"snapshots": 3}, {"block": 2}, {"snapshots": 1, "block": None}]
)
def test_schedules_that_this_version_lacks_are_refused_with_those_it_has(fields):
    with pytest.raises(bl.UnsupportedError, match=r"use Checkpointing\(\).*block=None"):
        bl.Checkpointing(**fields)
