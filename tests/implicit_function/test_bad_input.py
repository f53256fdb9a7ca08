"""What an implicit function refuses, and what it warns of."""

import math
import warnings

import pytest
import torch
from problems import real

import bilevel as bl
from bilevel.errors import (
    ArgumentError,
    ConvergenceError,
    DivergenceError,
    LostGradientError,
    StructureError,
    UnsupportedError,
)

F64 = torch.float64
A = torch.tensor([2.0, 3.0], dtype=F64)
TURN = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=F64)


def root(a):
    return a.sqrt()


def square_of(w, a):
    return w**2 - a


@pytest.mark.parametrize(
    ("solve", "error", "message"),
    [
        (lambda a: None, StructureError, "got None: is a return missing"),
        (lambda a: a.numpy() ** 0.5, StructureError, "got ndarray; wrap it with torch.as_tensor"),
        (lambda a: 1.5, StructureError, "got float"),
        (lambda a: torch.tensor([1, 2]), StructureError, "must return a floating-point or complex"),
        (lambda a: a * math.nan, DivergenceError, "returned 2 of 2 entries of solution that are"),
        (lambda a: {"w": a / 0}, DivergenceError, r"2 of 2 entries of solution\['w'\]"),
        (lambda a: (a.sqrt(), 3), StructureError, "must return a tree like the solution"),
        (lambda a: {"w": a.sqrt()}, StructureError, "must return a tree like the solution"),
        (lambda a: a[:1].sqrt(), StructureError, "2 equations for 1 unknowns, more than needed"),
    ],
)
def test_a_solver_that_returns_something_else(solve, error, message):
    with pytest.raises(error, match=message):
        bl.implicit(solve, lambda w, a: w**2 - a if isinstance(w, torch.Tensor) else a)(A)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (lambda w, a: (w**2 - a)[:1], "1 equations for 2 unknowns, fewer than needed"),
        (lambda w, a: torch.cat([w**2 - a, w]), "4 equations for 2 unknowns, more than needed"),
        (lambda w, a: (w**2 - a).sum(), "1 equations for 2 unknowns, fewer"),
        (lambda w, a: (w**2 - a)[:, None], r"like the solution, float64\[2\].*got float64\[2, 1\]"),
        (lambda w, a: (w**2 - a).float(), r"like the solution, float64\[2\].*got float32\[2\]"),
        (lambda w, a: None, "0 equations for 2 unknowns"),
    ],
)
def test_a_residual_that_is_no_square_system(residual, message):
    with pytest.raises(StructureError, match=message):
        bl.implicit(root, residual)(A)


def test_members_of_a_batch_that_differ():
    f = bl.implicit(
        lambda a: a.sqrt() if a[0] > 1 else a[:1].sqrt(), lambda w, a: w**2 - a[: len(w)]
    )
    with pytest.raises(StructureError, match="one structure, shape and dtype for all members"):
        torch.vmap(f)(torch.stack([A, A - 1.5]))


def test_aux_that_is_missing():
    with pytest.raises(StructureError, match=r"pair \(solution, aux\), as has_aux=True"):
        bl.implicit(root, square_of, has_aux=True)(A)


@pytest.mark.parametrize("objective", [False, True])
def test_a_tensor_that_requires_grad_and_is_closed_over(objective):
    hidden = A.clone().requires_grad_()
    if objective:
        f = bl.implicit(lambda a: a, objective=lambda w, a: ((w - a) ** 2 * hidden).sum())
    else:
        f = bl.implicit(root, lambda w, a: (w**2 - a) * hidden)
    name = "the objective" if objective else "the residual"
    with pytest.raises(LostGradientError, match=f"{name} uses a tensor of shape.*as an argument"):
        f(A)


def test_a_module_that_is_closed_over():
    net = torch.nn.Linear(2, 2).double()
    with pytest.raises(LostGradientError, match=r"the residual uses a tensor of shape \(2"):
        bl.implicit(lambda a: a, lambda w, a: net(w) - net(a))(A)


@pytest.mark.parametrize("where", ["outside", "inside of a transform"])
@pytest.mark.parametrize("name", ["grad", "vmap", "jvp"])
def test_a_tensor_that_a_transform_follows_and_that_is_closed_over(name, where):
    def loss(c):
        def residual(w, a):
            if where == "outside":
                return w**2 - a * (c / c.detach())
            return torch.func.grad(lambda v: ((v**3 / 3 - a * v) * c / c.detach()).sum())(w)

        return bl.implicit(root, residual)(A).sum()

    transform = {
        "grad": lambda: torch.func.grad(loss)(A),
        "vmap": lambda: torch.vmap(loss)(A[None]),
        "jvp": lambda: torch.func.jvp(loss, (A,), (A,)),
    }[name]
    with pytest.raises(LostGradientError, match="the residual uses a tensor that is being diff"):
        transform()


@pytest.mark.parametrize("residual", [lambda w, a: a - a, lambda w, a: w.detach() ** 2 - a])
def test_a_residual_that_does_not_read_the_solution(residual):
    with pytest.raises(LostGradientError, match="does not depend on the solution"):
        bl.implicit(root, residual)(A)


def test_a_solution_that_is_none_warns_with_its_size():
    f = bl.implicit(lambda a: 1.01 * a.sqrt(), square_of)
    with pytest.warns(bl.ConvergenceWarning, match=r"its norm is 7.2e-02, 8.8e-03 of the terms"):
        f(A)
    strict = bl.implicit(lambda a: 1.01 * a.sqrt(), square_of, on_failure="raise")
    with pytest.raises(ConvergenceError, match=r"above tolerance=0.0001"):
        torch.vmap(strict)(torch.stack([A, A]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bl.implicit(lambda a: 1.01 * a.sqrt(), square_of, on_failure="ignore")(A)
        bl.implicit(lambda a: 1.01 * a.sqrt(), square_of, tolerance=0.1)(A)


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e8, 1e150])
def test_what_is_small_goes_by_the_terms_of_the_residual(scale):
    good = bl.implicit(lambda a: a.sqrt() * (1 + 1e-9), lambda w, a: scale * (w**2 - a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good(A)
    bad = bl.implicit(lambda a: a.sqrt() * (1 + 1e-3), lambda w, a: scale * (w**2 - a))
    with pytest.warns(bl.ConvergenceWarning, match="is not small at the solution"):
        bad(A)


@pytest.mark.parametrize("unit", [1e-20, 1e-12, 1e12])
def test_a_solution_in_small_or_large_units_is_looked_at_in_them(unit):
    good = bl.implicit(lambda a: 2 * a, lambda w, a: w - 2 * a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good(unit * A)
    bad = bl.implicit(lambda a: 2.002 * a, lambda w, a: w - 2 * a)
    with pytest.warns(bl.ConvergenceWarning, match="is not small at the solution"):
        bad(unit * A)


def test_a_solution_that_is_zero_to_rounding_is_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bl.implicit(lambda a: 1e-17 * a, lambda w, a: w * (1 + a))(A)
        bl.implicit(lambda a: 0 * a, lambda w, a: w * (1 + a))(A)
        bl.implicit(lambda a: 0 * a, lambda w, a: w - a)(0 * A)


@pytest.mark.parametrize(
    "linear", [None, bl.linear.GMRES(), bl.linear.NormalCG(), bl.linear.Dense()]
)
def test_a_singular_derivative_is_named_with_the_smallest_value_met(linear):
    ones = torch.ones(2, 2, dtype=F64)
    f = bl.implicit(
        lambda a: a.sum() * torch.tensor([0.5, 0], dtype=F64),
        lambda w, a: ones @ w - a.sum() / 2,
        linear=linear,
    )
    with pytest.warns(
        bl.ConvergenceWarning, match=r"singular.*smallest value met is (0.0e\+00|\d.\de-1\d)"
    ):
        torch.func.grad(lambda a: f(a)[0])(A)


def test_a_derivative_that_is_zero_is_singular():
    a = torch.zeros(2, dtype=F64, requires_grad=True)
    loss = bl.implicit(lambda a: 0 * a, square_of, on_failure="raise")(a).sum()
    with pytest.raises(ConvergenceError, match="smallest value met is 0"):
        loss.backward()


def test_a_gauge_is_no_failure():
    # sum(w) = a: what the loss sees is defined, though w is not.
    ones = torch.ones(2, 2, dtype=F64)
    f = bl.implicit(
        lambda a: a * torch.tensor([0.5, 0], dtype=F64),
        lambda w, a: ones @ w - a / 2,
        on_failure="raise",
    )
    assert torch.func.grad(lambda a: f(a).sum())(
        torch.tensor(3.0, dtype=F64)
    ).item() == pytest.approx(0.5)


def test_conjugate_gradients_on_a_residual_that_is_not_symmetric():
    f = bl.implicit(
        lambda a: torch.linalg.solve(TURN, a), lambda w, a: TURN @ w - a, linear=bl.linear.CG()
    )
    with pytest.raises(ArgumentError, match=r"CG needs a symmetric operator.*use GMRES"):
        torch.func.grad(lambda a: f(a).sum())(A)


def test_the_older_vmap_of_torch_autograd_is_refused_by_name():
    f = bl.implicit(root, square_of)
    for strategy in ("reverse-mode", "forward-mode"):
        with pytest.raises(UnsupportedError, match=r"take torch.func.jacrev"):
            torch.autograd.functional.jacobian(f, A, vectorize=True, strategy=strategy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of the two, got neither"),
        ({"residual": square_of, "objective": square_of}, "one of the two, got both"),
        ({"residual": A}, "residual must be a function"),
        ({"residual": square_of, "linear": bl.linear.CG}, "got the class CG"),
        ({"residual": square_of, "tolerance": -1.0}, "tolerance must be >= 0"),
        ({"residual": square_of, "on_failure": "shout"}, "on_failure must be"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ArgumentError, match=message):
        bl.implicit(root, **settings)


def test_an_objective_that_is_no_scalar():
    with pytest.raises(StructureError, match="the objective must return a real scalar"):
        bl.implicit(root, objective=square_of)(A)


def test_a_residual_that_is_not_finite():
    with pytest.raises(DivergenceError, match=r"the residual is .* at the solution, which"):
        bl.implicit(lambda a: 0 * a, lambda w, a: w.abs().log() + a)(A)


def test_errors_of_the_solver_come_through():
    def solve(a):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        torch.vmap(bl.implicit(solve, square_of))(real(1, 3, 2))
