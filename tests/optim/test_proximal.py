"""Accelerated proximal gradients, and their line search."""

import pytest
import torch
from problems import real

import bilevel as bl
from bilevel import errors

F64 = torch.float64
X, Y = real(1, 30, 12), real(2, 30)
X = X @ torch.diag(torch.logspace(0, -1.5, 12, dtype=F64))
WEIGHT = torch.tensor(-4.0, dtype=F64)
L = float(torch.linalg.eigvalsh(X.T @ X / 30)[-1])
PROBLEM = bl.BilevelProblem(
    lambda w, a, batch: ((X @ w - Y) ** 2).mean() / 2,
    lambda w, a, batch: ((w - 0.1) ** 2).sum() / 2,
)
PENALTY = bl.prox.L1(lambda a: a.exp())


def rule(lr=1 / L, **settings):
    return bl.optim.ProximalGradient(lr, PENALTY, **settings)


def objective(w):
    return float(PROBLEM.inner(w, WEIGHT, None) + PENALTY.value(w, WEIGHT))


def solved(chosen, steps, method=None):
    method = bl.Implicit(bl.linear.GMRES()) if method is None else method
    solver = bl.BilevelSolver(PROBLEM, chosen, steps, method, certificate=None)
    return solver.hypergradient(torch.zeros(12, dtype=F64), WEIGHT)


BEST = objective(solved(rule(accelerated=True), 1500).params)


def test_acceleration_takes_a_fraction_of_the_steps():
    gaps = [objective(solved(rule(accelerated=a), 300).params) - BEST for a in (False, True)]
    assert gaps[1] < 1e-3 * gaps[0]


def test_accelerated_steps_are_those_of_fista_with_restart():
    x = y = torch.zeros(12, dtype=F64)
    age = 1.0
    restarts = 0
    for _ in range(120):
        gradient = X.T @ (X @ y - Y) / 30
        new = PENALTY(y - gradient / L, 1 / L, WEIGHT)
        if float((y - new) @ (new - x)) > 0:
            age, x, y = 1.0, new, new
            restarts += 1
        else:
            older = (1 + (1 + 4 * age**2) ** 0.5) / 2
            age, x, y = older, new, new + (age - 1) / older * (new - x)
    assert restarts > 0
    torch.testing.assert_close(solved(rule(accelerated=True), 120).params, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{"accelerated": True}, {"line_search": True}], ids=str)
def test_methods_agree_through_the_steps(settings):
    lr = 16 / L if "line_search" in settings else 1 / L
    each = [
        solved(rule(lr, **settings), 40, method).gradient
        for method in (bl.MLM(), bl.Unrolled(), bl.MLM(bl.Checkpointing(snapshots=2, block=3)))
    ]
    torch.testing.assert_close(each[0], each[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(each[0], each[2], rtol=1e-12, atol=0)


def test_the_hypergradient_through_a_line_search_is_that_of_differences():
    def value(a):
        solver = bl.BilevelSolver(PROBLEM, rule(16 / L, line_search=True), 40)
        return float(solver.value(torch.zeros(12, dtype=F64), a))

    found = solved(rule(16 / L, line_search=True), 40, bl.MLM()).gradient
    difference = (value(WEIGHT + 1e-5) - value(WEIGHT - 1e-5)) / 2e-5
    assert float(found) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_line_search_needs_no_step_size(accelerated):
    found = solved(rule(1000.0, accelerated=accelerated, line_search=True), 400)
    assert objective(found.params) - BEST < (1e-8 if accelerated else 1e-4)
    assert float(found.warm.state.scale) > 1e-3 / L / 4  # not smaller than needed


def test_without_it_such_a_step_diverges():
    with pytest.raises(errors.DivergenceError):
        solved(rule(1000.0), 300)


def test_an_objective_whose_gradient_is_wrong_ends_the_search():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x**2).sum()

        @staticmethod
        def backward(ctx, slope):
            return slope * torch.full((2,), -1.0, dtype=F64)

    problem = bl.BilevelProblem(
        lambda w, a, batch: Wrong.apply(w), lambda w, a, batch: (a * w).sum()
    )
    chosen = bl.optim.ProximalGradient(1.0, bl.prox.L1(0.0), line_search=True)
    solver = bl.BilevelSolver(problem, chosen, 5, certificate=None)
    with pytest.raises(errors.DivergenceError, match="found no step down"):
        solver.value(torch.ones(2, dtype=F64), torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("name", ["accelerated", "line_search"])
def test_flags_are_true_or_false(name):
    with pytest.raises(errors.ArgumentError, match=f"{name} must be True or False"):
        bl.optim.ProximalGradient(0.1, bl.prox.L1(0.1), **{name: "yes"})


def test_a_warm_start_keeps_momentum_and_step_size():
    chosen = rule(16 / L, accelerated=True, line_search=True)
    solver = bl.BilevelSolver(PROBLEM, chosen, 20, certificate=None)
    start = torch.zeros(12, dtype=F64)
    half = solver.advance(start, WEIGHT)
    whole = bl.BilevelSolver(PROBLEM, chosen, 40, certificate=None).advance(start, WEIGHT)
    again = solver.advance(start, WEIGHT, warm=half)
    torch.testing.assert_close(again.state.params, whole.state.params, rtol=1e-12, atol=1e-14)
    assert torch.equal(again.state.scale, whole.state.scale)
