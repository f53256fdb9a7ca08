"""Proximal operators against their definition, and hypergradients through them."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import cplx, real, square

import bilevel as bl

REAL = [bl.L1(0.7), bl.L2(0.7), bl.Box(-0.4, 0.6), bl.Box(upper=0.1), bl.Box(lower=0.0)]
numbers = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


@pytest.mark.parametrize("prox", [bl.L1(0.7), bl.L2(0.7)], ids=repr)
@pytest.mark.parametrize("draw", [real, cplx], ids=["real", "complex"])
def test_it_is_the_minimiser_of_its_definition(prox, draw):
    z, eta = draw(1, 5), 0.8

    def definition(v):
        x = torch.from_numpy(v) if draw is real else torch.complex(*torch.from_numpy(v).split(5))
        return float(square(x - z) / 2 + eta * prox.value(x, None))

    found = prox(z, eta, None)
    start = np.zeros(5 if draw is real else 10)
    best = scipy.optimize.minimize(
        definition, start, method="Powell", options={"xtol": 1e-10, "ftol": 1e-14}
    )
    v = best.x if draw is real else best.x[:5] + 1j * best.x[5:]
    torch.testing.assert_close(found, torch.from_numpy(v), rtol=0, atol=1e-5)


def test_soft_thresholding_by_hand():
    z = torch.tensor([3.0, -0.5, 0.0, -2.0])
    assert bl.L1(1.0)(z, 0.5, None).tolist() == [2.5, 0.0, 0.0, -1.5]
    turned = torch.polar(torch.tensor([3.0, 0.2]).double(), torch.tensor([1.0, 2.0]).double())
    shrunk = torch.polar(torch.tensor([2.5, 0.0]).double(), torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(bl.L1(1.0)(turned, 0.5, None), shrunk, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("prox", REAL, ids=repr)
@given(numbers, numbers)
def test_it_is_firmly_nonexpansive(prox, a, b):
    x, y = torch.tensor(a).double(), torch.tensor(b).double()
    p, q = prox(x, 0.3, None), prox(y, 0.3, None)
    assert float(square(p - q)) <= float((p - q) @ (x - y)) + 1e-12


@pytest.mark.parametrize("prox", REAL, ids=repr)
def test_a_tree_is_treated_leaf_by_leaf_and_integers_pass(prox):
    params = {"w": real(2, 3), "n": torch.tensor([1, 2]), "pair": (real(3), 4)}
    found = prox(params, 0.5, None)
    assert torch.equal(found["w"], prox(params["w"], 0.5, None))
    assert torch.equal(found["pair"][0], prox(params["pair"][0], 0.5, None))
    assert found["n"] is params["n"]
    assert found["pair"][1] == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_at_zero_are_finite_and_zero(dtype):
    x = torch.zeros(2, dtype=dtype, requires_grad=True)
    value = bl.L1(0.1)(x, 1.0, None)
    (first,) = torch.autograd.grad(square(value + 1), x, create_graph=True)
    (second,) = torch.autograd.grad(square(first + x), x)
    assert torch.equal(first.detach(), torch.zeros_like(first))
    assert bool(torch.isfinite(torch.view_as_real(second.to(torch.complex128))).all())


LEARNED = {
    "L1": (lambda w: bl.L1(w), lambda c: c["w"].exp() / 10),
    "L2": (lambda w: bl.L2(w), lambda c: c["w"].exp()),
    "Box": (lambda w: bl.Box(upper=w), lambda c: c["w"].exp() / 3),
    "a weight for each": (lambda w: bl.L1(w), lambda c: c["w"].exp() / torch.arange(10, 15)),
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("draw", [real, cplx], ids=["real", "complex"])
def test_a_learned_weight_has_the_slope_of_finite_differences(name, draw):
    make, weight = LEARNED[name]
    if name == "Box" and draw is cplx:
        with pytest.raises(bl.StructureError, match="complex numbers have no order"):
            make(weight)(draw(4, 5), 0.5, {"w": real(1)})
        return
    A, b, V, goal = draw(5, 9, 5), draw(6, 9), draw(7, 9, 5), draw(8, 9)
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(A @ w - b) / 18, lambda w, c, batch: square(V @ w - goal)
    )
    solver = bl.BilevelSolver(
        problem, bl.ProximalGradient(0.4, make(weight)), 300, bl.MLM(), certificate=None
    )
    start = torch.zeros(5, dtype=A.dtype)

    def value(x):
        return float(solver.hypergradient(start, {"w": x}).value)

    at, h = torch.tensor(-0.3, dtype=torch.float64), 1e-5
    slope = (value(at + h) - value(at - h)) / (2 * h)
    for method in (bl.MLM(), bl.Implicit(bl.GMRES()), bl.Implicit(bl.NormalCG(rtol=1e-9))):
        found = bl.BilevelSolver(problem, solver.optimizer, 300, method, certificate=None)
        gradient = found.hypergradient(start, {"w": at}).gradient["w"]
        assert float(gradient) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_cg_refuses_the_system_of_proximal_gradient_and_names_gmres():
    problem = bl.BilevelProblem(lambda w, c, b: square(w - 1), lambda w, c, b: square(w) * c)
    solver = bl.BilevelSolver(
        problem, bl.ProximalGradient(0.1, bl.L1(lambda c: c)), 5, bl.Implicit(), certificate=None
    )
    with pytest.raises(bl.ArgumentError, match="use GMRES"):
        solver.hypergradient(real(1, 3), torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.L1(-1.0), "weight must be >= 0, got -1"),
        (lambda: bl.L2(torch.tensor([1.0, -1.0])), "weight must be >= 0"),
        (lambda: bl.L1(float("nan")), "weight must be >= 0, got nan"),
        (lambda: bl.L1(torch.tensor(1.0, requires_grad=True)), "part of the control"),
        (lambda: bl.Box(), "needs a lower or an upper bound"),
        (lambda: bl.Box(1.0, 0.0), "lower must be <= upper"),
        (lambda: bl.Box(torch.tensor(1.0, requires_grad=True)), "part of the control"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(bl.ArgumentError, match=message):
        make()


def test_box_is_free_inside_and_infinitely_dear_outside():
    box = bl.Box(0.0, 1.0)
    assert float(box.value(torch.tensor([0.0, 0.5, 1.0]), None)) == 0
    assert float(box.value(torch.tensor([0.0, 1.5]), None)) == float("inf")
