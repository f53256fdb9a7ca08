"""Conjugate gradients.

Dot products of flat vectors are Re<a, b>; scalars are Python floats, those of each column apart.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_range, check_whole
from bilevel.linear.operator import (
    LinearResult,
    LinearSolver,
    Operator,
    refuse_asymmetric,
)
from bilevel.linear.system import System, dot, finite, solve_flat
from bilevel.tree import Tree


def limit_of(max_steps: int | None, system: System) -> int:
    """`max_steps`, or its default: ten steps a real dimension of a column, 1000 at most."""
    return min(10 * system.flat.width, 1000) if max_steps is None else max_steps


@dataclass(frozen=True)
class Conjugate(LinearSolver):
    """The settings of conjugate gradients, on the system itself or on its normal equations."""

    rtol: float = 1e-8
    max_steps: int | None = None
    damping: float = 0.0
    probes: int = 0

    def __post_init__(self) -> None:
        check_range(self.rtol, "rtol", least=0)
        check_whole(self.max_steps, "max_steps", 1, optional=True)
        check_range(self.damping, "damping", least=0)
        check_whole(self.probes, "probes")

    @property
    def tracked(self) -> float:
        """The tolerance of the residual that is tracked, so that the true one keeps `rtol`."""
        # That of a balanced system is taken in another norm: a tenth leaves room between the two.
        return 0.1 * self.rtol if self.probes else self.rtol


@final
@dataclass(frozen=True)
class CG(Conjugate):
    """Conjugate gradients, for symmetric positive operators (Hestenes & Stiefel 1952).

    It stops where it meets a direction of non-positive curvature, and says so in the result. A
    singular system is solved if it has a solution.

    Attributes:
        rtol: stop at `|b - A x| <= rtol |b|`; 0 goes on to the rounding level.
        max_steps: None is ten a real dimension, 1000 at most.
        damping: solve `(A + damping I) x = b` instead.
        probes: products spent at first on balancing the system, for unknowns of unlike scale: rows
            and columns are divided by the roots of their estimated norms. 4 serve; 0 for none.

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

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `steps` products, one more with a `start`."""
        refuse_asymmetric(operator, "CG")
        return solve_flat(self._iterate, operator, rhs, start, self.damping, self.probes)

    def _iterate(self, system: System) -> LinearResult:
        x, r, norms = system.begin()
        limit, rtol = limit_of(self.max_steps, system), self.tracked
        columns = [_Column(system, k, norm, rtol, limit) for k, norm in enumerate(norms)]
        if system.columns is None:
            _alone(system, columns[0], x, r)
        else:
            _side_by_side(system, columns, x, r)
        return system.result(
            x,
            [max(column.norm, column.floor) for column in columns],
            [column.steps for column in columns],
            rtol=self.rtol,
            floors=[column.floor for column in columns],
            measured=self.probes > 0 or system.eps > 1e-10,
            indefinite=[column.indefinite for column in columns],
            # Of the balanced system they are not those of A.
            find_ritz=None
            if self.probes
            else partial(smallest_ritz, [(column.pivots, column.ratios) for column in columns]),
        )


class _Column:
    """The scalars of one system.

    Attributes:
        norm: of the residual.
        floor: norm that rounding allows.
        steps: made.
        going: whether another step is wanted.
        indefinite: whether the last direction had no positive curvature.
        pivots: of the Lanczos matrix, `L diag(pivots) L^T`.
        ratios: squares of the entries below the diagonal of `L`.
    """

    def __init__(self, system: System, place: int, norm: float, rtol: float, limit: int) -> None:
        """Stand before the first step; `norm` is that of the first residual."""
        self._unit, self._eps = system.unit, system.eps
        self._rhs_norm, self._start_norm = system.rhs_norms[place], system.start_norms[place]
        self._target, self._limit = rtol * self._rhs_norm, limit
        self._rr = self._pp = norm * norm
        # With y = x - start, r is orthogonal to y and to the last p. So the lengths of p and y
        # follow from scalars (Steihaug 1983), and with them what rounding allows.
        self._yy, self._yp, self._size = 0.0, 0.0, 0.0
        self.norm, self.floor = norm, self._unit * self._rhs_norm
        self.steps, self.indefinite = 0, False
        self.going = norm > max(self._target, self.floor)
        self.pivots: list[float] = []
        self.ratios: list[float] = []

    def advance(self, curvature: float) -> float:
        """The factor of `p` in the next iterate; the curvature is `<p, A p>`."""
        pp = self._pp
        self._size = size = max(self._size, abs(curvature) / pp)
        # Below rounding, beside the largest curvature met, a sign means nothing: the direction is
        # flat, and is no part of the spectrum that the system sees.
        flat = abs(curvature) <= 4 * self._eps * size * pp
        if not flat:
            # The pivots of the Lanczos matrix are the curvatures over <r, r>: 1 / alpha.
            self.pivots.append(curvature / self._rr)
        if flat or curvature < 0:
            self.indefinite, self.going = True, False
            return 0.0
        self.steps += 1
        self._alpha = self._rr / curvature
        return self._alpha

    def turn(self, rr: float) -> float:
        """The factor of `p` in the next direction; `rr` is `<r, r>`."""
        alpha, pp, beta = self._alpha, self._pp, rr / self._rr
        self._rr = rr
        # y <- y + alpha p and p <- r + beta p, in lengths alone: <y, r> = <p, r> = 0 by
        # conjugacy, so that |y|^2, <y, p> and |p|^2 follow without a further dot product.
        self._yy += alpha * (2 * self._yp + alpha * pp)
        self._yp = beta * (self._yp + alpha * pp)
        self._pp = rr + beta * beta * pp
        self.norm, length = math.sqrt(rr), self._start_norm + math.sqrt(self._yy)
        self.floor = self._unit * (self._rhs_norm + self._size * length)
        self.going = self.norm > max(self._target, self.floor) and self.steps < self._limit
        self.ratios.append(beta)
        return beta


def _side_by_side(system: System, columns: list[_Column], x: Tensor, r: Tensor) -> None:
    """Bring `x` to the solutions; a column that is done stands still while others go on."""
    # The columns share each product and nothing else: the scalars of one that is done are zero, so
    # that its row of x, r and p stays as it is while others go on.
    p, done = r.clone(), 0
    while any(column.going for column in columns):
        done += 1
        Ap = system.apply(p)
        curvatures = system.dots(p, Ap, done)
        alpha = system.factors(
            [c.advance(k) if c.going else 0.0 for c, k in zip(columns, curvatures, strict=True)]
        )
        x.add_(alpha * p)
        r.sub_(alpha * Ap)
        squares = system.dots(r, r, done)
        beta = system.factors(
            [c.turn(rr) if c.going else 0.0 for c, rr in zip(columns, squares, strict=True)]
        )
        p.mul_(beta).add_(r)


def _alone(system: System, column: _Column, x: Tensor, r: Tensor) -> None:
    """The same for a single system, in place: a small operator costs as little as this."""
    # From one round to the next: r = b - A x, p is conjugate to all directions before, <p, r> =
    # <r, r>. `p` is lent to the operator, which may not write to it, and updated in place.
    p = r.clone()
    while column.going:
        Ap = system.apply(p)
        alpha = column.advance(finite(dot(p, Ap), column.steps + 1))
        if column.indefinite:
            break
        x.add_(p, alpha=alpha)
        r.sub_(Ap, alpha=alpha)
        beta = column.turn(finite(dot(r, r), column.steps))
        if column.going:
            torch.add(r, p, alpha=beta, out=p)


# What conjugate gradients learn of the spectrum on their way, in Python floats: that is a tenth of
# LAPACK's cost through torch at n = 20, and linear in n.


def smallest_ritz(runs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Smallest eigenvalue of the Lanczos matrices of runs of conjugate gradients."""
    # A run is a pair: the Lanczos matrix is `L diag(pivots) L^T` with `L` unit lower bidiagonal;
    # given are the pivots, and the squares of the entries below the diagonal of `L`.
    found = [_of_run(pivots, ratios) for pivots, ratios in runs if pivots]
    return min(found, default=None)


def _of_run(pivots: Sequence[float], ratios: Sequence[float]) -> float:
    beside = [c * q * q for c, q in zip(ratios, pivots, strict=False)][: len(pivots) - 1]
    carried = [0.0, *(c * q for c, q in zip(ratios, pivots, strict=False))]
    return _smallest_eigenvalue([q + c for q, c in zip(pivots, carried, strict=False)], beside)


def _smallest_eigenvalue(diagonal: Sequence[float], beside: Sequence[float]) -> float:
    r"""Smallest eigenvalue of a symmetric tridiagonal matrix."""
    # Laguerre's iteration from below, which never passes it. The pivots :math:`d_j(x)` of :math:`T
    # - x I` and their derivatives :math:`-u_j` give :math:`S_1 = \sum_i (\lambda_i - x)^{-1} =
    # \sum_j u_j / d_j` and its derivative :math:`S_2 = \sum_i (\lambda_i - x)^{-2}`.
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
