"""Derivatives of optima with constraints, through the conditions of those that are active."""

import pytest
import torch
from problems import real, square, zeros

import bilevel as bl
from bilevel.control import Constraints, factors
from bilevel.errors import ConvergenceError, LostGradientError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
F64 = torch.float64
N = 6
A = torch.tensor([[1.0, 1 / N], [0.0, 1.0]], dtype=F64)
B = torch.tensor([1 / (2 * N * N), 1 / N], dtype=F64)
GOAL = torch.tensor([1.0, 0.0], dtype=F64)
POINT = torch.tensor([0.3, 0.5, 1.0, 0.05, -0.1], dtype=F64)
CONTROLS, STATES = real(1, N), real(2, N + 1, 2)


def build(p):
    """A cart whose motor saturates; the cost is its energy, and some for what it misses."""
    return bl.ControlProblem(
        bl.Map(lambda x, u, t: A @ x + B * torch.sinh(p[0] * u) / p[0]),
        lambda x, c: p[1] * square(x),
        N,
        lambda x, u, t: u * u / N + p[2] * 0.1 * square(x),
    )


def at_goal(x, c):
    return x - GOAL


CASES = {
    "end": {"constraints": Constraints(end_equality=at_goal)},
    "end and speed": {
        "constraints": Constraints(end_equality=at_goal, inequality=lambda x, u, t: x[1] - 1.2)
    },
    "end, speed and bounds": {
        "bounds": (-6.0, 4.5),
        "constraints": Constraints(
            end_equality=at_goal,
            inequality=lambda x, u, t: torch.stack([x[1] - 1.25, -u - 5.0, 0 * u]),
        ),
    },
    "curved": {
        "constraints": Constraints(
            inequality=lambda x, u, t: x[1] ** 2 + 0.1 * u * x[0] - 0.8,
            end_inequality=lambda x, c: 0.95 - x[:1] ** 3,
            equality=lambda x, u, t: (u - 1.2 * x[1].cos()) * (t == 3),
        )
    },
}


def measured(settings):
    solver, seen = bl.ControlSolver(build, bl.Riccati(**settings)), []

    def value(v):
        found = solver.optimum(v[:3], v[3:], zeros(N))
        seen.append(found.solution)
        controls, states = torch.stack([*found.control.steps]), torch.stack(found.states)
        return (controls * CONTROLS).sum() + (states * STATES).sum() + 0.3 * found.cost

    return seen, value


@pytest.mark.parametrize(
    "name",
    [
        "end, speed and bounds",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("end", "end and speed", "curved")),
    ],
)
def test_derivatives_agree_with_differences_of_solved_problems(name):
    seen, value = measured(CASES[name])
    first, second = torch.func.grad(value)(POINT), torch.func.hessian(value)(POINT)
    active = seen[0].constraints.inequality > 1e-5
    assert active.any() or name == "end"
    along, h = real(3, 5), 1e-5
    ends = [torch.func.grad_and_value(value)(POINT + s * h * along) for s in (1, -1)]
    (ahead, above), (behind, below) = ends
    wanted = float(above - below) / (2 * h)
    assert float(first @ along) == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    wanted = (ahead - behind) / (2 * h)
    torch.testing.assert_close(second @ along, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second, second.mT, rtol=1e-9, atol=1e-9)


def test_forward_derivatives_are_those_of_the_reverse():
    _, value = measured(CASES["end, speed and bounds"])
    along = real(3, 5)
    forward = torch.func.jvp(value, (POINT,), (along,))[1]
    assert float(forward) == pytest.approx(float(torch.func.grad(value)(POINT) @ along), rel=1e-10)


def test_a_cart_that_must_stop_has_the_derivatives_of_the_closed_form():
    def weighed(p):
        return bl.ControlProblem(
            bl.Map(lambda x, u, t: A @ x + B * u),
            lambda x, c: 0 * x.sum(),
            N,
            lambda x, u, t: (1 + p[0] * t) * u * u,
        )

    solver = bl.ControlSolver(weighed, bl.Riccati(**CASES["end"]))

    def ours(v):
        return torch.stack([*solver.optimum(v[:1], v[1:], zeros(N)).control.steps])

    def exact(v):
        weights = 1 / (1 + v[0] * torch.arange(1, N + 1, dtype=F64))
        reach = torch.stack([torch.linalg.matrix_power(A, N - t - 1) @ B for t in range(N)], 1)
        missing = GOAL - torch.linalg.matrix_power(A, N) @ v[1:]
        return weights * (reach.mT @ torch.linalg.solve((reach * weights) @ reach.mT, missing))

    v = torch.tensor([0.2, 0.1, -0.3], dtype=F64)
    for derivative in (lambda f: f, torch.func.jacrev, lambda f: torch.func.hessian(f)):
        torch.testing.assert_close(derivative(ours)(v), derivative(exact)(v), rtol=1e-9, atol=1e-9)


def test_each_problem_of_a_batch_has_its_own_active_constraints():
    settings = CASES["end, speed and bounds"]
    starts = torch.stack([POINT[3:], torch.tensor([0.6, 0.3], dtype=F64)])
    rests = bl.PerStep([torch.zeros(2, dtype=F64) for _ in range(N)])
    together = bl.ControlSolver(build, bl.Riccati(batched=True, **settings))
    p = POINT[:3].clone().requires_grad_()
    found = together.optimum(p, starts, rests)
    active = found.solution.constraints.inequality > 1e-5
    assert not torch.equal(active[0], active[1])
    controls = torch.stack([*found.control.steps], 1)
    ours = torch.autograd.grad((controls * CONTROLS).sum() + found.cost.sum(), p)[0]
    alone = bl.ControlSolver(build, bl.Riccati(**settings))

    def one(p, start):
        found = alone.optimum(p, start, zeros(N))
        return (torch.stack([*found.control.steps]) * CONTROLS).sum() + found.cost

    each = sum(torch.func.grad(one)(POINT[:3], start) for start in starts)
    torch.testing.assert_close(ours, each, rtol=1e-7, atol=1e-7)
    mapped = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(POINT[:3], starts)
    torch.testing.assert_close(mapped.sum(0), each, rtol=1e-10, atol=1e-10)


def walk(p):
    return bl.ControlProblem(
        bl.Map(lambda x, u, t: x + u), lambda x, c: p * square(x), 2, lambda x, u, t: square(u)
    )


def at_walk(start=1.0, on_failure="warn", **settings):
    rest = bl.PerStep.unstack(torch.zeros(2, 1, dtype=F64))
    solver = bl.ControlSolver(walk, bl.Riccati(**settings), on_failure=on_failure)
    p = torch.ones((), dtype=F64, requires_grad=True)
    return p, solver.optimum(p, torch.tensor([start], dtype=F64), rest)


def test_a_limit_that_the_state_carries_has_a_derivative():
    def carrying(p):
        return bl.ControlProblem(
            bl.Map(lambda s, u, t: (s[0] + u, s[1])),
            lambda s, c: p * s[0] ** 2 / 2,
            5,
            lambda s, u, t: u**2 / 2,
        )

    limit = Constraints(inequality=lambda s, u, t: -u - s[1])
    solver = bl.ControlSolver(carrying, bl.Riccati(constraints=limit))

    def cost(bound):
        start = torch.tensor(4.0, dtype=F64), bound
        return solver.optimum(torch.ones((), dtype=F64), start, zeros(5)).cost

    bound = torch.tensor(0.5, dtype=F64)  # J = (4 - 5 b)^2 / 2 + 5 b^2 / 2
    assert float(torch.func.grad(cost)(bound)) == pytest.approx(-5, rel=1e-9)
    assert float(torch.func.hessian(cost)(bound)) == pytest.approx(30, rel=1e-9)
    hidden = torch.tensor(0.5, dtype=F64, requires_grad=True)
    lost = Constraints(inequality=lambda s, u, t: -u - hidden)
    with pytest.raises(LostGradientError, match="requires grad but is not among its arguments"):
        bl.ControlSolver(carrying, bl.Riccati(constraints=lost)).optimum(
            torch.ones((), dtype=F64), (bound, bound), zeros(5)
        )


def test_what_is_weakly_active_is_named():
    # Alone, each step takes a third of the way: u = -1/3 is where the limit touches the optimum.
    limit = Constraints(inequality=lambda x, u, t: -u - 1 / 3 if t == 2 else 0 * u)
    with pytest.warns(bl.ConvergenceWarning, match=r"inequality\[0\] at t = 2 is weakly active"):
        at_walk(constraints=limit)
    with pytest.warns(bl.ConvergenceWarning, match=r"bound of the control, number 0 at t = 1, is"):
        at_walk(bounds=(-1 / 3, 1.0))
    with pytest.raises(ConvergenceError, match="weakly active"):
        at_walk(bounds=(-1 / 3, 1.0), on_failure="raise")
    at_walk(bounds=(-1 / 3, 1.0), on_failure="ignore")
    # A bound that leaves no choice is none that could be left.
    at_walk(0.0, bounds=(0.0, 0.0))


def test_constraints_that_depend_on_each_other_are_named_and_the_rest_is_right():
    twice = Constraints(end_equality=lambda x, c: torch.cat([x - 0.5, 2 * x - 1]))
    with pytest.warns(bl.ConvergenceWarning, match=r"depend on each other.*end_equality\["):
        p, found = at_walk(constraints=twice)
    assert float(found.control.steps[0].detach()) == pytest.approx(-0.25, abs=1e-9)
    (slope,) = torch.autograd.grad(found.control.steps[0].sum() + found.cost, p)
    assert float(slope) == pytest.approx(0.25, abs=1e-8)  # the cost is p x(T)^2 + ...
    still = Constraints(equality=lambda x, u, t: x - 1 if t == 1 else 0 * x)
    with pytest.warns(bl.ConvergenceWarning, match=r"no control.*equality\[0\] at t = 1"):
        at_walk(constraints=still)


def test_too_many_active_constraints_are_refused(monkeypatch):
    monkeypatch.setattr(factors, "MOST_ACTIVE", 1)
    fixed = Constraints(equality=lambda x, u, t: u + 0.1)
    with pytest.raises(UnsupportedError, match="there are 2 here, where at most 1"):
        at_walk(constraints=fixed)
