"""Linear solvers on trees, against numpy and scipy."""

import dataclasses
import math
import re

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from hypothesis import given, settings, strategies as st
from problems import C128, F64, cplx, real
from reference import assert_same

from bilevel import tree
from bilevel.errors import ArgumentError, DivergenceError, StructureError
from bilevel.linear import CG, GMRES, Dense, LinearSolver, Neumann, NormalCG, Nystrom, Operator
from bilevel.linear.cg import _smallest_eigenvalue as smallest_eigenvalue
from bilevel.linear.flat import Flat

quick = settings(max_examples=25)
DTYPES = [F64, C128]
# Every solver, with settings under which it solves a small well-conditioned positive system.
EVERY = [
    CG(rtol=1e-12),
    NormalCG(rtol=1e-12),
    GMRES(rtol=1e-12),
    Neumann(500, step=0.4, rtol=1e-12),
    Nystrom(100, damping=1e-3, rtol=1e-10),
    Dense(rtol=1e-12),
]
every = pytest.mark.parametrize("solver", EVERY, ids=lambda s: type(s).__name__)
# Those that take operators without symmetry.
GENERAL = [s for s in EVERY if not isinstance(s, CG | Nystrom)]
general = pytest.mark.parametrize("solver", GENERAL, ids=lambda s: type(s).__name__)
damped = pytest.mark.parametrize(
    "solver", [s for s in EVERY if hasattr(s, "damping")], ids=lambda s: type(s).__name__
)


def matrix(seed, eigenvalues):
    """Symmetric, with these eigenvalues."""
    values = torch.as_tensor(eigenvalues, dtype=F64)
    Q = torch.linalg.qr(real(seed, len(values), len(values)))[0]
    return (Q * values) @ Q.T


def positive(seed, n, condition=10.0):
    return matrix(seed, torch.logspace(0, math.log10(condition), n, dtype=F64) * 2 / condition)


def operator(A, like=None, symmetric=None):
    """The operator of a real matrix on trees like `like`."""
    flat = Flat(A[0] if like is None else like, "like")
    symmetric = bool(torch.allclose(A, A.T)) if symmetric is None else symmetric
    return Operator(
        lambda v: flat.tree(A @ flat.vector(v)),
        adjoint=lambda v: flat.tree(A.T @ flat.vector(v)),
        symmetric=symmetric,
    )


def damping_of(solver):
    return getattr(solver, "damping", 0.0)


def truth(A, b, solver):
    return torch.linalg.solve(A + damping_of(solver) * torch.eye(len(A), dtype=F64), b)


def a_tree(seed, dtype=C128):
    """Real and complex, 0-d and empty, with None where there is no variable."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=dtype)

    return {"W": draw(2, 3), "n": None, "b": [draw(dtype=F64), draw(0)], "c": (draw(2), None)}


# The space of trees


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_vectors_have_the_dot_product_of_trees(dtype):
    a, b = a_tree(1, dtype), a_tree(2, dtype)
    flat = Flat(a, "a")
    assert flat.width == 9 if dtype == F64 else 17
    assert float(flat.vector(a) @ flat.vector(b)) == pytest.approx(float(tree.inner(a, b)))
    assert_same(flat.tree(flat.vector(b)), b, rtol=0)
    assert_same(flat.copied(flat.vector(b)), b, rtol=0)


@pytest.mark.parametrize(
    "leaf", [real(1), real(1, 3), real(1, 2, 3), cplx(1), cplx(1, 3), cplx(1, 2, 2).mT.conj()]
)
def test_a_bare_tensor_is_flattened_and_put_back(leaf):
    flat = Flat(leaf, "leaf")
    assert_same(flat.tree(flat.vector(leaf)), leaf.resolve_conj(), rtol=0)
    assert_same(flat.vector(None), torch.zeros(flat.width, dtype=F64), rtol=0)


def test_a_flat_vector_inside_a_storage_is_put_back():
    rhs = {"a": real(1, 2, 2).mT, "b": real(2, 1, 3), "c": real(3)}
    flat = Flat(rhs, "rhs")
    row = torch.stack([real(4, flat.width), flat.vector(rhs)])[1]
    assert_same(flat.tree(row), rhs, rtol=0)


def test_leaves_of_several_precisions_meet_in_the_widest():
    mixed = {"a": real(1, 2).float(), "b": real(2, 2), "c": cplx(3, 2).to(torch.complex64)}
    flat = Flat(mixed, "mixed")
    assert flat.dtype == F64
    assert_same(flat.tree(flat.vector(mixed)), mixed, rtol=0)
    assert Flat(real(1, 2).bfloat16(), "half").dtype == torch.float32


# Every solver


@every
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_a_real_system_is_solved(solver, n):
    A, b = positive(1, n), real(2, n)
    found = solver.solve(operator(A), b)
    torch.testing.assert_close(found.solution, truth(A, b, solver), rtol=1e-9, atol=1e-11)
    assert found.converged
    assert found.residual <= 1e-9


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_system_of_trees_is_solved(solver, dtype):
    rhs = a_tree(3, dtype)
    flat = Flat(rhs, "rhs")
    A = positive(4, flat.width)
    found = solver.solve(operator(A, rhs), rhs)
    assert_same(found.solution, flat.tree(truth(A, flat.vector(rhs), solver)), rtol=1e-9)


@every
def test_a_real_linear_map_of_complex_vectors_is_solved(solver):
    # A Hessian of a real function of complex variables: z -> P z + Q conj(z), P Hermitian, Q
    # symmetric. A complex dot product would not make it symmetric.
    P, Q = cplx(1, 4, 4), cplx(2, 4, 4)
    P, Q = torch.eye(4) + 0.05 * (P + P.mH), 0.05 * (Q + Q.T)
    b = cplx(3, 4)

    def apply(z):
        return P @ z + Q @ z.conj()

    # On (Re z, Im z), as numpy would solve it.
    p, q = P.numpy(), Q.numpy()
    A = np.block([[(p + q).real, (q - p).imag], [(p + q).imag, (p - q).real]])
    x = np.linalg.solve(
        A + damping_of(solver) * np.eye(8), np.concatenate([b.real.numpy(), b.imag.numpy()])
    )
    found = solver.solve(Operator(apply, symmetric=True), b)
    assert_same(found.solution, torch.from_numpy(x[:4] + 1j * x[4:]), rtol=1e-9)


@every
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_dimension_is_solved_at_once(solver, shape):
    a, b = 2.5 - damping_of(solver), torch.full(shape, 5.0, dtype=F64)
    solver = dataclasses.replace(solver, **({"step": 0.4} if hasattr(solver, "step") else {}))
    found = solver.solve(Operator(lambda v: a * v, lambda v: a * v, symmetric=True), b)
    torch.testing.assert_close(found.solution, b / 2.5, rtol=1e-12, atol=0)
    assert found.steps == 1
    assert found.converged


@every
def test_a_zero_right_hand_side_gives_zero_without_a_product(solver):
    rhs = tree.zeros_like(a_tree(1))
    found = solver.solve(operator(positive(1, 17), rhs), rhs, start=a_tree(2))
    assert_same(found.solution, rhs, rtol=0)
    assert (found.residual, found.steps, found.products) == (0, 0, 0)
    assert found.converged


@every
def test_a_space_without_variables_has_one_vector(solver):
    found = solver.solve(Operator(lambda v: v, symmetric=True), {"n": None})
    assert found.solution == {"n": None}
    assert found.converged


@every
def test_the_start_is_used_and_neither_it_nor_the_right_hand_side_is_written_to(solver):
    A, b, start = positive(1, 6), real(2, 6), real(3, 6)
    kept = b.clone(), start.clone()
    found = solver.solve(operator(A), b, start)
    torch.testing.assert_close(found.solution, truth(A, b, solver), rtol=1e-9, atol=1e-11)
    assert_same((b, start), kept, rtol=0)
    cold = solver.solve(operator(A), b)
    warm = solver.solve(operator(A), b, cold.solution)
    assert warm.steps <= 1
    if isinstance(solver, CG | GMRES | Neumann):
        assert warm.products == 1 + warm.steps


@every
@pytest.mark.parametrize("exponent", [-900, 100, 900])
def test_huge_and_tiny_right_hand_sides_lose_no_digit(solver, exponent):
    A, b, size = positive(1, 5), real(2, 5), 2.0**exponent
    found, plain = solver.solve(operator(A), size * b), solver.solve(operator(A), b)
    assert torch.equal(found.solution / size, plain.solution)
    assert (found.steps, found.residual) == (plain.steps, plain.residual)


@every
def test_no_graph_is_left_and_the_leaves_own_their_memory(solver):
    rhs = tree.map_leaves(lambda x: x if x is None else x.requires_grad_(), a_tree(1))
    A = positive(1, 17).requires_grad_()
    flat = Flat(rhs, "rhs")

    def apply(v):
        with torch.enable_grad():
            return flat.tree(A @ flat.vector(v))

    found = solver.solve(Operator(apply, apply, symmetric=True), rhs, rhs)
    leaves = [x for x in tree.leaves_of(found.solution) if x is not None]
    assert not any(x.requires_grad for x in leaves)
    assert not any(x._is_view() for x in leaves)
    assert len({x.untyped_storage().data_ptr() for x in leaves if x.numel()}) == 3
    assert torch.is_grad_enabled()


@every
def test_an_operator_that_returns_its_argument_is_solved(solver):
    b = real(1, 4)
    solver = dataclasses.replace(solver, **({"step": 1.0} if hasattr(solver, "step") else {}))
    found = solver.solve(Operator(lambda v: v, symmetric=True), b)
    torch.testing.assert_close(found.solution, b / (1 + damping_of(solver)))


@every
def test_an_operator_that_writes_every_product_to_one_buffer_is_solved(solver):
    A, b, buffer = positive(1, 6), real(2, 6), torch.empty(6, dtype=F64)

    def apply(v):
        return torch.mv(A, v, out=buffer)

    found = solver.solve(Operator(apply, apply, symmetric=True), b)
    torch.testing.assert_close(found.solution, truth(A, b, solver), rtol=1e-9, atol=1e-11)


@every
def test_none_in_a_product_counts_as_zero(solver):
    # What a gradient gives where the function does not depend on a leaf.
    operator = Operator(lambda v: {"a": 2 * v["a"], "b": None}, symmetric=True)
    rhs = {"a": real(1, 2), "b": torch.zeros(2, dtype=F64)}
    found = solver.solve(operator, rhs)
    exact = {"a": rhs["a"] / (2 + damping_of(solver)), "b": rhs["b"]}
    assert_same(found.solution, exact, rtol=1e-9)


@every
def test_integers_in_a_product_are_left_out(solver):
    operator = Operator(lambda v: {"a": 2 * v["a"], "n": torch.tensor(3)}, symmetric=True)
    found = solver.solve(operator, {"a": real(1, 2), "n": None})
    assert found.solution["n"] is None


@every
@pytest.mark.parametrize(("product", "value"), [(1, math.inf), (3, math.nan)])
def test_what_is_not_finite_in_the_operator_is_reported_with_its_step(solver, value, product):
    A, count = positive(1, 6), 0

    def apply(v):
        nonlocal count
        count += 1
        return A @ v if count < product else torch.full_like(v, value)

    # NormalCG makes a product before its first step, then two a step.
    step = {1: 0, 3: 1}[product] if isinstance(solver, NormalCG) else product
    with pytest.raises(DivergenceError, match=rf"met (nan|-?inf) at step {step}.*not finite"):
        solver.solve(Operator(apply, symmetric=True), real(2, 6))


# The arguments are laid out and looked at before any solver sees them.
@pytest.mark.parametrize("solver", [CG(), Dense()], ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_among_the_arguments_is_refused(solver, value):
    b, bad = real(1, 3), torch.tensor([0.0, value, 0.0], dtype=F64)
    with pytest.raises(DivergenceError, match="rhs is not finite: look at"):
        solver.solve(operator(positive(1, 3)), bad)
    with pytest.raises(DivergenceError, match="start is not finite: pass None"):
        solver.solve(operator(positive(1, 3)), b, bad)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_single_precision_is_solved_to_its_own_rounding(solver, dtype):
    b = cplx(1, 4).to(dtype) if dtype.is_complex else real(1, 8).float()
    A = positive(2, 8)
    flat = Flat(b, "b")
    # Nystrom cannot do better than eps |A| / damping.
    changes = {"damping": 1.0} if isinstance(solver, Nystrom) else {}
    solver = dataclasses.replace(solver, rtol=1e-5, **changes)
    found = solver.solve(operator(A.float(), b, symmetric=True), b)
    exact = truth(A, flat.vector(b).double(), solver)
    assert found.converged
    assert found.solution.dtype == dtype
    torch.testing.assert_close(flat.vector(found.solution).double(), exact, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("solver", [CG(), NormalCG(), GMRES(), Dense()], ids=repr)
def test_a_tolerance_below_rounding_counts_as_reached_there(solver):
    b = real(1, 8).float()
    A = positive(2, 8).float()
    found = solver.solve(operator(A, symmetric=True), b)
    assert found.converged
    assert 1e-8 < found.residual < 3e-6
    assert float((A @ found.solution - b).norm() / b.norm()) < 3e-6


@quick
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 12),
    condition=st.floats(1, 100),
    which=st.integers(0, len(EVERY) - 1),
)
def test_the_residual_reported_is_that_of_the_solution(seed, n, condition, which):
    solver = EVERY[which]
    A, b = positive(seed, n, condition), real(seed + 1, n)
    found = solver.solve(operator(A), b)
    x = found.solution
    true = float((b - A @ x - damping_of(solver) * x).norm() / b.norm())
    assert true == pytest.approx(found.residual, rel=1e-3, abs=1e-14 * condition)
    if found.converged:
        torch.testing.assert_close(x, truth(A, b, solver), rtol=1e-6, atol=1e-6)


@general
@quick
@given(seed=st.integers(0, 2**16), n=st.integers(1, 12))
def test_systems_without_symmetry_are_solved(solver, seed, n):
    A = 2 * torch.eye(n, dtype=F64) + 0.8 * real(seed, n, n) / n
    b = real(seed + 1, n)
    found = solver.solve(operator(A, symmetric=False), b)
    assert found.converged
    torch.testing.assert_close(found.solution, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)


@damped
def test_a_damping_solves_the_damped_system_exactly(solver):
    A, b = positive(1, 8), real(2, 8)
    found = dataclasses.replace(solver, damping=3.0).solve(operator(A), b)
    exact = torch.linalg.solve(A + 3 * torch.eye(8, dtype=F64), b)
    torch.testing.assert_close(found.solution, exact, rtol=1e-9, atol=1e-12)
    least = 3 + float(torch.linalg.eigvalsh(A)[0])
    assert found.ritz is None or found.ritz == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("solver", [CG, NormalCG, GMRES, Dense])
def test_the_damping_is_zero_by_default(solver):
    assert solver().damping == 0


# Conjugate gradients


# Rounding is magnified from iterate to iterate, faster the larger the condition number is.
@pytest.mark.parametrize(("condition", "steps"), [(2, 15), (10, 15), (1e4, 5)])
@pytest.mark.parametrize("warm", [False, True])
def test_cg_agrees_with_scipy_iterate_for_iterate(condition, steps, warm):
    A, b = positive(1, 15, condition), real(2, 15)
    start = real(3, 15) if warm else None
    iterates = []
    sla.cg(
        A.numpy(), b.numpy(), x0=start.numpy() if warm else None, rtol=0, atol=0, maxiter=steps,
        callback=lambda x: iterates.append(torch.from_numpy(x.copy())),
    )  # fmt: skip
    assert len(iterates) == steps
    for k, x in enumerate(iterates, 1):
        found = CG(rtol=0, max_steps=k).solve(operator(A), b, start)
        assert (found.steps, found.products) == (k, k + warm)
        assert float((found.solution - x).norm() / x.norm()) < 1e-12


def test_cg_stops_where_scipy_stops():
    A, b = positive(1, 30, 20), real(2, 30)
    count = []
    sla.cg(A.numpy(), b.numpy(), rtol=1e-6, atol=0, callback=count.append)
    assert CG(rtol=1e-6).solve(operator(A), b).steps == len(count)


def test_cg_returns_its_last_iterate():
    # At d = 2 a peer returned the iterate before, 5e-3 off.
    A, b = positive(1, 2), real(2, 2)
    found = CG(rtol=1e-12).solve(operator(A), b)
    assert found.steps == 2
    torch.testing.assert_close(found.solution, torch.linalg.solve(A, b), rtol=1e-13, atol=0)


@pytest.mark.parametrize("solver", [CG(0, 3000), NormalCG(0, 3000)], ids=repr)
@pytest.mark.parametrize("condition", [1, 10, 1e6])
def test_over_iterating_stays_finite_and_exact(solver, condition):
    A, b = positive(1, 10, condition), real(2, 10)
    found = solver.solve(operator(A), b)
    assert found.steps < 3000 or condition > 10
    error = (found.solution - torch.linalg.solve(A, b)).norm() / found.solution.norm()
    assert float(error) < 1e-14 * condition ** (1 if isinstance(solver, CG) else 2)


def test_cg_stops_at_the_rounding_level():
    A, b = positive(1, 10, 100), real(2, 10)
    found = CG(rtol=0, max_steps=1000).solve(operator(A), b)
    assert found.steps < 40
    assert found.converged
    true = float((A @ found.solution - b).norm() / b.norm())
    assert 1e-17 < found.residual < 1e-14
    assert true < 3 * found.residual


def test_the_residual_says_what_rounding_allows_where_the_recursion_would_promise_more():
    # The recursion falls below any tolerance; the true residual stays near eps |A| |x| / |b|.
    A = matrix(1, torch.logspace(-10, 0, 12, dtype=F64))
    b = A @ real(2, 12)
    b = torch.linalg.eigh(A)[1][:, 0] + 1e-3 * b
    found = CG(rtol=1e-12, max_steps=2000).solve(operator(A), b)
    true = float((A @ found.solution - b).norm() / b.norm())
    assert true > 1e-9
    assert found.residual > true / 10


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_cg_solves_a_singular_system_that_has_a_solution(rank):
    A = matrix(1, [0.0] * (8 - rank) + [1.0 + k for k in range(rank)])
    b = A @ real(2, 8)
    found = CG(rtol=1e-10).solve(operator(A), b)
    assert found.converged
    assert not found.indefinite
    torch.testing.assert_close(found.solution, torch.linalg.pinv(A, rtol=1e-12) @ b)


def test_cg_says_that_a_singular_system_without_a_solution_is_singular():
    A, b = matrix(1, [0.0, 0.0, 1.0, 2.0]), real(2, 4)
    found = CG().solve(operator(A), b)
    assert (found.converged, found.indefinite) == (False, True)
    assert 0 < found.ritz < 1  # of what was met before the flat direction
    assert torch.isfinite(found.solution).all()
    assert "singular or indefinite. Use NormalCG, or a damping" in found.message


@pytest.mark.parametrize("eigenvalues", [[-1.0], [0.0], [-1.0, 1.0, 2.0], [-3.0, -2.0, -1.0]])
def test_cg_says_that_an_indefinite_system_is_indefinite(eigenvalues):
    A, b = matrix(1, eigenvalues), real(2, len(eigenvalues))
    found = CG().solve(operator(A), b)
    assert (found.converged, found.indefinite) == (False, True)
    # A flat direction is no curvature; a negative one is.
    flat = min(eigenvalues) == 0
    assert found.ritz is None if flat else min(eigenvalues) - 1e-12 <= found.ritz < 0
    x = found.solution
    assert found.residual == pytest.approx(float((b - A @ x).norm() / b.norm()))
    assert found.products == found.steps + 1
    # What the message suggests:
    if min(eigenvalues) < 0:
        solved = NormalCG().solve(operator(A), b)
        torch.testing.assert_close(solved.solution, torch.linalg.solve(A, b))
        assert not CG(damping=3.5).solve(operator(A), b).indefinite


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_cg_gives_the_smallest_ritz_value_of_lanczos(n):
    A, b = positive(1, n, 50), real(2, n)
    for k in range(1, n + 1):
        found = CG(rtol=0, max_steps=k).solve(operator(A), b)
        basis = torch.linalg.qr(torch.stack([A.matrix_power(j) @ b for j in range(k)], 1))[0]
        ritz = float(torch.linalg.eigvalsh(basis.T @ A @ basis)[0])
        # The power basis loses half the digits.
        assert found.ritz == pytest.approx(ritz, rel=1e-3)
    assert found.ritz == pytest.approx(float(torch.linalg.eigvalsh(A)[0]), rel=1e-10)


def test_there_is_no_ritz_value_without_a_step():
    A, b = positive(1, 4), real(2, 4)
    found = CG().solve(operator(A), b, torch.linalg.solve(A, b))
    assert (found.steps, found.products, found.ritz, found.converged) == (0, 1, None, True)


@quick
@given(
    n=st.integers(1, 40), seed=st.integers(0, 2**16), shift=st.floats(-5, 5), size=st.floats(-9, 9)
)
def test_the_smallest_eigenvalue_of_a_tridiagonal_matrix_is_that_of_numpy(n, seed, shift, size):
    rng = np.random.default_rng(seed)
    a, b = 10**size * (rng.normal(size=n) + shift), 10**size * rng.normal(size=n - 1)
    T = np.diag(a) + np.diag(b, 1) + np.diag(b, -1)
    found = smallest_eigenvalue(a.tolist(), (b**2).tolist())
    values = np.linalg.eigvalsh(T)
    assert found == pytest.approx(values[0], abs=1e-13 * np.abs(values).max())


@pytest.mark.parametrize("diagonal", [[2.0] * 5, [0.0] * 3, [-1.0, 1.0, -1.0]])
def test_the_smallest_eigenvalue_of_a_diagonal_matrix_is_its_smallest_entry(diagonal):
    assert smallest_eigenvalue(diagonal, [0.0] * (len(diagonal) - 1)) == min(diagonal)


# GMRES, normal equations, Neumann series


@pytest.mark.parametrize("restart", [3, 5, 50])
@pytest.mark.parametrize("warm", [False, True])
def test_gmres_agrees_with_scipy_after_every_cycle(restart, warm):
    n = 12
    A = 2 * torch.eye(n, dtype=F64) + 2 * real(1, n, n) / math.sqrt(n)
    b, start = real(2, n), real(3, n) if warm else None
    x0 = start.numpy() if warm else None
    for cycles in (1, 2, 3):
        x, _ = sla.gmres(A.numpy(), b.numpy(), x0, restart=restart, maxiter=cycles, rtol=1e-10)
        solver = GMRES(restart, rtol=1e-10, max_steps=cycles * min(restart, n))
        found = solver.solve(operator(A), b, start)
        torch.testing.assert_close(found.solution, torch.from_numpy(x), rtol=1e-8, atol=1e-9)
        restarts = math.ceil(found.steps / restart) - 1
        assert found.products == found.steps + restarts + warm


def test_gmres_needs_no_more_steps_than_dimensions():
    A, b = real(1, 9, 9), real(2, 9)
    found = GMRES(rtol=1e-12).solve(operator(A), b)
    assert found.steps == 9
    torch.testing.assert_close(found.solution, torch.linalg.solve(A, b))


def test_gmres_and_minres_agree_on_an_indefinite_system():
    A, b = matrix(1, [-3.0, -2.0, -0.5, 1.0, 2.0, 4.0]), real(2, 6)
    x, _ = sla.minres(A.numpy(), b.numpy(), rtol=1e-14)
    found = GMRES(rtol=1e-12).solve(operator(A), b)
    torch.testing.assert_close(found.solution, torch.from_numpy(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", [GMRES(), NormalCG(), Dense()], ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
def test_singular_systems_are_solved_if_they_can_be(solver, symmetric):
    A = matrix(1, [0.0, 0.0, 1.0, 2.0, 3.0])
    b = A @ real(2, 5)
    found = solver.solve(operator(A, symmetric=symmetric), b)
    assert found.converged
    torch.testing.assert_close(found.solution, torch.linalg.pinv(A, rtol=1e-12) @ b)
    null = torch.linalg.eigh(A)[1][:, :2] @ real(3, 2)
    nearest = solver.solve(operator(A, symmetric=symmetric), b, null)
    torch.testing.assert_close(nearest.solution, found.solution + null)


@pytest.mark.parametrize("solver", [GMRES(), NormalCG(), Dense()], ids=repr)
@pytest.mark.parametrize("symmetric", [True, False])
def test_singular_systems_without_a_solution_have_not_converged(solver, symmetric):
    A, b = matrix(1, [0.0, 0.0, 1.0, 2.0, 3.0]), real(2, 5)
    found = solver.solve(operator(A, symmetric=symmetric), b)
    assert not found.converged
    x = torch.linalg.pinv(A, rtol=1e-12) @ b
    assert found.residual == pytest.approx(float((b - A @ x).norm() / b.norm()), rel=1e-6)
    assert found.steps < 50
    if not isinstance(solver, GMRES):
        torch.testing.assert_close(found.solution, x)


@pytest.mark.parametrize("solver", [GMRES(), NormalCG(), Dense()], ids=repr)
def test_the_zero_operator_solves_nothing(solver):
    found = solver.solve(Operator(torch.zeros_like, symmetric=True), real(1, 3))
    assert not found.converged
    assert found.residual == 1
    assert torch.equal(found.solution, torch.zeros(3, dtype=F64))


def test_gmres_stagnates_honestly():
    shift = Operator(lambda v: v.roll(1))
    b = torch.tensor([1.0, 0, 0, 0], dtype=F64)
    found = GMRES(restart=3).solve(shift, b)
    assert (found.converged, found.residual, found.steps) == (False, 1, 40)
    assert GMRES(restart=4).solve(shift, b).converged


def test_normal_cg_agrees_with_cg_on_the_normal_equations():
    A, b = real(1, 8, 8) + 4 * torch.eye(8, dtype=F64), real(2, 8)
    for k in range(1, 6):
        found = NormalCG(rtol=0, max_steps=k).solve(operator(A), b)
        normal = CG(rtol=0, max_steps=k).solve(operator(A.T @ A, symmetric=True), A.T @ b)
        torch.testing.assert_close(found.solution, normal.solution, rtol=1e-10, atol=1e-12)
        assert (found.steps, found.products) == (k, 2 * k + 1)
    x = sla.lsqr(A.numpy(), b.numpy(), iter_lim=5, atol=0, btol=0)[0]
    torch.testing.assert_close(found.solution, torch.from_numpy(x), rtol=1e-9, atol=1e-11)


def test_normal_cg_uses_the_adjoint_it_is_given():
    A = 3 * torch.eye(3, dtype=F64) + real(1, 3, 3)
    wrong = Operator(lambda v: A @ v, adjoint=lambda v: A @ v)
    good = NormalCG(max_steps=30).solve(operator(A, symmetric=False), real(2, 3))
    assert good.converged
    assert not NormalCG(max_steps=30).solve(wrong, real(2, 3)).converged


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_adds_its_terms(terms):
    A, b, start = real(1, 4, 4) / 4 + torch.eye(4, dtype=F64), real(2, 4), real(3, 4)
    M = torch.eye(4, dtype=F64) - 0.5 * A
    inverse = 0.5 * sum(M.matrix_power(k) for k in range(terms))
    solver = Neumann(terms, step=0.5, rtol=0)
    cold, warm = (solver.solve(operator(A), b, x) for x in (None, start))
    torch.testing.assert_close(cold.solution, inverse @ b)
    torch.testing.assert_close(warm.solution, start + inverse @ (b - A @ start))
    assert (cold.steps, cold.products) == (terms, terms)
    assert (warm.steps, warm.products) == (terms, terms + 1)


def test_a_neumann_series_that_diverges_is_reported():
    b = real(1, 2)
    found = Neumann(20).solve(Operator(lambda v: 4 * v), b)
    assert not found.converged
    assert found.residual == pytest.approx(3.0**20)
    with pytest.raises(DivergenceError, match=r"met inf at step \d+.*grew without bound"):
        Neumann(1000).solve(Operator(lambda v: 4 * v), b)


# Nystrom and dense


@pytest.mark.parametrize("rank", [3, 5, 40])
@pytest.mark.parametrize("warm", [False, True])
def test_nystrom_is_exact_once_its_rank_reaches_that_of_the_operator(rank, warm):
    A, b = matrix(1, [0.0] * 9 + [1.0, 5.0, 30.0]), real(2, 12)
    solver = Nystrom(rank, damping=0.1)
    found = solver.solve(operator(A), b, real(3, 12) if warm else None)
    assert found.converged
    assert found.products == min(rank, 12) + 1 + warm
    torch.testing.assert_close(found.solution, truth(A, b, solver), rtol=1e-8, atol=1e-8)


def test_nystrom_is_the_inverse_of_its_approximation():
    A, b, mu = positive(1, 6, 100), real(2, 6), 0.3
    draw = torch.randn(6, 2, generator=torch.Generator().manual_seed(7), dtype=F64)
    Y = A @ draw
    low = Y @ torch.linalg.inv(draw.T @ Y) @ Y.T
    found = Nystrom(2, mu, seed=7).solve(operator(A), b)
    torch.testing.assert_close(
        found.solution, torch.linalg.solve(low + mu * torch.eye(6, dtype=F64), b)
    )
    residual = b - A @ found.solution - mu * found.solution
    assert found.residual == pytest.approx(float(residual.norm() / b.norm()))
    assert not found.converged
    assert dataclasses.replace(Nystrom(2, mu, 7), rtol=2.0).solve(operator(A), b).converged
    basis = torch.linalg.qr(draw)[0]
    ritz = float(torch.linalg.eigvalsh(basis.T @ A @ basis)[0])
    assert found.ritz == pytest.approx(ritz + mu)


def test_nystrom_sees_negative_curvature():
    A, b = matrix(1, [-2.0, -1.0, 1.0, 2.0]), real(2, 4)
    assert Nystrom(4, 0.5).solve(operator(A), b).indefinite
    above = Nystrom(4, 2.5).solve(operator(A), b)
    assert (above.indefinite, above.converged) == (False, True)


@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0], [-1.0, 2.0], [0.0, 2.0], [5.0]])
def test_dense_knows_the_eigenvalues_of_a_symmetric_operator(eigenvalues):
    A, b = matrix(1, eigenvalues), real(2, len(eigenvalues))
    found = Dense().solve(operator(A), b)
    assert found.ritz == pytest.approx(min(eigenvalues), abs=1e-14)
    assert found.indefinite == (min(eigenvalues) <= 0)
    assert found.products == len(b)
    assert Dense().solve(operator(A), b, b).products == len(b) + 1
    assert Dense().solve(operator(A, symmetric=False), b).ritz is None


# Settings and errors


SETTINGS = [
    (CG(), {"rtol": 1e-2}),
    (CG(), {"max_steps": 2}),
    (CG(), {"damping": 1.0}),
    (NormalCG(), {"rtol": 0.1}),
    (NormalCG(), {"max_steps": 2}),
    (NormalCG(), {"damping": 1.0}),
    (GMRES(), {"rtol": 1e-2}),
    (GMRES(), {"max_steps": 2}),
    (GMRES(), {"damping": 1.0}),
    (GMRES(max_steps=5), {"restart": 2}),
    (Neumann(9), {"terms": 8}),
    (Neumann(9), {"step": 0.5}),
    (Neumann(99, 0.5), {"rtol": 1e-2}),
    (Nystrom(2, 0.1), {"rank": 3}),
    (Nystrom(2, 0.1), {"damping": 0.2}),
    (Nystrom(2, 0.1), {"seed": 1}),
    (Dense(), {"damping": 1.0}),
]


@pytest.mark.parametrize(("solver", "change"), SETTINGS, ids=repr)
def test_each_setting_matters(solver, change):
    A, b = positive(1, 8), real(2, 8)
    plain, other = (
        s.solve(operator(A), b) for s in (solver, dataclasses.replace(solver, **change))
    )
    assert float((plain.solution - other.solution).norm()) > 1e-6


@pytest.mark.parametrize("solver", [Dense(), Nystrom(2, 0.1)], ids=repr)
def test_the_tolerance_of_a_direct_solver_says_what_counts_as_converged(solver):
    A, b = matrix(1, [0.0, 1.0, 2.0, 3.0]), real(2, 4)
    assert not solver.solve(operator(A), b).converged
    assert dataclasses.replace(solver, rtol=5.0).solve(operator(A), b).converged


def test_the_default_limit_of_steps_is_ten_a_dimension_and_a_thousand_at_most():
    A, b = matrix(1, torch.logspace(0, 14, 6, dtype=F64)), real(2, 6)
    assert NormalCG(rtol=0).solve(operator(A), b).steps == 60
    n = 400
    steep = torch.logspace(0, 13, n, dtype=F64)
    diagonal = Operator(lambda v: steep * v, symmetric=True)
    found = CG().solve(diagonal, torch.ones(n, dtype=F64))
    assert (found.steps, found.converged) == (1000, False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CG(rtol=-1), "rtol must be >= 0 and finite, got -1."),
        (lambda: CG(rtol=math.nan), "rtol must be >= 0 and finite, got nan."),
        (lambda: CG(max_steps=0), "max_steps must be a whole number >= 1, or None, got 0."),
        (lambda: CG(damping=-0.1), "damping must be >= 0 and finite, got -0.1."),
        (lambda: NormalCG(rtol=-1), "rtol must be >= 0 and finite, got -1."),
        (
            lambda: NormalCG(max_steps=2.5),
            "max_steps must be a whole number >= 1, or None, got 2.5.",
        ),
        (lambda: NormalCG(damping=math.inf), "damping must be >= 0 and finite, got inf."),
        (lambda: GMRES(restart=0), "restart must be a whole number >= 1, got 0."),
        (lambda: GMRES(rtol=-1), "rtol must be >= 0 and finite, got -1."),
        (lambda: GMRES(max_steps=-1), "max_steps must be a whole number >= 1, or None, got -1."),
        (lambda: GMRES(damping=-1), "damping must be >= 0 and finite, got -1."),
        (lambda: Neumann(0), "terms must be a whole number >= 1, got 0."),
        (lambda: Neumann(1, step=0), "step must be > 0 and finite, got 0."),
        (lambda: Neumann(1, rtol=-1), "rtol must be >= 0 and finite, got -1."),
        (lambda: Nystrom(0, 1.0), "rank must be a whole number >= 1, got 0."),
        (
            lambda: Nystrom(1, 0.0),
            "damping must be > 0 and finite, got 0.",
        ),
        (lambda: Nystrom(1, -1.0), "damping must be > 0 and finite, got -1."),
        (lambda: Nystrom(1, 1.0, rtol=-1), "rtol must be >= 0 and finite, got -1."),
        (lambda: Dense(rtol=-1), "rtol must be >= 0 and finite, got -1."),
        (lambda: Dense(damping=-1), "damping must be >= 0 and finite, got -1."),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize("solver", [CG(), Nystrom(1, 1.0)], ids=repr)
def test_an_operator_not_known_to_be_symmetric_is_refused(solver):
    name = type(solver).__name__
    with pytest.raises(
        ArgumentError, match=f"{name} needs a symmetric operator.*use GMRES, or NormalCG"
    ):
        solver.solve(Operator(lambda v: v), real(1, 2))


def test_normal_cg_without_an_adjoint_is_refused():
    with pytest.raises(ArgumentError, match=r"NormalCG needs the adjoint.*or use GMRES"):
        NormalCG().solve(Operator(lambda v: v), real(1, 2))


def test_dense_refuses_an_operator_that_is_not_symmetric_as_said():
    A = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64)
    with pytest.raises(
        ArgumentError, match=r"must be symmetric, as symmetric=True says.*8\.2e-01.*False"
    ):
        Dense().solve(operator(A, symmetric=True), real(1, 2))


@every
@pytest.mark.parametrize(
    ("rhs", "message"),
    [
        (torch.tensor([1, 2]), r"^rhs must be a floating-point or complex tensor.*torch.int64"),
        ({"a": real(1, 2), "k": 3}, r"^rhs\['k'\] must be .*None where.*got int"),
    ],
)
def test_a_right_hand_side_that_is_no_vector_is_refused(solver, rhs, message):
    with pytest.raises(StructureError, match=message):
        solver.solve(Operator(lambda v: v, symmetric=True), rhs)


@every
def test_a_start_that_is_not_like_the_right_hand_side_is_refused(solver):
    with pytest.raises(
        StructureError,
        match=r"start must match rhs: start must be float64\[2\].*float64\[3\]",
    ):
        solver.solve(operator(positive(1, 2)), real(1, 2), real(1, 3))


# One check, at the first product; the direct solvers make theirs in other ways.
@pytest.mark.parametrize("solver", [CG(), NormalCG(), Dense()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda v: {"a": v["a"][:1], "n": None}, r"product\['a'\] must be float64\[2\]"),
        (lambda v: {"a": v["a"].float(), "n": None}, r"product\['a'\] must be float64.*float32"),
        (lambda v: {"a": v["a"] + 0j, "n": None}, r"product\['a'\] must be float64.*complex128"),
        (lambda v: {**v, "n": real(1)}, r"product\['n'\] must be NoneType, got float64"),
        (lambda v: v["a"], r"product must be .*'a'"),
    ],
)
def test_a_product_outside_the_space_is_refused(solver, apply, message):
    operator = Operator(apply, symmetric=True)
    with pytest.raises(
        StructureError, match=f"operator.apply must return a vector like rhs: {message}"
    ):
        solver.solve(operator, {"a": real(1, 2), "n": None})


def test_an_adjoint_outside_the_space_is_refused_by_name():
    operator = Operator(lambda v: v, adjoint=lambda v: v[:1])
    with pytest.raises(StructureError, match=r"operator.adjoint must return a vector like rhs"):
        NormalCG().solve(operator, real(1, 2))


def test_the_message_says_what_happened():
    A, b = positive(1, 8), real(2, 8)
    assert re.fullmatch(
        r"The linear solve converged: relative residual \d\.\de-\d+, 1 steps, 8 products\.",
        Dense().solve(operator(A), b).message,
    )
    short = CG(max_steps=2).solve(operator(A), b).message
    assert re.match(r"The linear solve did not converge: .* 2 steps, 2 products\. Allow", short)


def test_a_solver_is_a_linear_solver_and_the_base_is_abstract():
    assert all(isinstance(s, LinearSolver) for s in EVERY)
    with pytest.raises(TypeError, match="abstract"):
        LinearSolver()


FAR_FROM_ONE = [1e-36, 1e-25, 1e-20, 1e18, 1e25, 1e30]
SCALED = [CG(rtol=1e-5), CG(rtol=1e-5, probes=4), Dense(rtol=1e-5), GMRES(rtol=1e-5)]
SCALED += [NormalCG(rtol=1e-5)]


@pytest.mark.parametrize("size", FAR_FROM_ONE)
@pytest.mark.parametrize("solver", SCALED, ids=repr)
def test_an_operator_whose_squares_leave_the_range_of_its_dtype_is_scaled(solver, size):
    A, rhs = (positive(5, 8) * size).float(), torch.arange(1.0, 9.0)
    product = lambda v: {"x": A @ v["x"], "n": None}  # noqa: E731
    symmetric = Operator(product, adjoint=product, symmetric=True)
    start = {"x": torch.ones(8) / size, "n": None}
    wanted = torch.linalg.solve(A.double(), rhs.double())
    for begun in (None, start):
        found = solver.solve(symmetric, {"x": rhs, "n": None}, begun)
        assert found.converged
        error = (found.solution["x"].double() - wanted).norm()
        assert error <= 1e-4 * wanted.norm()
        if found.ritz is not None and not isinstance(solver, NormalCG):
            least = float(torch.linalg.eigvalsh(A.double() / size)[0]) * size
            assert found.ritz == pytest.approx(least, rel=1e-2)


def test_a_neumann_series_is_of_the_operator_as_it_is():
    found = Neumann(5).solve(Operator(lambda v: 1e-30 * v, symmetric=True), torch.ones(3))
    torch.testing.assert_close(found.solution, torch.full((3,), 5.0))
