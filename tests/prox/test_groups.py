"""Penalties of groups, and operators for the parts of a tree."""

import pytest
import torch
from problems import cplx, real

import bilevel as bl
from bilevel import errors, prox

F64 = torch.float64
PENALTIES = {
    "ElasticNet": (prox.ElasticNet(0.8, 1.3), real(1, 6)),
    "ElasticNet, complex": (prox.ElasticNet(0.8, 1.3), cplx(1, 6)),
    "GroupL1": (prox.GroupL1(1.7), real(2, 5, 3)),
    "GroupL1, complex": (prox.GroupL1(2.2), cplx(2, 5, 3)),
    "GroupL1 of columns": (
        prox.GroupL1(torch.tensor([0.5, 3.0, 9.0], dtype=F64), dim=0),
        real(2, 5, 3),
    ),
    "GroupL1 of the leaf": (prox.GroupL1(1.0, dim=None), real(2, 5, 3)),
    "GroupL1 of two axes": (prox.GroupL1(1.9, dim=(0, 2)), real(2, 3, 4, 2)),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_the_operator_minimises_what_defines_it(name):
    operator, z = PENALTIES[name]
    step = 0.6

    def moreau(x):
        return float(((x - z).abs() ** 2).sum() / 2 + step * operator.value(x, None))

    x = operator(z, step, None)
    least = moreau(x)
    for seed in range(30):
        way = (cplx if z.is_complex() else real)(50 + seed, *z.shape)
        for size in (1e-4, 1e-1):
            assert moreau(x + size * way) > least


@pytest.mark.parametrize("name", PENALTIES)
def test_the_derivative_is_that_of_differences(name):
    operator, z = PENALTIES[name]
    assert not operator.on_kink(z, 0.6, None, torch.zeros_like(z))
    assert torch.autograd.gradcheck(lambda z: operator(z, 0.6, None), z.clone().requires_grad_())


def test_at_the_threshold_of_a_group_the_derivative_is_that_from_outside():
    z = torch.tensor([[3.0, 4.0]], dtype=F64)
    operator = prox.GroupL1(5.0)
    assert operator(z, 1.0, None).tolist() == [[0.0, 0.0]]
    assert operator.on_kink(z, 1.0, None, torch.zeros_like(z))
    assert not operator.on_kink(z, 0.5, None, torch.zeros_like(z))
    jacobian = torch.autograd.functional.jacobian(lambda z: operator(z, 1.0, None), z)
    unit = z[0] / 5
    torch.testing.assert_close(jacobian[0, :, 0], torch.outer(unit, unit))


def test_a_group_of_zeros_has_a_finite_derivative():
    z = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    for weight in (0.0, 1.0):
        (slope,) = torch.autograd.grad(prox.GroupL1(weight)(z, 1.0, None).sum(), z)
        assert bool(slope.isfinite().all())


def test_weights_are_learned():
    z, w = real(2, 5, 3), torch.tensor([0.3, 0.5], dtype=F64)
    operators = prox.GroupL1(lambda c: c[0]), prox.ElasticNet(lambda c: c[0], lambda c: c[1])
    for operator in operators:
        operator.check(z, w)
        assert torch.autograd.gradcheck(
            lambda c, operator=operator: operator(z, 1.0, c), w.clone().requires_grad_()
        )
        with pytest.raises(errors.ArgumentError, match="must be >= 0"):
            operator.check(z, -w)


PARTS = prox.Product({"shares": prox.Simplex(), "net": prox.L1(0.5), "free": None})
PARAMS = {"shares": real(1, 3), "net": [real(2, 2), {"b": real(3)}], "free": real(4, 2)}


def test_a_product_gives_each_part_its_own():
    found = PARTS(PARAMS, 0.2, None)
    torch.testing.assert_close(found["shares"], prox.Simplex()(PARAMS["shares"], 0.2, None))
    torch.testing.assert_close(found["net"][1]["b"], prox.L1(0.5)(PARAMS["net"][1]["b"], 0.2, None))
    assert found["free"] is PARAMS["free"]
    inside = {**found, "net": PARAMS["net"]}
    assert float(PARTS.value(inside, None)) == pytest.approx(
        0.5 * float(PARAMS["net"][0].abs().sum() + PARAMS["net"][1]["b"].abs())
    )
    assert float(PARTS.term(inside, None)) == pytest.approx(float(PARTS.value(inside, None)))


def test_a_product_has_the_ties_of_its_parts():
    slack = bl.tree.zeros_like(PARAMS)
    assert not PARTS.on_kink(PARAMS, 0.2, None, slack)
    tied = {**PARAMS, "net": [torch.tensor([0.1, 3.0], dtype=F64), PARAMS["net"][1]]}
    assert PARTS.on_kink(tied, 0.2, None, slack)
    assert not PARTS.on_kink(tied, {**slack, "net": [0.3, {"b": 0.3}], "shares": 1.0}, None, slack)


def test_the_minimiser_of_a_product_is_that_of_each_part():
    problem = bl.BilevelProblem(
        lambda p, a, batch: (
            ((p["x"] - a) ** 2).sum() / 2 + ((p["y"] - torch.tensor([0.3, 2.0])) ** 2).sum() / 2
        ),
        lambda p, a, batch: (p["x"] ** 2).sum() + p["y"].sum(),
    )
    parts = prox.Product({"x": prox.NonNegative(), "y": prox.L1(1.0)})
    rule = bl.optim.ProximalGradient(0.5, parts)
    solver = bl.BilevelSolver(problem, rule, 80, bl.MLM())
    params = {"x": torch.zeros(2, dtype=F64), "y": torch.zeros(2, dtype=F64)}
    found = solver.hypergradient(params, torch.tensor([-1.0, 2.0], dtype=F64))
    torch.testing.assert_close(found.params["x"], torch.tensor([0.0, 2.0], dtype=F64))
    torch.testing.assert_close(found.params["y"], torch.tensor([0.0, 1.0], dtype=F64))
    torch.testing.assert_close(found.gradient, torch.tensor([0.0, 4.0], dtype=F64))
    assert found.certificate.trustworthy


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: prox.GroupL1(-1.0), errors.ArgumentError, "weight must be >= 0"),
        (lambda: prox.ElasticNet(1.0, -1.0), errors.ArgumentError, "l2 must be >= 0"),
        (lambda: prox.Product({"a": 3}), errors.ArgumentError, "must be operators"),
        (lambda: prox.Product({"a": prox.L1}), errors.ArgumentError, "must be operators"),
        (lambda: prox.Product({"a": None}), errors.ArgumentError, "at least one operator"),
        (
            lambda: PARTS({"shares": real(1, 3)}, 0.1, None),
            errors.StructureError,
            "structure of the params",
        ),
        (
            lambda: prox.GroupL1(1.0, dim=2).check(real(1, 3), None),
            errors.StructureError,
            "leaves that have that axis",
        ),
    ],
)
def test_bad_input_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
