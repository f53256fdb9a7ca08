"""Conjugate gradients on the normal equations."""

import math
from dataclasses import dataclass
from typing import final

from bilevel.errors import ArgumentError
from bilevel.linear.cg import Conjugate, limit_of
from bilevel.linear.operator import LinearResult, Operator
from bilevel.linear.system import System, solve_flat
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class NormalCG(Conjugate):
    """Conjugate gradients on `A^* A x = A^* b` (CGLS, Hestenes & Stiefel 1952); any operator.

    Two products a step, and the condition number counts squared. Where the system has no solution
    it stops at the least squares one, which has not `converged`.

    Attributes:
        rtol: stop at `|b - A x| <= rtol |b|`; 0 goes on to the rounding level.
        max_steps: None is ten a real dimension, 1000 at most.
        damping: solve `(A + damping I) x = b` instead.
        probes: products spent at first on balancing the system, for unknowns of unlike scale: rows
            and columns are divided by the roots of their estimated norms. 4 serve; 0 for none.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> found = NormalCG().solve(
        ...     Operator(lambda v: turn @ v, adjoint=lambda v: turn.T @ v),
        ...     torch.tensor([1.0, 2.0]),
        ... )
        >>> found.solution, found.products
        (tensor([ 2., -1.]), 4)
    """

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `2 steps + 1` products, one more with a `start`, one to measure."""
        if operator.adjoint is None and not operator.symmetric:
            raise ArgumentError(
                "NormalCG needs the adjoint of the operator, got adjoint=None; pass "
                "Operator(apply, adjoint=...), or use GMRES, which needs none."
            )
        return solve_flat(self._iterate, operator, rhs, start, self.damping, self.probes)

    def _iterate(self, system: System) -> LinearResult:
        # CGLS: conjugate gradients on A^* A, which is never formed. From one round to the next
        # r = b - A x and s = A^* r, the residual of the normal equations; p is conjugate under
        # A^* A to all directions before. A column that is done has factors of zero.
        x, r, norms = system.begin()
        limit, done = limit_of(self.max_steps, system), 0
        s = system.adjoint(r)
        p = s.clone()  # the operator may write its products to one buffer
        columns = [
            _Normal(norm, ss, size, self.tracked, system)
            for norm, ss, size in zip(norms, system.dots(s, s, 0), system.rhs_norms, strict=True)
        ]
        while True:
            for column, length in zip(columns, system.norms(x, done), strict=True):
                column.look(length)
            if done == limit or not any(column.going for column in columns):
                break
            done += 1
            # Along p / |p|: the fourth power of the operator's norm would overflow early.
            lengths = system.norms(p, done)
            unit = p / system.factors([length or 1.0 for length in lengths])
            q = system.apply(unit)
            squares = system.dots(q, q, done)
            alpha = system.factors(
                [
                    column.advance(length, qq)
                    for column, length, qq in zip(columns, lengths, squares, strict=True)
                ]
            )
            x.add_(alpha * unit)
            r.sub_(alpha * q)  # keeps r orthogonal to A p
            norms = system.norms(r, done)
            s = system.adjoint(r)
            squares = system.dots(s, s, done)
            beta = system.factors(
                [
                    column.turn(norm, ss)
                    for column, norm, ss in zip(columns, norms, squares, strict=True)
                ]
            )
            p.mul_(beta).add_(s)
        return system.result(
            x,
            [max(column.norm, column.floor) for column in columns],
            [column.steps for column in columns],
            rtol=self.rtol,
            floors=[column.floor for column in columns],
            measured=self.probes > 0 or system.eps > 1e-10,
        )


class _Normal:
    """The scalars of one system of normal equations.

    Attributes:
        norm: of the residual.
        floor: norm that rounding allows.
        steps: made.
        going: whether another step is wanted.
    """

    def __init__(
        self, norm: float, ss: float, rhs_norm: float, rtol: float, system: System
    ) -> None:
        """Stand before the first step; `ss` is the square of `|A^* r|`."""
        self.norm, self._ss, self._rhs_norm = norm, ss, rhs_norm
        self._target, self._unit, self._eps = rtol * rhs_norm, system.unit, system.eps
        self.floor, self._size, self.steps, self.going = 0.0, 0.0, 0, True

    def look(self, length: float) -> None:
        """Decide whether to go on; `length` is that of the iterate."""
        self.floor = self._unit * (self._rhs_norm + self._size * length)
        # |A^* r| at rounding: the least squares solution, whatever is left of the residual.
        stationary = math.sqrt(self._ss) <= 4 * self._eps * self._size * self.norm
        self.going = (
            self.going
            and self.norm > max(self._target, self.floor)
            and not stationary
            and self._ss > 0
        )

    def advance(self, length: float, qq: float) -> float:
        """The factor of `p / |p|` in the next iterate; `qq` is `|A p|^2 / |p|^2`."""
        if not self.going:
            return 0.0
        self.steps += 1
        self._size = max(self._size, math.sqrt(qq))  # |A| from below
        self.going = qq > 0  # else p lies in the null space
        return self._ss / (length * qq) if qq else 0.0

    def turn(self, norm: float, ss: float) -> float:
        """The factor of `p` in the next direction; `norm` is that of the residual."""
        if not self.going:
            return 0.0
        self.norm, previous, self._ss = norm, self._ss, ss
        return ss / previous
