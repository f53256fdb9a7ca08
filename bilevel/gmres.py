"""GMRES on flat real vectors."""

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from bilevel.krylov import limit_of
from bilevel.linear import LinearResult, LinearSolver, Operator
from bilevel.system import (
    System,
    check_settings,
    dot,
    finite,
    solve_flat,
)
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
        """Check the fields."""
        check_settings(
            rtol=self.rtol,
            damping=self.damping,
            positive={"restart": self.restart, "max_steps": self.max_steps},
        )

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `steps` products, one more a restart and with a `start`."""
        return solve_flat(self._iterate, operator, rhs, start, self.damping)

    def _iterate(self, system: System) -> LinearResult:
        x, r, norm = system.begin()
        limit, target = limit_of(self.max_steps, system), self.rtol * system.rhs_norm
        size, steps, stuck = 0.0, 0, False
        while True:
            floor = system.floor(size, math.sqrt(dot(x, x)))
            if norm <= max(target, floor) or steps == limit or stuck:
                break
            if steps:
                r = system.rhs - system.apply(x)
                norm = math.sqrt(finite(dot(r, r), steps))
                if norm <= max(target, floor):
                    break
            length = min(self.restart, limit - steps, system.flat.n)
            cycle = _cycle(system, r / norm, norm, length, max(target, floor), steps)
            x = x + cycle.correction
            norm, stuck, steps = cycle.norm, cycle.stuck, steps + cycle.steps
            size = max(size, cycle.size)
        return system.result(x, max(norm, floor), steps, rtol=self.rtol, floor=floor)


class _Cycle(NamedTuple):
    """One cycle between restarts."""

    correction: Tensor
    norm: float  # of the residual after it
    steps: int
    size: float  # the largest |A v| over the basis
    stuck: bool  # whether the basis is complete and the operator singular on it


def _cycle(
    system: System, first: Tensor, norm: float, length: int, target: float, done: int
) -> _Cycle:
    """The correction of least residual from the Krylov space of `first`, until `target`."""
    # The Hessenberg matrix is made triangular by rotations as it grows.
    basis = first.new_empty(length + 1, first.numel())
    basis[0] = v = first
    columns: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    right, size, steps, stuck = [norm], 0.0, 0, False
    while steps < length:
        w, known = system.apply(v), basis[: steps + 1]
        steps += 1
        h = known.mv(w)
        w = torch.addmv(w, known.T, h, alpha=-1)
        again = known.mv(w)  # once more: one Gram-Schmidt pass loses orthogonality
        w = torch.addmv(w, known.T, again, alpha=-1)
        tail = math.sqrt(finite(dot(w, w), done + steps))
        column = (h + again).tolist()
        size = max(size, math.hypot(*column, tail))
        zero = 10 * system.eps * size
        for j, (c, s) in enumerate(rotations):
            a, b = column[j], column[j + 1]
            column[j], column[j + 1] = c * a + s * b, c * b - s * a
        diagonal = math.hypot(column[-1], tail)
        stuck = diagonal <= zero
        if stuck:
            break
        c, s = column[-1] / diagonal, tail / diagonal
        rotations.append((c, s))
        column[-1] = diagonal
        columns.append(column)
        right[-1:] = [c * right[-1], -s * right[-1]]
        if tail <= zero or abs(right[-1]) <= target:
            break
        basis[steps] = v = w / tail
    y = right[:-1]
    for j in reversed(range(len(columns))):
        y[j] /= columns[j][j]
        for i in range(j):
            y[i] -= columns[j][i] * y[j]
    weights = torch.tensor(y, dtype=first.dtype, device=first.device)
    return _Cycle(weights @ basis[: len(y)], abs(right[-1]), steps, size, stuck)
