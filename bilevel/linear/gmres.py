"""GMRES on flat real vectors, for any number of systems side by side."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_range, check_whole
from bilevel.linear.cg import limit_of
from bilevel.linear.operator import LinearResult, LinearSolver, Operator
from bilevel.linear.system import System, solve_flat
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalised minimal residuals (Saad & Schultz 1986), for any operator, without its adjoint.

    Attributes:
        restart: steps before the basis is dropped; it holds `restart + 1` vectors.
        rtol: stop at `|b - A x| <= rtol |b|`; 0 goes on to the rounding level.
        max_steps: of all cycles together; None is ten a real dimension, 1000 at most.
        damping: solve `(A + damping I) x = b` instead.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> found = GMRES().solve(Operator(lambda v: turn @ v), torch.tensor([1.0, 2.0]))
        >>> found.solution.round(decimals=5), found.steps
        (tensor([ 2., -1.]), 2)
    """

    restart: int = 30
    rtol: float = 1e-8
    max_steps: int | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_whole(self.restart, "restart", 1)
        check_range(self.rtol, "rtol", least=0)
        check_whole(self.max_steps, "max_steps", 1, optional=True)
        check_range(self.damping, "damping", least=0)

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `steps` products, one more a restart and with a `start`."""
        return solve_flat(self._iterate, operator, rhs, start, self.damping)

    def _iterate(self, system: System) -> LinearResult:
        x, r, norms = system.begin()
        limit, done = limit_of(self.max_steps, system), 0
        columns = [
            _Column(norm, self.rtol * size, system.eps)
            for norm, size in zip(norms, system.rhs_norms, strict=True)
        ]
        while True:
            floors = system.floors([column.size for column in columns], x)
            for column, floor in zip(columns, floors, strict=True):
                column.floor = floor
            if done == limit or not any(column.unsolved for column in columns):
                break
            if done:
                # The rotations track the norm of the residual, not the residual: a new cycle
                # starts from one that is computed.
                r = system.rhs - system.apply(x)
                for column, norm in zip(columns, system.norms(r, done), strict=True):
                    column.norm = norm if column.unsolved else column.norm
                if not any(column.unsolved for column in columns):
                    break
            correction, steps = _cycle(
                system, r, columns, min(self.restart, limit - done, system.flat.width), done
            )
            x, done = x + correction.view_as(x), done + steps
        return system.result(
            x,
            [max(column.norm, column.floor) for column in columns],
            [column.steps for column in columns],
            rtol=self.rtol,
            floors=[column.floor for column in columns],
        )


def _cycle(
    system: System, r: Tensor, columns: "list[_Column]", length: int, done: int
) -> tuple[Tensor, int]:
    """The correction of least residual from the Krylov space of `r`, and the steps it took."""
    # Arnoldi: after `steps` rounds A basis[:steps] = basis[:steps + 1] H with orthonormal rows of
    # the basis and H upper Hessenberg, for each column apart. Least |r - A y| is then a small least
    # squares problem with H, which each `_Column` keeps solved.
    for column in columns:
        column.begin()
    v = r.view(-1, system.flat.width) / _divisors(r, columns, [column.norm for column in columns])
    basis = v.new_empty(len(v), length + 1, v.shape[1])
    basis[:, 0], steps = v, 0
    while steps < length and any(column.going for column in columns):
        w = system.apply(v.view_as(r)).reshape(*v.shape, 1)
        steps += 1
        known = basis[:, :steps]
        h = known @ w
        w = torch.baddbmm(w, known.mT, h, alpha=-1)
        again = known @ w  # once more: one Gram-Schmidt pass loses orthogonality
        w = torch.baddbmm(w, known.mT, again, alpha=-1).squeeze(-1)
        tails = system.norms(w.view_as(r), done + steps)
        products = (h + again).squeeze(-1).tolist()
        for column, product, tail in zip(columns, products, tails, strict=True):
            if column.going:
                column.extend(product, tail)
        v = w / _divisors(r, columns, tails)
        basis[:, steps] = v
    weights = r.new_tensor([column.weights(steps) for column in columns])
    return weights[:, None] @ basis[:, :steps], steps


def _divisors(like: Tensor, columns: "list[_Column]", norms: list[float]) -> Tensor:
    """`norms`, infinite for columns that stand still: their rows of the basis become zero."""
    kept = [norm if column.going else math.inf for column, norm in zip(columns, norms, strict=True)]
    return like.new_tensor(kept)[:, None]


class _Column:
    """What is known of one column: one least squares problem with a Hessenberg matrix a cycle.

    Attributes:
        norm: of the residual.
        floor: norm that counts as zero.
        steps: made.
        size: the largest |A v| met.
        stuck: whether the basis is complete and the operator singular on it.
        going: whether the present cycle goes on.
    """

    def __init__(self, norm: float, target: float, eps: float) -> None:
        self.norm, self._target, self._eps = norm, target, eps
        self.floor, self.steps, self.size = 0.0, 0, 0.0
        self.stuck, self.going = False, False

    @property
    def unsolved(self) -> bool:
        """Whether another cycle is wanted."""
        return self.norm > max(self._target, self.floor) and not self.stuck

    def begin(self) -> None:
        """Begin a cycle."""
        # The matrix is made triangular by rotations as it grows.
        self._triangle: list[list[float]] = []
        self._rotations: list[tuple[float, float]] = []
        self._right, self.going = [self.norm], self.unsolved

    def extend(self, column: list[float], tail: float) -> None:
        """Take another column of the matrix; `tail` is its entry below the diagonal."""
        self.steps += 1
        self.size = max(self.size, math.hypot(*column, tail))
        zero = 10 * self._eps * self.size
        # The rotations so far make the new column fit the triangle; one more removes its tail, and
        # turns the right-hand side: its last entry is the norm of the residual, up to a sign.
        for j, (c, s) in enumerate(self._rotations):
            a, b = column[j], column[j + 1]
            column[j], column[j + 1] = c * a + s * b, c * b - s * a
        diagonal = math.hypot(column[-1], tail)
        # Nothing is left of the new column: A maps the Krylov space into a smaller one.
        self.stuck = diagonal <= zero
        if self.stuck:
            self.going = False
            return
        c, s = column[-1] / diagonal, tail / diagonal
        self._rotations.append((c, s))
        column[-1] = diagonal
        self._triangle.append(column)
        self._right[-1:] = [c * self._right[-1], -s * self._right[-1]]
        self.norm = abs(self._right[-1])
        # Without a tail the Krylov space is complete: the solution lies in it.
        self.going = tail > zero and self.norm > max(self._target, self.floor)

    def weights(self, steps: int) -> list[float]:
        """Coefficients of the solution in the basis, zero beyond its own steps."""
        y = self._right[:-1]  # back substitution in the triangle
        for j in reversed(range(len(y))):
            y[j] /= self._triangle[j][j]
            for i in range(j):
                y[i] -= self._triangle[j][i] * y[j]
        return y + [0.0] * (steps - len(y))
