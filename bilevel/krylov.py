"""Conjugate gradients, on the system and on its normal equations.

Dot products of flat vectors are Re<a, b>; scalars are Python floats, of one system.
"""

import itertools
import math
from dataclasses import dataclass
from typing import final

import torch

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


def limit_of(max_steps: int | None, system: System) -> int:
    """`max_steps`, or its default: ten steps a real dimension, 1000 at most."""
    return min(10 * system.flat.n, 1000) if max_steps is None else max_steps


@final
@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients, for symmetric positive operators (Hestenes & Stiefel 1952).

    It stops where it meets a direction of non-positive curvature, and says so in the result. A
    singular system is solved if it has a solution.

    Attributes:
        rtol: stop at `|b - A x| <= rtol |b|`; 0 goes on to the rounding level.
        max_steps: None is ten a real dimension, 1000 at most.
        damping: solve `(A + damping I) x = b` instead.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> hessian = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        >>> found = CG().solve(
        ...     Operator(lambda v: hessian @ v, symmetric=True), torch.tensor([5.0, 5.0])
        ... )
        >>> found.solution.round(decimals=5), found.steps, found.converged
        (tensor([1., 2.]), 2, True)
    """

    rtol: float = 1e-8
    max_steps: int | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_settings(rtol=self.rtol, damping=self.damping, positive={"max_steps": self.max_steps})

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `steps` products, one more with a `start`."""
        refuse_asymmetric(operator, "CG")
        return solve_flat(self._iterate, operator, rhs, start, self.damping)

    def _iterate(self, system: System) -> LinearResult:
        x, r, norm = system.begin()
        limit, target = limit_of(self.max_steps, system), self.rtol * system.rhs_norm
        rr = norm * norm
        p, pp, beta = r, rr, 0.0
        # With y = x - start, r is orthogonal to y and to the last p. So the lengths of p and y
        # follow from scalars (Steihaug 1983), and with them what rounding allows.
        yy, yp, size = 0.0, 0.0, 0.0
        pivots: list[float] = []  # of the Lanczos matrix T = L diag(pivots) L^T
        ratios: list[float] = []  # squares of the entries below the diagonal of L
        indefinite = False
        while True:
            norm, floor = math.sqrt(rr), system.floor(size, system.start_norm + math.sqrt(yy))
            if norm <= max(target, floor) or len(pivots) == limit:
                break
            if pivots:
                p = torch.add(r, p, alpha=beta)
                ratios.append(beta)
            Ap = system.apply(p)
            curvature = finite(dot(p, Ap), len(pivots) + 1)
            pivots.append(curvature / rr)
            size = max(size, abs(curvature) / pp)
            indefinite = curvature <= 4 * system.eps * size * pp
            if indefinite:
                break
            alpha = rr / curvature
            x.add_(p, alpha=alpha)
            r = torch.sub(r, Ap, alpha=alpha)
            previous, rr = rr, finite(dot(r, r), len(pivots))
            beta = rr / previous
            yy += alpha * (2 * yp + alpha * pp)
            yp = beta * (yp + alpha * pp)
            pp = rr + beta * beta * pp
        return system.result(
            x,
            max(norm, floor),
            len(pivots) - indefinite,
            rtol=self.rtol,
            floor=floor,
            ritz=_smallest_ritz(pivots, ratios),
            indefinite=indefinite,
        )


def _smallest_ritz(pivots: list[float], ratios: list[float]) -> float | None:
    """Smallest eigenvalue of the Lanczos matrix of a CG run; None before the first step."""
    # The matrix is L diag(pivots) L^T, L unit lower bidiagonal with the roots of ratios below.
    if not pivots:
        return None
    beside = [c * q * q for c, q in zip(ratios, pivots, strict=False)]
    carried = [0.0, *(c * q for c, q in zip(ratios, pivots, strict=False))]
    return smallest_eigenvalue([q + c for q, c in zip(pivots, carried, strict=True)], beside)


def smallest_eigenvalue(diagonal: list[float], beside: list[float]) -> float:
    r"""Smallest eigenvalue of a symmetric tridiagonal matrix.

    Laguerre's iteration from below, which never passes it. The pivots :math:`d_j(x)` of
    :math:`T - x I` and their derivatives :math:`-u_j` give
    :math:`S_1 = \sum_i (\lambda_i - x)^{-1} = \sum_j u_j / d_j` and its derivative
    :math:`S_2 = \sum_i (\lambda_i - x)^{-2}`. In Python floats it is a tenth of LAPACK's cost
    through torch at n = 20, and linear in n.

    Args:
        diagonal: n entries.
        beside: squares of the n - 1 entries next to it.

    Returns:
        The eigenvalue, to rounding.
    """
    n = len(diagonal)
    squares = [0.0, *beside]
    roots = [*map(math.sqrt, squares), 0.0]
    radii = [a + b for a, b in itertools.pairwise(roots)]
    x = min(a - b for a, b in zip(diagonal, radii, strict=True))  # Gershgorin
    scale = max(abs(a) + b for a, b in zip(diagonal, radii, strict=True))
    for _ in range(100):
        d, u, du, s1, s2 = 1.0, 0.0, 0.0, 0.0, 0.0
        for a, b in zip(diagonal, squares, strict=True):
            c = b / d
            u, du = 1 + c / d * u, c / d * (du + 2 * u * u / d)
            d = a - x - c
            if d <= 0:
                return x
            s1 += u / d
            s2 += du / d + (u / d) ** 2
        step = n / (s1 + math.sqrt(max(0.0, (n - 1) * (n * s2 - s1 * s1))))
        x += step
        if not step > 1e-16 * scale:
            break
    return x


@final
@dataclass(frozen=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on `A^* A x = A^* b` (CGLS, Hestenes & Stiefel 1952); any operator.

    Two products a step, and the condition number counts squared. Where the system has no solution
    it stops at the least squares one, which has not `converged`.

    Attributes:
        rtol: stop at `|b - A x| <= rtol |b|`; 0 goes on to the rounding level.
        max_steps: None is ten a real dimension, 1000 at most.
        damping: solve `(A + damping I) x = b` instead.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> found = NormalCG().solve(
        ...     Operator(lambda v: turn @ v, adjoint=lambda v: turn.T @ v), torch.tensor([1.0, 2.0])
        ... )
        >>> found.solution, found.products
        (tensor([ 2., -1.]), 3)
    """

    rtol: float = 1e-8
    max_steps: int | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_settings(rtol=self.rtol, damping=self.damping, positive={"max_steps": self.max_steps})

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `2 steps + 1` products, one more with a `start`."""
        if operator.adjoint is None and not operator.symmetric:
            raise ArgumentError(
                "NormalCG needs the adjoint of the operator, got adjoint=None; pass "
                "Operator(apply, adjoint=...), or use GMRES, which needs none."
            )
        return solve_flat(self._iterate, operator, rhs, start, self.damping)

    def _iterate(self, system: System) -> LinearResult:
        x, r, norm = system.begin()
        limit, target = limit_of(self.max_steps, system), self.rtol * system.rhs_norm
        size, steps = 0.0, 0
        s = system.adjoint(r)
        ss = finite(dot(s, s), 0)
        p = s.clone()  # the operator may write its products to one buffer
        while True:
            floor = system.floor(size, math.sqrt(dot(x, x)))
            stationary = math.sqrt(ss) <= 4 * system.eps * size * norm
            if norm <= max(target, floor) or stationary or ss == 0 or steps == limit:
                break
            steps += 1
            # Along p / |p|: the fourth power of the operator's norm would overflow early.
            length = math.sqrt(dot(p, p))
            unit = p / length
            q = system.apply(unit)
            qq = finite(dot(q, q), steps)
            size = max(size, math.sqrt(qq))
            if qq == 0:
                break
            alpha = ss / (length * qq)
            x.add_(unit, alpha=alpha)
            r = torch.sub(r, q, alpha=alpha)
            norm = math.sqrt(finite(dot(r, r), steps))
            s = system.adjoint(r)
            previous, ss = ss, finite(dot(s, s), steps)
            p = torch.add(s, p, alpha=ss / previous)
        return system.result(x, max(norm, floor), steps, rtol=self.rtol, floor=floor)
