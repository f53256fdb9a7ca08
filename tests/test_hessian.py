"""The Hessian of the outer value of a bilevel problem."""

import pytest
import torch
from bilevel_cases import by_newton, logistic, ridge, scalar, trees

import bilevel as bl
from bilevel.errors import LostGradientError, StructureError, UnsupportedError
from bilevel.linear import Operator

CASES = [ridge(3), ridge(2, complex_=True), ridge(2, scalar_control=True), scalar(), trees()]
CASES += [logistic()]


def drawn(like):
    generator = torch.Generator().manual_seed(0)
    return bl.tree.map_leaves(
        lambda x: (
            torch.randn(x.shape, dtype=x.dtype, generator=generator)
            if bl.tree.is_variable(x)
            else None
        ),
        like,
    )


def difference(case, direction, h=1e-5):
    """Central, of the exact hypergradient."""
    each = [
        by_newton(case.problem, case.params, bl.tree.moved(case.control, direction, -s))[1]
        for s in (h, -h)
    ]
    return bl.tree.map_leaves(lambda a, b: None if a is None else (a - b) / (2 * h), *each)


def error(found, wanted):
    gap = bl.tree.map_leaves(lambda a, b: None if b is None else a - b, found, wanted)
    return bl.tree.norm(gap) / bl.tree.norm(wanted)


SWEPT = [(case, method) for case in CASES[:2] for method in (bl.MLM(), bl.Unrolled())]


@pytest.mark.parametrize(
    ("case", "method"), [*((case, bl.Implicit()) for case in CASES), *SWEPT], ids=repr
)
def test_it_is_the_derivative_of_the_hypergradient(case, method):
    solver = bl.BilevelSolver(case.problem, bl.optim.SGD(case.step_size), case.steps, method)
    along = drawn(case.control)
    found = solver.hvp(case.params, case.control, along)
    assert error(found.product, difference(case, along)) < 1e-7
    assert error(found.gradient, case.exact) < 1e-6
    assert found.cost.item() == pytest.approx(solver.value(case.params, case.control).item())


def test_of_a_given_solver_and_of_a_root():
    case = ridge(3)
    along = drawn(case.control)
    solver = bl.BilevelSolver(
        case.problem, bl.Given(lambda w, a, b: case.minimiser), method=bl.Implicit()
    )
    found = solver.hvp(case.params, case.control, along)
    assert error(found.product, difference(case, along)) < 1e-7
    # w^3 = a, F = w^2: F'' = d/da 2/3 a^(-1/3).
    root = bl.BilevelProblem(residual=lambda w, a, b: w**3 - a, outer=lambda w, a, b: w**2)
    solver = bl.BilevelSolver(root, bl.optim.NewtonKrylov(), 20, bl.Implicit())
    a = torch.tensor(8.0, dtype=torch.float64)
    assert solver.hvp(a, a, 3 + 0 * a).product.item() == pytest.approx(-2 / 9 / 16 * 3)


def test_what_it_refuses():
    case = ridge(2)
    rule = bl.optim.SGD(case.step_size)
    for method in (bl.OneStep(), bl.MLM(last=3)):
        solver = bl.BilevelSolver(case.problem, rule, 30, method)
        with pytest.raises(UnsupportedError, match="hvp has none to take"):
            solver.hvp(case.params, case.control, case.control)
    solver = bl.BilevelSolver(case.problem, rule, 30, bl.Implicit())
    with pytest.raises(StructureError, match="direction must be like the control"):
        solver.hvp(case.params, case.control, case.control[:1])
    with pytest.warns(bl.ConvergenceWarning, match="is not small at the solution"):
        bl.BilevelSolver(case.problem, rule, 1, bl.Implicit()).hvp(
            10 + case.params, case.control, case.control
        )


DOUBLE = Operator(lambda v: 2 * v, symmetric=True)
DETACHED = {
    "hypergradient": lambda solver, w, a: solver.hypergradient(w, a).value,
    "value": lambda solver, w, a: solver.value(w, a),
    "advance": lambda solver, w, a: solver.advance(w, a).state.sum(),
    "solve": lambda solver, w, a: solver.solve(w, a, steps=1).control.sum(),
    "hvp": lambda solver, w, a: solver.hvp(w, a, a.detach()).cost,
    "hypergradients": lambda solver, w, a: (
        solver.hypergradients(w, a, [solver.problem.outer])[0].value
    ),
    "adapt": lambda solver, w, a: bl.adapt(
        solver.optimizer, a, lambda p: p.square().sum(), 2
    ).sum(),
    "linear": lambda solver, w, a: (
        bl.linear.CG().solve(bl.linear.Operator(lambda v: 2 * v, symmetric=True), a).solution.sum()
    ),
}


@pytest.mark.parametrize("name", DETACHED)
def test_a_detached_value_in_an_inner_objective_is_refused(name):
    case = ridge(2)
    inside = bl.BilevelSolver(
        case.problem, bl.optim.SGD(case.step_size), 20, bl.Implicit(), certificate=None
    )
    problem = bl.BilevelProblem(
        lambda w, a, batch: (w - a).square().sum() + DETACHED[name](inside, w, a),
        lambda w, a, batch: w.square().sum(),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 3, bl.Implicit())
    with pytest.raises(LostGradientError, match="was called inside a step or an objective"):
        solver.hypergradient(case.params, case.control)
