"""Several linear systems side by side: each must come out as if it had been solved alone."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from problems import F64, cplx, real
from reference import assert_same

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, DivergenceError, StructureError
from bilevel.linear import CG, GMRES, Dense, Neumann, NormalCG, Nystrom, Operator

SOLVERS = [
    CG(rtol=1e-10),
    NormalCG(rtol=1e-10),
    GMRES(rtol=1e-10),
    Neumann(400, step=0.4, rtol=1e-10),
    Nystrom(100, damping=0.1, rtol=1e-10),
    Dense(rtol=1e-10),
]
every = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
stepping = pytest.mark.parametrize("solver", SOLVERS[:4], ids=lambda s: type(s).__name__)
M = 4


def matrices(seed, spectra):
    """Symmetric matrices with these eigenvalues, one a column."""
    return torch.stack(
        [_turned(seed + k, torch.as_tensor(values, dtype=F64)) for k, values in enumerate(spectra)]
    )


def _turned(seed, values):
    Q = torch.linalg.qr(real(seed, len(values), len(values)))[0]
    return (Q * values) @ Q.T


def positive(seed, n, columns=M):
    """Each column of another condition, so that each needs another number of steps."""
    return matrices(
        seed, [2 * torch.logspace(-0.4 * k / columns, 0, n, dtype=F64) for k in range(columns)]
    )


def joined(vector):
    """A tree of M columns as a real matrix of M rows."""
    return torch.cat(
        [
            (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
            .reshape(len(x), -1)
            .double()
            for x in tree.leaves_of(vector)
            if x is not None
        ],
        1,
    )


def split(rows, like):
    """Back."""
    start, leaves = 0, []
    for x in tree.leaves_of(like):
        if x is None:
            leaves.append(None)
            continue
        size = x.numel() // len(x) * (2 if x.is_complex() else 1)
        part = rows[:, start : start + size].contiguous()
        start += size
        part = torch.view_as_complex(part.view(len(x), -1, 2)) if x.is_complex() else part
        leaves.append(part.reshape(x.shape).to(x.dtype))
    return tree.unflatten(tree.flatten(like)[1], leaves)


def together(A, like, **settings):
    return Operator(
        lambda v: split((A @ joined(v)[..., None])[..., 0], like),
        lambda v: split((A.mT @ joined(v)[..., None])[..., 0], like),
        **{"symmetric": True, "columns": len(A), **settings},
    )


def column(vector, k):
    return tree.map_leaves(lambda x: None if x is None else x[k], vector)


def alone(solver, A, rhs, k, start=None, **settings):
    """What the solver finds for one column."""
    own = tree.map_leaves(lambda x: None if x is None else x[None], column(rhs, k))
    start = None if start is None else column(start, k)

    def apply(matrix):
        return lambda v: column(
            split(
                joined(tree.map_leaves(lambda x: None if x is None else x[None], v)) @ matrix.T, own
            ),
            0,
        )

    operator = Operator(apply(A[k]), apply(A[k].T), **{"symmetric": True, **settings})
    return solver.solve(operator, column(rhs, k), start)


def a_tree(seed, columns=M):
    """Real and complex, of several shapes, an odd number of real dimensions; None in places."""
    return {
        "c": cplx(seed, columns, 2),
        "n": None,
        "r": [real(seed + 1, columns), real(seed + 2, columns, 2, 2), real(seed, columns, 0)],
    }


def assert_as_alone(found, solver, A, rhs, start=None, rtol=1e-9, **settings):
    for k in range(len(A)):
        single = alone(solver, A, rhs, k, start, **settings)
        assert_same(column(found.solution, k), single.solution, rtol=rtol)
        assert found.column_steps[k] == single.steps
        assert found.column_converged[k] == single.converged
        assert found.column_residuals[k] == pytest.approx(single.residual, rel=1e-3, abs=1e-12)
        if single.indefinite is not None:
            assert found.column_indefinite[k] == single.indefinite


RHS = {
    "a vector": lambda seed: real(seed, M, 9),
    "a scalar": lambda seed: real(seed, M),
    "a matrix": lambda seed: real(seed, M, 3, 3),
    "a transposed matrix": lambda seed: real(seed, 3, 3, M).mT.transpose(0, 1),
    "a transposed leaf": lambda seed: {"a": real(seed, 9, M).T},
    "a complex vector": lambda seed: cplx(seed, M, 5),
    "a transposed complex vector": lambda seed: cplx(seed, 5, M).mH,
    "a tree": a_tree,
    "one column": lambda seed: a_tree(seed, 1),
}


# How columns lie in memory is settled before any solver sees them.
@pytest.mark.parametrize(
    ("solver", "kind", "warm"),
    [
        *((solver, "a tree", warm) for solver in SOLVERS for warm in (False, True)),
        *((solver, "one column", True) for solver in SOLVERS),
        *((SOLVERS[0], kind, True) for kind in RHS),
        *((SOLVERS[-1], kind, False) for kind in RHS),
    ],
    ids=lambda x: x if isinstance(x, str) else repr(x),
)
def test_each_column_comes_out_as_if_it_had_been_solved_alone(solver, kind, warm):
    rhs = RHS[kind](1)
    A = positive(3, joined(rhs).shape[1], len(joined(rhs)))
    start = RHS[kind](5) if warm else None
    found = solver.solve(together(A, rhs), rhs, start)
    assert_as_alone(found, solver, A, rhs, start)
    assert found.converged
    exact = torch.linalg.solve(
        A + getattr(solver, "damping", 0.0) * torch.eye(A.shape[-1], dtype=F64), joined(rhs)
    )
    torch.testing.assert_close(joined(found.solution), exact, rtol=1e-7, atol=1e-8)


@every
def test_products_may_lie_in_memory_as_they_like(solver):
    rhs, A = {"a": real(1, M, 9)}, positive(3, 9)

    def apply(v):
        return {"a": (v["a"][:, None] @ A).transpose(0, 2).contiguous().transpose(0, 2)[:, 0]}

    found = solver.solve(Operator(apply, apply, symmetric=True, columns=M), rhs)
    plain = solver.solve(together(A, rhs), rhs)
    assert_same(found.solution, plain.solution, rtol=1e-9)


@every
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 8),
    columns=st.integers(1, 5),
    condition=st.floats(1, 50),
)
def test_random_systems_come_out_as_alone(solver, seed, n, columns, condition):
    rhs = real(seed, columns, n)
    spectra = [
        1.5
        * condition ** -torch.rand(n, generator=torch.Generator().manual_seed(k + seed)).double()
        for k in range(columns)
    ]
    A = matrices(seed + 1, spectra)
    found = solver.solve(together(A, rhs), rhs)
    # Rounding differs, and is magnified: a step more or less near the tolerance.
    for k in range(columns):
        single = alone(solver, A, rhs, k)
        assert_same(column(found.solution, k), single.solution, rtol=1e-6)
        assert abs(found.column_steps[k] - single.steps) <= 1
        assert found.column_converged[k] == single.converged


@pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if not isinstance(s, CG | Nystrom)], ids=repr
)
def test_columns_without_symmetry_come_out_as_alone(solver):
    rhs = a_tree(1)
    A = 2 * torch.eye(9, dtype=F64) + 0.2 * real(2, M, 9, 9)
    found = solver.solve(together(A, rhs, symmetric=False), rhs)
    assert found.converged
    assert_as_alone(found, solver, A, rhs, symmetric=False)


def test_gmres_restarts_the_columns_that_need_it():
    rhs = real(1, M, 12)
    A = 2 * torch.eye(12, dtype=F64) + torch.arange(M)[:, None, None] * real(2, M, 12, 12) / 12
    solver = GMRES(restart=4, rtol=1e-8, max_steps=60)
    found = solver.solve(together(A, rhs, symmetric=False), rhs)
    assert found.column_steps[0] == 1
    assert max(found.column_steps) > 8
    assert found.converged
    exact = torch.linalg.solve(A, rhs)
    torch.testing.assert_close(found.solution, exact, rtol=1e-6, atol=1e-7)


@stepping
def test_one_product_serves_all_columns(solver):
    rhs, count = a_tree(1), 0
    plain = together(positive(3, 9), rhs)

    def counted(v):
        nonlocal count
        count += 1
        return plain.apply(v)

    found = solver.solve(Operator(counted, symmetric=True, columns=M), rhs)
    assert found.products == count
    twice = isinstance(solver, NormalCG)
    assert found.products == max(found.column_steps) * (2 if twice else 1) + twice
    assert found.steps == max(found.column_steps) > min(found.column_steps)


@pytest.mark.parametrize("solver", [Dense(), Nystrom(9, 0.1)], ids=repr)
def test_direct_solvers_make_a_product_a_dimension_of_one_column(solver):
    rhs = a_tree(1)
    found = solver.solve(together(positive(3, 9), rhs), rhs)
    assert found.products == 9 + isinstance(solver, Nystrom)


@every
def test_the_scalars_are_those_of_the_worst_column(solver):
    rhs = real(1, M, 9)
    A = positive(3, 9)
    found = solver.solve(together(A, rhs), rhs)
    assert found.residual == max(found.column_residuals)
    assert found.steps == max(found.column_steps)
    if found.ritz is not None:
        singles = [alone(solver, A, rhs, k).ritz for k in range(M)]
        assert found.ritz == pytest.approx(min(singles), rel=1e-4)
    single = alone(solver, A, rhs, 0)
    assert single.column_residuals is single.column_steps is single.column_converged is None
    assert single.column_indefinite is None


@every
def test_a_column_without_a_right_hand_side_gives_zero_whatever_its_start(solver):
    rhs, start = a_tree(1), a_tree(7)
    for x in tree.leaves_of(rhs):
        if x is not None:
            x[2] = 0
    A = positive(3, 9)
    found = solver.solve(together(A, rhs), rhs, start)
    assert_as_alone(found, solver, A, rhs, start)
    assert_same(column(found.solution, 2), tree.zeros_like(column(rhs, 2)), rtol=0)
    assert found.column_residuals[2] == 0


@every
def test_right_hand_sides_that_are_all_zero_take_no_product(solver):
    rhs = tree.zeros_like(a_tree(1))
    found = solver.solve(together(positive(3, 9), rhs), rhs, a_tree(2))
    assert_same(found.solution, rhs, rtol=0)
    assert (found.column_residuals, found.column_steps) == ((0.0,) * M, (0,) * M)
    assert found.column_converged == (True,) * M
    assert found.products == 0


@every
@pytest.mark.parametrize("exponent", [-900, 700])
def test_a_column_of_another_scale_loses_no_digit(solver, exponent):
    rhs, A = real(1, M, 9), positive(3, 9)
    scales = torch.tensor([1.0, 2.0**exponent, 1e200, 1.0], dtype=F64)
    found = solver.solve(together(A, rhs), rhs * scales[:, None])
    plain = solver.solve(together(A, rhs), rhs)
    torch.testing.assert_close(found.solution / scales[:, None], plain.solution, rtol=1e-13, atol=0)
    assert found.column_steps == plain.column_steps
    assert found.converged


@every
def test_operators_of_different_size_stand_side_by_side(solver):
    if isinstance(solver, Neumann | Nystrom):
        solver = dataclasses.replace(solver, **({"step": 1e-3} if hasattr(solver, "step") else {}))
        sizes = torch.tensor([1.0, 0.5, 0.7, 0.9], dtype=F64)
    else:
        sizes = torch.tensor([1.0, 1e-30, 1e30, 1e8], dtype=F64)
    rhs, A = real(1, M, 5), positive(3, 5) * sizes[:, None, None]
    found = solver.solve(together(A, rhs), rhs)
    assert_as_alone(found, solver, A, rhs)


@pytest.mark.parametrize("solver", [CG(), NormalCG(), GMRES(), Dense()], ids=repr)
def test_a_singular_column_spoils_no_other(solver):
    # Not far apart: where the last step is one of rounding, kernels differ in whether it is made.
    spectra = [[1.0, 2, 3, 4], [0, 0, 1, 2], [2, 2, 3, 4], [0, 0, 0, 0]]
    rhs, A = real(1, M, 4), matrices(2, spectra)
    found = solver.solve(together(A, rhs), rhs)
    assert found.column_converged == (True, False, True, False)
    assert not found.converged
    good = [0, 2]
    exact = torch.linalg.solve(A[good], rhs[good])
    torch.testing.assert_close(found.solution[good], exact, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(found.solution).all()
    assert_as_alone(found, solver, A, rhs, rtol=1e-6)
    # With right-hand sides in its range the singular column is solved as well.
    rhs = (A @ rhs[..., None])[..., 0]
    found = solver.solve(together(A, rhs), rhs)
    assert found.converged
    exact = (torch.linalg.pinv(A, rtol=1e-12) @ rhs[..., None])[..., 0]
    torch.testing.assert_close(found.solution, exact, rtol=1e-6, atol=1e-8)


def test_negative_curvature_stops_its_own_column_alone():
    spectra = [[1.0, 2, 3], [-1, 1, 2], [1, 1.5, 7], [-3, -2, -1]]
    rhs, A = real(1, M, 3), matrices(2, spectra)
    found = CG().solve(together(A, rhs), rhs)
    assert found.column_indefinite == (False, True, False, True)
    assert found.column_converged == (True, False, True, False)
    assert (found.indefinite, found.converged) == (True, False)
    assert found.column_steps[3] == 0
    assert found.ritz <= -1
    assert_as_alone(found, CG(), A, rhs)
    assert "did not converge in columns 1, 3: 4 columns, the worst with" in found.message
    assert "Columns 1, 3 met a direction of non-positive curvature" in found.message
    shifted = CG(damping=3.5).solve(together(A, rhs), rhs)
    assert shifted.column_indefinite == (False,) * M
    exact = torch.linalg.solve(A + 3.5 * torch.eye(3, dtype=F64), rhs)
    torch.testing.assert_close(shifted.solution, exact, rtol=1e-7, atol=1e-8)


@stepping
def test_steps_are_limited_in_every_column(solver):
    rhs, A = real(1, M, 9), positive(3, 9)
    change = {"terms": 3} if isinstance(solver, Neumann) else {"max_steps": 3}
    solver = dataclasses.replace(solver, **change)
    found = solver.solve(together(A, rhs), rhs)
    assert found.steps == 3
    assert_as_alone(found, solver, A, rhs)
    if not isinstance(solver, Neumann):
        assert found.column_converged == (True, False, False, False)
        assert "did not converge in columns 1, 2, 3: 4 columns, the worst with" in found.message


@pytest.mark.parametrize("solver", [CG(), NormalCG()], ids=repr)
def test_the_default_limit_of_steps_is_ten_a_dimension_of_one_column(solver):
    A = matrices(1, [torch.logspace(0, 14, 6, dtype=F64)] * 2)
    rhs = real(2, 2, 6)
    found = dataclasses.replace(solver, rtol=0).solve(together(A, rhs), rhs)
    assert found.steps <= 60
    assert isinstance(solver, CG) or found.steps == 60


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_single_precision_columns_are_solved_to_their_own_rounding(solver, dtype):
    rhs = cplx(1, M, 4).to(dtype) if dtype.is_complex else real(1, M, 8).float()
    A = positive(2, 8)
    changes = {"damping": 1.0} if isinstance(solver, Nystrom) else {}
    solver = dataclasses.replace(solver, rtol=1e-5, **changes)
    single = A.float()

    def apply(v):
        rows = joined(v).float()
        return split((single @ rows[..., None])[..., 0], rhs)

    found = solver.solve(Operator(apply, apply, symmetric=True, columns=M), rhs)
    assert found.converged
    assert found.solution.dtype == dtype
    damping = getattr(solver, "damping", 0.0)
    exact = torch.linalg.solve(A + damping * torch.eye(8, dtype=F64), joined(rhs))
    torch.testing.assert_close(joined(found.solution), exact, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("solver", [CG(0), NormalCG(0)], ids=repr)
def test_columns_go_on_to_the_rounding_level_and_stop_there(solver):
    rhs, A = real(1, M, 9), positive(3, 9)
    found = solver.solve(together(A, rhs), rhs)
    assert found.converged
    assert found.steps < 40
    assert 1e-17 < found.residual < 1e-14


@every
def test_the_leaves_of_a_solution_own_their_memory_and_nothing_given_is_written_to(solver):
    rhs, start, A = a_tree(1), a_tree(5), positive(3, 9)
    kept = tree.map_leaves(lambda x: None if x is None else x.clone(), (rhs, start))
    found = solver.solve(together(A, rhs), rhs, start)
    assert_same((rhs, start), kept, rtol=0)
    leaves = [x for x in tree.leaves_of(found.solution) if x is not None]
    assert not any(x._is_view() or x.requires_grad for x in leaves)


@every
def test_a_value_that_is_not_finite_is_reported_with_its_column(solver):
    rhs = real(1, M, 9)
    plain = together(positive(3, 9), rhs).apply

    def apply(v):
        product = plain(v)
        product[2] = math.nan
        return product

    with pytest.raises(DivergenceError, match=r"met nan at step [01] in column 2: the operator"):
        solver.solve(Operator(apply, symmetric=True, columns=M), rhs)


@every
@pytest.mark.parametrize(
    ("rhs", "message"),
    [
        (real(1, 3), r"^rhs must have a leading axis of length 4, one place a column, got.*\(3,\)"),
        (torch.tensor(1.0), r"^rhs must have a leading axis of length 4.*shape \(\); stack the"),
        ({"a": real(1, 4), "b": real(1, 2, 4)}, r"^rhs\['b'\] must have a leading axis.*\(2, 4\)"),
    ],
)
def test_leaves_without_the_axis_of_columns_are_refused(solver, rhs, message):
    with pytest.raises(StructureError, match=message):
        solver.solve(Operator(lambda v: v, symmetric=True, columns=M), rhs)


@pytest.mark.parametrize("columns", [0, -1, 2.0, True])
def test_a_number_of_columns_out_of_range_is_refused(columns):
    with pytest.raises(ArgumentError, match=r"^columns must be a whole number >= 1, or None, got"):
        Operator(lambda v: v, columns=columns)


def test_a_long_list_of_columns_is_cut():
    rhs = torch.ones(20, 2, dtype=F64)
    found = CG().solve(Operator(lambda v: -v, symmetric=True, columns=20), rhs)
    assert "in columns 0, 1, 2, 3, 4, 5, 6, 7 and 12 more: 20 columns" in found.message
    rhs[1:] = 0
    found = CG().solve(Operator(lambda v: -v, symmetric=True, columns=20), rhs)
    assert "Column 0 met a direction" in found.message


def test_the_hypergradient_of_each_column_is_that_of_its_own_problem():
    X, y = real(1, M, 12, 5), real(2, M, 12)
    y[1] = 0  # a column whose params stay at zero, where its outer gradient vanishes

    def inner(w, alpha, batch):
        X, y = batch
        fit = ((X @ w[..., None])[..., 0] - y).square().sum() / 2
        return fit + (alpha.exp() * w.square().sum(-1)).sum() / 2

    def outer(w, alpha, batch):
        return w.square().sum() / 2

    def exact(k):
        A = X[k].T @ X[k] + alpha[k].exp() * torch.eye(5, dtype=F64)
        w = torch.linalg.solve(A, X[k].T @ y[k])
        return -alpha[k].exp() * w @ torch.linalg.solve(A, w)

    alpha = torch.linspace(-1, 3, M, dtype=F64)
    problem = bl.BilevelProblem(inner, outer, columns=M)
    solver = bl.BilevelSolver(
        problem, bl.optim.SGD(0.03), 600, bl.Implicit(CG(1e-12)), certificate=None
    )
    found = solver.hypergradient(torch.zeros(M, 5, dtype=F64), alpha, (X, y))
    torch.testing.assert_close(
        found.gradient, torch.stack([exact(k) for k in range(M)]), rtol=1e-9, atol=1e-12
    )
    assert found.linear.column_steps[1] == 0
    assert found.linear.products == max(found.linear.column_steps) <= 6
    with pytest.raises(StructureError, match="must have a leading axis of length 3"):
        dataclasses.replace(solver, problem=dataclasses.replace(problem, columns=3)).hypergradient(
            torch.zeros(M, 5, dtype=F64), alpha, (X, y)
        )
