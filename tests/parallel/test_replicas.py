"""Several processes equal one, and an error of one is an error of all."""

import math

import pytest
import rank_cases
import torch
from ranks import on_ranks

import bilevel as bl
from bilevel.errors import ArgumentError
from bilevel.parallel.parts import part_of

pytestmark = pytest.mark.xdist_group("ranks")  # so that the ranks are started once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of three ranks for all tests: starting processes takes longest."""
    kept = tmp_path_factory.mktemp("kept")
    return on_ranks(3, rank_cases.everything, tmp_path_factory.mktemp("ranks"), kept)


@pytest.mark.parametrize("size", ["two", "three"])
def test_hypergradients_of_every_method_are_those_of_one_process(run, size):
    first, *others = (one[size] for one in run[: 2 if size == "two" else 3])
    if size == "two":
        error, trusted = first.pop("certificate")
        assert error < 1e-10
        assert trusted
    for name, (difference, value) in first.items():
        assert difference < 1e-12, name
        # Bit by bit the same on each rank.
        assert {other[name][1] for other in others} == {value}, name


def test_controls_are_those_of_one_process(run):
    first, second = (one["controls"] for one in run[:2])
    for name, (difference, costs) in first.items():
        assert difference < 1e-12, name
        assert costs == second[name][1]


def test_solves_are_those_of_one_process_and_end_together(run):
    first, second = (one["solved"] for one in run[:2])
    assert first.pop("ended") == second.pop("ended") == 2
    for name, (difference, values) in first.items():
        assert difference < 1e-12, name
        assert values == second[name][1]


def test_a_kept_solve_goes_on_with_another_number_of_processes(run):
    solver = rank_cases.solvers()["MLM"][0]
    loaders = (
        bl.Minibatches(rank_cases.TRAIN, 6, seed=3),
        bl.Minibatches(rank_cases.JUDGED, 6, seed=4),
    )
    given = rank_cases.PARAMS, rank_cases.CONTROL
    alone = solver.solve(*given, steps=4, batches=loaders)
    for one in run[:2]:
        control, values, _ = one["kept by two"]
        assert len(values) == 4
        assert values[:2] == one["kept by three"][1]
        assert rank_cases.distance(control, alone.control) < 1e-12
    assert torch.equal(run[0]["kept by two"][0]["rate"], run[1]["kept by two"][0]["rate"])


def test_params_in_parts_give_the_same_and_stay_in_parts(run):
    (first, errors), _ = (one["sharded"] for one in run[:2])
    assert first.pop("loaded") == 0
    for name, (difference, kinds) in first.items():
        assert difference < 1e-12, name
        assert kinds == {"DTensor"}
    assert "pass the solver replicas" in errors["alone"]
    assert "take a method that solves none" in errors["Implicit"]
    assert "the control must be whole" in errors["control"]
    assert "a copy made before fully_shard" in errors["functional"]


def test_tasks_and_columns_are_shared_by_processes(run):
    (first, errors), (second, _) = (one["weighted"] for one in run[:2])
    for name, (difference, value) in first.items():
        assert difference < 1e-12, name
        assert value == second[name][1]
    assert "give the solver the replicas of OverRanks" in errors["alone"]
    assert "pass Replicas(split=False), got split=None" in errors["split"]


MESSAGES = {
    "does not divide": "ArgumentError: inner_batch[0] has 7 samples, which 2 processes",
    "parts of other sizes": "ArgumentError: the parts of a batch must have as many samples",
    "leaves differ": "ArgumentError: a batch is split .* got inner_batch[0] 12, inner_batch[1] 4",
    "other data": "ParallelError: with Replicas(split=True) every process must get the same",
    "other kinds": "ParallelError: every process must get batches alike",
    "other control": "ParallelError: every process must hold the same .* control['rate'] is",
    "other settings": "solver.inner_steps is 5 (rank 0), 6 (rank 1)",
    "other steps": "solve(steps=) is 2 (rank 0), 3 (rank 1)",
    "other code": "problem.outer is refused.<locals>.<lambda>, code .* outer, code",
    "a sum": "ArgumentError: the inner objective is .* must be a mean over samples",
    "diverges": "DivergenceError: the inner iteration is not finite after step 1 of 5",
    "accumulate": "ArgumentError: accumulate=5 batches an update cannot be shared evenly by 2",
    "wrapped": "UnsupportedError: the module is a DistributedDataParallel",
    "Riccati": "UnsupportedError: Riccati sweeps on one process, .* take NewtonCG()",
    "residual": "UnsupportedError: replicas= .* this problem is by its residual=: leave them out",
    "Given": "UnsupportedError: Given solves the inner problem by itself, .* take an inner",
    "hvp": "UnsupportedError: hvp evaluates whole batches on one process: leave replicas=",
    "kept sweep": "UnsupportedError: a sweep is kept by one process: leave replicas= out",
    "no group": "ArgumentError: group must be a process group",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_processes_do_not_share_is_refused_on_each(run, name):
    for one in run[:2]:
        message, seconds = one["refused"][name]
        place = 0
        for piece in MESSAGES[name].split(" .* "):
            assert piece in message[place:], message
            place = message.index(piece, place)
        assert seconds < 20


def test_a_process_outside_of_the_group_is_told(run):
    message, _ = run[2]["outside"]
    assert "not in the group" in message


def test_an_error_of_one_ends_the_others(run):
    alone = run[0]["broken"]
    assert "broken" not in run[1]  # it died
    message, seconds = alone["raises"]
    assert "another process ended this run; rank 1: KeyError: 'mine'" in message
    assert seconds < 30
    message, seconds = alone["hangs"]
    assert "has waited for 1 s and not every process came" in message
    message, seconds = alone["dies"]
    assert "it has died or was killed" in message
    assert seconds < 30


def test_replicas_need_processes_that_know_each_other():
    with pytest.raises(ArgumentError, match=r"init_process_group\('gloo'\) first"):
        bl.Replicas()
    with pytest.raises(ArgumentError, match="timeout must be > 0"):
        bl.Replicas(timeout=0)
    with pytest.raises(ArgumentError, match="split must be True, False or None"):
        bl.Replicas(split=2)


def test_parts_of_a_batch_are_its_samples_in_order():
    batch = {"x": torch.arange(6), "scale": torch.tensor(2.0), "name": "a"}
    parts = [part_of(batch, "batch", rank, 3) for rank in range(3)]
    assert [one["x"].tolist() for one in parts] == [[0, 1], [2, 3], [4, 5]]
    assert {one["scale"].item() for one in parts} == {2.0}
    assert part_of(torch.tensor(math.pi), "batch", 1, 2) == torch.tensor(math.pi)
