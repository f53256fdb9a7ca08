"""Solvers that are not Krylov methods: the Neumann series, a Nystrom sketch, the full matrix."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from bilevel.columns import neumann_series
from bilevel.errors import ArgumentError
from bilevel.linear import LinearResult, LinearSolver, Operator
from bilevel.system import (
    System,
    check_settings,
    dot,
    finite,
    refuse_asymmetric,
    solve_flat,
)
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The series `x = step sum_{k < terms} (I - step A)^k b`, for any operator.

    It converges where the spectral radius of `I - step A` is below 1. On `A = (I - dPhi)^*` it is
    the multiplier sweep frozen at the last iterate.

    Attributes:
        terms: most terms to add up, one product each; the last serves the residual alone.
        step: factor `step` of the series.
        rtol: stop at `|b - A x| <= rtol |b|`; 0 adds all terms.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> found = Neumann(terms=3, step=0.5).solve(Operator(lambda v: v), torch.tensor(1.0))
        >>> found.solution, found.residual
        (tensor(0.8750), 0.125)
    """

    terms: int
    step: float = 1.0
    rtol: float = 1e-8

    def __post_init__(self) -> None:
        """Check the fields."""
        check_settings(rtol=self.rtol, positive={"terms": self.terms})
        if not (self.step > 0 and math.isfinite(self.step)):
            raise ArgumentError(f"step must be finite and > 0, got {self.step}.")

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `steps` products, one more with a `start`."""
        iterate = self._iterate_columns if operator.columns else self._iterate
        return solve_flat(iterate, operator, rhs, start)

    def _iterate(self, system: System) -> LinearResult:
        x, r, (norm,) = system.begin()
        target, size, steps = self.rtol * system.rhs_norms[0], 0.0, 0
        while norm > target and steps < self.terms:
            steps += 1
            x.add_(r, alpha=self.step)
            Ar = system.apply(r)
            size = max(size, math.sqrt(finite(dot(Ar, Ar), steps)) / norm)
            r = torch.sub(r, Ar, alpha=self.step)
            norm = math.sqrt(finite(dot(r, r), steps))
        floor = system.unit * (system.rhs_norms[0] + size * math.sqrt(dot(x, x)))
        return system.result(x, [max(norm, floor)], [steps], rtol=self.rtol, floors=[floor])

    def _iterate_columns(self, system: System) -> LinearResult:
        return neumann_series(system, self.rtol, self.terms, self.step)


@final
@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """The inverse of `damping I` plus a random low-rank approximation, for symmetric operators.

    With `Q` an orthonormal random basis, `A ~ (A Q) (Q^T A Q)^+ (A Q)^T` (Hataya & Yamada 2023,
    AISTATS; Gaussian `Q` as in Frangella, Tropp & Udell 2023, doi:10.1137/21M1466244). Exact for
    `(A + damping I) x = b` where `rank` reaches the rank of `A`; the residual tells elsewhere.

    Attributes:
        rank: dimension of `Q`, one product each.
        damping: > 0.
        seed: of `Q`.
        rtol: what counts as converged.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> direction = torch.tensor([3.0, 4.0])
        >>> operator = Operator(lambda v: direction * (direction @ v), symmetric=True)
        >>> found = Nystrom(rank=1, damping=1.0, rtol=1e-5).solve(operator, direction)
        >>> found.solution * 26, found.products, found.converged
        (tensor([3.0000, 4.0000]), 2, True)
    """

    rank: int
    damping: float
    seed: int = 0
    rtol: float = 1e-8

    def __post_init__(self) -> None:
        """Check the fields."""
        check_settings(rtol=self.rtol, damping=self.damping, positive={"rank": self.rank})
        if self.damping == 0:
            raise ArgumentError("damping must be > 0: a matrix of low rank has no inverse.")

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `rank + 1` products, one more with a `start`, which is corrected."""
        refuse_asymmetric(operator, "Nystrom")
        return solve_flat(self._correct, operator, rhs, start, self.damping)

    def _correct(self, system: System) -> LinearResult:
        n, eps = system.flat.width, system.eps
        x, r, _ = system.begin()
        # On the CPU: the same numbers on every device.
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(n, min(self.rank, n), generator=generator, dtype=torch.float64)
        Q = torch.linalg.qr(drawn)[0].to(r)
        Y = _image(system, Q) - self.damping * Q
        core = Q.T @ Y
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        size = values.abs().amax(1)
        kept = values.abs() > 10 * eps * math.sqrt(n) * size[:, None]
        basis, R = torch.linalg.qr((Y @ vectors) * kept[:, None])
        found, turn = torch.linalg.eigh((R / torch.where(kept, values, 1)[:, None]) @ R.mT)
        U = basis @ turn
        r = system.rows(r)[..., None]
        part = U.mT @ r
        x.add_(
            ((r - U @ part) / self.damping + U @ (part / (found + self.damping)[..., None])).view(
                -1
            )
        )
        r = system.rhs - system.apply(x)
        ritz = (values[:, 0] + self.damping).tolist()
        return system.result(
            x,
            system.norms(r, 1),
            [int(size > 0) for size in system.rhs_norms],
            rtol=self.rtol,
            floors=_floors(system, (size + self.damping).tolist(), x),
            indefinite=[value <= 0 for value in ritz],
            find_ritz=partial(min, ritz),
        )


@final
@dataclass(frozen=True)
class Dense(LinearSolver):
    """Form the matrix and decompose it: a product a real dimension, memory quadratic in it.

    For small problems, and as the reference of the others. A symmetric operator is decomposed by
    eigenvalues, any other by singular values; of a singular system it finds the least squares
    solution, nearest to `start`.

    Attributes:
        rtol: what counts as converged.
        damping: solve `(A + damping I) x = b` instead.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> saddle = Operator(lambda v: {"x": 2 * v["x"], "y": -v["y"]}, symmetric=True)
        >>> rhs = {"x": torch.tensor(2.0), "y": torch.tensor(3.0)}
        >>> found = Dense().solve(saddle, rhs)
        >>> found.solution, found.ritz, found.indefinite
        ({'x': tensor(1.), 'y': tensor(-3.)}, -1.0, True)
    """

    rtol: float = 1e-8
    damping: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_settings(rtol=self.rtol, damping=self.damping)

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; a product a real dimension, one more with a `start`."""
        method = self._symmetric if operator.symmetric else self._general
        return solve_flat(method, operator, rhs, start, self.damping)

    def _symmetric(self, system: System) -> LinearResult:
        x, r, _ = system.begin()
        A = _matrices(system)
        eps, sizes = system.eps, _sizes(A)
        for size, gap in zip(sizes, _sizes(A - A.mT), strict=True):
            if gap > math.sqrt(eps) * size:
                raise ArgumentError(
                    "the operator must be symmetric, as symmetric=True says, got a matrix with "
                    f"|A - A^T| / |A| = {gap / size:.1e}; correct the product, or pass "
                    "symmetric=False."
                )
        values, V = torch.linalg.eigh((A + A.mT) / 2)
        x.add_((V @ _divided(V.mT @ system.rows(r)[..., None], values)).view(-1))
        smallest = values[:, 0].tolist()
        return self._result(
            system,
            x,
            A,
            indefinite=[value <= eps * size for value, size in zip(smallest, sizes, strict=True)],
            find_ritz=partial(min, smallest),
        )

    def _general(self, system: System) -> LinearResult:
        x, r, _ = system.begin()
        A = _matrices(system)
        U, values, Vh = torch.linalg.svd(A)
        x.add_((Vh.mT @ _divided(U.mT @ system.rows(r)[..., None], values)).view(-1))
        return self._result(system, x, A)

    def _result(self, system: System, x: Tensor, A: Tensor, **more: Any) -> LinearResult:
        r = system.rhs - (A @ system.rows(x)[..., None]).view(-1)
        return system.result(
            x,
            system.norms(r, 1),
            [int(size > 0) for size in system.rhs_norms],
            rtol=self.rtol,
            floors=_floors(system, _sizes(A), x),
            **more,
        )


def _image(system: System, Q: Tensor) -> Tensor:
    """The products with the columns of `Q`, for each column of the system a matrix."""
    found = []
    for k, v in enumerate(Q.T, 1):
        product = system.apply(v.repeat(system.columns or 1))
        system.norms(product, k)
        found.append(system.rows(product).clone())
    return torch.stack(found, -1)


def _matrices(system: System) -> Tensor:
    """The matrix of each column of the system."""
    return _image(system, torch.eye(system.flat.width).to(system.rhs))


def _sizes(A: Tensor) -> list[float]:
    """Norm of each matrix."""
    return torch.linalg.matrix_norm(A).tolist()


def _divided(a: Tensor, values: Tensor) -> Tensor:
    """`a / values` of each column, zero where the value is zero up to rounding."""
    size = values.abs().amax(1, keepdim=True)
    kept = values.abs() > values.shape[1] * torch.finfo(values.dtype).eps * size
    return torch.where(kept[..., None], a / torch.where(kept, values, 1)[..., None], 0)


def _floors(system: System, sizes: list[float], x: Tensor) -> list[float]:
    """Rounding level of residuals that are computed: sums of n terms, whose roundings add up."""
    unit = 4 * math.sqrt(system.flat.width) * system.unit
    return [
        unit * (norm + size * length)
        for norm, size, length in zip(system.rhs_norms, sizes, system.norms(x, 1), strict=True)
    ]
