"""What an outer loop is fed: pairs, pairs of loaders, and iterators that end."""

from collections import namedtuple

import pytest
import torch
from problems import square
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from bilevel.errors import ArgumentError

ZERO = torch.zeros(1, dtype=torch.float64)


def seen_by(batches, steps):
    """What inner and outer objective get at each update."""
    inner, outer = [], []
    problem = bl.BilevelProblem(
        lambda w, a, batch: inner.append(batch) or square(w - a) / 2,
        lambda w, a, batch: outer.append(batch) or square(w - 1),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 1, bl.Unrolled(), certificate=None)
    found = solver.solve(ZERO, ZERO, steps=steps, batches=batches)
    assert found.steps == steps
    return inner, outer


def loader(*values):
    return DataLoader(TensorDataset(torch.tensor(values), -torch.tensor(values)), batch_size=1)


def test_a_pair_of_loaders_gives_each_objective_its_own_and_begins_each_again():
    inner, outer = seen_by((loader(1.0, 2.0), loader(3.0, 4.0, 5.0)), 5)
    assert [float(x) for x, _ in inner] == [1, 2, 1, 2, 1]
    assert [float(x) for x, _ in outer] == [3, 4, 5, 3, 4]
    assert [float(y) for _, y in outer] == [-3, -4, -5, -3, -4]


def test_a_pair_of_lists_is_a_pair_of_loaders():
    assert seen_by((["a", "b"], ["c"]), 3) == (["a", "b", "a"], ["c", "c", "c"])
    assert seen_by([("a", "c"), ("b", "c")], 3) == (["a", "b", "a"], ["c", "c", "c"])
    inner, _ = seen_by(([ZERO, ZERO + 1], [ZERO]), 2)
    assert [float(x) for x in inner] == [0, 1]


Sample = namedtuple("Sample", "x y")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (loader(1.0), r"must give tuples, .* got a list of 2; pass batches=\(inner_loader, outer_"),
        ([[1.0, 2.0]], "got a list of 2"),
        ([Sample(1.0, 2.0)], "got a Sample of 2"),
        ([torch.zeros(2)], "got a Tensor"),
        ([(1, 2, 3)], "got a tuple of 3"),
        ((ZERO, ZERO), r"Tensor for the inner one; .* batches=\[\(inner_batch, outer_batch\)\]"),
        (({"x": ZERO}, [ZERO]), "dict for the inner one"),
        (([ZERO], 3), "int for the outer one"),
        (((1.0, 2.0), (3.0, 4.0)), "pass a list of pairs, or a pair of lists"),
        (3, "must be an iterable"),
        ((bl.Minibatches(ZERO, 1), (ZERO, ZERO)), r"the outer part .* tuple of tensors, one batch"),
        (([ZERO], [ZERO, torch.tensor([1])]), r"write batches=\[\(inner_batch, outer_batch\)\]"),
        (([], [1.0]), "the inner loader gave nothing"),
    ],
)
def test_batches_that_could_go_to_the_wrong_objective_are_refused(batches, message):
    with pytest.raises(ArgumentError, match=message):
        seen_by(batches, 2)


@pytest.mark.parametrize(
    "batches", [zip([1.0, 2.0], [3.0, 4.0], strict=True), (iter([1.0, 2.0]), [3.0])]
)
def test_an_iterator_that_ends_is_named_and_loses_no_update(batches):
    with pytest.raises(ArgumentError, match=r"gave 2 batches, then ended.* a DataLoader") as caught:
        seen_by(batches, 5)
    reached = caught.value.progress
    assert reached.steps == len(reached.values) == 2
    assert float(reached.control) != 0
    assert "then ended" in reached.reason


def test_accumulated_batches_that_end_are_named_too():
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: square(u), 1)
    solver = bl.ControlSolver(lambda batch: (problem, batch * (ZERO + 1)))
    with pytest.raises(ArgumentError, match="gave 5 batches, then ended") as caught:
        solver.solve(ZERO, steps=9, batches=iter([1.0, 2.0, 3.0, 4.0, 5.0]), accumulate=2)
    assert caught.value.progress.steps == 2


def test_numbers_of_batches_that_overflow_together_are_caught():
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u), lambda u, c: u + c, 1)
    solver = bl.ControlSolver(lambda batch: (problem, batch))
    huge = torch.tensor(3e38)
    with pytest.raises(bl.errors.DivergenceError, match="iteration 1: the cost is inf"):
        solver.solve(torch.ones(()), steps=1, batches=[huge], accumulate=2)
