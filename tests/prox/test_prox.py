"""Proximal operators against their definition, and hypergradients through them."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, strategies as st
from problems import cplx, real, square

import bilevel as bl
from bilevel.errors import ArgumentError, StructureError

REAL = [
    bl.prox.L1(0.7),
    bl.prox.L2(0.7),
    bl.prox.Box(-0.4, 0.6),
    bl.prox.Box(upper=0.1),
    bl.prox.Box(lower=0.0),
]
numbers = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


@pytest.mark.parametrize("prox", [bl.prox.L1(0.7), bl.prox.L2(0.7)], ids=repr)
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


@pytest.mark.parametrize("box", [p for p in REAL if isinstance(p, bl.prox.Box)], ids=repr)
def test_a_box_gives_the_nearest_point_inside(box):
    z = real(1, 6)
    bounds = [(box.lower, box.upper)] * 6
    best = scipy.optimize.lsq_linear(
        np.eye(6),
        z.numpy(),
        np.array([[-np.inf if a is None else a, np.inf if b is None else b] for a, b in bounds]).T,
        tol=1e-12,
    )
    torch.testing.assert_close(box(z, 0.3, None), torch.from_numpy(best.x), rtol=0, atol=1e-6)


def test_soft_thresholding_by_hand():
    z = torch.tensor([3.0, -0.5, 0.0, -2.0])
    assert bl.prox.L1(1.0)(z, 0.5, None).tolist() == [2.5, 0.0, 0.0, -1.5]
    turned = torch.polar(torch.tensor([3.0, 0.2]).double(), torch.tensor([1.0, 2.0]).double())
    shrunk = torch.polar(torch.tensor([2.5, 0.0]).double(), torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(bl.prox.L1(1.0)(turned, 0.5, None), shrunk, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("prox", REAL, ids=repr)
@given(numbers, numbers)
def test_it_is_firmly_nonexpansive(prox, a, b):
    x, y = torch.tensor(a).double(), torch.tensor(b).double()
    p, q = prox(x, 0.3, None), prox(y, 0.3, None)
    assert float(square(p - q)) <= float((p - q) @ (x - y)) + 1e-12


SMOOTH = {
    "L1": lambda w: bl.prox.L1(lambda control: w(control)),
    "L2": lambda w: bl.prox.L2(lambda control: w(control)),
}


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("draw", [real, cplx], ids=["real", "complex"])
def test_both_derivatives_are_those_of_finite_differences(kind, draw):
    prox = SMOOTH[kind](lambda control: control.exp())
    x = (draw(1, 5) + torch.arange(5) % 2).requires_grad_()  # some below the threshold
    control = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    for function in (lambda x, c: prox(x, 0.8, c), prox.value):
        assert torch.autograd.gradcheck(function, (x, control))
        assert torch.autograd.gradgradcheck(function, (x, control))


@pytest.mark.parametrize("draw", [real, cplx], ids=["real", "complex"])
def test_everything_is_finite_at_zero_up_to_the_second_derivative(draw):
    for prox in (bl.prox.L1(lambda control: control), bl.prox.L2(lambda control: control)):
        for function in (lambda x, c, prox=prox: prox(x, 0.5, c), prox.value):
            x = torch.zeros_like(draw(1, 3)).requires_grad_()
            control = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
            found = torch.real(function(x, control) * draw(2, 3)).sum()
            first = torch.autograd.grad(found, (x, control), create_graph=True)
            total = sum(square(g) for g in first)
            second = torch.autograd.grad(total, (x, control), allow_unused=True)
            for g in [*first, *second]:
                assert g is None or bool(torch.isfinite(torch.view_as_real(g + 0j)).all())


@pytest.mark.parametrize("draw", [real, cplx], ids=["real", "complex"])
@pytest.mark.parametrize("prox", [bl.prox.L1(0.0), bl.prox.L2(0.0)], ids=repr)
def test_a_weight_of_zero_changes_neither_values_nor_derivatives(prox, draw):
    x = draw(1, 4)
    x[1] = 0
    x.requires_grad_()
    found = prox(x, 1.0, None)
    assert torch.equal(found.detach(), x.detach())
    (slope,) = torch.autograd.grad(torch.real(found).sum(), x)
    assert torch.equal(slope, torch.ones_like(x))


def test_a_learned_weight_may_be_a_tree_like_the_params():
    params = {"w": real(1, 3), "n": torch.tensor(2), "b": real(2)}
    prox = bl.prox.L1(lambda control: {"w": control[:3], "n": None, "b": control[3]})
    control = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = prox(params, {"w": 0.5, "n": None, "b": 2.0}, control)
    for name, weight, size in (("w", control[:3], 0.5), ("b", control[3], 2.0)):
        z = params[name]
        by_hand = torch.sign(z) * torch.relu(z.abs() - size * weight)
        torch.testing.assert_close(found[name], by_hand, rtol=0, atol=1e-15)
    total = (control[:3] * params["w"].abs()).sum() + control[3] * params["b"].abs()
    assert float(prox.value(params, control)) == pytest.approx(float(total), rel=1e-14)
    wrong = bl.prox.L1(lambda control: {"v": control})
    with pytest.raises(StructureError, match=r"weight must be a scalar, or a tree like the par"):
        wrong(params, 0.5, control)
    with pytest.raises(StructureError, match=r"step_size must be a scalar, or a tree like the "):
        prox(params, {"w": 0.5}, control)


@pytest.mark.parametrize(
    "prox",
    [bl.prox.L1(lambda c: c), bl.prox.L2(lambda c: c), bl.prox.Box(lambda c: -c, lambda c: c)],
    ids=["L1", "L2", "Box"],
)
def test_it_runs_under_vmap(prox):
    z, weights = real(1, 6, 4), torch.linspace(0.1, 2, 6, dtype=torch.float64)
    for function in (lambda x, w: prox(x, 0.5, w), prox.value):
        found = torch.func.vmap(function)(z, weights)
        looped = torch.stack([function(x, w) for x, w in zip(z, weights, strict=True)])
        torch.testing.assert_close(found, looped)


@pytest.mark.parametrize(
    ("prox", "control", "message"),
    [
        (bl.prox.L1(lambda c: c), -0.1, r"weight must be >= 0 and finite, got -0\.1"),
        (
            bl.prox.L2(lambda c: torch.stack([c, -c, c])),
            0.1,
            r"weight must be >= 0 and finite, got -0\.1 to 0\.1",
        ),
        (bl.prox.Box(lambda c: c, 0.5), 1.0, r"lower must be <= upper, got 1\.0 and 0\.5"),
    ],
    ids=["L1", "L2", "Box"],
)
def test_a_learned_setting_out_of_range_is_refused_before_the_first_step(prox, control, message):
    problem = bl.BilevelProblem(lambda w, c, b: square(w - 1), lambda w, c, b: square(w) * c)
    solver = bl.BilevelSolver(problem, bl.optim.ProximalGradient(0.1, prox), 5, certificate=None)
    with pytest.raises(ArgumentError, match=message):
        solver.hypergradient(real(1, 3), torch.tensor(control, dtype=torch.float64))


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
    value = bl.prox.L1(0.1)(x, 1.0, None)
    (first,) = torch.autograd.grad(square(value + 1), x, create_graph=True)
    (second,) = torch.autograd.grad(square(first + x), x)
    assert torch.equal(first.detach(), torch.zeros_like(first))
    assert bool(torch.isfinite(torch.view_as_real(second.to(torch.complex128))).all())


STEPS = 70  # after these the iteration stands, to rounding
LEARNED = {
    "L1": (lambda w: bl.prox.L1(w), lambda c: c["w"].exp() / 10),
    "L2": (lambda w: bl.prox.L2(w), lambda c: c["w"].exp()),
    "Box": (lambda w: bl.prox.Box(upper=w), lambda c: c["w"].exp() / 3),
    "a weight for each": (lambda w: bl.prox.L1(w), lambda c: c["w"].exp() / torch.arange(10, 15)),
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("draw", [real, cplx], ids=["real", "complex"])
def test_a_learned_weight_has_the_slope_of_finite_differences(name, draw):
    make, weight = LEARNED[name]
    if name == "Box" and draw is cplx:
        with pytest.raises(StructureError, match="complex numbers have no order"):
            make(weight)(draw(4, 5), 0.5, {"w": real(1)})
        return
    A, b, V, goal = draw(5, 40, 5), draw(6, 40), draw(7, 9, 5), draw(8, 9)
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(A @ w - b) / 80, lambda w, c, batch: square(V @ w - goal)
    )
    solver = bl.BilevelSolver(
        problem, bl.optim.ProximalGradient(0.4, make(weight)), STEPS, bl.MLM(), certificate=None
    )
    start = torch.zeros(5, dtype=A.dtype)

    def value(x):
        return float(solver.value(start, {"w": x}))

    at, h = torch.tensor(-0.3, dtype=torch.float64), 1e-5
    slope = (value(at + h) - value(at - h)) / (2 * h)
    for method in (
        bl.MLM(),
        bl.Implicit(bl.linear.GMRES()),
        bl.Implicit(bl.linear.NormalCG(rtol=1e-9)),
    ):
        found = bl.BilevelSolver(problem, solver.optimizer, STEPS, method, certificate=None)
        gradient = found.hypergradient(start, {"w": at}).gradient["w"]
        assert float(gradient) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_cg_refuses_the_system_of_proximal_gradient_and_names_gmres():
    problem = bl.BilevelProblem(lambda w, c, b: square(w - 1), lambda w, c, b: square(w) * c)
    solver = bl.BilevelSolver(
        problem,
        bl.optim.ProximalGradient(0.1, bl.prox.L1(lambda c: c)),
        5,
        bl.Implicit(),
        certificate=None,
    )
    with pytest.raises(ArgumentError, match="use GMRES"):
        solver.hypergradient(real(1, 3), torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.prox.L1(-1.0), "weight must be >= 0 and finite, got -1"),
        (lambda: bl.prox.L2(torch.tensor([1.0, -1.0])), "weight must be >= 0"),
        (lambda: bl.prox.L1(float("nan")), "weight must be >= 0 and finite, got nan"),
        (lambda: bl.prox.L1(torch.tensor(1.0, requires_grad=True)), "part of the control"),
        (
            lambda: bl.prox.L1(None),
            "weight must be a number, a tensor or a function .*, got NoneType",
        ),
        (lambda: bl.prox.L2({"a": "1"}), "weight must be a number, .*, got str"),
        (lambda: bl.prox.Box(lower="0"), "lower must be a number, .*, got str"),
        (lambda: bl.prox.Box(), "needs a lower or an upper bound"),
        (lambda: bl.prox.Box(1.0, 0.0), "lower must be <= upper"),
        (lambda: bl.prox.Box(torch.tensor(1.0, requires_grad=True)), "part of the control"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_box_is_free_inside_and_infinitely_dear_outside():
    box = bl.prox.Box(0.0, 1.0)
    assert float(box.value(torch.tensor([0.0, 0.5, 1.0]), None)) == 0
    assert float(box.value(torch.tensor([0.0, 1.5]), None)) == float("inf")
