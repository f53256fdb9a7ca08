"""Constraints of steps and of the end, and those that cannot be met."""

import pytest
import torch
from problems import real, square, zeros

import bilevel as bl
from bilevel.control import Constraints
from bilevel.errors import ArgumentError, StructureError

F64 = torch.float64
N = 10
A = torch.tensor([[1.0, 1 / N], [0.0, 1.0]], dtype=F64)
B = torch.tensor([1 / (2 * N * N), 1 / N], dtype=F64)
GOAL, REST = torch.tensor([1.0, 0.0], dtype=F64), torch.zeros(2, dtype=F64)


def cart():
    """A double integrator; the cost is the energy of its force."""
    return bl.ControlProblem(
        bl.Map(lambda x, u, t: A @ x + B * u),
        lambda x, c: 0 * x.sum(),
        N,
        lambda x, u, t: u * u / N,
    )


def solve(constraints, **settings):
    solver = bl.ControlSolver(
        cart(), bl.Riccati(constraints=constraints, **settings), on_failure="ignore"
    )
    return solver.solve(zeros(N), REST)


def at_goal(x, c):
    return x - GOAL


def test_rest_to_rest_takes_its_known_energy():
    found = solve(Constraints(end_equality=at_goal))
    exact = 12 * N**2 / (N**2 - 1)
    assert found.converged
    assert found.cost == pytest.approx(exact, abs=1e-8)
    assert float(found.constraints.violation) <= 1e-10
    # The derivative of the energy in the distance, and minus the multiplier of the last state.
    assert float(found.constraints.end_equality[0]) == pytest.approx(-2 * exact, rel=1e-8)
    last = found.adjoint.multipliers[-1]
    torch.testing.assert_close(last, -found.constraints.end_equality, rtol=1e-8, atol=1e-8)


def test_limits_of_force_and_speed_are_met_with_signed_multipliers():
    limits = Constraints(
        inequality=lambda x, u, t: torch.stack([u - 7, -u - 7.5, x[1] - 1.4]), end_equality=at_goal
    )
    found = solve(limits)
    assert found.converged
    speeds = torch.stack(found.adjoint.states)[:-1, 1]
    active = found.constraints.inequality[:, 2] > 1e-6
    assert int(active.sum()) == 3
    assert float((speeds[active] - 1.4).abs().max()) <= 1e-9
    assert float((speeds - 1.4).max()) <= 1e-9
    assert float(found.constraints.inequality.min()) >= 0
    # Bounds do for the force what constraints do.
    speed = Constraints(inequality=lambda x, u, t: x[1] - 1.4, end_equality=at_goal)
    boxed = solve(speed, bounds=(-7.5, 7.0))
    assert boxed.cost == pytest.approx(found.cost, abs=1e-8)


def test_equalities_of_steps_and_inequalities_of_the_end():
    limits = Constraints(
        equality=lambda x, u, t: u - 1 if t == 3 else 0 * u,
        end_inequality=lambda x, c: 1 - x[:1],
    )
    found = solve(limits)
    assert found.converged
    assert float(found.control.steps[2]) == pytest.approx(1, abs=1e-9)
    assert float(found.adjoint.final_state[0]) == pytest.approx(1, abs=1e-9)
    assert float(found.constraints.end_inequality) > 0


def test_each_problem_of_a_batch_has_its_own_multipliers():
    constraints = Constraints(end_equality=at_goal, inequality=lambda x, u, t: x[1] - 1.4)
    settings = {"constraints": constraints}
    starts = torch.stack([REST, torch.tensor([0.5, 0.2], dtype=F64)])
    begin = bl.PerStep([torch.zeros(2, dtype=F64) for _ in range(N)])
    solver = bl.ControlSolver(cart(), bl.Riccati(batched=True, **settings))
    together = solver.solve(begin, starts)
    assert together.converged.all()
    for i, start in enumerate(starts):
        alone = bl.ControlSolver(cart(), bl.Riccati(**settings)).solve(zeros(N), start)
        assert float(together.cost[i]) == pytest.approx(alone.cost, abs=1e-9)
        torch.testing.assert_close(
            together.constraints.end_equality[i], alone.constraints.end_equality
        )


def test_what_cannot_be_met_is_named_with_its_time():
    impossible = Constraints(inequality=lambda x, u, t: 1 + u * u if t == 4 else u - 100)
    with pytest.warns(bl.ConvergenceWarning, match=r"infeasible: inequality\[0\] at t = 4"):
        found = bl.ControlSolver(cart(), bl.Riccati(constraints=impossible)).solve(zeros(N), REST)
    assert not found.converged
    assert float(found.constraints.violation) == pytest.approx(1, abs=1e-3)


BAD = [
    (lambda: Constraints(), ArgumentError, "must hold one of"),
    (lambda: Constraints(inequality=lambda x, u: u), ArgumentError, "called as inequality"),
    (lambda: Constraints(equality=3), ArgumentError, "equality must be a function"),
    (lambda: Constraints(end_equality=at_goal, weight=0.0), ArgumentError, "weight"),
    (lambda: bl.Riccati(constraints=at_goal), ArgumentError, "Constraints"),
    (lambda: solve(Constraints(inequality=lambda x, u, t: u > 1)), StructureError, "real tensor"),
    (
        lambda: solve(Constraints(equality=lambda x, u, t: u.expand(t))),
        StructureError,
        r"the shape that it has at t = 1, \(1,\), got \(2,\)",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_constraints_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_receding_horizon_begins_where_the_last_one_ended():
    problem = bl.ControlProblem(
        bl.Map(lambda x, u, t: A @ x + B * torch.tanh(u)),
        lambda x, c: 20 * square(x),
        N,
        lambda x, u, t: u * u / N + square(x) / N,
    )
    solver = bl.ControlSolver(problem, bl.Riccati())
    first = solver.solve(zeros(N), GOAL)
    following = first.adjoint.states[1] + 1e-3 * real(1, 2)
    cold, warm = (solver.solve(begin, following) for begin in (zeros(N), first.control.shifted()))
    assert warm.cost == pytest.approx(cold.cost, rel=1e-12)
    assert warm.costs[0] < cold.costs[0]
    assert warm.steps <= cold.steps
    with pytest.raises(ArgumentError, match="at most the 10 steps"):
        first.control.shifted(11)
