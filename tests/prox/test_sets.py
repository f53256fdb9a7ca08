"""Projections: onto the set, nearest to where they came from, with the right derivative."""

import math

import pytest
import torch
from problems import cplx, real

import bilevel as bl
from bilevel import errors, prox, tree

F64 = torch.float64
A, B = real(1, 2, 5), real(2, 2)
C, D = cplx(3, 2, 5), cplx(4, 2)
SETS = {
    "NonNegative": (prox.NonNegative(), real(5, 5), lambda x: bool((x >= 0).all())),
    "Simplex": (
        prox.Simplex(),
        real(6, 5),
        lambda x: bool((x >= 0).all()) and abs(float(x.sum()) - 1) < 1e-12,
    ),
    "rows on simplexes": (
        prox.Simplex(2.5),
        real(7, 4, 3),
        lambda x: bool((x >= 0).all()) and float((x.sum(1) - 2.5).abs().max()) < 1e-12,
    ),
    "columns on simplexes": (
        prox.Simplex(torch.tensor([1.0, 2.0, 3.0], dtype=F64), dim=0),
        real(7, 4, 3),
        lambda x: float((x.sum(0) - torch.tensor([1.0, 2, 3])).abs().max()) < 1e-12,
    ),
    "a whole leaf on one simplex": (
        prox.Simplex(dim=None),
        real(7, 4, 3),
        lambda x: bool((x >= 0).all()) and abs(float(x.sum()) - 1) < 1e-12,
    ),
    "Affine": (prox.Affine(A, B), real(8, 5), lambda x: float((A @ x - B).norm()) < 1e-12),
    "Affine, many": (
        prox.Affine(A, B),
        real(8, 3, 5),
        lambda x: float((x @ A.T - B).norm()) < 1e-12,
    ),
    "Affine, complex": (
        prox.Affine(C, D),
        cplx(8, 5),
        lambda x: float((C @ x - D).abs().max()) < 1e-12,
    ),
    "Affine, a row twice": (
        prox.Affine(torch.cat([A, A[:1]]), torch.cat([B, B[:1]])),
        real(8, 5),
        lambda x: float((A @ x - B).norm()) < 1e-12,
    ),
    "Ball": (prox.Ball(0.7, 0.1), real(9, 5), lambda x: float((x - 0.1).norm()) <= 0.7 + 1e-12),
    "Ball, complex": (prox.Ball(0.7), cplx(9, 5), lambda x: float(x.norm()) <= 0.7 + 1e-12),
    "rows in balls": (
        prox.Ball(torch.tensor([0.3, 0.5, 9.0], dtype=F64), dim=-1),
        real(9, 3, 4),
        lambda x: bool((x.norm(dim=1) <= torch.tensor([0.3, 0.5, 9.0]) + 1e-12).all()),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_projection_leads_to_the_nearest_point_of_the_set(name):
    operator, z, inside = SETS[name]
    x = operator(z, 0.3, None)
    assert x.shape == z.shape
    assert x.dtype == z.dtype
    assert inside(x)
    torch.testing.assert_close(operator(x, 0.3, None), x, rtol=1e-12, atol=1e-12)
    # <z - x, y - x> <= 0 for every y of the set: the nearest point of a convex set, and no other.
    for seed in range(20):
        far = 3 * (cplx if z.is_complex() else real)(100 + seed, *z.shape)
        y = operator(far, 0.3, None)
        assert float(tree.inner(z - x, y - x)) <= 1e-10


@pytest.mark.parametrize("name", SETS)
def test_the_derivative_of_a_projection_is_that_of_differences(name):
    operator, z, _ = SETS[name]
    assert not operator.on_kink(z, 0.3, None, torch.zeros_like(z))
    assert torch.autograd.gradcheck(lambda z: operator(z, 0.3, None), z.clone().requires_grad_())


@pytest.mark.parametrize("name", SETS)
def test_the_value_is_zero_in_the_set_and_infinite_outside(name):
    operator, z, _ = SETS[name]
    assert operator.value(operator(z, 0.3, None), None) == 0
    assert operator.value(z, None) == math.inf
    assert operator.term(z, None) == 0


def test_the_derivative_of_the_simplex_is_that_of_its_support():
    z = torch.tensor([0.9, 0.6, -1.0, 0.1], dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda z: prox.Simplex()(z, 1.0, None), z)
    on = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(jacobian, on.diag() - torch.outer(on, on) / 2)


@pytest.mark.parametrize(
    ("operator", "z", "jacobian"),
    [
        # z_3 is at the level: on the support, from inside.
        (
            prox.Simplex(),
            torch.tensor([1.5, 1.5, 1.0], dtype=F64),
            torch.eye(3, dtype=F64) - torch.ones(3, 3, dtype=F64) / 3,
        ),
        (prox.NonNegative(), torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)),
        (prox.Ball(5.0), torch.tensor([3.0, 4.0], dtype=F64), torch.eye(2, dtype=F64)),
    ],
    ids=["Simplex", "NonNegative", "Ball"],
)
def test_on_the_border_the_derivative_is_that_from_inside(operator, z, jacobian):
    found = torch.autograd.functional.jacobian(lambda z: operator(z, 1.0, None), z)
    torch.testing.assert_close(found, jacobian)
    assert operator.on_kink(z, 1.0, None, torch.zeros_like(z))
    assert not operator.on_kink(z + 0.1, 1.0, None, torch.zeros_like(z)) or isinstance(
        operator, prox.Simplex
    )


def test_equal_entries_share_the_simplex_alike():
    x = prox.Simplex()(torch.full((4,), 7.0, dtype=F64), 1.0, None)
    torch.testing.assert_close(x, torch.full((4,), 0.25, dtype=F64))


def test_a_simplex_of_one_entry_is_a_point():
    z = torch.tensor([-4.0], dtype=F64, requires_grad=True)
    x = prox.Simplex(2.0)(z, 1.0, None)
    assert x.tolist() == [2.0]
    (slope,) = torch.autograd.grad(x.sum(), z)
    assert slope.tolist() == [0.0]


LEARNED = {
    "total": (prox.Simplex(lambda c: c.exp()), torch.tensor(0.4, dtype=F64)),
    "radius": (prox.Ball(lambda c: c.exp()), torch.tensor(-1.0, dtype=F64)),
    "center": (prox.Ball(0.5, lambda c: c), real(11, 5)),
    "b": (prox.Affine(A, lambda c: c), real(12, 2)),
    "A": (prox.Affine(lambda c: c, B), real(13, 2, 5)),
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_the_set_is_told_can_be_learned(name):
    operator, control = LEARNED[name]
    z = real(14, 5)
    operator.check(z, control)
    assert torch.autograd.gradcheck(
        lambda z, c: operator(z, 1.0, c), (z.requires_grad_(), control.clone().requires_grad_())
    )
    with pytest.raises(errors.UnsupportedError, match="moves with the control"):
        operator.term(z, control)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: prox.Simplex(0), errors.ArgumentError, "total must be > 0"),
        (lambda: prox.Simplex(-1.0), errors.ArgumentError, "total must be > 0"),
        (lambda: prox.Simplex(dim=(0, 1)), errors.ArgumentError, "dim must be one axis"),
        (lambda: prox.Simplex(dim=0.5), errors.ArgumentError, "dim must be a whole number"),
        (lambda: prox.Ball(0.0), errors.ArgumentError, "radius must be > 0"),
        (
            lambda: prox.Affine(torch.zeros(0, 3), torch.zeros(0)),
            errors.ArgumentError,
            "at least one row and one column",
        ),
        (lambda: prox.Affine(torch.ones(3), torch.ones(1)), errors.ArgumentError, "a matrix"),
        (lambda: prox.Affine(torch.eye(2), torch.ones(3)), errors.ArgumentError, "one number a ro"),
        (lambda: prox.Affine(torch.eye(2), torch.tensor(1.0)), errors.ArgumentError, "one number"),
        (lambda: prox.Affine([[1.0]], torch.ones(1)), errors.ArgumentError, "A must be a tensor"),
        (
            lambda: prox.Affine(torch.ones(2, 3), torch.tensor([1.0, 2.0])),
            errors.ArgumentError,
            "no x has A x = b",
        ),
        (
            lambda: prox.Affine(torch.zeros(1, 3), torch.ones(1)),
            errors.ArgumentError,
            "no x has A x = b",
        ),
        (
            lambda: prox.Simplex().check(torch.zeros(0), None),
            errors.StructureError,
            "at least one entry",
        ),
        (
            lambda: prox.Simplex()(torch.zeros(3, 0), 1.0, None),
            errors.StructureError,
            "at least one entry",
        ),
        (
            lambda: prox.Simplex()(torch.tensor(1.0), 1.0, None),
            errors.StructureError,
            "leaves that have that axis",
        ),
        (
            lambda: prox.Simplex()(cplx(1, 3), 1.0, None),
            errors.StructureError,
            "complex numbers have no order",
        ),
        (
            lambda: prox.NonNegative()(cplx(1, 3), 1.0, None),
            errors.StructureError,
            "NonNegative orders its params",
        ),
        (
            lambda: prox.Affine(A, B).check(real(1, 4), None),
            errors.StructureError,
            "last axis has 5 entries",
        ),
        (
            lambda: prox.Affine(C, D).check(real(1, 5), None),
            errors.StructureError,
            "a complex A constrains complex params",
        ),
        (
            lambda: prox.Affine(torch.ones(2, 3), lambda c: c).check(
                torch.ones(3), torch.tensor([1.0, 2.0])
            ),
            errors.ArgumentError,
            "no x has A x = b",
        ),
        (
            lambda: prox.Simplex(lambda c: c).check(torch.ones(3), torch.tensor(-1.0)),
            errors.ArgumentError,
            "total must be > 0",
        ),
        (
            lambda: prox.Simplex()(torch.ones(3), torch.ones(3), None),
            errors.UnsupportedError,
            "one step size",
        ),
    ],
)
def test_constraints_that_cannot_be_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_bad_constraint_is_refused_before_the_first_step():
    problem = bl.BilevelProblem(
        lambda w, a, batch: ((w - a) ** 2).sum(), lambda w, a, batch: (w**2).sum()
    )
    rule = bl.optim.ProximalGradient(0.1, prox.Affine(torch.ones(1, 3), torch.ones(1)))
    solver = bl.BilevelSolver(problem, rule, 5)
    with pytest.raises(errors.StructureError, match="last axis has 3 entries"):
        solver.hypergradient(torch.zeros(2), torch.tensor(1.0))


def test_a_portfolio_has_the_hypergradient_of_its_active_set():
    """Markowitz: min w' S w / 2 - a m' w on the simplex; the answer by its KKT system."""
    factor, m = real(1, 6, 6), real(2, 6)
    S = factor @ factor.T / 6 + 0.1 * torch.eye(6, dtype=F64)
    goal = torch.full((6,), 1 / 6, dtype=F64)
    problem = bl.BilevelProblem(
        lambda w, a, batch: w @ S @ w / 2 - a * (m @ w),
        lambda w, a, batch: ((w - goal) ** 2).sum() / 2,
    )
    step = 1 / float(torch.linalg.eigvalsh(S)[-1])
    rule = bl.optim.ProximalGradient(step, prox.Simplex(), accelerated=True)
    a = torch.tensor(0.3, dtype=F64)
    solver = bl.BilevelSolver(problem, rule, 150, bl.Implicit(bl.linear.GMRES()))
    found = solver.hypergradient(goal, a)
    on = found.params > 0
    assert 1 < int(on.sum()) < 6
    n = int(on.sum())
    K = torch.ones(n + 1, n + 1, dtype=F64)
    K[:n, :n], K[n, n] = S[on][:, on], 0
    w = torch.linalg.solve(K, torch.cat([a * m[on], torch.ones(1, dtype=F64)]))[:n]
    slope = torch.linalg.solve(K, torch.cat([m[on], torch.zeros(1, dtype=F64)]))[:n]
    torch.testing.assert_close(found.params[on], w, rtol=1e-6, atol=1e-8)
    assert float(found.gradient) == pytest.approx(float((w - goal[on]) @ slope), rel=1e-5)
    assert found.certificate.trustworthy
    for method in (bl.Penalty(), bl.MLM()):
        other = bl.BilevelSolver(problem, rule, 150, method).hypergradient(goal, a)
        assert float(other.gradient) == pytest.approx(float(found.gradient), rel=1e-4)
