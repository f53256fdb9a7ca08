"""One sweep is one Newton step on J: first and second derivatives of every kind of problem."""

import pytest
import torch
from problems import CASES, KNOWN, Custom, cplx, real, square

import bilevel as bl
from bilevel import tree
from bilevel.control.riccati.controls import Point
from bilevel.control.riccati.linearisation import Linearisation
from bilevel.control.riccati.solving import laid_out
from bilevel.control.riccati.sweep import backward, model_of
from bilevel.errors import UnsupportedError

F64 = torch.float64
COUPLED = "shared part and running cost"  # its terminal cost reads a step's control
SEPARATE = [case for case in CASES if COUPLED not in case.name]


def linearised(case):
    laid = laid_out(bl.Riccati(), case.problem, case.observation, case.control)
    return laid, Linearisation(laid.stages, laid.start)


def change(model, gains, horizon):
    """The step of a sweep in the linearised dynamics."""
    size = model.terminal.shape[1] - 1
    x, own = (model.start @ gains.shared.unsqueeze(2))[0, :, 0], []
    for t in range(horizon):
        here = torch.cat([x, x.new_ones(1)])
        own.append(gains.gains[0, t] @ here)
        x = (model.maps[0, t] @ torch.cat([here, own[-1]]))[:size]
    steps = torch.stack(own).unsqueeze(0) if own else gains.gains[..., 0]
    return Point(steps, gains.shared)


@pytest.mark.parametrize("case", SEPARATE, ids=repr)
def test_cost_gradient_and_multipliers_are_those_of_the_multiplier_sweep(case):
    laid, found = linearised(case)
    swept = bl.adjoint(case.problem, case.observation, case.control, keep_multipliers=True)
    assert float(found.cost) == pytest.approx(float(swept.cost), rel=1e-13)
    leaves = laid.controls.leaves
    ours = leaves.gathered(laid.controls.control(found.gradient, spread=True))
    if not leaves.tied:
        torch.testing.assert_close(ours, leaves.gathered(swept.gradient), rtol=1e-11, atol=1e-12)
    for p, multiplier in zip(found.costates[0], swept.multipliers, strict=True):
        parts = [x for x in tree.leaves_of(multiplier) if x is not None]
        flat = [(torch.view_as_real(x) if x.is_complex() else x).reshape(-1) for x in parts]
        torch.testing.assert_close(-p[: laid.stages.n], torch.cat(flat), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in SEPARATE if "same tensor" not in c.name], ids=repr)
def test_a_shifted_sweep_solves_the_shifted_newton_system(case):
    laid, found = linearised(case)
    model = model_of(found, found.hessians(gauss_newton=False))
    shift = 1e3 * model.scale()
    gains = backward(model, shift)
    assert int(gains.failed) == -1
    step = change(model, gains, case.problem.horizon)
    direction = laid.controls.control(step, spread=True)
    product = bl.hvp(case.problem, case.observation, case.control, direction).product
    gradient = bl.adjoint(case.problem, case.observation, case.control).gradient
    variables = [laid.controls.leaves.gathered(x) for x in (product, direction, gradient)]
    for hd, d, g in zip(*variables, strict=True):  # (H + shift) d = -g
        scale = max(float(g.abs().max()), 1e-3)
        torch.testing.assert_close(hd + shift[0] * d, -g, rtol=0, atol=1e-11 * scale)


def test_a_terminal_cost_of_the_steps_controls_is_refused_by_name():
    case = next(case for case in CASES if COUPLED in case.name)
    with pytest.raises(UnsupportedError, match=r"reads control\.steps"):
        linearised(case)


@pytest.mark.parametrize("known", KNOWN, ids=repr)
def test_known_problems_to_their_digits(known):
    found = bl.ControlSolver(known.problem, bl.Riccati()).solve(known.control, known.observation)
    assert found.converged
    assert found.gradient_norm <= 1e-9
    assert found.steps == (1 if "van der Pol" not in known.name else found.steps)
    assert found.steps <= 6
    assert found.cost == pytest.approx(known.cost, abs=known.digits, rel=0)
    if known.first_control is not None:
        first = found.control.steps[0] if isinstance(found.control, bl.PerStep) else found.control
        assert float(first.reshape(-1)[0]) == pytest.approx(known.first_control, abs=1e-10)
    if known.multipliers is not None:
        ours = [float(x) for x in found.adjoint.multipliers]
        assert ours == pytest.approx(known.multipliers, abs=1e-12)
    assert max(found.kkt.feasibility, found.kkt.costate, found.kkt.stationarity) <= 1e-9
    swept = bl.kkt(
        known.problem,
        known.observation,
        found.control,
        found.adjoint.states,
        found.adjoint.multipliers,
    )
    assert max(swept.feasibility, swept.costate) <= 1e-12
    assert swept.stationarity == pytest.approx(found.kkt.stationarity, abs=1e-11)


def test_the_gradient_of_the_value_is_minus_the_multiplier_at_a_solution():
    known = next(one for one in KNOWN if one.name == "van der Pol")
    found = bl.ControlSolver(known.problem, bl.Riccati()).solve(known.control, known.observation)
    laid = laid_out(bl.Riccati(), known.problem, known.observation, found.control)
    there = Linearisation(laid.stages, laid.start)
    model = model_of(there, there.hessians(gauss_newton=False))
    gains = backward(model, torch.zeros(1, dtype=F64))
    s = gains.values[0, :, :-1, -1]  # the last column of P in homogeneous coordinates
    torch.testing.assert_close(s, -torch.stack(found.adjoint.multipliers), rtol=0, atol=1e-12)
    assert float(gains.gains[..., -1].abs().max()) <= 1e-9  # k_t = 0


def weights(seed):
    return real(seed, 7, 3)


TIMES = {
    "a number of it": lambda t: 0.1 * t,
    "a row of a table": lambda t: weights(3)[t].sum(),
    "the row before": lambda t: weights(3)[t - 1].sum(),
    "torch functions": lambda t: torch.cos(0.3 * t * torch.ones((), dtype=F64)),
    "an entry of a list": lambda t: [0.3, 0.5, 0.1, 0.7, 0.2, 0.9, 0.4][t],
    "a key": lambda t: {2: 0.7}.get(t, 0.2),
    "a branch": lambda t: 0.7 if t > 3 else 0.2,
    "a power": lambda t: 0.9**t,
    "halves": lambda t: t // 2 + t % 2,
}


@pytest.mark.parametrize("use", TIMES.values(), ids=TIMES)
def test_steps_and_costs_may_depend_on_t_in_any_way(use):
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(0.6 * u + use(t) * c)),
        lambda u, c: square(u - 1),
        6,
        lambda u, c, t: use(t) * square(u) + square(c) / 3 + use(t) * c.sum() / 9,
    )
    control = bl.PerStep.unstack(torch.zeros(6, 3, dtype=F64))
    found = bl.ControlSolver(problem, bl.Riccati()).solve(control, real(1, 3))
    assert found.converged
    swept = bl.adjoint(problem, real(1, 3), found.control)
    assert tree.norm(swept.gradient) <= 1e-9


def test_float32_ends_where_rounding_does():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(0.6 * u + 0.1 * t * c)),
        lambda u, c: square(u - 1),
        6,
        lambda u, c, t: square(c) / 3,
    )
    found = bl.ControlSolver(problem, bl.Riccati()).solve(
        bl.PerStep.unstack(torch.zeros(6, 3)), torch.ones(3)
    )
    assert found.converged
    assert found.control.steps[0].dtype == torch.float32
    exact = bl.ControlSolver(problem, bl.Riccati()).solve(
        bl.PerStep.unstack(torch.zeros(6, 3, dtype=F64)), torch.ones(3, dtype=F64)
    )
    assert found.cost == pytest.approx(exact.cost, rel=1e-5)


def test_complex_controls_are_a_real_space():
    A, goal = 0.4 * cplx(1, 3, 3), cplx(2, 3)
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: A @ u + 0.3 * u.conj() + c),
        lambda u, c: square(u - goal),
        4,
        lambda u, c, t: square(c) / 2 + square(u) / 9,
    )
    control = bl.PerStep([torch.zeros(3, dtype=torch.complex128) for _ in range(4)])
    found = bl.ControlSolver(problem, bl.Riccati()).solve(control, cplx(3, 3))
    assert (found.steps, found.converged) == (1, True)
    assert tree.norm(bl.adjoint(problem, cplx(3, 3), found.control).gradient) <= 1e-12


def test_a_start_of_its_own_and_a_shared_part_are_found_with_the_steps():
    problem = bl.ControlProblem(
        Custom(
            lambda u, c, t: torch.tanh(u + c[0] + c[1]["gain"] * u),
            lambda f, c: f * c + c**3 / 5,
        ),
        lambda u, c: square(u - 0.3) + square(c.initial) / 7,
        5,
        lambda u, c, t: square(c[0]) + square(u) / 5 + square(c[1]["gain"] - 0.1),
    )
    control = bl.PerStep(
        [torch.zeros(2, dtype=F64) for _ in range(5)],
        initial=0.5 * torch.ones(2, dtype=F64),
        shared={"gain": torch.zeros((), dtype=F64), "n": 3},
    )
    found = bl.ControlSolver(problem, bl.Riccati()).solve(control, real(4, 2))
    assert found.converged
    assert found.control.shared["n"] == 3
    assert tree.norm(bl.adjoint(problem, real(4, 2), found.control).gradient) <= 1e-9
    assert float(found.control.shared["gain"]) != 0


def test_a_tensor_tied_over_the_steps_stays_one_variable():
    zero = torch.zeros(1, dtype=F64)
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u + c), lambda u, c: square(u), 4, lambda u, c, t: square(c)
    )
    found = bl.ControlSolver(problem, bl.Riccati()).solve(
        bl.PerStep(4 * [zero]), torch.ones(1, dtype=F64)
    )
    assert [float(x) for x in found.control.steps] == pytest.approx([-1 / 5] * 4)
    assert all(x is found.control.steps[0] for x in found.control.steps)
    pair = [zero, zero, zero + 0, zero + 0]
    with pytest.raises(UnsupportedError, match="some steps share"):
        bl.ControlSolver(problem, bl.Riccati()).solve(bl.PerStep(pair), torch.ones(1, dtype=F64))


def test_gauss_newton_takes_other_steps_to_the_same_minimum():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(u + c)),
        lambda u, c: square(u - 0.3),
        5,
        lambda u, c, t: square(c) / 3 + square(u) / 9,
    )
    control = bl.PerStep.unstack(torch.zeros(5, 3, dtype=F64))
    found = [
        bl.ControlSolver(problem, bl.Riccati(gauss_newton=flag)).solve(control, real(5, 3))
        for flag in (True, False)
    ]
    assert found[0].cost == pytest.approx(found[1].cost, rel=1e-12)
    assert found[0].converged
    assert found[0].costs[2:] != found[1].costs[2:]


@pytest.mark.parametrize(("cost", "start"), [(1e-20, 1.0), (1.0, 1e-12), (1e-9, 1e-3), (1e15, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_problems_of_any_scale_are_solved_to_their_own_digits(cost, start, dtype):
    problem = bl.ControlProblem(
        bl.Map(lambda x, c, t: x + c),
        lambda x, c: cost * x**2 / 2,
        3,
        lambda x, c, t: cost * c**2 / 2,
    )
    zeros = bl.PerStep([torch.zeros((), dtype=dtype) for _ in range(3)])
    begun = torch.tensor(start, dtype=dtype)
    found = bl.ControlSolver(problem, bl.Riccati()).solve(zeros, begun)
    assert found.converged
    for theta in found.control.steps:  # -x0 / (T + 1)
        torch.testing.assert_close(theta, -begun / 4, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize(("start", "ends"), [(1e-13, False), (0.0, False), (1e-5, True)])
def test_a_start_so_near_to_a_maximum_that_rounding_hides_the_way_is_no_minimum(
    start, ends, gauss_newton
):
    problem = bl.ControlProblem(
        bl.Map(lambda x, c, t: x + 0.2 * torch.sin(x) + c),
        lambda x, c: (x**2 - 1) ** 2,
        5,
        lambda x, c, t: c**2 / 10,
    )
    zeros = bl.PerStep([torch.zeros((), dtype=torch.float64) for _ in range(5)])
    solver = bl.ControlSolver(problem, bl.Riccati(gauss_newton), on_failure="ignore")
    found = solver.solve(zeros, torch.tensor(start, dtype=torch.float64), steps=300)
    assert found.converged is ends
    assert ends or "no minimum" in found.reason
