"""Problems side by side, bounds, and starts that are no minimum."""

import math

import pytest
import torch
from problems import real, square, zeros

import bilevel as bl
from bilevel import tree
from bilevel.errors import (
    ArgumentError,
    DivergenceError,
    LostGradientError,
    StructureError,
    UnsupportedError,
)

F64 = torch.float64


def swing(horizon=15, dt=0.2):
    """A pendulum to swing up, whose rest is stationary and no minimum."""

    def step(x, u, t):
        speed = x[1] + dt * (-9.81 * torch.sin(x[0]) + u[0] - 0.1 * x[1])
        return torch.stack([x[0] + dt * speed, speed])

    return bl.ControlProblem(
        bl.Map(step),
        lambda x, c: 20 * (1 + torch.cos(x[0])) + 5 * x[1] ** 2,
        horizon,
        lambda x, u, t: dt * (0.005 * u @ u + 1 + torch.cos(x[0]) + 0.05 * x[1] ** 2),
    )


def pushes(size, horizon=15):
    return bl.PerStep([torch.full((1,), size, dtype=F64) for _ in range(horizon)])


REST = torch.zeros(2, dtype=F64)


def quiet(problem, **settings):
    return bl.ControlSolver(problem, bl.Riccati(**settings), on_failure="ignore")


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"bounds": (-3.0, 3.0)}, {"gauss_newton": True}],
    ids=repr,
)
def test_each_problem_of_a_batch_goes_as_it_goes_alone(settings):
    starts = torch.stack([REST, real(1, 2), 2 * real(2, 2), REST + 0.1])
    begin = bl.PerStep([0.1 * real(t + 10, 4, 1) * (starts[:, :1] != 0) for t in range(15)])
    together = quiet(swing(), batched=True, **settings).solve(begin, starts)
    for i, start in enumerate(starts):
        control = bl.PerStep([x[i] for x in begin.steps])
        alone = quiet(swing(), **settings).solve(control, start)
        assert int(together.steps[i]) == alone.steps
        assert bool(together.converged[i]) == alone.converged
        assert together.reason[i].split(",")[-1] == alone.reason.split(",")[-1]
        assert float(together.cost[i]) == pytest.approx(alone.cost, rel=1e-12)
        ours = torch.stack([x[i] for x in together.control.steps])
        torch.testing.assert_close(ours, torch.stack([*alone.control.steps]), rtol=0, atol=1e-9)
    assert together.converged.tolist() == [False, True, True, True]
    assert together.adjoint.multipliers[3].shape == starts.shape


def test_the_hanging_pendulum_at_rest_is_stationary_and_not_converged():
    with pytest.warns(bl.ConvergenceWarning, match="stationary point is no minimum"):
        found = bl.ControlSolver(swing(), bl.Riccati()).solve(pushes(0.0), REST)
    assert (found.steps, found.converged, found.gradient_norm) == (0, False, 0.0)
    pushed = quiet(swing()).solve(pushes(0.1), REST)
    assert pushed.converged
    assert pushed.cost < found.cost / 2
    assert max(pushed.shifts) > 100 * pushed.shifts[-1]  # grown, and shrunk again


def test_bounds_are_kept_and_optimal():
    found = quiet(swing(), bounds=(-3.0, torch.tensor([3.5], dtype=F64))).solve(pushes(0.1), REST)
    u = torch.cat([*found.control.steps])
    assert found.converged
    assert bool(((u >= -3) & (u <= 3.5)).all())
    slope = torch.cat([*bl.adjoint(swing(), REST, found.control).gradient.steps])
    low, high = u == -3, u == 3.5
    assert int(low.sum()) > 2 < int(high.sum())
    assert float(slope[~low & ~high].abs().max()) <= 1e-9
    assert float(slope[low].min()) > 0 > float(slope[high].max())


def test_bounds_of_several_controls_agree_with_an_exact_projection():
    # Without dynamics a bounded quadratic in each step: the clipped minimiser is the minimum only
    # if H is diagonal; here it is not, and the KKT conditions tell.
    H = torch.tensor([[2.0, 1.5], [1.5, 2.0]], dtype=F64)
    problem = bl.ControlProblem(
        bl.Map(lambda x, u, t: 0.9 * x + u),
        lambda x, c: square(x),
        6,
        lambda x, u, t: u @ H @ u / 2 + x @ x / 4 + u[0] / 3,
    )
    start = bl.PerStep.unstack(torch.zeros(6, 2, dtype=F64))
    bounds = bl.PerStep([torch.tensor([-0.4, -0.1 * t], dtype=F64) for t in range(1, 7)])
    found = quiet(problem, bounds=(bounds, 0.05)).solve(start, real(3, 2))
    slope = bl.adjoint(problem, real(3, 2), found.control).gradient
    assert found.converged
    active = 0
    for u, g, low in zip(found.control.steps, slope.steps, bounds.steps, strict=True):
        at_low, at_high = u == low, u == 0.05
        active += int((at_low | at_high).sum())
        assert float((g * ~(at_low | at_high)).abs().max()) <= 1e-9
        assert float((g * at_low).min()) >= 0 >= float((g * at_high).max())
    assert 0 < active < 12


def test_a_shared_control_is_bounded_too():
    problem = bl.ControlProblem(
        bl.Map(lambda x, u, t: x + u["push"]),
        lambda x, c: square(x),
        4,
        lambda x, u, t: square(u["push"]),
    )
    control = {"push": torch.zeros(2, dtype=F64)}
    start = torch.tensor([1.0, 0.1], dtype=F64)
    bounds = ({"push": torch.tensor([-0.1, -1.0], dtype=F64)}, None)
    found = quiet(problem, bounds=bounds).solve(control, start)
    assert found.control["push"].tolist() == pytest.approx([-0.1, -0.02], abs=1e-12)


BAD_BOUNDS = [
    ((1.0, -1.0), ArgumentError, "low must be at most high"),
    ((torch.zeros(3), 1.0), StructureError, r"fits the control's, \(1,\)"),
    ((bl.PerStep([0.0]), 1.0), StructureError, "one entry per step, 15"),
    (({"a": 0.0}, 1.0), StructureError, "a tree like the control"),
    ((math.nan, 1.0), ArgumentError, "got NaN"),
]


@pytest.mark.parametrize(("bounds", "error", "message"), BAD_BOUNDS)
def test_bounds_that_do_not_fit_are_refused(bounds, error, message):
    with pytest.raises(error, match=message):
        quiet(swing(), bounds=bounds).solve(pushes(0.1), REST)


def line(terminal, running=None):
    return bl.ControlProblem(bl.Map(lambda x, u, t: x + u), terminal, 3, running)


@pytest.mark.parametrize(
    "problem",
    [
        line(lambda x, c: x.sum()),
        line(lambda x, c: x.sum() - square(x)),
        line(lambda x, c: x.sum() - square(x), lambda x, u, t: 0.3 * square(u)),
    ],
)
def test_problems_without_a_minimum_are_said_to_be_unbounded(problem):
    start = bl.PerStep.unstack(torch.zeros(3, 2, dtype=F64))
    with pytest.raises(DivergenceError, match="unbounded below") as caught:
        quiet(problem).solve(start, torch.ones(2, dtype=F64))
    assert not caught.value.progress.converged


def test_a_step_without_a_finite_derivative_is_named():
    problem = bl.ControlProblem(
        bl.Map(lambda x, u, t: torch.sqrt((x - 3 + t) ** 2) + u), lambda x, c: square(x), 3
    )
    start = bl.PerStep([torch.zeros(1, dtype=F64) for _ in range(3)])
    with pytest.raises(DivergenceError, match="t = 2"):
        quiet(problem).solve(start, torch.ones(1, dtype=F64))
    far = bl.ControlProblem(bl.Map(lambda x, u, t: 1e200 * x + u), lambda x, c: square(x), 3)
    with pytest.raises(DivergenceError, match=r"u\(2\)"):
        quiet(far).solve(start, torch.ones(1, dtype=F64))


def test_a_batch_whose_axes_do_not_agree_is_refused():
    with pytest.raises(StructureError, match="3 problems"):
        quiet(swing(), batched=True).solve(pushes(0.1), torch.zeros(3, 2, dtype=F64))


def test_what_is_no_problem_for_a_sweep_is_refused_by_name():
    noisy = bl.ControlProblem(
        bl.Map(lambda x, u, t: x + u * torch.randn(())), lambda x, c: square(x), 3
    )
    with pytest.raises(UnsupportedError, match="draw nothing at random"):
        quiet(noisy).solve(zeros(3), torch.ones((), dtype=F64))
    large = bl.PerStep([torch.zeros(401) for _ in range(3)])
    with pytest.raises(UnsupportedError, match="NewtonCG"):
        quiet(line(lambda x, c: square(x))).solve(large, torch.zeros(401))
    found = quiet(line(lambda x, c: square(x), lambda x, u, t: square(u)), largest=401)
    assert found.solve(large, torch.ones(401)).converged
    with pytest.raises(ArgumentError, match="floating-point or complex"):
        quiet(line(lambda x, c: square(x))).solve(
            bl.PerStep([torch.tensor([1]) for _ in range(3)]), torch.zeros(1)
        )
    with pytest.raises(ArgumentError, match="the class Riccati"):
        bl.ControlSolver(swing(), bl.Riccati)
    with pytest.raises(ArgumentError, match="checkpointing"):
        bl.ControlSolver(swing(), bl.Riccati(), bl.Checkpointing())
    with pytest.raises(ArgumentError, match="bounds="):
        quiet(swing()).solve(pushes(0.1), REST, project=lambda c: c)


def test_each_setting_matters():
    def steps(**settings):
        found = quiet(swing(), **settings).solve(pushes(0.5), REST, steps=60)
        return found.steps, found.cost, found.converged

    usual = steps()
    assert steps(lengths=1) != usual
    assert steps(decrease=0.49) != usual
    loose = quiet(swing(), tolerance=1.0).solve(pushes(0.1), REST)
    assert 1e-9 < loose.gradient_norm <= 1.0
    for bad in ({"lengths": 0}, {"decrease": 0.5}, {"tolerance": 0.0}, {"largest": 0}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            bl.Riccati(**bad)
    with pytest.raises(ArgumentError, match="pair"):
        bl.Riccati(bounds=3.0)


def test_callbacks_see_and_end_the_iteration():
    seen = []
    quiet(swing()).solve(pushes(0.1), REST, callback=lambda p: seen.append(p.cost) or p.step == 3)
    assert len(seen) == 3
    assert seen == sorted(seen, reverse=True)


def test_an_interruption_takes_with_it_what_was_reached():
    def interrupt(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        quiet(swing()).solve(pushes(0.1), REST, callback=interrupt)
    reached = caught.value.progress
    assert (reached.steps, len(reached.costs)) == (2, 2)
    assert reached.cost < reached.costs[0]


def test_what_nothing_reads_is_refused():
    problem = line(lambda x, c: square(x), lambda x, u, t: square(u["a"]))
    deaf = bl.ControlProblem(
        bl.Map(lambda x, u, t: x + u["a"]), problem.terminal, 3, problem.running
    )
    control = bl.PerStep([{"a": REST + 0 * t, "b": REST + t} for t in range(3)])
    with pytest.raises(LostGradientError, match=r"\['b'\] reaches no cost"):
        quiet(deaf).solve(control, torch.ones(2, dtype=F64))


def test_arguments_stay_as_they_are():
    control, start = pushes(0.1), REST.clone()
    quiet(swing(), bounds=(-0.05, 0.05)).solve(control, start)
    assert all(float(x) == 0.1 for x in control.steps)
    assert tree.norm(start) == 0


def test_a_problem_without_a_finite_cost_is_named_and_leaves_the_others_alone():
    problem = bl.ControlProblem(
        bl.Map(lambda x, u, t: x + u), lambda x, c: x.log() ** 2, 5, lambda x, u, t: u**2 / 2
    )
    starts = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    begin = bl.PerStep([torch.zeros(3, dtype=torch.float64) for _ in range(5)])
    with pytest.warns(bl.ConvergenceWarning, match=r"problem 1: the cost \(nan\) or its gradient"):
        found = bl.ControlSolver(problem, bl.Riccati(batched=True)).solve(begin, starts)
    assert found.converged.tolist() == [True, False, True]
    alone = bl.PerStep([torch.zeros((), dtype=torch.float64) for _ in range(5)])
    solver = bl.ControlSolver(problem, bl.Riccati())
    assert float(found.cost[2]) == solver.solve(alone, starts[2]).cost
    with pytest.raises(DivergenceError, match="not finite at the control to begin with"):
        solver.solve(alone, starts[1])
