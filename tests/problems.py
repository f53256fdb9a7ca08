"""Tables of control problems: awkward ones for Theorem 1, and ones whose answer is known."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl

F64, C128 = torch.float64, torch.complex128


def real(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def cplx(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=C128)


def square(x: Tensor) -> Tensor:
    return (x * x.conj()).real.sum()


@dataclass(frozen=True, eq=False)
class Custom(bl.Dynamics):
    """g, g0 and the readout from plain functions."""

    g: Callable[[Any, Any, int], Any]
    g0: Callable[[Any, Any], Any] = lambda observation, control: observation
    read: Callable[[Any], Any] = lambda state: state

    def step(self, state, control, t):
        return self.g(state, control, t)

    def init(self, observation, control):
        return self.g0(observation, control)

    def readout(self, state):
        return self.read(state)


@dataclass(frozen=True, eq=False)
class Case:
    """A control problem at a point.

    Attributes:
        bitwise: whether the sweep adds in the order autograd does: one control a step, no
            running cost.
    """

    name: str
    problem: bl.ControlProblem
    observation: Any
    control: Any
    bitwise: bool = False

    def __repr__(self) -> str:
        return self.name


def _case(
    name, g, control, observation, horizon, terminal, running=None, bitwise=False, **functions
):
    problem = bl.ControlProblem(Custom(g, **functions), terminal, horizon, running)
    return Case(name, problem, observation, control, bitwise)


def _shared_real(horizon: int) -> Case:
    """One plain control, read by g0, g, r and l."""
    return _case(
        f"shared control read by everything, T = {horizon}",
        lambda u, c, t: torch.tanh(c["A"] @ u + 0.1 * t * c["b"]) + 0.3 * u,
        {"A": 0.6 * real(1, 4, 4), "b": real(2, 4)},
        real(3, 4),
        horizon,
        lambda u, c: (u**3).sum() / 3 + 0.1 * square(c["A"]) + (c["b"] * u).sum(),
        lambda u, c, t: 0.05 * t * (u**2).sum() + (c["b"] * u).sum() + (c["A"] ** 3).sum() / t,
        g0=lambda f, c: torch.sin(c["A"] @ f) + c["b"] * f,
    )


def _complex() -> Case:
    """Not holomorphic; a complex and a real control at once."""

    def g(u, c, t):
        size = (u * u.conj()).real
        turned = c["W"] @ u * c["scale"]
        return 0.5 * turned + torch.exp(1j * c["phase"] * t) * u.conj() / (1 + size) + 0.1j * size

    return _case(
        "complex state, complex and real control",
        g,
        {"W": 0.5 * cplx(4, 3, 3), "scale": real(5, 3), "phase": real(6)},
        cplx(7, 3),
        4,
        lambda u, c: square(u - cplx(8, 3)) ** 2 + c["phase"] ** 3 + (c["W"] @ u).imag.sum(),
        lambda u, c, t: 0.2 * t * square(u) + (u.conj() * c["W"][0]).real.sum() * c["phase"],
        g0=lambda f, c: c["W"] @ f.conj() * torch.exp(1j * c["scale"]),
    )


def _tree_state() -> Case:
    """Tensors, a complex one, an integer one, a bool one and a Python integer in one state."""

    def g(u, c, t):
        x = torch.tanh(c * u["x"] * u["count"]) + u["z"].imag * u["k"]
        z = torch.where(u["on"], u["z"] * torch.exp(1j * c), u["z"].conj()) + x
        return {**u, "x": x, "z": z}

    observation = {
        "x": real(9, 3),
        "z": cplx(10, 3),
        "count": torch.tensor([1, 2, 3]),
        "on": torch.tensor([True, False, True]),
        "k": 2,
    }
    return _case(
        "tree state with integers",
        g,
        0.3 * real(11, 3),
        observation,
        4,
        lambda u, c: (u["x"] ** 2 * u["count"]).sum() + square(u["z"]) * u["k"],
        lambda u, c, t: (u["x"] * u["z"].real).sum() * t + (c * u["x"]).sum(),
    )


def _per_step(running: bool) -> Case:
    """theta_t of several leaves, theta_0, and (with a running cost) a shared part."""
    horizon = 4
    steps = [(0.5 * real(20 + t, 3, 3), {"b": real(30 + t, 3)}) for t in range(horizon)]
    shared = real(12, 3) if running else None

    def g(u, c, t):
        (A, rest), s = c if running else (c, torch.ones(3, dtype=F64))
        return torch.tanh(A @ u * s + rest["b"]) * t

    def r(u, c, t):
        (A, rest), s = c
        return 0.1 * t * (A @ u * s).sum() + (rest["b"] ** 2 * s).sum() + 0.05 * (u**2).sum()

    def terminal(u, c):
        plain = (u**2).sum() + (u * real(13, 3)).sum()
        if not running:
            return plain
        return plain + (c.initial["w"] ** 3).sum() + (c.steps[1][0] * c.shared).sum()

    return _case(
        "per-step control with theta_0" + (", shared part and running cost" if running else ""),
        g,
        bl.PerStep(steps, initial={"w": real(14, 3)}, shared=shared),
        real(15, 3),
        horizon,
        terminal,
        r if running else None,
        bitwise=not running,
        g0=lambda f, c: torch.sin(f * c["w"]) + c["w"],
    )


def _mixed_fields() -> list[Case]:
    """A real control of a complex state, and the other way round."""
    return [
        _case(
            "complex state, real control per step",
            lambda u, c, t: torch.exp(1j * c * t) * u + c * u.conj() ** 2,
            bl.PerStep([0.3 * real(40 + t, 3) for t in range(4)]),
            0.4 * cplx(16, 3),
            4,
            lambda u, c: square(u - 1),
            bitwise=True,
        ),
        _case(
            "real state, complex control",
            lambda u, c, t: 0.5 * u + torch.real(c * torch.exp(1j * t * u)),
            0.7 * cplx(17, 3),
            real(18, 3),
            4,
            lambda u, c: (u**3).sum() + square(c),
            lambda u, c, t: (c * u).imag.sum(),
        ),
    ]


def _awkward_states() -> list[Case]:
    pair = (real(50, 3), real(51, 3))
    c = 0.5 * real(52, 3)

    def reads_both(u, c):
        return (u[0] ** 2).sum() + (u[0] * u[1]).sum()

    def running(u, c, t):
        return t * (u[1] ** 2 * c).sum() + u[0].sum()

    return [
        _case(
            "a leaf passed through unchanged",
            lambda u, c, t: (torch.tanh(c * u[0] + u[1]), u[1]),
            c,
            pair,
            4,
            reads_both,
            running,
        ),
        _case(
            "leaves that change places",
            lambda u, c, t: (u[1], torch.tanh(c * u[0] * t)),
            c,
            pair,
            4,
            reads_both,
            running,
        ),
        _case(
            "one tensor returned twice",
            lambda u, c, t: (torch.tanh(c * u[0] + u[1]),) * 2,
            c,
            pair,
            4,
            reads_both,
            running,
        ),
        _case(
            "a step that returns its state",
            lambda u, c, t: u if t % 2 else torch.tanh(c * u),
            c,
            real(53, 3),
            4,
            lambda u, c: (u**2).sum(),
            lambda u, c, t: t * (u * c).sum(),
        ),
        _case(
            "a step that returns a view",
            lambda u, c, t: u.T if t % 2 else torch.tanh(u * c),
            c,
            real(54, 3, 3),
            4,
            lambda u, c: (u**2 * real(55, 3, 3)).sum(),
            lambda u, c, t: (u * c).sum(),
        ),
        _case(
            "a step that ignores its state",
            lambda u, c, t: torch.sin(t * c),
            c,
            real(56, 3),
            3,
            lambda u, c: (u**2).sum(),
        ),
        _case(
            "a step that is a constant",
            lambda u, c, t: torch.full((3,), 0.3, dtype=F64) if t == 2 else torch.tanh(c * u + t),
            c,
            real(57, 3),
            4,
            lambda u, c: (u**2).sum(),
            lambda u, c, t: (u**3).sum(),
        ),
        _case(
            "a state of no dimensions",
            lambda u, c, t: torch.sin(c * u) + u / t,
            torch.tensor(0.7, dtype=F64),
            torch.tensor(1.3, dtype=F64),
            5,
            lambda u, c: u**2 + c**2,
            lambda u, c, t: t * u * c,
        ),
        _case(
            "costs that see a readout",
            lambda u, c, t: (torch.tanh(c * u[1]), u[0] * u[1] + c),
            c,
            pair,
            4,
            lambda x, c: (x**2).sum(),
            lambda x, c, t: t * (x**3).sum(),
            read=lambda u: u[1] * u[0],
        ),
    ]


def _awkward_costs() -> list[Case]:
    def tanh(u, c, t):
        return torch.tanh(c * u + t)

    c, u = 0.5 * real(60, 3), real(61, 3)
    return [
        _case(
            "a terminal cost of the control alone",
            tanh,
            c,
            u,
            3,
            lambda u, c: (c**3).sum(),
            lambda u, c, t: t * (u**2).sum(),
        ),
        _case(
            "a running cost of the control alone",
            tanh,
            c,
            u,
            3,
            lambda u, c: (u**3).sum(),
            lambda u, c, t: t * (c**2).sum(),
        ),
        _case(
            "a running cost that is a constant at first",
            tanh,
            c,
            u,
            3,
            lambda u, c: (u**3).sum(),
            lambda u, c, t: torch.tensor(2.5, dtype=F64) if t == 1 else t * (u**2).sum(),
        ),
        _case(
            "an observation that is a tree",
            tanh,
            bl.PerStep([0.5 * real(62 + t, 3) for t in range(3)], initial=(real(65, 3), 4)),
            {"k": cplx(66, 3), "mask": torch.tensor([True, False, True])},
            3,
            lambda u, c: (u**3).sum(),
            g0=lambda f, c: torch.where(f["mask"], (f["k"] ** 2).imag * c[0], f["k"].real) * c[1],
            bitwise=True,
        ),
        _case(
            "the same tensor at every step and shared",
            lambda u, c, t: torch.tanh(c[0] * u + t * c[1]),
            bl.PerStep([c, c, c], shared=c),
            u,
            3,
            lambda u, c: (u**3).sum(),
        ),
    ]


class ComplexConv(nn.Module):
    """A residual phase with a modulus, so that it is not holomorphic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, dtype=C128)
        self.gain = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.conv(x)
        return x - self.gain * (y * torch.tanh(y.abs()) + (x - target).conj())


class Normed(nn.Module):
    """A phase with buffers that change in training, and a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)
        self.norm = nn.BatchNorm1d(3, dtype=F64)
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=F64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frozen * torch.tanh(self.norm(self.linear(x)))


def seeded(make: Callable[[], Any], seed: int) -> Any:
    """What `make` makes of torch's default generator at `seed`; the generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def normed_phases() -> bl.Phases:
    return seeded(
        lambda: bl.Phases([Normed() for _ in range(3)], initial=nn.Linear(2, 3, dtype=F64)), 70
    )


def complex_phases() -> bl.Phases:
    return seeded(
        lambda: bl.Phases([ComplexConv() for _ in range(3)], context=(cplx(71, 1, 4, 4),)), 72
    )


def _phases() -> list[Case]:
    normed, convs = normed_phases(), complex_phases()
    return [
        Case(
            "phases with batch normalisation",
            bl.ControlProblem(normed, lambda u, c: (u**3).sum(), 3),
            real(73, 5, 2),
            normed.controls(),
        ),
        Case(
            "phases with complex convolutions",
            bl.ControlProblem(
                convs, lambda u, c: square(u), 3, lambda u, c, t: 0.1 * t * square(u)
            ),
            cplx(74, 1, 4, 4),
            convs.controls(),
        ),
    ]


CASES = [
    *(_shared_real(horizon) for horizon in (0, 1, 2, 5)),
    _complex(),
    _tree_state(),
    _per_step(running=True),
    _per_step(running=False),
    *_mixed_fields(),
    *_awkward_states(),
    *_awkward_costs(),
    *_phases(),
]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


# Every horizon, and every kind of control and of leaf: with these every choice is tried.
TELLING = [
    *CASES[:4],
    case_named("complex state, complex and real control"),
    case_named("tree state with integers"),
    case_named("per-step control with theta_0, shared part and running cost"),
]


def random_case(horizon: int, size: int, seed: int, dtype: torch.dtype, per_step: bool) -> Case:
    """Random sizes and coefficients, for property tests; every function reads everything."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def part() -> dict[str, Tensor]:
        return {"A": draw(size, size) / size, "s": draw(size).real.clone()}

    weights = draw(horizon + 2, size)

    def g(u, c, t):
        v = c["A"] @ u
        return v / (1 + (v * v.conj()).real) + c["s"] * u.conj() + weights[t]

    def total(c):
        parts = [*c.steps, c.initial] if isinstance(c, bl.PerStep) else [c]
        return sum(square(p["A"]) + (p["s"] ** 3).sum() for p in parts)

    control = bl.PerStep([part() for _ in range(horizon)], part()) if per_step else part()
    return _case(
        "random",
        g,
        control,
        draw(size),
        horizon,
        lambda u, c: square(u - weights[-1]) + 0.1 * total(c),
        lambda u, c, t: t * 0.1 * square(u * c["s"]) + (u * weights[t].conj()).real.sum(),
        g0=lambda f, c: c["A"] @ f + weights[0] * c["s"] * f.conj(),
    )


# --- Problems with known answers -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Known:
    """A control problem whose minimum is known.

    Attributes:
        cost: J*.
        digits: to how much J* is known and reached, absolute.
        first_control: theta_1, where known.
        multipliers: lambda_t for all t, where known.
    """

    name: str
    problem: bl.ControlProblem
    observation: Tensor
    control: Any
    cost: float
    digits: float
    first_control: float | None = None
    multipliers: list[float] | None = None

    def __repr__(self) -> str:
        return self.name


def zeros(horizon: int) -> bl.PerStep:
    return bl.PerStep([torch.zeros((), dtype=F64) for _ in range(horizon)])


WALK = bl.Map(lambda u, c, t: u + c)


def walk(horizon: int, start: float, *, shared: bool) -> Known:
    """x+ = x + theta, cost x_T^2 / 2 + sum theta^2 / 2: by symmetry all theta are equal."""
    answer = -start / (horizon + 1)
    return Known(
        f"walk of {horizon} steps, {'shared' if shared else 'per step'}",
        bl.ControlProblem(WALK, lambda u, c: u**2 / 2, horizon, lambda u, c, t: c**2 / 2),
        torch.tensor(start, dtype=F64),
        torch.zeros((), dtype=F64) if shared else zeros(horizon),
        start**2 / (2 * (horizon + 1)),
        1e-14,
        first_control=answer,
        multipliers=[answer] * (horizon + 1),
    )


def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def costly_walk(horizon: int, start: float) -> Known:
    """The same with x(t-1)^2 / 2 in the cost: the Riccati recursion P = 1 + P/(1 + P)."""
    # lambda_t = -P_t x_t and x_t = x_{t-1} / (1 + P_t), with P_t = F(2k+2)/F(2k+1), k = T - t.
    gains = [fibonacci(2 * k + 2) / fibonacci(2 * k + 1) for k in range(horizon, -1, -1)]
    states = [start]
    for gain in gains[1:]:
        states.append(states[-1] / (1 + gain))
    return Known(
        f"costly walk of {horizon} steps",
        bl.ControlProblem(WALK, lambda u, c: u**2 / 2, horizon, lambda u, c, t: (c**2 + u**2) / 2),
        torch.tensor(start, dtype=F64),
        zeros(horizon),
        gains[0] * start**2 / 2,
        1e-14,
        first_control=states[1] - states[0],
        multipliers=[-p * x for p, x in zip(gains, states, strict=True)],
    )


def double_integrator(
    n_steps: int, multiplier: Tensor | None = None, penalty: float = 0.0
) -> bl.ControlProblem:
    """Rest to rest over a distance of 1 in unit time; zero-order hold; u^2 dt.

    The end constraint c = u(T) - (1, 0) enters as Re<nu, c> + w/2 |c|^2.
    """
    dt = 1 / n_steps
    nu = torch.zeros(2, dtype=F64) if multiplier is None else multiplier
    goal = torch.tensor([1.0, 0.0], dtype=F64)

    def step(x, u, t):
        return torch.stack([x[0] + dt * x[1] + dt**2 / 2 * u, x[1] + dt * u])

    def terminal(x, control):
        defect = x - goal
        return (nu * defect).sum() + penalty / 2 * (defect**2).sum()

    return bl.ControlProblem(bl.Map(step), terminal, n_steps, lambda x, u, t: dt * u**2)


A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=F64)
B = torch.tensor([0.005, 0.1], dtype=F64)


def lqr() -> Known:
    return Known(
        "linear-quadratic regulator",
        bl.ControlProblem(
            bl.Map(lambda x, u, t: A @ x + B * u),
            lambda x, c: 5 * (x**2).sum(),
            50,
            lambda x, u, t: ((x**2).sum() + 0.1 * u**2) / 2,
        ),
        torch.tensor([1.0, 0.0], dtype=F64),
        zeros(50),
        6.65871637525538,
        2e-14,
        first_control=-2.5857612827293326,
    )


def riccati() -> tuple[float, list[float]]:
    """Cost and controls of `lqr` by dynamic programming."""
    P = 10 * torch.eye(2, dtype=F64)
    gains = []
    for _ in range(50):
        K = (B @ P @ A) / (0.1 + B @ P @ B)
        P = torch.eye(2, dtype=F64) + A.T @ P @ (A - torch.outer(B, K))
        gains.append(K)
    x = torch.tensor([1.0, 0.0], dtype=F64)
    cost, controls = float(x @ P @ x) / 2, []
    for K in reversed(gains):
        u = -(K @ x)
        controls.append(float(u))
        x = A @ x + B * u
    return cost, controls


def van_der_pol() -> Known:
    dt = 2 / 20

    def field(x, u):
        return torch.stack(
            [x[1], (1 - x[0] ** 2) * x[1] - x[0] + u, (x[0] ** 2 + x[1] ** 2 + u**2) / 2]
        )

    def rk4(x, u, t):
        a = field(x, u)
        b = field(x + dt / 2 * a, u)
        c = field(x + dt / 2 * b, u)
        d = field(x + dt * c, u)
        return x + dt / 6 * (a + 2 * b + 2 * c + d)

    return Known(
        "van der Pol",
        bl.ControlProblem(bl.Map(rk4), lambda x, c: x[2], 20),
        torch.tensor([1.0, 0.0, 0.0], dtype=F64),
        zeros(20),
        1.048392993799,
        5e-13,
    )


KNOWN = [
    walk(7, 2.0, shared=False),
    walk(7, 2.0, shared=True),
    walk(1, -3.0, shared=False),
    costly_walk(10, 1.0),
    lqr(),
    van_der_pol(),
    Known(
        "double integrator with a penalty",
        double_integrator(10, penalty=1e6),
        torch.zeros(2, dtype=F64),
        zeros(10),
        12.120844823,
        5e-10,
    ),
]
