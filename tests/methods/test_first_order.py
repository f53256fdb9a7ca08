"""The multiplier handed to the start unchanged."""

import pytest
import torch
from problems import real

import bilevel as bl
from bilevel import errors

F64 = torch.float64
X, GOAL = real(1, 6, 3), real(2, 3)


def problem_of(start=lambda w, a: a):
    return bl.BilevelProblem(
        lambda w, a, batch: ((X @ w) ** 2).mean() / 2,
        lambda w, a, batch: ((w - GOAL) ** 2).sum() / 2,
        start,
    )


def hypergradient(problem, control, steps=4, **settings):
    rule = settings.pop("rule", bl.optim.SGD(0.1))
    solver = bl.BilevelSolver(problem, rule, steps, bl.FirstOrder(), **settings)
    return solver.hypergradient(torch.zeros(3, dtype=F64), control)


def test_it_is_the_gradient_of_the_outer_objective_at_the_end():
    start = real(3, 3)
    found = hypergradient(problem_of(), start, certificate=None)
    w = start
    for _ in range(4):
        w = w - 0.1 * X.T @ (X @ w) / 6
    torch.testing.assert_close(found.params, w)
    torch.testing.assert_close(found.gradient, w - GOAL)


def test_it_goes_through_the_start_as_it_is_and_through_the_outer_objective():
    control = {"a": real(3, 3), "scale": torch.tensor(2.0, dtype=F64)}
    problem = bl.BilevelProblem(
        lambda w, c, batch: ((X @ w) ** 2).mean() / 2,
        lambda w, c, batch: c["scale"] * ((w - GOAL) ** 2).sum() / 2,
        lambda w, c: w + c["a"] ** 2,
    )
    rule = bl.optim.Adam(0.01)  # with moments, which have no multiplier
    found = hypergradient(problem, control, certificate=None, rule=rule)
    end = found.params
    torch.testing.assert_close(found.gradient["a"], 2 * control["a"] * 2 * (end - GOAL))
    torch.testing.assert_close(found.gradient["scale"], ((end - GOAL) ** 2).sum() / 2)


def test_without_inner_steps_it_is_exact():
    found = hypergradient(problem_of(), real(3, 3), 0, certificate=bl.AgainstSteps())
    assert found.certificate.trustworthy
    torch.testing.assert_close(found.gradient, real(3, 3) - GOAL)


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (bl.AgainstSteps(), "nothing is known of the 4 inner steps left out"),
        (bl.AgainstMinimiser(), "does not move it"),
    ],
    ids=["steps", "minimiser"],
)
def test_it_is_not_trusted(certificate, reason):
    with pytest.warns(bl.ConvergenceWarning, match=reason):
        found = hypergradient(problem_of(), real(3, 3), certificate=certificate)
    assert not found.certificate.trustworthy


def test_a_problem_without_a_start_is_refused():
    with pytest.raises(errors.ArgumentError, match="FirstOrder hands the multiplier to a learned"):
        hypergradient(problem_of(None), real(3, 3))


def test_a_control_that_the_steps_alone_read_is_refused():
    problem = problem_of(lambda w, c: c["a"])
    control = {"a": real(3, 3), "rate": torch.tensor(0.1, dtype=F64)}
    with pytest.raises(errors.LostGradientError, match=r"rate.*takes every inner step for the id"):
        hypergradient(problem, control, rule=bl.optim.SGD(lambda c: c["rate"]))


def test_a_descent_by_it_learns_a_start():
    solver = bl.BilevelSolver(problem_of(), bl.optim.SGD(0.1), 4, bl.FirstOrder(), certificate=None)
    found = solver.solve(
        torch.zeros(3, dtype=F64), real(3, 3), lambda p: torch.optim.SGD(p, 0.5), steps=60
    )
    assert found.value < 0.1 * found.values[0]
