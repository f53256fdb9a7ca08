"""What a sweep keeps, as integers."""

import math
from functools import cache
from itertools import islice

import pytest
from choices import CHECKPOINTINGS
from counting import calls
from hypothesis import given, settings, strategies as st

import bilevel as bl
from bilevel.errors import ArgumentError
from bilevel.sweeps.schedule import Do, Schedule, repetitions


def simulate(schedule):
    """Follow a schedule; steps evaluated, most snapshots kept, times each block was advanced."""
    kept, most, evaluated, here = set(), 0, 0, 0
    taped, advanced = [], [0] * schedule.n_blocks
    for do, i in schedule.actions():
        match do:
            case Do.KEEP:
                assert here == i
                assert i not in kept
                kept.add(i)
                most = max(most, len(kept))
            case Do.ADVANCE:
                assert here is not None
                assert here < i
                for j in range(here, i):
                    advanced[j] += 1
                    evaluated += len(schedule.steps(j))
                here = i
            case Do.TAPE:
                assert here == i
                evaluated += len(schedule.steps(i))
                taped.append(i)
                here = None  # the tape ends at a state that was reversed already
            case Do.LOAD:
                assert i == max(kept)  # stores may count on last in, first out
                here = i
            case Do.DROP:
                assert i == max(kept)
                kept.remove(i)
    assert taped == list(reversed(range(schedule.n_blocks)))
    assert not kept
    return evaluated, most, advanced


@cache
def least_advanced(steps, snapshots, block):
    """By dynamic programming: fewest steps advanced, with snapshots allowed at any step."""
    if steps <= block:
        return 0
    if snapshots == 0:
        return math.inf
    return min(
        cut
        + least_advanced(steps - cut, snapshots - 1, block)
        + least_advanced(cut, snapshots, block)
        for cut in range(1, steps)
    )


@pytest.mark.parametrize("block", range(1, 8))
def test_no_schedule_evaluates_less_and_the_count_is_that_of_the_formula(block):
    for horizon in range(1, 41):
        for snapshots in range(1, 8):
            schedule = Schedule(horizon, block, snapshots)
            evaluated, most, advanced = simulate(schedule)
            assert most <= snapshots
            assert evaluated == schedule.forward_steps
            assert evaluated == horizon + least_advanced(horizon, snapshots, block)
            assert max(advanced) <= repetitions(schedule.n_blocks, snapshots)


@settings(max_examples=100)
@given(horizon=st.integers(0, 3000), block=st.integers(1, 100), snapshots=st.integers(1, 100))
def test_long_schedules_run_within_their_snapshots_and_as_long_as_the_formula_says(
    horizon, block, snapshots
):
    schedule = Schedule(horizon, block, snapshots)
    if schedule.forward_steps > 10**5:
        return
    evaluated, most, _ = simulate(schedule)
    assert most <= snapshots
    assert evaluated == schedule.forward_steps


def test_a_short_first_block_costs_less_than_a_short_last_one():
    assert Schedule(1000, 32, 10).forward_steps == 2616
    assert [len(Schedule(1000, 32, 10).steps(i)) for i in (0, 1, 31)] == [8, 32, 32]


def test_the_schedule_of_100_000_steps_begins_without_all_of_them():
    for snapshots in (1, 2, 3, 50, 10**5):
        with calls() as seen:
            schedule = Schedule(10**5, 1, snapshots)
            list(islice(schedule.actions(), 1000))
            assert schedule.forward_steps > 10**5
        assert 1000 < seen.made < 20_000


@settings(max_examples=50)
@given(horizon=st.integers(0, 200), checkpointing=st.sampled_from(CHECKPOINTINGS))
def test_blocks_cover_every_step_once_and_in_order(horizon, checkpointing):
    schedule = checkpointing.schedule(horizon)
    blocks = [schedule.steps(i) for i in range(schedule.n_blocks)]
    assert [t for block in blocks for t in block] == list(range(horizon))
    assert all(len(block) > 0 for block in blocks)


def test_the_default_has_blocks_of_one_step_and_graphs_kept_have_one_block():
    every, whole = bl.Checkpointing(), bl.Checkpointing(block=None)
    assert every.schedule(5) == Schedule(5, 1, 4)
    assert whole.schedule(5) == Schedule(5, 5, 1)
    assert not every.keeps_graphs
    assert whole.keeps_graphs


@pytest.mark.parametrize("value", [0, -3, 1.5, True])
@pytest.mark.parametrize("name", ["snapshots", "block"])
def test_counts_below_one_are_refused(name, value):
    with pytest.raises(
        ArgumentError, match=f"{name} must be a whole number >= 1, or None, got {value}"
    ):
        bl.Checkpointing(**{name: value})


@pytest.mark.parametrize("fields", [{"snapshots": 1}, {"storage": bl.OnHost()}])
def test_snapshots_beside_graphs_kept_are_refused(fields):
    with pytest.raises(ArgumentError, match=r"block=None keeps every graph.*leave out"):
        bl.Checkpointing(block=None, **fields)


def test_a_storage_that_is_none_is_refused():
    with pytest.raises(ArgumentError, match=r"storage must be InMemory.*got str"):
        bl.Checkpointing(storage="disk")


# --- Plans


def peak(checkpointing, horizon, state, graph, working):
    schedule = checkpointing.schedule(horizon)
    return (
        checkpointing.storage.resident(schedule.snapshots) * state
        + schedule.block * graph
        + working
    )


STORAGES = [bl.InMemory(), bl.OnHost(), bl.OnDisk("folder")]


@settings(max_examples=150)
@given(
    horizon=st.integers(1, 40),
    budget=st.integers(0, 300),
    state=st.integers(1, 20),
    graph=st.integers(1, 20),
    working=st.integers(0, 20),
    storage=st.sampled_from(STORAGES),
)
def test_a_plan_is_the_best_within_its_budget_or_an_error(
    horizon, budget, state, graph, working, storage
):
    choices = [
        bl.Checkpointing(s, k, storage)
        for k in range(1, horizon + 1)
        for s in range(1, horizon + 1)
    ]
    fitting = [c for c in choices if peak(c, horizon, state, graph, working) <= budget]
    arguments = (horizon, budget, state, graph, storage)
    if not fitting:
        resident = storage.resident(1)
        least = working + resident * state + graph
        with pytest.raises(ArgumentError, match=f"at least {least} bytes"):
            bl.plan(*arguments, working_bytes=working)
        bl.plan(horizon, least, *arguments[2:], working_bytes=working)
        return
    found = bl.plan(*arguments, working_bytes=working)
    assert found.peak_bytes <= budget
    assert found.forward_steps == min(c.schedule(horizon).forward_steps for c in fitting)
    assert found.forward_steps == found.schedule(horizon).forward_steps
    if not found.keeps_graphs:
        assert found.peak_bytes == peak(found, horizon, state, graph, working)
        assert found.storage == storage


def test_a_plan_counts_what_the_sweep_works_with_unless_told():
    with pytest.raises(ArgumentError, match=r"budget of 10 bytes is too small.*at least 600 "):
        bl.plan(1000, 10, 100, 100)
    assert bl.plan(1000, 600, 100, 100).schedule(1000) == Schedule(1000, 1, 1)
    assert bl.plan(1000, 200, 100, 100, working_bytes=0).schedule(1000) == Schedule(1000, 1, 1)


def test_a_plan_that_affords_it_keeps_graphs():
    found = bl.plan(10, 10**6, 100, 100)
    assert found == bl.Checkpointing(block=None)
    assert (found.forward_steps, found.peak_bytes) == (10, 10 * 100 + 100 + 400)


@pytest.mark.parametrize("budget", [8_000, 20_000, 2**20, 10**7, 10**8])
def test_a_plan_of_100_000_steps_looks_at_few_of_them(budget):
    with calls() as seen:
        found = bl.plan(10**5, budget, 1000, 2000)
    assert 10 < seen.made < 10_000
    assert found.peak_bytes <= budget
    assert found.schedule(10**5).forward_steps == found.forward_steps


def test_a_plan_of_no_steps_exists():
    assert bl.plan(0, 500, 100, 100).forward_steps == 0


@pytest.mark.parametrize("name", ["horizon", "state_bytes", "graph_bytes"])
@pytest.mark.parametrize("value", [-1, 2.5])
def test_a_plan_of_sizes_that_are_no_counts_is_refused(name, value):
    sizes = {"horizon": 5, "state_bytes": 1, "graph_bytes": 1, name: value}
    with pytest.raises(ArgumentError, match=f"{name} must be a whole number >= 0, got {value}"):
        bl.plan(budget_bytes=100, **sizes)


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("500 MiB", 500 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5 KiB", 1536),
        ("3 kB", 3000),
        ("1 TiB", 2**40),
        (" 7 B ", 7),
    ],
)
def test_a_budget_reads_sizes(size, found):
    assert bl.Budget(size).bytes == found


@pytest.mark.parametrize("size", ["500 megs", "MiB", "", "-3 MiB", None, 2.5e6j, "1e3"])
def test_a_budget_that_cannot_be_read_is_refused(size):
    with pytest.raises(ArgumentError, match="a budget is a number of bytes, or text with"):
        bl.Budget(size)


@pytest.mark.parametrize("size", [0, -5, "0 MiB"])
def test_an_empty_budget_is_refused(size):
    with pytest.raises(ArgumentError, match="at least one byte"):
        bl.Budget(size)
