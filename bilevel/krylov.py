"""Conjugate gradients, on the system and on its normal equations.

Dot products of flat vectors are Re<a, b>; scalars are Python floats, of one system. Several at once
are in `columns`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import final

import torch

from bilevel.columns import conjugate_gradients, normal_equations
from bilevel.errors import ArgumentError
from bilevel.linear import LinearResult, LinearSolver, Operator
from bilevel.ritz import smallest_ritz
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
        iterate = self._iterate_columns if operator.columns else self._iterate
        return solve_flat(iterate, operator, rhs, start, self.damping)

    def _iterate(self, system: System) -> LinearResult:
        x, r, (norm,) = system.begin()
        limit, target = limit_of(self.max_steps, system), self.rtol * system.rhs_norms[0]
        (rhs_norm,), (start_norm,), unit = system.rhs_norms, system.start_norms, system.unit
        rr = norm * norm
        p, pp, beta = r.clone(), rr, 0.0
        # With y = x - start, r is orthogonal to y and to the last p. So the lengths of p and y
        # follow from scalars (Steihaug 1983), and with them what rounding allows.
        yy, yp, size = 0.0, 0.0, 0.0
        pivots: list[float] = []  # of the Lanczos matrix T = L diag(pivots) L^T
        ratios: list[float] = []  # squares of the entries below the diagonal of L
        indefinite = False
        while True:
            norm, floor = math.sqrt(rr), unit * (rhs_norm + size * (start_norm + math.sqrt(yy)))
            if norm <= max(target, floor) or len(pivots) == limit:
                break
            if pivots:
                # In place: at n = 20 every allocation is a tenth of the arithmetic.
                torch.add(r, p, alpha=beta, out=p)
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
            r.sub_(Ap, alpha=alpha)
            previous, rr = rr, finite(dot(r, r), len(pivots))
            beta = rr / previous
            yy += alpha * (2 * yp + alpha * pp)
            yp = beta * (yp + alpha * pp)
            pp = rr + beta * beta * pp
        return system.result(
            x,
            [max(norm, floor)],
            [len(pivots) - indefinite],
            rtol=self.rtol,
            floors=[floor],
            indefinite=[indefinite],
            find_ritz=partial(smallest_ritz, pivots, ratios),
        )

    def _iterate_columns(self, system: System) -> LinearResult:
        return conjugate_gradients(system, self.rtol, limit_of(self.max_steps, system))


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
        iterate = self._iterate_columns if operator.columns else self._iterate
        return solve_flat(iterate, operator, rhs, start, self.damping)

    def _iterate(self, system: System) -> LinearResult:
        x, r, (norm,) = system.begin()
        limit, target = limit_of(self.max_steps, system), self.rtol * system.rhs_norms[0]
        size, steps = 0.0, 0
        s = system.adjoint(r)
        ss = finite(dot(s, s), 0)
        p = s.clone()  # the operator may write its products to one buffer
        while True:
            floor = system.unit * (system.rhs_norms[0] + size * math.sqrt(dot(x, x)))
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
            r.sub_(q, alpha=alpha)
            norm = math.sqrt(finite(dot(r, r), steps))
            s = system.adjoint(r)
            previous, ss = ss, finite(dot(s, s), steps)
            torch.add(s, p, alpha=ss / previous, out=p)
        return system.result(x, [max(norm, floor)], [steps], rtol=self.rtol, floors=[floor])

    def _iterate_columns(self, system: System) -> LinearResult:
        return normal_equations(system, self.rtol, limit_of(self.max_steps, system))
