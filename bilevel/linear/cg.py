"""Conjugate gradients.

Dot products of flat vectors are Re<a, b>; scalars are Python floats, those of each column apart.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from bilevel.linear.operator import (
    LinearResult,
    LinearSolver,
    Operator,
    check_settings,
    refuse_asymmetric,
)
from bilevel.linear.ritz import smallest_ritz
from bilevel.linear.system import System, dot, finite, solve_flat
from bilevel.tree import Tree


def limit_of(max_steps: int | None, system: System) -> int:
    """`max_steps`, or its default: ten steps a real dimension of a column, 1000 at most."""
    return min(10 * system.flat.width, 1000) if max_steps is None else max_steps


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
        x, r, norms = system.begin()
        limit = limit_of(self.max_steps, system)
        columns = [_Column(system, k, norm, self.rtol, limit) for k, norm in enumerate(norms)]
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
            indefinite=[column.indefinite for column in columns],
            find_ritz=partial(
                smallest_ritz, [(column.pivots, column.ratios) for column in columns]
            ),
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
        self.pivots.append(curvature / self._rr)
        self._size = size = max(self._size, abs(curvature) / pp)
        if curvature <= 4 * self._eps * size * pp:
            self.indefinite, self.going = True, False
            return 0.0
        self.steps += 1
        self._alpha = self._rr / curvature
        return self._alpha

    def turn(self, rr: float) -> float:
        """The factor of `p` in the next direction; `rr` is `<r, r>`."""
        alpha, pp, beta = self._alpha, self._pp, rr / self._rr
        self._rr = rr
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
