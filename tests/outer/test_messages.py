"""What is said of programs that are written wrong, and how records print."""

import dataclasses
import math
import re

import pytest
import torch
from problems import real, square
from torch.optim import lr_scheduler

import bilevel as bl
from bilevel.errors import ArgumentError, LostGradientError, StructureError

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


def inner(w, a, batch):
    return square(w - a) / 2


def outer(w, a, batch):
    return square(w - 1) / 2


WALK = bl.Map(lambda u, c, t: u + c)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.BilevelProblem(lambda w, a: w, outer), "inner(params, control, batch)"),
        (lambda: bl.BilevelProblem(inner, lambda w: w), "outer(params, control, batch)"),
        (lambda: bl.BilevelProblem(inner, outer, lambda w: w), "start(params, control)"),
        (lambda: bl.Map(lambda u, c: u), "g(state, control, t)"),
        (lambda: bl.ControlProblem(WALK, lambda u: u, 1), "terminal(state, control)"),
        (
            lambda: bl.ControlProblem(WALK, lambda u, c: u, 1, lambda u, c: u),
            "running(state, control, t)",
        ),
        (lambda: bl.ControlSolver(lambda: None), "build(batch)"),
        (
            lambda: bl.weighted_problem(lambda w: w, lambda w, b: w, bl.TaskWeights(2)),
            "train_losses(params, batch)",
        ),
        (
            lambda: bl.weighted_problem(lambda w, b: w, [lambda w: w], bl.TaskWeights(2)),
            "validation_losses(params, batch)",
        ),
        (lambda: bl.adapt(bl.optim.SGD(0.1), ZERO, lambda w, batch: w, 1), "task(params)"),
    ],
)
def test_a_function_of_other_arguments_is_refused_where_it_is_given(make, message):
    with pytest.raises(ArgumentError, match=re.escape(f"is called as {message}")):
        make()


def test_functions_with_defaults_and_any_arguments_are_taken():
    bl.BilevelProblem(lambda *given: given[0], lambda w, a, batch, scale=2.0: w)
    bl.Map(torch.nn.Identity())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"callback": lambda: True}, "callback(progress)"),
        ({"project": lambda a, b: a}, "project(control)"),
        ({"scheduler": lambda: None}, "scheduler(optimizer)"),
    ],
)
def test_functions_of_a_solve_are_looked_at_before_it_begins(settings, message):
    solver = bl.BilevelSolver(bl.BilevelProblem(inner, outer), bl.optim.SGD(0.5))
    with pytest.raises(ArgumentError, match=re.escape(message)):
        solver.solve(ZERO, ONE, **settings)


def test_a_schedule_by_plateaus_gets_the_cost():
    rates = []
    found = bl.ControlSolver(
        bl.ControlProblem(WALK, lambda u, c: 1 + 0 * (u + c), 1),
        lambda p: torch.optim.SGD(p, 1.0),
    ).solve(
        ZERO,
        ONE,
        steps=5,
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
        callback=lambda p: rates.append(p.optimizer.param_groups[0]["lr"]),
    )
    assert found.costs == [1.0] * 5
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "scheduler", [lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 1), lambda o: None]
)
def test_a_scheduler_that_is_none_is_refused(scheduler):
    solver = bl.ControlSolver(bl.ControlProblem(WALK, lambda u, c: u, 1))
    with pytest.raises(ArgumentError, match="scheduler must be a function"):
        solver.solve(ZERO, ONE, scheduler=scheduler)


def test_swapped_params_and_control_are_guessed():
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(w - c["shift"]) / 2, lambda w, c, batch: square(w)
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), certificate=None)
    with pytest.raises((TypeError, IndexError, RuntimeError)) as caught:
        solver.hypergradient({"shift": ONE}, ZERO)
    assert "params {'shift': 'float64[] on cpu'}" in caught.value.__notes__[0]
    assert "are they in this order?" in caught.value.__notes__[0]


@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled(), bl.Implicit()], ids=repr)
def test_an_argmax_for_an_outer_objective_is_named(method):
    problem = bl.BilevelProblem(inner, lambda w, a, batch: w.argmax())
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 3, method, certificate=None)
    with pytest.raises(StructureError, match=r"outer objective .* got int64.*an argmax or a"):
        solver.hypergradient(real(1, 3), real(2, 3))


@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled(), bl.Implicit()], ids=repr)
def test_an_accuracy_for_an_outer_objective_is_no_gradient_of_zero(method):
    problem = bl.BilevelProblem(inner, lambda w, a, batch: (w > 0).double().mean())
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 30, method)
    with pytest.raises(LostGradientError, match="a comparison"):
        solver.hypergradient(real(1, 3), real(2, 3))


@pytest.mark.parametrize("method", [bl.OneStep(), bl.MLM(last=2)], ids=repr)
def test_a_start_that_truncation_never_comes_to_is_named(method):
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - 1) / 2, lambda w, a, batch: square(w), lambda w, a: a + 0 * w
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, method, certificate=None)
    with pytest.raises(LostGradientError, match=r"never comes to the start: learn a start"):
        solver.hypergradient(ZERO, ONE)
    exact = dataclasses.replace(solver, method=bl.MLM()).hypergradient(ZERO, ONE)
    assert float(exact.gradient) == pytest.approx(2 * 0.9**5)


RATES = [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "rate",
    [
        bl.ByStep(lambda t: RATES[t - 1]),
        bl.ByStep(lambda t: lambda a: torch.stack([a * r for r in RATES])[t - 1]),
        bl.ByStep(dict(enumerate(RATES, 1)).__getitem__),
    ],
    ids=["list", "learned", "dict"],
)
def test_rates_that_end_before_a_warm_start_does_are_named(rate):
    problem = bl.BilevelProblem(inner, outer)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(rate), 3, certificate=None)
    with pytest.raises(ArgumentError, match=r"nothing for inner step 4 .* warm_start") as caught:
        solver.solve(ZERO, ONE, steps=4)
    assert caught.value.progress.steps == 1
    assert solver.solve(ZERO, ONE, steps=4, warm_start=False).steps == 4


def test_batches_by_step_that_end_are_named():
    batches = bl.ByStep(lambda t: [1.0, 2.0][t])
    solver = bl.BilevelSolver(bl.BilevelProblem(inner, outer), bl.optim.SGD(0.1), 3)
    with pytest.raises(ArgumentError, match="nothing for inner step 2"):
        solver.hypergradient(ZERO, ONE, batches)


# Records.


def big(method=None):
    problem = bl.BilevelProblem(inner, outer)
    a = torch.zeros(3000, dtype=torch.float64)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, method or bl.Implicit())
    return solver.solve(a, {"shift": a}["shift"], steps=30)


def test_a_solution_prints_in_five_lines():
    found = big()
    for record in (found, found.hypergradient):
        shown = repr(record)
        assert str(record) == shown
        assert len(shown.splitlines()) <= 5
        assert len(shown) < 600
    assert "float64[3000] on cpu of norm" in repr(found)
    assert "values=[30 from 1500 to" in repr(found)
    assert "converged=False" in repr(found)
    assert "certificates=[30, 30 trustworthy]" in repr(found)
    assert "certificate=<trustworthy, " in repr(found.hypergradient)


def test_a_control_solution_and_a_progress_print_in_five_lines():
    seen = []
    control = bl.PerStep([torch.full((100,), float(t)) for t in range(40)])
    problem = bl.ControlProblem(WALK, lambda u, c: square(u), 40)
    found = bl.ControlSolver(problem).solve(
        control, torch.zeros(100), steps=2, callback=seen.append
    )
    for record in (found, seen[0]):
        assert len(repr(record).splitlines()) <= 5
        assert "<40 tensors, 4000 numbers of norm" in repr(record)
    assert math.isfinite(found.cost)


@pytest.mark.parametrize("given", ["none", "inner"])
def test_a_batch_that_was_not_given_is_said(given):
    """An objective that reads its batch, as that of any data does."""
    problem = bl.BilevelProblem(
        inner=lambda w, a, batch: ((w * batch[0] - batch[1]) ** 2).sum() + a * w**2,
        outer=lambda w, a, batch: ((w * batch[0] - batch[1]) ** 2).sum(),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), inner_steps=3)
    one, data = torch.tensor(1.0), (torch.ones(3), torch.zeros(3))
    batches = {"none": (), "inner": (data,)}[given]
    with pytest.raises(TypeError) as caught:
        solver.hypergradient(one, one, *batches)
    note = caught.value.__notes__[1]
    assert ("inner and the outer" in note) == (given == "none")
    assert "pass inner_batch and outer_batch, or batches= to solve" in note
    with pytest.raises(TypeError) as caught:
        solver.solve(one, one, steps=1)
    assert any("No batch was given" in note for note in caught.value.__notes__)
