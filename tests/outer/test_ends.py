"""How a descent ends: converged by what it may believe, and with what it had when it fails."""

import dataclasses
import random
import warnings

import pytest
import torch
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError, ConvergenceError, LostGradientError

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


def sgd(rate):
    return lambda leaves: torch.optim.SGD(leaves, rate)


def learned_rate():
    """Two inner steps of a learned rate, cold: F = (1 - a)^(2 k) for k steps from 0 to 1."""
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - 1) / 2, lambda w, a, batch: square(w - 1)
    )
    rule = bl.optim.SGD(lambda a: a)
    return bl.BilevelSolver(problem, rule, 10, certificate=bl.AgainstSteps())


# AgainstSteps and warm starts.


def test_steps_that_are_the_model_begin_anew_at_every_update():
    solver, a = learned_rate(), 0.02 * ONE
    found = solver.solve(ZERO, a, sgd(0.002), steps=6)
    assert found.value == pytest.approx(float((1 - found.control) ** 20), rel=1e-12)
    assert found.value == pytest.approx(float(solver.value(ZERO, found.control)), rel=1e-12)
    assert found.certificates[-1].target == "the inner steps made"
    cold = solver.solve(ZERO, a, sgd(0.002), steps=6, warm_start=False)
    assert torch.equal(found.control, cold.control)


def test_a_warm_start_by_name_is_said_by_the_certificate():
    found = learned_rate().solve(ZERO, 0.02 * ONE, sgd(0.002), steps=6, warm_start=True)
    assert found.hypergradient.warm.steps == 70
    assert "from a warm start, which are no fixed function of" in str(found.certificates[1])
    assert "warm start" not in str(found.certificates[0])
    first = learned_rate().hypergradient(ZERO, 0.02 * ONE)
    second = learned_rate().hypergradient(ZERO, 0.02 * ONE, warm=first.warm)
    assert "from a warm start" in second.certificate.target


def test_other_certificates_go_on_from_the_update_before():
    solver = dataclasses.replace(learned_rate(), certificate=None)
    assert solver.solve(ZERO, 0.02 * ONE, sgd(0.002), steps=1).hypergradient.warm.steps == 20


# Converged, and by whom.


def shifted(method, certificate, steps=60, **settings):
    """w(a) = a, F = (w - 2)^2 / 2 from a = 0: the hypergradient is a - 2."""
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - a) / 2, lambda w, a, batch: square(w - 2) / 2
    )
    return bl.BilevelSolver(problem, bl.optim.SGD(0.01), steps, method, certificate, **settings)


@pytest.mark.parametrize("certificate", [bl.AgainstMinimiser(), bl.AgainstSteps()])
def test_a_small_gradient_that_is_not_trusted_is_no_convergence(certificate):
    # OneStep gives the hypergradient times 0.01: -0.02 at first, within the tolerance.
    solver = shifted(bl.OneStep(), certificate, on_failure="ignore")
    found = solver.solve(ZERO, ZERO, sgd(0.1), steps=3, tolerance=0.05)
    assert not found.converged
    assert found.steps == 3
    assert len(found.certificates) == 3
    assert "within the tolerance 0.05, but that gradient is not to be trusted" in found.reason
    assert "not trustworthy" in found.reason
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataclasses.replace(solver, on_failure="warn").solve(
            ZERO, ZERO, sgd(0.1), steps=1, tolerance=0.05
        )
    assert ["is not to be trusted" in str(w.message) for w in caught] == [False, True]
    raising = dataclasses.replace(solver, on_failure="raise")
    with pytest.raises(ConvergenceError, match="iteration 1") as caught:
        raising.solve(ZERO, ZERO, sgd(0.1), steps=1, tolerance=0.05)
    assert not caught.value.progress.converged
    assert not caught.value.progress.hypergradient.certificate.trustworthy


def test_what_converged_says_who_judged_it():
    nobody = shifted(bl.OneStep(), None).solve(ZERO, ZERO, steps=3, tolerance=0.05)
    assert nobody.converged
    assert "nobody judged it" in nobody.reason
    trusted = shifted(bl.Implicit(), bl.AgainstMinimiser(), 2000).solve(
        ZERO, 1.99 * ONE, steps=3, tolerance=0.05
    )
    assert (trusted.converged, trusted.steps) == (True, 0)
    assert "its certificate trusts it" in trusted.reason
    assert [c.trustworthy for c in trusted.certificates] == [True]


def test_a_control_solution_says_why_it_ended():
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: u**2 / 2, 1)
    solver = bl.ControlSolver(problem, sgd(0.5), on_failure="ignore")
    assert "within the tolerance" in solver.solve(ZERO, ONE, steps=50, tolerance=1e-6).reason
    assert "above the tolerance" in solver.solve(ZERO, ONE, steps=2, tolerance=1e-6).reason
    assert "no tolerance was given" in solver.solve(ZERO, ONE, steps=2).reason
    stopped = solver.solve(ZERO, ONE, steps=2, callback=lambda p: True)
    assert "the callback ended it" in stopped.reason


def at_the_optimum(scale=1.0):
    """F reads the control too: at the optimum two slopes of order one cancel."""
    a0 = real(3, 4)
    problem = bl.BilevelProblem(
        lambda w, a, batch: (torch.cosh(w).sum() + square(w - a)) / 2,
        lambda w, a, batch: scale * (square(w - 1) + square(a + 1)) / 2,
    )
    return problem, a0


@pytest.mark.parametrize(
    ("method", "scale", "dtype"),
    [
        (bl.Implicit(), 1.0, torch.float32),
        pytest.param(bl.MLM(), 1e-3, torch.float64, marks=pytest.mark.slow),
        pytest.param(bl.MLM(), 1.0, torch.float64, marks=pytest.mark.slow),
        pytest.param(bl.MLM(), 1.0, torch.float32, marks=pytest.mark.slow),
        pytest.param(bl.Implicit(), 1e-3, torch.float64, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_plain_run_to_its_optimum_is_no_failure(method, scale, dtype):
    problem, a = at_the_optimum(scale)
    a, steps = a.to(dtype), 40 if dtype == torch.float32 else 80
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.3), 100, method, on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solver.solve(torch.zeros_like(a), a, sgd(0.5 / scale), steps=steps)
    assert found.gradient_norm <= 1e4 * torch.finfo(dtype).eps * scale
    assert len(found.certificates) == steps


def test_an_error_that_is_negligible_before_is_one_where_a_descent_begins():
    # The error of few steps is relative to the slopes that cancel: at the optimum it is a failure.
    problem, _ = at_the_optimum()
    # a = w + sinh(w) / 2, and the hypergradient is zero where w - 1 = -(a + 1) (1 + cosh(w) / 2).
    w = torch.full((4,), -0.3, dtype=torch.float64)
    for _ in range(30):
        a, slope, bend = w + w.sinh() / 2, 1 + w.cosh() / 2, w.sinh() / 2
        w = w - (w - 1 + (a + 1) * slope) / (1 + slope**2 + (a + 1) * bend)
    exact = bl.BilevelSolver(problem, bl.optim.SGD(0.3), 100, bl.Implicit(), certificate=None)
    assert exact.hypergradient(w, a).gradient.norm() < 1e-12
    few = bl.BilevelSolver(problem, bl.optim.SGD(0.3), 3, on_failure="raise")
    with pytest.raises(ConvergenceError, match=r"iteration 1: .*not trustworthy"):
        few.solve(torch.zeros_like(a), a, sgd(0.5), steps=1)
    # Below a tolerance that was asked for it is none.
    found = few.solve(w, a, sgd(0.5), steps=1, tolerance=1.0)
    assert found.converged


# A tolerance of the inner iteration, and methods that differentiate its steps.


@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled(), bl.Implicit()], ids=repr)
@pytest.mark.parametrize("warm_start", [None, True, False])
def test_an_inner_tolerance_keeps_the_gradient_of_the_steps(method, warm_start):
    # w(a) = a, F = w + a: the hypergradient is 2, of which the direct part is 1.
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - a) / 2, lambda w, a, batch: w.sum() + a.sum()
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 100, method, certificate=None)
    seen = []
    solver.solve(
        ZERO,
        ONE,
        sgd(1e-9),
        steps=4,
        inner_tolerance=1e-2,
        warm_start=warm_start,
        callback=lambda p: seen.append(float(p.found.gradient)),
    )
    assert seen == pytest.approx([2.0] * 4, rel=2e-2)


@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled()], ids=repr)
def test_a_start_within_the_inner_tolerance_carries_the_gradient_all_the_same(method):
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - a) / 2, lambda w, a, batch: w.sum() + a.sum()
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 100, method, certificate=None)
    exact, near = ONE.clone(), ONE + 1e-4
    for start in (exact, near):
        found = solver.hypergradient(start, ONE, inner_tolerance=1e-2)
        assert float(found.gradient) == pytest.approx(2, rel=1e-2)
    lost = bl.BilevelProblem(problem.inner, lambda w, a, batch: w.sum())
    found = dataclasses.replace(solver, problem=lost).hypergradient(ONE, ONE, inner_tolerance=1e-2)
    assert float(found.gradient) == pytest.approx(1, rel=1e-2)


def test_an_inner_tolerance_is_checked_by_hypergradient():
    with pytest.raises(ArgumentError, match="inner_tolerance must be > 0"):
        shifted(bl.MLM(), None).hypergradient(ZERO, ONE, inner_tolerance=0.0)
    found = shifted(bl.Implicit(), None, 2000).hypergradient(ZERO, ONE, inner_tolerance=0.5)
    assert found.warm.steps == 70  # 0.99^69 is the first below a half, looked at every ten


# What a failure keeps.


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("mine"), MemoryError])
def test_whatever_ends_a_solve_has_the_progress(error):
    def callback(progress):
        if progress.step == 3:
            raise error

    whole = shifted(bl.MLM(), None, 100).solve(ZERO, ZERO, sgd(0.1), steps=3)
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind) as caught:
        shifted(bl.MLM(), None, 100).solve(ZERO, ZERO, sgd(0.1), steps=9, callback=callback)
    reached = caught.value.progress
    assert isinstance(reached, bl.solution.Solution)
    assert torch.equal(reached.control, whole.control)
    assert reached.values == whole.values
    assert not reached.converged
    assert any("error.progress" in note for note in caught.value.__notes__)


def test_an_error_of_a_users_cost_has_the_progress_of_the_control_solver():
    calls = []

    def cost(u, c):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk is full")
        return u**2 / 2

    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), cost, 1)
    with pytest.raises(OSError, match="disk is full") as caught:
        bl.ControlSolver(problem, sgd(0.5)).solve(ZERO, ONE, steps=9)
    reached = caught.value.progress
    assert isinstance(reached, bl.control.ControlSolution)
    assert (reached.steps, reached.costs) == (2, [0.5, 0.125])
    assert float(reached.control) == -0.75


def test_a_line_search_that_fails_on_its_way_leaves_the_control_of_the_last_update():
    calls = []

    def cost(u, c):
        calls.append(1)
        if len(calls) == 4:
            raise OSError
        return torch.cosh(u)

    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), cost, 1)
    lbfgs = lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2)  # noqa: E731
    with pytest.raises(OSError) as caught:
        bl.ControlSolver(problem, lbfgs).solve(ZERO, ONE, steps=9)
    whole = bl.ControlSolver(
        bl.ControlProblem(problem.dynamics, lambda u, c: torch.cosh(u), 1), lbfgs
    ).solve(ZERO, ONE, steps=1)
    assert caught.value.progress.steps == 1
    assert torch.equal(caught.value.progress.control, whole.control)


def test_history_holds_nothing_of_the_size_of_the_control():
    problem, a = at_the_optimum()
    found = bl.BilevelSolver(problem, bl.optim.SGD(0.3), 100).solve(
        torch.zeros_like(a), a, sgd(0.5), steps=3
    )
    held = [
        value
        for certificate in found.certificates
        for value in vars(certificate).values()
        for value in bl.tree.leaves_of(value)
    ]
    assert len(found.certificates) == 3
    assert {type(x) for x in held} <= {str, float, int, bool, type(None)}
    assert found.certificates[0].error_estimate < 2e-2


# Parts of a control that one sweep does not read.


@pytest.mark.parametrize("seed", range(4))
def test_a_block_that_one_sweep_leaves_out_has_gradient_zero(seed):
    draws = random.Random(seed)
    used = []

    def step(u, c, t):
        used.append(draws.random() < 0.5)
        return u + c["a"] + (c["b"] if used[-1] else 0)

    problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u - 9) / 2, 1)
    gradients = []
    # The graph of the one sweep is kept: these draws are not torch's, and are not made again.
    solver = bl.ControlSolver(problem, sgd(0.1), bl.Checkpointing(block=None))
    found = solver.solve(
        {"a": ZERO, "b": ZERO.clone()},
        ONE,
        steps=12,
        callback=lambda p: gradients.append(float(p.found.gradient["b"])),
    )
    assert found.steps == 12
    assert 0 in gradients
    assert min(gradients) < 0


def test_a_part_that_nothing_ever_reads_is_still_refused():
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c["a"]), lambda u, c: square(u), 1)
    with pytest.raises(LostGradientError, match=r"control\['b'\] reaches no cost.* dynamics"):
        bl.ControlSolver(problem).solve({"a": ZERO, "b": ZERO.clone()}, ONE)


@pytest.mark.parametrize(
    "optimizer",
    [sgd(0.25), lambda p: torch.optim.LBFGS(p), bl.NewtonCG()],
    ids=["SGD", "LBFGS", "NewtonCG"],
)
def test_every_optimiser_goes_on_where_a_batch_does_not_read_a_part(optimizer):
    def build(batch):
        dynamics = bl.Map(lambda u, c, t: u + c["a"] + (c["b"] if batch else 0))
        return bl.ControlProblem(
            dynamics, lambda u, c: (square(u - 3) + square(c["a"]) + batch * square(c["b"])) / 2, 1
        ), ZERO

    control = {"a": ZERO, "b": ZERO.clone()}
    found = bl.ControlSolver(build, optimizer).solve(control, batches=[1, 1, 1, 0, 1], steps=60)
    # The last five updates are the same cycle: b stands still in the fourth of each.
    assert found.steps == 60
    assert 0.9 < float(found.control["b"]) < 1.3


def test_a_head_that_only_the_first_batch_reads_stands_still_in_the_others():
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(w - c["a"]) / 2,
        lambda w, c, batch: square(w - 1) + (square(c["b"] - 1) if batch else 0),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, certificate=None)
    control = {"a": ZERO, "b": ZERO.clone()}
    found = solver.solve(ZERO, control, sgd(0.25), steps=3, batches=[(0, 1), (0, 0), (0, 0)])
    assert float(found.control["b"]) == 0.5
    with pytest.raises(LostGradientError, match=r"control\['b'\] reaches no objective"):
        solver.solve(ZERO, control, sgd(0.25), steps=3, batches=[(0, 0), (0, 1)])
