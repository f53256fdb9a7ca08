"""Second derivatives of optima: against closed forms, and against differences of first ones."""

import pytest
import torch
from problems import cplx, real, square

import bilevel as bl
from bilevel.errors import LostGradientError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
F64 = torch.float64
T, N, M = 4, 2, 2
SIZES = [N * N, N * M, N, 1, N]
POINT = torch.cat(
    [0.5 * real(2, N * N), real(3, N * M), real(4, N).abs() + 1, real(5, 1), real(1, N)]
)
POINT[-N - 1] = 0.5
WEIGHTS = real(6, T, M), real(7, T + 1, N)
ALONG = real(8, len(POINT))
REST = bl.PerStep.unstack(torch.zeros(T, M, dtype=F64))


def parts(v):
    A, B, q, r, x = v.split(SIZES)
    return A.view(N, N), B.view(N, M), q, r[0], x


def problem_of(bend):
    def build(p):
        A, B, q, r, _ = parts(p)
        return bl.ControlProblem(
            bl.Map(lambda x, u, t: A @ (torch.sin(x) if bend else x) + 0.1 * t * (B @ u)),
            lambda x, c: (q * x * x).sum() / 2,
            T,
            lambda x, u, t: (x @ x + r * (u @ u)) / 2,
        )

    return build


def measured(bend=False, **settings):
    """A function of the optimum, of numbers that are both parameters and observation."""
    solver = bl.ControlSolver(problem_of(bend), bl.Riccati(tolerance=1e-11, **settings))

    def value(v):
        found = solver.optimum(v, parts(v)[-1], REST)
        return weighed(torch.stack([*found.control.steps]), torch.stack(found.states), found.cost)

    return value


def weighed(controls, states, cost):
    return (controls * WEIGHTS[0]).sum() + (states * WEIGHTS[1]).sum() + 0.7 * cost


def closed_form(v):
    """The same by one dense solve of the conditions, through which autograd goes."""
    A, B, q, r, x = parts(v)
    size = T * M
    rows, drift = [torch.zeros(N, size, dtype=F64)], [x]
    for t in range(T):
        here = torch.zeros(M, size, dtype=F64)
        here[:, t * M : (t + 1) * M] = torch.eye(M, dtype=F64)
        rows.append(A @ rows[-1] + 0.1 * (t + 1) * (B @ here))
        drift.append(A @ drift[-1])
    weights = torch.cat([torch.ones(T * N, dtype=F64), q])
    S, d = torch.cat(rows), torch.cat(drift)
    H = S.mT @ (weights[:, None] * S) + r * torch.eye(size, dtype=F64)
    u = -torch.linalg.solve(H, S.mT @ (weights * d))
    states = d + S @ u
    cost = (weights * states**2).sum() / 2 + r * (u @ u) / 2
    return weighed(u.view(T, M), states.view(T + 1, N), cost)


def gradient(value, v, *, create_graph=False):
    if not v.requires_grad:
        v = v.clone().requires_grad_()
    return torch.autograd.grad(value(v), v, create_graph=create_graph)[0]


NESTINGS = {
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "forward over reverse": torch.func.hessian,
    "reverse over forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
}


@pytest.fixture(scope="module")
def exact():
    return torch.autograd.functional.hessian(closed_form, POINT)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_second_derivatives_of_a_regulator_are_those_of_its_closed_form(nesting, exact):
    found = NESTINGS[nesting](measured())(POINT)
    assert not found.requires_grad
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_plain_autograd_differentiates_twice_too(exact):
    v = POINT.clone().requires_grad_()
    slope = gradient(measured(), v, create_graph=True)
    (found,) = torch.autograd.grad(slope @ ALONG, v)
    torch.testing.assert_close(found, exact @ ALONG, rtol=1e-10, atol=1e-10)


def test_the_hessian_of_the_cost_alone_is_exact_too():
    solver = bl.ControlSolver(problem_of(bend=False), bl.Riccati())

    def cost(v):
        return solver.optimum(v, parts(v)[-1], REST).cost

    def known(v):
        A, B, q, r, x = parts(v)
        P = torch.diag(q)
        for t in range(T, 0, -1):
            b = 0.1 * t * B
            gain = torch.linalg.solve(b.mT @ P @ b + r * torch.eye(M, dtype=F64), b.mT @ P @ A)
            P = torch.eye(N, dtype=F64) + A.mT @ P @ (A - b @ gain)
        return x @ P @ x / 2

    wanted = torch.autograd.functional.hessian(known, POINT)
    torch.testing.assert_close(torch.func.hessian(cost)(POINT), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bounds", [None, (-0.05, 0.02)], ids=["free", "bounded"])
def test_higher_derivatives_agree_with_differences_of_lower_ones(bounds):
    value = measured(bend=True, bounds=bounds)

    def twice(v):
        v = v.clone().requires_grad_()
        slope = gradient(value, v, create_graph=True)
        (found,) = torch.autograd.grad(slope @ ALONG, v, create_graph=True)
        return found, torch.autograd.grad(found @ ALONG, v)[0]

    h = 1e-5
    second, third = twice(POINT)
    for order, exact in ((lambda v: gradient(value, v), second), (lambda v: twice(v)[0], third)):
        ends = [order(POINT + s * h * ALONG).detach() for s in (1, -1)]
        wanted = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close(exact.detach(), wanted, rtol=1e-6, atol=1e-6)
    if bounds is not None:
        found = bl.ControlSolver(problem_of(bend=True), bl.Riccati(bounds=bounds)).optimum(
            POINT, POINT[-N:], REST
        )
        u = torch.stack([*found.control.steps])
        assert 0 < int(((u == bounds[0]) | (u == bounds[1])).sum()) < T * M


def test_a_batch_and_vmap_have_the_second_derivatives_of_each():
    starts = torch.stack([POINT[-N:], -2 * POINT[-N:], real(9, N)])
    build, settings = problem_of(bend=True), {"tolerance": 1e-11, "bounds": (-0.3, 0.3)}
    rests = bl.PerStep([torch.zeros(3, M, dtype=F64) for _ in range(T)])
    together = bl.ControlSolver(build, bl.Riccati(batched=True, **settings))
    alone = bl.ControlSolver(build, bl.Riccati(**settings))

    def costs(x):
        found = together.optimum(POINT, x, rests)
        return found.cost.sum() + (torch.stack([*found.control.steps]) ** 3).sum()

    def one(x):
        found = alone.optimum(POINT, x, REST)
        return found.cost + (torch.stack([*found.control.steps]) ** 3).sum()

    each = torch.stack([torch.func.hessian(one)(x) for x in starts])
    mapped = torch.func.vmap(torch.func.hessian(one))(starts)
    torch.testing.assert_close(mapped, each, rtol=1e-11, atol=1e-11)
    every = torch.func.hessian(costs)(starts)
    for i in range(3):
        for k in range(3):
            wanted = each[i] if i == k else torch.zeros_like(each[i])
            torch.testing.assert_close(every[i, :, k], wanted, rtol=1e-10, atol=1e-10)


def test_complex_states_and_shared_controls_have_second_derivatives():
    A, goal, start = 0.4 * cplx(1, 2, 2), cplx(2, 2), cplx(3, 2)

    def build(p):
        return bl.ControlProblem(
            bl.Map(lambda u, c, t: p * (A @ u) + 0.3 * u.conj() * u + c[0] + c[1]),
            lambda u, c: square(u - goal) + p**2 * square(c.shared),
            3,
            lambda u, c, t: square(c[0]) + square(u) / 9,
        )

    zero = torch.zeros(2, dtype=torch.complex128)
    rest = bl.PerStep([zero] * 3, shared=torch.zeros(2, dtype=F64))
    rest = bl.PerStep([x.clone() for x in rest.steps], shared=rest.shared)
    solver = bl.ControlSolver(build, bl.Riccati(tolerance=1e-11))

    def value(p, f):
        found = solver.optimum(p, f, rest)
        return square(found.control.steps[1]) + found.control.shared[0] + square(found.states[2])

    p = torch.tensor(0.9, dtype=F64)
    slope, curved = torch.func.grad(value), torch.func.grad(torch.func.grad(value))
    h = 1e-5
    wanted = (slope(p + h, start) - slope(p - h, start)) / (2 * h)
    assert float(curved(p, start)) == pytest.approx(float(wanted), rel=1e-7)
    # Mixed: in the parameter and in a complex observation.
    mixed = torch.func.grad(lambda f: slope(p, f))(start)
    along = cplx(4, 2)
    wanted = (slope(p, start + h * along) - slope(p, start - h * along)) / (2 * h)
    found = float((mixed.conj() * along).real.sum())
    assert found == pytest.approx(float(wanted), rel=1e-7)


def test_what_build_closes_over_is_refused():
    hidden = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def build(p):
        return bl.ControlProblem(
            bl.Map(lambda x, u, t: x + u),
            lambda x, c: hidden * p * square(x),
            2,
            lambda x, u, t: square(u),
        )

    rest = bl.PerStep.unstack(torch.zeros(2, 1, dtype=F64))
    with pytest.raises(LostGradientError, match="requires grad but is not"):
        bl.ControlSolver(build, bl.Riccati()).optimum(hidden.detach(), POINT[:1], rest)
