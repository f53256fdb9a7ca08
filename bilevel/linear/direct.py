"""Solvers that do not iterate: a Nystrom sketch, the full matrix."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_range, check_whole
from bilevel.errors import ArgumentError
from bilevel.linear.operator import (
    LinearResult,
    LinearSolver,
    Operator,
    refuse_asymmetric,
)
from bilevel.linear.system import System, solve_flat
from bilevel.tree import Tree


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
        check_whole(self.rank, "rank", 1)
        check_range(self.damping, "damping", above=0)  # a matrix of low rank has no inverse
        check_range(self.rtol, "rtol", least=0)

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `rank + 1` products, one more with a `start`, which is corrected."""
        refuse_asymmetric(operator, "Nystrom")
        return solve_flat(self._correct, operator, rhs, start, self.damping, scales=False)

    def _correct(self, system: System) -> LinearResult:
        n, eps = system.flat.width, system.eps
        x, r, _ = system.begin()
        # On the CPU: the same numbers on every device.
        generator = torch.Generator().manual_seed(self.seed)
        shape = n, min(self.rank, n)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        Q = torch.linalg.qr(drawn)[0].to(r)
        # Nystrom: A ~ Y core^+ Y^T with Y = A Q, core = Q^T A Q. Written with core = V S V^T and
        # Y V = basis R it is U diag(found) U^T, and (that + damping)^-1 is known on the span of U
        # and beside it. Eigenvalues of the core at rounding are left out.
        Y = _image(system, Q) - self.damping * Q
        core = Q.T @ Y
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        size = values.abs().amax(1)
        kept = values.abs() > 10 * eps * math.sqrt(n) * size[:, None]
        basis, R = torch.linalg.qr((Y @ vectors) * kept[:, None])
        found, turn = torch.linalg.eigh((R / torch.where(kept, values, 1)[:, None]) @ R.mT)
        U = basis @ turn
        r = r.view(-1, n, 1)
        part = U.mT @ r
        beyond = (r - U @ part) / self.damping
        x.add_((beyond + U @ (part / (found + self.damping)[..., None])).view_as(x))
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
        check_range(self.rtol, "rtol", least=0)
        check_range(self.damping, "damping", least=0)

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
        values, V = torch.linalg.eigh((A + A.mT) / 2)  # x += V (V^T r / values)
        x.add_((V @ _divided(V.mT @ _upright(r, A), values)).view_as(x))
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
        U, values, Vh = torch.linalg.svd(A)  # x += V (U^T r / values)
        x.add_((Vh.mT @ _divided(U.mT @ _upright(r, A), values)).view_as(x))
        return self._result(system, x, A)

    def _result(self, system: System, x: Tensor, A: Tensor, **more: Any) -> LinearResult:
        r = system.rhs - (A @ _upright(x, A)).view_as(x)
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
        product = system.apply(v.expand(system.flat.shape).clone())
        system.norms(product, k)
        found.append(product.clone().view(-1, len(v)))
    return torch.stack(found, -1)


def _upright(v: Tensor, A: Tensor) -> Tensor:
    """A flat vector as what the matrices `A` are multiplied with."""
    return v.reshape(len(A), -1, 1)


def _matrices(system: System) -> Tensor:
    """The matrix of each column of the system."""
    return _image(
        system, torch.eye(system.flat.width, dtype=system.flat.dtype, device=system.flat.device)
    )


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
    factor = 4 * math.sqrt(system.flat.width)
    return [factor * floor for floor in system.floors(sizes, x)]
