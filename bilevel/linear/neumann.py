"""The Neumann series."""

from dataclasses import dataclass
from typing import final

from bilevel.checks import check_range, check_whole
from bilevel.linear.operator import LinearResult, LinearSolver, Operator
from bilevel.linear.system import System, solve_flat
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
        >>> import torch
        >>> found = Neumann(terms=3, step=0.5).solve(
        ...     Operator(lambda v: v), torch.tensor(1.0)
        ... )
        >>> found.solution, found.residual
        (tensor(0.8750), 0.125)
    """

    terms: int
    step: float = 1.0
    rtol: float = 1e-8

    def __post_init__(self) -> None:
        check_whole(self.terms, "terms", 1)
        check_range(self.step, "step", above=0)
        check_range(self.rtol, "rtol", least=0)

    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """See `LinearSolver`; `steps` products, one more with a `start`."""
        return solve_flat(self._iterate, operator, rhs, start, scales=False)

    def _iterate(self, system: System) -> LinearResult:
        x, r, norms = system.begin()
        targets = [self.rtol * size for size in system.rhs_norms]
        sizes, steps = [0.0] * len(norms), [0] * len(norms)
        # r is the next term, (I - step A)^k b, and the residual b - A x at once: x <- x + step r
        # and r <- r - step A r keep both true.
        for term in range(1, self.terms + 1):
            going = [norm > target for norm, target in zip(norms, targets, strict=True)]
            if not any(going):
                break
            factor = system.factors([self.step * go for go in going])
            x.add_(factor * r)
            Ar = system.apply(r)
            r = r - factor * Ar
            for k, length in enumerate(system.norms(Ar, term)):
                if going[k]:
                    sizes[k], steps[k] = max(sizes[k], length / norms[k]), term
            norms = system.norms(r, term)
        floors = system.floors(sizes, x)
        return system.result(
            x,
            [max(norm, floor) for norm, floor in zip(norms, floors, strict=True)],
            steps,
            rtol=self.rtol,
            floors=floors,
        )
