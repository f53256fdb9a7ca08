"""Newton-CG: one iteration for linear-quadratic problems, descent everywhere else."""

from itertools import pairwise

import pytest
import torch
from problems import KNOWN, cplx, lqr, real, square, walk
from reference import plain_cost

import bilevel as bl
from bilevel.control import newton_cg as newton
from bilevel.errors import ArgumentError

F64 = torch.float64
pytestmark = pytest.mark.xdist_group("newton")  # the regulator is solved once
GRAPHS = bl.Checkpointing(block=None)  # the fastest sweeps of a small problem


def solve(problem, observation, control, optimizer=None, checkpointing=GRAPHS, **settings):
    settings = {"steps": 30, "tolerance": 1e-9, **settings}
    solver = bl.ControlSolver(problem, optimizer or bl.NewtonCG(), checkpointing)
    return solver.solve(control, observation, **settings)


@pytest.fixture(scope="module")
def solved_lqr():
    known = lqr()
    return known, solve(known.problem, known.observation, known.control)


@pytest.mark.parametrize("known", [k for k in KNOWN if "regulator" not in repr(k)], ids=repr)
def test_newton_reaches_the_known_minimum(known):
    # A weight of 1e6 has a gradient that rounds at 1e-6.
    tolerance = 1e-6 if "penalty" in repr(known) else 1e-8
    # Only van der Pol's is not quadratic: there exact directions are a waste.
    optimizer = (
        bl.NewtonCG(bl.linear.CG(rtol=1e-2)) if "van der Pol" in repr(known) else bl.NewtonCG()
    )
    found = solve(known.problem, known.observation, known.control, optimizer, tolerance=tolerance)
    assert found.steps == 1 or "van der Pol" in repr(known)
    assert found.converged
    assert found.cost == pytest.approx(known.cost, abs=known.digits, rel=0)
    if known.first_control is not None:
        first = found.control
        first = first.steps[0] if isinstance(first, bl.PerStep) else first
        assert float(first.reshape(-1)[0]) == pytest.approx(known.first_control, abs=1e-8)


def test_a_linear_quadratic_regulator_takes_exactly_one_iteration(solved_lqr):
    known, found = solved_lqr
    assert found.steps == 1
    assert found.converged
    assert found.cost == pytest.approx(known.cost, abs=known.digits, rel=0)
    assert float(found.control.steps[0]) == pytest.approx(known.first_control, abs=1e-8)


@pytest.mark.parametrize("checkpointing", [None, bl.Checkpointing(snapshots=2)], ids=repr)
def test_one_iteration_is_enough_under_any_checkpointing(checkpointing):
    known = walk(5, 2.0, shared=False)
    found = solve(known.problem, known.observation, known.control, checkpointing=checkpointing)
    assert found.steps == 1
    assert found.cost == pytest.approx(known.cost, abs=known.digits, rel=0)


def test_residuals_of_the_optimality_conditions_come_with_the_solution(solved_lqr):
    known, found = solved_lqr
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
        complex_problem(), cplx(3, 3), start, bl.NewtonCG(bl.linear.CG(max_steps=3)), tolerance=1e-6
    )
    assert inexact.converged
    assert inexact.steps > 1  # an exact one takes one
    # From 0.7 a full step overshoots: without halvings nothing is accepted.
    hard = {"x": torch.tensor([0.7], dtype=torch.float64)}
    stuck = bl.ControlSolver(valley(), bl.NewtonCG(halvings=0), on_failure="ignore").solve(
        hard, zero[:1], steps=1
    )
    moved = bl.ControlSolver(valley(), bl.NewtonCG(halvings=30), on_failure="ignore").solve(
        hard, zero[:1], steps=1
    )
    assert float(stuck.control["x"]) == 0.7
    assert float(moved.control["x"]) != 0.7
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
        (lambda: bl.NewtonCG(decrease=0.5), "decrease must be > 0 and < 0.5"),
        (lambda: bl.NewtonCG(halvings=-1), "halvings must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_the_cost_never_rises_but_for_its_rounding():
    A, goal = 0.5 * real(5, 4, 4), real(6, 4)
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(A @ u + c)),
        lambda u, c: square(u - goal),
        3,
        lambda u, c, t: square(c) / 50,
    )
    start = bl.PerStep([real(7 + t, 4) for t in range(3)])
    found = solve(problem, real(8, 4), start, tolerance=0.0)
    assert found.gradient_norm <= 1e-12
    assert all(b <= a * (1 + 1e-15) for a, b in pairwise([*found.costs, found.cost]))
    # It ends by itself where no step lowers the cost, before the 30 steps allowed.
    assert found.steps < 30


def test_an_exact_minimum_ends_the_iteration_before_it_begins():
    bowl = bl.ControlProblem(bl.Map(lambda u, c, t: u + c["x"]), lambda u, c: square(u), 1)
    found = solve(bowl, torch.zeros(1, dtype=F64), {"x": torch.zeros(1, dtype=F64)})
    assert (found.steps, found.gradient_norm, found.converged) == (0, 0.0, True)
    at_rest = {"x": torch.zeros(1, dtype=F64)}
    assert solve(bowl, torch.zeros(1, dtype=F64), at_rest, tolerance=0.0).steps == 0


def test_a_standstill_is_told_from_a_lack_of_steps():
    # |u| has no step down from 0.05 but those shorter than 0.1.
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: u.abs().sum(), 1)
    zero = torch.zeros(1, dtype=F64)
    with pytest.warns(bl.ConvergenceWarning, match="no step along the direction lowers the cost"):
        found = solve(problem, zero, zero + 0.3, bl.NewtonCG(halvings=2))
    assert found.steps == 2  # by 1/2 to -0.2, by 1/4 to 0.05
    assert float(found.control) == pytest.approx(0.05, abs=1e-12)
    assert [*found.costs, found.cost] == pytest.approx([0.3, 0.2, 0.05])


def test_a_trial_that_is_not_finite_is_too_far():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u + c),
        lambda u, c: (u - torch.log(u)).sum(),  # convex, minimum 1 at u = 1; NaN where u < 0
        1,
    )
    zero = torch.zeros(1, dtype=F64)
    found = solve(problem, zero, zero + 5.0)  # the full step leads to 5 - 20
    assert found.converged
    assert float(found.control) == pytest.approx(1, abs=1e-9)


def test_steps_that_draw_draw_the_same_throughout_a_solve():
    def problem():
        def step(u, c, t):
            return u + c * (1 + 0.3 * torch.randn(3, dtype=F64))

        return bl.ControlProblem(
            bl.Map(step), lambda u, c: square(u), 4, lambda u, c, t: square(c) / 9
        )

    start, control = real(4, 3), torch.zeros(3, dtype=F64)
    torch.manual_seed(7)
    found = solve(problem(), start, control)
    after = torch.rand(())
    assert found.steps == 1
    assert found.converged
    torch.manual_seed(7)
    assert found.cost == pytest.approx(
        float(plain_cost(problem(), start, found.control)), rel=1e-14
    )
    assert torch.equal(after, torch.rand(()))  # the generator stands as after one forward sweep


@pytest.mark.parametrize("optimizer", [bl.NewtonCG(), lambda p: torch.optim.SGD(p, 1e-3)])
def test_random_steps_leave_no_residual_in_the_states_and_multipliers(optimizer):
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(u + c * torch.randn(3, dtype=F64))),
        lambda u, c: square(u) + square(c),
        5,
    )
    solver = bl.ControlSolver(problem, optimizer, on_failure="ignore")
    found = solver.solve(real(1, 3), real(2, 3), steps=2)
    assert found.kkt.feasibility == 0
    assert found.kkt.costate <= 1e-14
    assert found.kkt.stationarity == pytest.approx(found.gradient_norm, rel=1e-12, abs=1e-14)


def test_the_gradient_of_the_accepted_trial_serves_the_next_iteration():
    counted = []

    def step(u, c, t):
        counted.append(t)
        return u + c

    known = walk(5, 2.0, shared=False)
    problem = bl.ControlProblem(
        bl.Map(step), known.problem.terminal, 5, running=known.problem.running
    )
    products = []

    def product(*arguments, **settings):
        before = len(counted)
        found = bl.hvp(*arguments, **settings)
        products.append(len(counted) - before)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newton, "hvp", product)
        found = solve(problem, known.observation, known.control)
    # The start, one trial, the final record and the residuals: the iteration that finds the
    # gradient within the tolerance evaluates nothing.
    assert len(counted) - sum(products) == 5 * 4
    assert found.products == [1]  # the gradient is an eigenvector
    assert "products=[1, 1 in all]" in repr(found)
    assert len(products) == 1 + 2  # two more tell a minimum: there are two curvatures


def test_parts_of_a_control_that_are_no_variables_are_carried():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u + c["x"] * c["n"] if c["on"] is None else u),
        lambda u, c: square(u) + sum(square(part["x"]) for part in c.steps),
        2,
    )
    control = bl.PerStep([{"x": torch.zeros(2, dtype=F64), "n": 2, "on": None} for _ in range(2)])
    found = solve(problem, torch.ones(2, dtype=F64), control)
    assert found.steps == 1
    # u = 1 + 2 (x1 + x2), x1 = x2 = -2 u = -2 / (1 + 8)
    assert found.control.steps[1]["x"].tolist() == pytest.approx([-2 / 9] * 2, abs=1e-12)
    assert found.control.steps[0]["n"] == 2
    assert found.control.steps[0]["on"] is None


def test_single_precision_converges_to_its_own_rounding():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: 0.9 * u + 0.1 * c),
        lambda u, c: square(u),
        10,
        lambda u, c, t: square(c) / 9 + square(u) / 10,
    )
    start = torch.tensor([1.0, -2.0])
    control = bl.PerStep([torch.zeros(2) for _ in range(10)])
    found = solve(problem, start, control, tolerance=1e-5)
    assert found.steps == 1
    double = bl.PerStep([c.double() for c in found.control.steps])
    exact = solve(problem, start.double(), double)
    assert found.cost == pytest.approx(exact.cost, rel=1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 1e-8])
def test_a_saddle_to_begin_with_is_reported_as_no_minimum(tolerance):
    control = {"x": torch.zeros(1, dtype=torch.float64)}
    solver = bl.ControlSolver(valley(), bl.NewtonCG(), on_failure="ignore")
    found = solver.solve(control, torch.zeros(1, dtype=torch.float64), tolerance=tolerance)
    assert not found.converged
    assert "no minimum: the Hessian has negative curvature" in found.reason
    # Beside it there is a minimum, and flat directions are none that lead down.
    near = solver.solve({"x": control["x"] + 0.1}, control["x"], tolerance=1e-9)
    assert near.converged
    flat = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: square(u - 1), 3)
    rest = bl.PerStep([torch.zeros(2, dtype=F64) for _ in range(3)])
    assert solve(flat, torch.zeros(2, dtype=F64), rest).converged


def test_where_a_direction_ends_the_generator_stands_as_after_any_solve():
    problem, _ = valley(), torch.manual_seed(3)
    control = {"x": torch.full((1,), 0.3, dtype=torch.float64)}
    before = torch.get_rng_state()
    solve(problem, torch.zeros(1, dtype=torch.float64), control)
    assert torch.equal(before, torch.get_rng_state())
