"""Newton-CG: one iteration for linear-quadratic problems, descent everywhere else."""

import pytest
import torch
from problems import KNOWN, cplx, lqr, square

import bilevel as bl


def solve(problem, observation, control, optimizer=None, **settings):
    settings = {"steps": 30, "tolerance": 1e-9, **settings}
    solver = bl.ControlSolver(problem, optimizer or bl.NewtonCG())
    return solver.solve(control, observation, **settings)


@pytest.mark.parametrize("known", KNOWN, ids=repr)
def test_newton_reaches_the_known_minimum(known):
    # A cost of 1e6 has a gradient that rounds at 1e-6.
    tolerance = 1e-6 if "penalty" in repr(known) else 1e-9
    found = solve(known.problem, known.observation, known.control, tolerance=tolerance)
    assert found.converged
    assert found.cost == pytest.approx(known.cost, abs=known.digits, rel=0)
    if known.first_control is not None:
        first = found.control
        first = first.steps[0] if isinstance(first, bl.PerStep) else first
        assert float(first.reshape(-1)[0]) == pytest.approx(known.first_control, abs=1e-8)


@pytest.mark.parametrize("checkpointing", [None, bl.Checkpointing(snapshots=3)], ids=repr)
def test_a_linear_quadratic_problem_takes_exactly_one_iteration(checkpointing):
    known = lqr()
    solver = bl.ControlSolver(known.problem, bl.NewtonCG(), checkpointing)
    found = solver.solve(known.control, known.observation, steps=5, tolerance=1e-8)
    assert found.steps == 1
    assert found.converged
    assert found.cost == pytest.approx(known.cost, abs=1e-12)


def test_residuals_of_the_optimality_conditions_come_with_the_solution():
    known = lqr()
    found = solve(known.problem, known.observation, known.control)
    assert found.kkt.feasibility == 0
    assert found.kkt.costate <= 1e-12
    assert found.kkt.stationarity == pytest.approx(found.gradient_norm, rel=1e-6, abs=1e-14)
    short = bl.ControlSolver(known.problem, lambda p: torch.optim.SGD(p, 1e-3)).solve(
        known.control, known.observation, steps=2
    )
    assert short.kkt.stationarity == pytest.approx(short.gradient_norm, rel=1e-12)
    assert short.kkt.stationarity > 0.1


def complex_problem():
    A, goal = 0.4 * cplx(1, 3, 3), cplx(2, 3)
    step = bl.Map(lambda u, c, t: A @ u + 0.3 * u.conj() + c)
    return bl.ControlProblem(
        step, lambda u, c: square(u - goal), 4, lambda u, c, t: square(c) / 2 + square(u) / 9
    )


def test_complex_controls_are_a_real_space():
    problem, start = complex_problem(), cplx(3, 3)
    control = bl.PerStep([torch.zeros(3, dtype=torch.complex128) for _ in range(4)])
    found = solve(problem, start, control)
    assert found.steps == 1
    lbfgs = bl.ControlSolver(
        problem, lambda p: torch.optim.LBFGS(p, max_iter=200, line_search_fn="strong_wolfe")
    ).solve(control, start, steps=1)
    assert found.cost == pytest.approx(lbfgs.cost, abs=1e-8)


def valley(curvature=1.0):
    """Two wells: the second derivative at 0 is negative."""
    return bl.ControlProblem(
        bl.Map(lambda u, c, t: u + c["x"]),
        lambda u, c: ((u**2 - 1) ** 2).sum() / 4 + curvature * square(c["x"]) / 100,
        1,
    )


@pytest.mark.parametrize("start", [0.01, 0.3, -0.2, 2.0])
def test_negative_curvature_is_left_downhill_and_the_cost_never_rises(start):
    control = {"x": torch.tensor([start], dtype=torch.float64), "n": 3}
    found = solve(valley(), torch.zeros(1, dtype=torch.float64), control)
    assert found.converged
    assert found.costs == sorted(found.costs, reverse=True)
    x = float(found.control["x"])
    assert abs(x) == pytest.approx((1 - 0.02) ** 0.5, abs=1e-9)
    assert x * start > 0
    assert found.control["n"] == 3


def test_each_setting_matters():
    zero = torch.zeros(2, dtype=torch.float64)
    start = bl.PerStep([torch.zeros(3, dtype=torch.complex128) for _ in range(4)])
    inexact = solve(
        complex_problem(), cplx(3, 3), start, bl.NewtonCG(bl.CG(max_steps=3)), tolerance=1e-6
    )
    assert inexact.converged
    assert inexact.steps > 1  # an exact one takes one
    # From 0.5 a full step overshoots: without halvings nothing is accepted.
    hard = {"x": torch.tensor([0.6], dtype=torch.float64)}
    stuck = bl.ControlSolver(valley(), bl.NewtonCG(halvings=0), on_failure="ignore").solve(
        hard, zero[:1], steps=1
    )
    moved = bl.ControlSolver(valley(), bl.NewtonCG(halvings=30), on_failure="ignore").solve(
        hard, zero[:1], steps=1
    )
    assert float(stuck.control["x"]) == 0.6
    assert float(moved.control["x"]) != 0.6
    strict = bl.ControlSolver(valley(), bl.NewtonCG(decrease=0.49), on_failure="ignore").solve(
        hard, zero[:1], steps=1
    )
    assert float(strict.control["x"]) != float(moved.control["x"])


def test_schedules_projections_callbacks_and_batches_are_used():
    seen = []

    def build(batch):
        return valley(batch), torch.zeros(1, dtype=torch.float64)

    control = {"x": torch.tensor([1.5], dtype=torch.float64)}
    found = bl.ControlSolver(build, bl.NewtonCG()).solve(
        control,
        steps=6,
        batches=[1.0, 2.0],
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        project=lambda c: {"x": c["x"].clamp(min=1.2)},
        callback=lambda p: seen.append(p.optimizer.param_groups[0]["lr"]),
    )
    assert seen == [0.5**k for k in range(1, 7)]
    assert float(found.control["x"]) == 1.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.NewtonCG(linear="cg"), "linear must be a linear solver"),
        (lambda: bl.NewtonCG(decrease=0.5), "decrease must be > 0 and < 1/2"),
        (lambda: bl.NewtonCG(halvings=-1), "halvings must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(bl.ArgumentError, match=message):
        make()
