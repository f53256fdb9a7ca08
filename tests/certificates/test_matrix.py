"""The matrix of a small derivative: that of the products, whole, and only where it is sound."""

import pytest
import torch
from reference import assert_same_vector

import bilevel as bl
from bilevel.autodiff import Linearisation
from bilevel.certificates.curvature import spectrum
from bilevel.certificates.matrix import LARGEST, WIDEST, applied, formed
from bilevel.linear import Operator


def of(residual, params):
    found = Linearisation(residual, params, name="the residual")
    return found, Operator(found.pull, adjoint=found.push)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quadratic(w):
    return {
        "a": 3 * w["a"] + w["b"].real.sum(),
        "b": (2 + 1j) * w["b"] * w["a"].sum() + w["c"],
        "c": w["c"].sin() - w["b"].imag.sum(),
    }


TREES = {
    "0-d": (torch.sin, torch.tensor(0.3, dtype=torch.float64)),
    "one entry": (lambda w: w**3, normal(1)),
    "a matrix": (lambda w: torch.tanh(w @ w), normal(4, 4)),
    "float32": (lambda w: torch.tanh(w.flip(0)) * w, normal(9, dtype=torch.float32)),
    "mixed leaves": (
        quadratic,
        {
            "a": normal(2),
            "b": normal(3, dtype=torch.complex128),
            "c": torch.tensor(0.4, dtype=torch.float64),
        },
    ),
}


@pytest.mark.parametrize(("residual", "params"), TREES.values(), ids=TREES)
def test_it_is_that_of_the_products(residual, params):
    found, operator = of(residual, params)
    matrix = formed(found, operator, found.value)
    assert matrix is not None
    quick = applied(matrix, found.value, symmetric=False)
    v = bl.tree.map_leaves(lambda x: normal(*x.shape, dtype=x.dtype, seed=1), params)
    rtol = 64 * torch.finfo(matrix.dtype).eps
    assert_same_vector(quick.apply(v), operator.apply(v), rtol)
    assert_same_vector(quick.adjoint(v), operator.adjoint(v), rtol)


class Untellable(torch.autograd.Function):
    """A square whose backward looks at numbers, which several vectors at once do not have."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g if float(g.abs().sum()) > 0 else torch.zeros_like(x)


@pytest.mark.parametrize(
    ("residual", "params"),
    [
        (Untellable.apply, normal(3)),
        (torch.sin, normal(WIDEST + 1)),
        (lambda w: (w[:, None] * torch.ones(LARGEST, dtype=w.dtype)).sin().mean(1), normal(2)),
    ],
    ids=["no rule", "wide", "long"],
)
def test_there_is_none_where_it_would_be_wrong_or_large(residual, params):
    found, operator = of(residual, params)
    assert formed(found, operator, found.value) is None


def test_it_is_compared_with_a_product():
    found, operator = of(torch.sin, normal(3))
    other = Operator(lambda v: 1.001 * operator.apply(v))
    assert formed(found, other, found.value) is None


def test_the_spectrum_is_whole():
    values = torch.linspace(1, 2, 40, dtype=torch.float64)
    values[17] = -1e-3
    turn = torch.linalg.qr(normal(40, 40))[0]
    curvature = spectrum(turn @ values.diag() @ turn.mT, normal(40), symmetric=True)
    assert curvature.smallest == pytest.approx(-1e-3, abs=1e-12)
    assert curvature.directions == 40
    assert abs(float(curvature.vector @ turn[:, 17])) == pytest.approx(1, abs=1e-9)


def test_a_shallow_saddle_among_forty_unknowns_is_met():
    # Twelve random directions meet least values between 1e-2 and 1e-1 here.
    scales = torch.logspace(0, 3, 40, dtype=torch.float64)
    scales[0] = -1e-4

    def inner(w, a, _):
        return (scales * (w - a) ** 2).sum() / 2 + 1e-5 * w[0] ** 4

    problem = bl.BilevelProblem(inner, lambda w, a, _: (w - 1).square().sum())
    solver = bl.BilevelSolver(problem, bl.optim.SGD(1e-3), inner_steps=5, method=bl.MLM())
    a = torch.zeros(40, dtype=torch.float64)
    with pytest.warns(bl.ConvergenceWarning):
        found = solver.hypergradient(torch.zeros_like(a), a)
    assert not found.certificate.trustworthy
    assert "negative curvature" in found.certificate.reason
