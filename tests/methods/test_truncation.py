"""Sweeps that stop early: bounds that hold, estimates that say so, what cannot be judged."""

import math
from functools import cache

import pytest
import torch
from bilevel_cases import ridge
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError


def contraction(case, step_size):
    """|I - eta H|, exact for ridge."""
    inner = torch.func.grad(lambda w: case.problem.inner(w, case.control, None))
    H = torch.func.jacrev(inner)(case.params)
    return float(torch.linalg.matrix_norm(torch.eye(4, dtype=H.dtype) - step_size * H, 2))


CASE = ridge(4)


@cache
def whole_sweep(steps, eta):
    """Of `CASE`: the constants on the trajectory, and the gradient with nothing left out."""
    bounds = bl.methods.Bounds(contraction(CASE, eta), coupling(CASE, steps, eta))
    return bounds, find(CASE, bl.MLM(), steps, eta).gradient


def find(case, method, steps, step_size, **settings):
    solver = bl.BilevelSolver(
        case.problem, bl.optim.SGD(step_size), steps, method, certificate=None, **settings
    )
    return solver.hypergradient(case.params, case.control)


def coupling(case, steps, step_size):
    """The largest |B_s| on the trajectory: eta |e^alpha w| for ridge with a weight each."""
    largest, w = 0.0, case.params
    for _ in range(steps):
        largest = max(largest, float((case.control.exp() * w).abs().max()))
        w = w.detach().requires_grad_()
        (slope,) = torch.autograd.grad(case.problem.inner(w, case.control, None), w)
        w = w.detach() - step_size * slope
    return step_size * largest


@pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("steps", [5, 40, 120])
@pytest.mark.parametrize("slow", [1.0, 0.2])
def test_with_constants_what_is_left_out_is_within_the_tolerance(tolerance, steps, slow):
    eta = slow * CASE.step_size
    bounds, whole = whole_sweep(steps, eta)
    found = find(CASE, bl.MLM(tolerance=tolerance, bounds=bounds), steps, eta)
    apart = float((found.gradient - whole).norm() / whole.norm())
    if found.truncation is None:
        assert apart == 0
        return
    assert 0 < found.truncation.steps < steps
    assert apart <= found.truncation.error <= tolerance


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 1.5])
def test_the_bound_is_the_geometric_series(rate):
    expected = 2 * 3 * sum(rate**k for k in range(7))
    assert bl.methods.Bounds(rate, 2.0).left_out(3.0, 7) == pytest.approx(expected, rel=1e-14)


def test_a_bound_beyond_every_number_is_infinite_unless_nothing_is_left_out():
    assert bl.methods.Bounds(2.0, 1.0).left_out(1.0, 5000) == math.inf
    assert bl.methods.Bounds(2.0, 0.0).left_out(1.0, 5000) == 0
    assert bl.methods.Bounds(2.0, 1.0).left_out(0.0, 5000) == 0


def test_a_loose_tolerance_reverses_fewer_steps():
    bounds, _ = whole_sweep(120, CASE.step_size)
    left = [
        find(CASE, bl.MLM(tolerance=tol, bounds=bounds), 120, CASE.step_size).truncation.steps
        for tol in (1e-8, 1e-4, 1e-1)
    ]
    assert left == sorted(left)
    assert left[0] < left[-1]


@pytest.mark.parametrize("last", [1, 5, 20])
def test_truncation_to_the_last_steps_starts_the_sweep_at_a_constant(last):
    case = ridge(4)
    eta, steps = case.step_size / 3, 20
    w = case.params
    for _ in range(steps - last):
        w = w - eta * torch.func.grad(case.problem.inner)(w, case.control, None)
    expected = bl.BilevelSolver(
        case.problem, bl.optim.SGD(eta), last, bl.Unrolled(), certificate=None
    ).hypergradient(w, case.control)
    found = find(case, bl.MLM(last=last), steps, eta)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-13, atol=0)
    assert (found.truncation is None) == (last == steps)
    if last < steps:
        assert found.truncation.steps == steps - last
        assert found.truncation.error is None
        bounds = bl.methods.Bounds(contraction(case, eta), coupling(case, steps, eta))
        bounded = find(case, bl.MLM(last=last, bounds=bounds), steps, eta)
        whole = find(case, bl.MLM(), steps, eta).gradient
        apart = float((bounded.gradient - whole).norm() / whole.norm())
        assert apart <= bounded.truncation.error


def test_one_step_is_the_last_step():
    case = ridge(4)
    one = find(case, bl.OneStep(), 20, case.step_size)
    last = find(case, bl.MLM(last=1), 20, case.step_size)
    assert torch.equal(one.gradient, last.gradient)


@pytest.mark.parametrize(
    "optimizer", [bl.optim.SGD(0.1, momentum=0.9), bl.optim.Adam(0.1)], ids=repr
)
def test_truncation_goes_on_with_momentum_and_step_count(optimizer):
    case = ridge(4)
    whole = bl.BilevelSolver(case.problem, optimizer, 12, bl.MLM(), certificate=None)
    cut = bl.BilevelSolver(case.problem, optimizer, 12, bl.MLM(last=4), certificate=None)
    a, b = (s.hypergradient(case.params, case.control) for s in (whole, cut))
    torch.testing.assert_close(a.params, b.params, rtol=1e-14, atol=0)
    torch.testing.assert_close(a.value, b.value, rtol=1e-14, atol=0)
    assert b.warm.steps == 12


def test_a_start_cannot_be_judged():
    problem = bl.BilevelProblem(
        lambda w, a, b: square(w - 1), lambda w, a, b: square(w), start=lambda w, a: w + a
    )
    method = bl.MLM(tolerance=0.1, bounds=bl.methods.Bounds(0.9, 1.0))
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, method, certificate=None)
    with pytest.raises(ArgumentError, match="what the start contributes"):
        solver.hypergradient(real(1, 2), real(2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.MLM(last=0), "last must be a whole number >= 1, or None"),
        (lambda: bl.MLM(last=2.5), "last must be a whole number"),
        (lambda: bl.MLM(tolerance=0.0), "tolerance must be > 0 and < 1"),
        (lambda: bl.MLM(tolerance=1.0), "tolerance must be > 0 and < 1"),
        (lambda: bl.MLM(last=3, tolerance=0.1), "give one of them"),
        (lambda: bl.MLM(tolerance=0.1), r"needs bounds=Bounds\(rate, coupling\)"),
        (lambda: bl.methods.Bounds(-0.1, 1.0), "rate must be >= 0"),
        (lambda: bl.methods.Bounds(0.1, math.nan), "coupling must be >= 0"),
        (lambda: bl.Implicit(bl.linear.CG), "linear must be a linear solver such as CG"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
