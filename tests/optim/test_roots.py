"""Problems by a residual, and the rules that look for its roots."""

import pytest
import torch
from bilevel_cases import ridge
from problems import cplx, real, square

import bilevel as bl
from bilevel.errors import ArgumentError, LostGradientError, StructureError, UnsupportedError

F64 = torch.float64
U, X, Y = real(1, 6, 3), real(2, 3), real(3, 6)
START, CONTROL = torch.zeros(6, dtype=F64), 0.25 * real(4, 6, 6)
RULES = [bl.optim.FixedPoint(), bl.optim.Anderson(), bl.optim.NewtonKrylov()]


def layer(z, c):
    return torch.tanh(c @ z + U @ X)


EQUILIBRIUM = bl.BilevelProblem(
    residual=lambda z, c, batch: z - layer(z, c), outer=lambda z, c, batch: square(z - Y)
)


def exact():
    """Value and gradient by a long unrolled iteration."""
    c, z = CONTROL.clone().requires_grad_(), START
    for _ in range(300):
        z = layer(z, c)
    value = square(z - Y)
    value.backward()
    return value.detach(), c.grad


@pytest.mark.parametrize(
    "rule", [*RULES, bl.Given(lambda z, c, b: equilibrium(c))], ids=lambda rule: type(rule).__name__
)
def test_every_rule_finds_the_fixed_point_and_its_hypergradient(rule):
    solver = bl.BilevelSolver(EQUILIBRIUM, rule, 60, bl.Implicit(), on_failure="raise")
    found = solver.hypergradient(START, CONTROL)
    value, gradient = exact()
    torch.testing.assert_close(found.value, value, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-8, atol=1e-10)
    assert found.certificate.trustworthy
    assert found.certificate.curvature is None
    text = str(found.certificate)
    assert "root of the inner residual" in text
    assert "minimiser" not in text


def equilibrium(c):
    z = START
    for _ in range(300):
        z = layer(z, c)
    return z


@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled()], ids=repr)
def test_the_plain_iteration_can_be_reversed(method):
    solver = bl.BilevelSolver(EQUILIBRIUM, bl.optim.FixedPoint(), 100, method)
    torch.testing.assert_close(solver.hypergradient(START, CONTROL).gradient, exact()[1])


def test_anderson_needs_fewer_steps_than_the_plain_iteration():
    def residual_after(rule, steps):
        solver = bl.BilevelSolver(EQUILIBRIUM, rule, steps, bl.Implicit(), None)
        z = rule.params(solver.advance(START, CONTROL).state)
        return float((z - layer(z, CONTROL)).norm())

    plain, least = (residual_after(rule, 20) for rule in RULES[:2])
    assert least < 1e-3 * plain
    assert residual_after(bl.optim.Anderson(memory=1), 20) == pytest.approx(plain, rel=1e-6)
    assert residual_after(RULES[2], 6) < 1e-12


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_trees_of_complex_and_integer_leaves(rule):
    A = 0.2 * cplx(5, 3, 3)

    def residual(p, c, batch):
        return {
            "z": p["z"] - A @ p["z"].conj() - c,
            "pair": (p["pair"][0] - p["z"].real.sum() / p["n"], None),
            "n": None,
        }

    params = {
        "z": torch.zeros(3, dtype=torch.complex128),
        "pair": (torch.tensor(0.0, dtype=F64), torch.tensor([1, 2])),
        "n": 4,
    }
    problem = bl.BilevelProblem(
        residual=residual, outer=lambda p, c, batch: p["pair"][0] ** 2 + square(p["z"])
    )
    solver = bl.BilevelSolver(problem, rule, 80, bl.Implicit(), on_failure="raise")
    c = cplx(6, 3)
    found = solver.hypergradient(params, c)
    eye = torch.eye(3, dtype=F64)
    M = torch.cat([torch.cat([eye - A.real, -A.imag], 1), torch.cat([-A.imag, eye + A.real], 1)])
    both = torch.cat([c.real, c.imag]).requires_grad_()
    z = torch.linalg.solve(M, both)
    ((z[:3].sum() / 4) ** 2 + square(z)).backward()
    torch.testing.assert_close(found.gradient, torch.complex(both.grad[:3], both.grad[3:]))


def test_kkt_conditions_of_a_quadratic_programme():
    # min |w - a|^2 / 2 subject to b w = 1, with a learned: w = a + b (1 - b a) / |b|^2.
    b, a = real(7, 4), real(8, 4)
    problem = bl.BilevelProblem(
        residual=lambda p, a, batch: {
            "w": p["w"] - a - p["nu"] * b,
            "nu": b @ p["w"] - 1,
        },
        outer=lambda p, a, batch: square(p["w"] - 1) / 2,
    )
    params = {"w": torch.zeros(4, dtype=F64), "nu": torch.zeros((), dtype=F64)}
    solver = bl.BilevelSolver(
        problem, bl.optim.NewtonKrylov(), 3, bl.Implicit(), on_failure="raise"
    )
    found = solver.hypergradient(params, a)
    project = torch.eye(4, dtype=F64) - torch.outer(b, b) / (b @ b)
    w = a + b * (1 - b @ a) / (b @ b)
    torch.testing.assert_close(found.params["w"], w)
    torch.testing.assert_close(found.gradient, project @ (w - 1))


def test_an_unstable_root_is_a_root():
    # w = w^3 has the roots 0 and 1: from the second the plain iteration runs away.
    problem = bl.BilevelProblem(
        residual=lambda w, a, batch: a * w - w**3, outer=lambda w, a, batch: w
    )
    a = torch.tensor(4.0, dtype=F64)
    solver = bl.BilevelSolver(
        problem, bl.Given(lambda w, a, b: a.sqrt()), method=bl.Implicit(), on_failure="raise"
    )
    assert solver.hypergradient(a, a).gradient.item() == pytest.approx(0.25)


def test_newton_finds_the_stationary_point_of_an_objective_too():
    case = ridge(3)
    solver = bl.BilevelSolver(
        case.problem, bl.optim.NewtonKrylov(), 3, bl.Implicit(), on_failure="raise"
    )
    found = solver.hypergradient(case.params, case.control)
    torch.testing.assert_close(found.gradient, case.exact, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (lambda w, a, b: (w - a)[:1], StructureError, "1 equations for 2 unknowns, fewer than"),
        (
            lambda w, a, b: torch.cat([w, a]),
            StructureError,
            "4 equations for 2 unknowns, more than",
        ),
        (lambda w, a, b: (w - a)[None], StructureError, r"got float64\[1, 2\] on cpu"),
        (lambda w, a, b: None, StructureError, "0 equations for 2 unknowns"),
        (lambda w, a, b: w - a * HIDDEN, LostGradientError, "the inner residual uses a tensor"),
    ],
)
def test_a_residual_that_is_no_square_system(residual, error, message):
    problem = bl.BilevelProblem(residual=residual, outer=lambda w, a, batch: square(w))
    solver = bl.BilevelSolver(problem, bl.optim.FixedPoint(), 3, bl.Implicit())
    with pytest.raises(error, match=message):
        solver.hypergradient(real(1, 2), real(2, 2))


HIDDEN = torch.tensor(1.0, dtype=F64, requires_grad=True)


def test_a_tensor_that_a_residual_closes_over_is_named_with_a_given_solver_too():
    problem = bl.BilevelProblem(
        residual=lambda w, a, batch: w - a * HIDDEN, outer=lambda w, a, batch: square(w)
    )
    solver = bl.BilevelSolver(problem, bl.Given(lambda w, a, batch: a), method=bl.Implicit())
    with pytest.raises(LostGradientError, match="the inner residual uses a tensor"):
        solver.hypergradient(real(1, 2), real(2, 2))


@pytest.mark.parametrize("certificate", [None, bl.AgainstMinimiser()], ids=["nobody", "judged"])
def test_a_singular_derivative_is_named_with_the_smallest_value_met(certificate):
    ones = torch.ones(2, 2, dtype=F64)
    problem = bl.BilevelProblem(
        residual=lambda w, a, batch: ones @ w - a, outer=lambda w, a, batch: w[0] ** 2
    )
    solver = bl.BilevelSolver(
        problem,
        bl.Given(lambda w, a, batch: torch.stack([a.sum() / 2, 0 * a.sum()])),
        method=bl.Implicit(),
        certificate=certificate,
    )
    with pytest.warns(bl.ConvergenceWarning, match=r"singular.*smallest value met is \d.\de-1\d"):
        solver.hypergradient(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))


@pytest.mark.parametrize("rule", [bl.optim.SGD(0.1), bl.optim.Adam(0.1)], ids=repr)
def test_rules_of_descent_are_refused(rule):
    with pytest.raises(ArgumentError, match=r"has none: take bilevel.optim.FixedPoint\(\), And"):
        bl.BilevelSolver(EQUILIBRIUM, rule, method=bl.Implicit())


@pytest.mark.parametrize("rule", RULES[1:], ids=repr)
@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled(), bl.OneStep()], ids=repr)
def test_methods_that_reverse_steps_are_refused_by_name(rule, method):
    with pytest.raises(ArgumentError, match=rf"{type(method).__name__} differentiates"):
        bl.BilevelSolver(EQUILIBRIUM, rule, method=method)


def test_a_method_that_evaluates_the_objective_is_refused_by_name():
    with pytest.raises(ArgumentError, match="Penalty needs an inner objective"):
        bl.BilevelSolver(EQUILIBRIUM, bl.optim.FixedPoint(), method=bl.Penalty())


def test_settings():
    with pytest.raises(ArgumentError, match=r"an inner objective, or residual=.*got both"):
        bl.BilevelProblem(EQUILIBRIUM.outer, EQUILIBRIUM.outer, residual=EQUILIBRIUM.residual)
    with pytest.raises(ArgumentError, match=r"an inner objective, or residual=.*got neither"):
        bl.BilevelProblem(outer=EQUILIBRIUM.outer)
    with pytest.raises(ArgumentError, match="needs an outer objective"):
        bl.BilevelProblem(residual=EQUILIBRIUM.residual)
    with pytest.raises(ArgumentError, match=r"residual must be a function of \(params, control"):
        bl.BilevelProblem(residual=3, outer=EQUILIBRIUM.outer)
    with pytest.raises(ArgumentError, match="memory must be a whole number >= 1"):
        bl.optim.Anderson(memory=0)
    with pytest.raises(ArgumentError, match="linear must be a linear solver"):
        bl.optim.NewtonKrylov(linear="gmres")
    with pytest.raises(UnsupportedError, match="no inner objective to evaluate"):
        EQUILIBRIUM.inner(START, CONTROL, None)
