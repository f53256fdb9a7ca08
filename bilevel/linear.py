"""Linear systems on trees: what an operator is, what a solver is and what it reports.

Trees are real vector spaces under Re<a, b>, complex leaves of twice the dimension. The Hessian of a
real function of complex variables is linear over the reals only, so every coefficient is real.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear map `A` of a space of trees into itself, given by its products.

    Attributes:
        apply: `v -> A v`. The result has the leaves of `v`; None in a place counts as zero.
        adjoint: `v -> A^* v`, with `Re<A v, w> = Re<v, A^* w>`.
        symmetric: whether `A^* = A`. It is believed; `Dense` alone checks it.
    """

    apply: Callable[[Tree], Tree]
    adjoint: Callable[[Tree], Tree] | None = None
    symmetric: bool = False


@dataclass(frozen=True, eq=False)
class LinearResult:
    """What a solver found for `A x = b`, or for `(A + damping I) x = b` if it has a damping.

    Attributes:
        solution: the last iterate, detached; of the structure of `b`.
        residual: `|b - A x| / |b|` as the method tracks it, and never less than rounding allows.
        steps: iterations made.
        products: applications of the operator and of its adjoint.
        converged: whether the residual came down to `rtol`, or to the rounding level of the dtype
            where `rtol` is below it.
        ritz: smallest Ritz value of the system, an upper bound of the smallest eigenvalue; None
            where the method gives none.
        indefinite: whether a direction `p` with `Re<p, A p> <= 0` was met; None where the method
            does not look.
    """

    solution: Tree
    residual: float
    steps: int
    products: int
    converged: bool
    ritz: float | None = None
    indefinite: bool | None = None

    @property
    def message(self) -> str:
        """What happened, and what to try where it did not converge: text for a warning."""
        how = f"relative residual {self.residual:.1e}, {self.steps} steps, {self.products} products"
        if self.converged:
            return f"The linear solve converged: {how}."
        if self.indefinite:
            return (
                f"The linear solve did not converge: {how}. It met a direction of non-positive "
                "curvature: the operator is singular or indefinite. Use NormalCG, or a damping "
                "above the most negative eigenvalue."
            )
        return (
            f"The linear solve did not converge: {how}. Allow more steps or a larger rtol, start "
            "nearer, or add damping."
        )


class LinearSolver(ABC):
    """How a linear system is solved."""

    @abstractmethod
    def solve(self, operator: Operator, rhs: Tree, start: Tree | None = None) -> LinearResult:
        """Solve `A x = b`.

        Nothing given is written to, and no autograd graph is built.

        Args:
            operator: `A`, which is applied to trees like `rhs`.
            rhs: `b`, a tree of floating-point and complex tensors, None elsewhere.
            start: first iterate, like `rhs`; None is zero. A solution that is not unique comes out
                as the one nearest to it.

        Returns:
            The solution and how it was reached.

        Raises:
            ArgumentError: if the method cannot work on the operator.
            StructureError: if `rhs`, `start` or a product is not of the space.
            DivergenceError: if something is not finite; the message names the step.
        """
