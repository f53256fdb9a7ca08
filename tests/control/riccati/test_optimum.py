"""The optimal control as a function: derivatives against closed forms and re-solved problems."""

import pytest
import torch
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError, ConvergenceError, LostGradientError

# The first use of forward mode in torch 2.13 scripts decompositions, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
F64 = torch.float64
T, N, M = 6, 3, 2
START, REST = real(1, N), bl.PerStep.unstack(torch.zeros(T, M, dtype=F64))
POINT = {"A": 0.5 * real(2, N, N), "B": real(3, N, M), "q": real(4, N).abs() + 1}
POINT["r"] = torch.tensor(0.5, dtype=F64)


def quadratic(p):
    return bl.ControlProblem(
        bl.Map(lambda x, u, t: p["A"] @ x + p["B"] @ u),
        lambda x, c: (p["q"] * x * x).sum() / 2,
        T,
        lambda x, u, t: (x @ x + p["r"] * (u @ u)) / 2,
    )


def curved(p):
    return bl.ControlProblem(
        bl.Map(lambda x, u, t: p["A"] @ torch.sin(x) + 0.1 * t * (p["B"] @ u)),
        lambda x, c: (p["q"] * x * x).sum() / 2,
        T,
        lambda x, u, t: (x @ x + p["r"] * (u @ u)) / 2,
    )


def closed_form(p, x):
    """Controls and states of the quadratic problem by one dense solve; autograd goes through it."""
    powers = [torch.eye(N, dtype=F64)]
    for _ in range(T):
        powers.append(p["A"] @ powers[-1])
    G = torch.cat(powers)  # states of the start
    rows = [
        torch.cat(
            [
                powers[t - s - 1] @ p["B"] if s < t else torch.zeros(N, M, dtype=F64)
                for s in range(T)
            ],
            1,
        )
        for t in range(T + 1)
    ]
    S = torch.cat(rows)
    Q = torch.cat([torch.ones(T * N, dtype=F64), p["q"]])
    H = S.mT @ (Q[:, None] * S) + p["r"] * torch.eye(T * M, dtype=F64)
    u = -torch.linalg.solve(H, S.mT @ (Q * (G @ x)))
    states = G @ x + S @ u
    return u.view(T, M), states.view(T + 1, N), (Q * states**2).sum() / 2 + p["r"] * u @ u / 2


def weighed(controls, states, cost):
    return (controls * real(5, T, M)).sum() + (states * real(6, T + 1, N)).sum() + 0.7 * cost


def measured(build, **settings):
    solver = bl.ControlSolver(build, bl.Riccati(tolerance=1e-11, **settings))

    def value(p, x):
        found = solver.optimum(p, x, REST)
        return weighed(torch.stack([*found.control.steps]), torch.stack(found.states), found.cost)

    return value


def leaves():
    p = {name: x.clone().requires_grad_() for name, x in POINT.items()}
    return p, START.clone().requires_grad_()


def gradients(value):
    p, x = leaves()
    return torch.autograd.grad(value(p, x), [*p.values(), x])


def test_derivatives_of_a_regulator_are_those_of_its_closed_form():
    ours = gradients(measured(quadratic))
    exact = gradients(lambda p, x: weighed(*closed_form(p, x)))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def directions():
    return {name: real(7, *x.shape) for name, x in POINT.items()}, real(8, N)


@pytest.mark.parametrize("bounds", [None, (-0.05, 0.02)], ids=["free", "bounded"])
@pytest.mark.parametrize("build", [quadratic, curved])
def test_derivatives_agree_with_differences_of_solved_problems(build, bounds):
    value = measured(build, bounds=bounds)
    dp, dx = directions()
    p, x = leaves()
    reverse = sum(
        (g * d).sum()
        for g, d in zip(
            torch.autograd.grad(value(p, x), [*p.values(), x]), [*dp.values(), dx], strict=True
        )
    )
    _, forward = torch.func.jvp(value, (POINT, START), (dp, dx))
    h = 1e-5
    ends = [
        value({name: v + s * h * dp[name] for name, v in POINT.items()}, START + s * h * dx)
        for s in (1, -1)
    ]
    assert float(forward) == pytest.approx(float(reverse), rel=1e-12)
    assert float(reverse) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-7)
    if bounds is not None:
        found = bl.ControlSolver(build, bl.Riccati(bounds=bounds)).optimum(POINT, START, REST)
        u = torch.stack([*found.control.steps])
        assert 0 < int(((u == -0.05) | (u == 0.02)).sum()) < T * M


def test_transforms_of_torch_func_go_through():
    solver = bl.ControlSolver(curved, bl.Riccati(tolerance=1e-11))

    def controls(x):
        return torch.stack([*solver.optimum(POINT, x, REST).control.steps])

    by_rows = torch.func.jacrev(controls)(START)
    torch.testing.assert_close(by_rows, torch.func.jacfwd(controls)(START), rtol=1e-12, atol=1e-13)
    several = torch.stack([START, 2 * START])
    alone = torch.stack([controls(x) for x in several])
    torch.testing.assert_close(torch.func.vmap(controls)(several), alone, rtol=1e-12, atol=1e-13)


def test_a_batch_of_optima_has_the_derivatives_of_each():
    several = torch.stack([START, -2 * START, real(9, N)])
    settings = {"bounds": (-0.05, 0.02)}
    solver = bl.ControlSolver(curved, bl.Riccati(tolerance=1e-11, batched=True, **settings))
    p, _ = leaves()
    x = several.clone().requires_grad_()
    rest = bl.PerStep([torch.zeros(3, M, dtype=F64) for _ in range(T)])
    found = solver.optimum(p, x, rest)
    total = sum(
        weighed(
            torch.stack([u[i] for u in found.control.steps]),
            torch.stack([s[i] for s in found.states]),
            found.cost[i],
        )
        for i in range(3)
    )
    ours = torch.autograd.grad(total, [*p.values(), x])
    value = measured(curved, **settings)
    p, _ = leaves()
    each = several.clone().requires_grad_()
    alone = torch.autograd.grad(sum(value(p, row) for row in each), [*p.values(), each])
    for a, b in zip(ours, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_shared_control_and_a_start_have_derivatives_too():
    def build(p):
        return bl.ControlProblem(
            bl.Map(lambda x, u, t: torch.tanh(x + u[0] + p * u[1])),
            lambda x, c: square(x - 0.3) + p * square(c.shared),
            4,
            lambda x, u, t: square(u[0]) + p**2 * square(u[1] - 0.1),
        )

    rest = bl.PerStep(
        [torch.zeros(2, dtype=F64) for _ in range(4)], shared=torch.zeros(2, dtype=F64)
    )
    solver = bl.ControlSolver(build, bl.Riccati(tolerance=1e-11))

    def value(p):
        found = solver.optimum(p, START[:2], rest)
        return (found.control.shared * real(1, 2)).sum() + (found.control.steps[2]).sum()

    p = torch.tensor(0.8, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(p), p)
    ends = [value(torch.tensor(0.8 + h, dtype=F64)) for h in (1e-5, -1e-5)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_what_has_no_derivative_is_said():
    def flat(p):
        return bl.ControlProblem(bl.Map(lambda x, u, t: x + u), lambda x, c: p * square(x), 3)

    solver = bl.ControlSolver(flat, bl.Riccati())
    rest = bl.PerStep.unstack(torch.zeros(3, 1, dtype=F64))
    with pytest.raises(ConvergenceError, match="not the only one near"):
        solver.optimum(torch.ones((), dtype=F64), torch.ones(1, dtype=F64), rest)
    with pytest.raises(ArgumentError, match="ControlSolver"):
        bl.ControlSolver(flat(1.0), bl.Riccati()).optimum(POINT, START, REST)
    with pytest.raises(ArgumentError, match="must return a ControlProblem"):
        bl.ControlSolver(lambda p: None, bl.Riccati()).optimum(POINT, START, REST)


def test_the_control_to_begin_with_may_come_from_build():
    weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    f = torch.tensor(4.0, dtype=torch.float64)
    start = bl.PerStep.unstack(torch.zeros(1, dtype=torch.float64))

    def build(weight):
        return bl.ControlProblem(
            bl.Map(lambda state, control, t: state + control),
            terminal=lambda state, control: weight * state**2 / 2,
            running=lambda state, control, t: control**2 / 2,
            horizon=1,
        )

    paired = bl.ControlSolver(lambda weight: (build(weight), start), bl.Riccati())
    best = paired.optimum(weight, f)
    (slope,) = torch.autograd.grad(best.control.steps[0], weight)
    assert (float(best.control.steps[0].detach()), float(slope)) == pytest.approx((-3, -0.25))
    with pytest.raises(ArgumentError, match=r"control to begin with.*\(problem, control\)"):
        bl.ControlSolver(build, bl.Riccati()).optimum(weight, f)
    with pytest.raises(ArgumentError, match="or \\(problem, control\\), got \\(int, int\\)"):
        bl.ControlSolver(lambda weight: (1, 2), bl.Riccati()).optimum(weight, f)


def test_bounds_in_which_a_derivative_is_asked_for_are_refused():
    def cost(low):
        solver = bl.ControlSolver(quadratic, bl.Riccati(bounds=(low, 1.0)))
        return solver.optimum(POINT, START, REST).cost

    low = torch.tensor(-0.1, dtype=F64)
    for derivative in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(LostGradientError, match="bounds= are settings"):
            derivative(cost)(low)
    with pytest.raises(LostGradientError, match="bounds= are settings"):
        cost(low.requires_grad_())
