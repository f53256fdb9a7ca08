"""Linear systems on trees: what an operator is, what a solver is and what it reports.

Trees are real vector spaces under Re<a, b>, complex leaves of twice the dimension. The Hessian of a
real function of complex variables is linear over the reals only, so every coefficient is real.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from bilevel.checks import check_whole
from bilevel.errors import ArgumentError
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear map `A` of a space of trees into itself, given by its products.

    Attributes:
        apply: `v -> A v`. The result has the leaves of `v`; None in a place counts as zero. `v` is
            lent: a solver writes its next vector there.
        adjoint: `v -> A^* v`, with `Re<A v, w> = Re<v, A^* w>`.
        symmetric: whether `A^* = A`. It is believed; `Dense` alone checks it.
        columns: number M of independent systems, if every leaf has a leading axis of length M and
            `A` acts on each place of it alone: `A` is block diagonal, and one product serves all
            blocks. It is believed. None is a single system.

    Raises:
        ArgumentError: if `columns` is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> double = bl.linear.Operator(lambda x: 2 * x, symmetric=True)
        >>> bl.linear.CG().solve(double, torch.tensor([2.0, 4.0])).solution
        tensor([1., 2.])
    """

    apply: Callable[[Tree], Tree]
    adjoint: Callable[[Tree], Tree] | None = None
    symmetric: bool = False
    columns: int | None = None

    def __post_init__(self) -> None:
        check_whole(self.columns, "columns", 1, optional=True)


@dataclass(frozen=True, eq=False)
class LinearResult:
    """What a solver found for `A x = b`, or for `(A + damping I) x = b` if it has a damping.

    With `Operator.columns` the numbers are those of the worst column, and each column's own stand
    in the tuples; without, the tuples are None.

    Attributes:
        solution: the last iterate, detached; of the structure of `b`.
        residual: `|b - A x| / |b|` as the method tracks it, and never less than rounding allows.
        steps: iterations made.
        products: applications of the operator, to all columns at once, and of its adjoint.
        converged: whether the residual came down to `rtol`, or to the rounding level of the dtype
            where `rtol` is below it.
        indefinite: whether a direction `p` with `Re<p, A p> <= 0` was met; None where the method
            does not look.
        column_residuals: residual of each column.
        column_steps: iterations until each column stood still.
        column_converged: which columns converged.
        column_indefinite: which columns met a direction of non-positive curvature.
        find_ritz: what `ritz` is found by when it is asked for; None where the method gives none.

    Example:
        >>> import torch, bilevel as bl
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> operator = bl.linear.Operator(lambda v: matrix @ v, symmetric=True)
        >>> found = bl.linear.CG().solve(operator, torch.tensor([3.0, 4.0]))
        >>> found.solution, found.converged, found.steps
        (tensor([1.0000, 1.0000]), True, 2)
    """

    solution: Tree
    residual: float
    steps: int
    products: int
    converged: bool
    indefinite: bool | None = None
    column_residuals: tuple[float, ...] | None = None
    column_steps: tuple[int, ...] | None = None
    column_converged: tuple[bool, ...] | None = None
    column_indefinite: tuple[bool, ...] | None = None
    find_ritz: Callable[[], float | None] | None = field(default=None, repr=False)

    @cached_property
    def ritz(self) -> float | None:
        """Smallest Ritz value, an upper bound of the smallest eigenvalue of the system.

        None where the method gives none, and before the first step.
        """
        return self.find_ritz() if self.find_ritz else None

    @property
    def message(self) -> str:
        """What happened, and what to try where it did not converge: text for a warning."""
        how = f"relative residual {self.residual:.1e}, {self.steps} steps, {self.products} products"
        where = ""
        if self.column_converged is not None:
            how = f"{len(self.column_converged)} columns, the worst with {how}"
            failed = [k for k, done in enumerate(self.column_converged) if not done]
            where = f" in {_listed(failed)}"
        if self.converged:
            return f"The linear solve converged: {how}."
        if self.indefinite:
            if self.column_indefinite is not None:
                met = [k for k, negative in enumerate(self.column_indefinite) if negative]
                curved = f"{_listed(met).capitalize()} met"
            else:
                curved = "It met"
            return (
                f"The linear solve did not converge{where}: {how}. {curved} a direction of "
                "non-positive curvature: the operator is singular or indefinite. Use NormalCG, or "
                "a damping above the most negative eigenvalue."
            )
        return (
            f"The linear solve did not converge{where}: {how}. Allow more steps or a larger rtol, "
            "start nearer, add damping, or balance unknowns of unlike scale by CG(probes=4)."
        )


def _listed(places: list[int]) -> str:
    """`column 3`, or `columns 3, 5`, by their places from 0; the first eight."""
    shown = ", ".join(map(str, places[:8]))
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return f"column{'s' if len(places) > 1 else ''} {shown}{more}"


class LinearSolver(ABC):
    """How a linear system is solved.

    Example:
        A solver of one's own, here a dense one:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Dense(LinearSolver):
        ...     def solve(self, operator, rhs, start=None):
        ...         columns = [operator.apply(one) for one in torch.eye(len(rhs))]
        ...         solution = torch.linalg.solve(torch.stack(columns, 1), rhs)
        ...         return LinearResult(solution, 0.0, 1, len(rhs), converged=True)
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: ((w - a) ** 2).sum() / 2,
        ...     outer=lambda w, a, batch: ((w - 1) ** 2).sum(),
        ... )
        >>> method = bl.Implicit(Dense())
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.5), inner_steps=40, method=method
        ... )
        >>> solver.hypergradient(torch.zeros(2), torch.tensor([3.0, 0.0])).gradient
        tensor([ 4., -2.])
    """

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
            StructureError: if `rhs`, `start` or a product is not of the space, or a leaf of `rhs`
                has not the leading axis that the operator's `columns` promise.
            DivergenceError: if something is not finite; the message names the step.
        """


def refuse_asymmetric(operator: Operator, method: str) -> None:
    """Refuse an operator that is not known to be symmetric."""
    if not operator.symmetric:
        raise ArgumentError(
            f"{method} needs a symmetric operator, got symmetric=False; use GMRES, or NormalCG "
            "with an adjoint, or pass symmetric=True if Re<A v, w> = Re<v, A w>."
        )
