"""One linear system as solvers see it: flat, scaled, its products counted and checked."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel import autodiff
from bilevel.errors import ArgumentError, DivergenceError
from bilevel.flat import Flat
from bilevel.linear import LinearResult, Operator
from bilevel.tree import Tree


class System:
    """`(A + damping I) x = b` on flat vectors, scaled so that the largest entry of `b` is near 1.

    The scale is a power of two, so no digit changes; without it the square of a small residual
    would be lost to underflow, and zero would pass for the solution.

    Attributes:
        flat: the layout of the trees.
        rhs: `b`, scaled; not to be written to.
        rhs_norm: of the scaled `b`.
        start_norm: of the scaled first iterate.
        eps: of the dtype of both.
        products: made so far.
    """

    def __init__(
        self, operator: Operator, rhs: Tree, start: Tree | None, damping: float = 0.0
    ) -> None:
        """Lay out the system.

        Args:
            operator: `A`.
            rhs: `b`.
            start: first iterate.
            damping: added to the diagonal.

        Raises:
            DivergenceError: if `rhs` or `start` is not finite.
        """
        self.flat = Flat(rhs, "rhs")
        self.products = 0
        self._operator, self._damping = operator, damping
        self._unchecked = {"operator.apply", "operator.adjoint"}
        b = self.flat.vector(rhs).detach()
        largest = torch.linalg.vector_norm(b, math.inf).item() if self.flat.n else 0.0
        if not math.isfinite(largest):
            raise DivergenceError("rhs is not finite: look at what computed it.")
        self._scale = 2.0 ** (math.frexp(largest)[1] - 1)
        self.rhs = b / self._scale
        self.eps = torch.finfo(b.dtype).eps
        self.rhs_norm = math.sqrt(dot(self.rhs, self.rhs))
        self._start: Tensor | None = None
        self.start_norm = 0.0
        if start is not None:
            self.flat.check(start, "start", "start must match rhs")
            self._start = self.flat.vector(start).detach() / self._scale
            self.start_norm = torch.linalg.vector_norm(self._start).item()
            if not math.isfinite(self.start_norm):
                raise DivergenceError("start is not finite: pass None to start at zero.")

    def begin(self) -> tuple[Tensor, Tensor, float]:
        """The first iterate, its residual, not to be written to, and the norm; 0 or 1 product."""
        if self._start is None:
            return self.flat.zeros(), self.rhs, self.rhs_norm
        r = self.rhs - self.apply(self._start)
        return self._start, r, math.sqrt(finite(dot(r, r), 0))

    def apply(self, v: Tensor) -> Tensor:
        """`(A + damping I) v`; not to be written to."""
        return self._product(self._operator.apply, "operator.apply", v)

    def adjoint(self, v: Tensor) -> Tensor:
        """`(A^* + damping I) v`; not to be written to."""
        if self._operator.adjoint is None:
            return self.apply(v)
        return self._product(self._operator.adjoint, "operator.adjoint", v)

    def _product(self, apply: Callable[[Tree], Tree], name: str, v: Tensor) -> Tensor:
        self.products += 1
        found = apply(self.flat.tree(v))
        if name in self._unchecked:
            self.flat.check(found, "product", f"{name} must return a vector like rhs")
            self._unchecked.discard(name)
        product = self.flat.vector(found)
        return product.add(v, alpha=self._damping) if self._damping else product

    def floor(self, size: float, length: float) -> float:
        """Least residual norm that rounding allows.

        Args:
            size: estimate of the norm of the operator.
            length: norm of the iterate.

        Returns:
            Half a unit in the last place of the terms that the residual is the difference of.
        """
        return 0.5 * self.eps * (self.rhs_norm + size * length)

    def result(
        self,
        x: Tensor,
        norm: float,
        steps: int,
        *,
        rtol: float,
        floor: float,
        ritz: float | None = None,
        indefinite: bool | None = None,
    ) -> LinearResult:
        """The record of an iterate.

        Args:
            x: the iterate.
            norm: of its residual, as the method tracks it.
            steps: made.
            rtol: that was asked for.
            floor: residual norm that counts as reached if `rtol` asks for less. Not where it is
                large: an iterate so long that its residual is all rounding solves nothing.
            ritz: for the record.
            indefinite: for the record.

        Returns:
            The record, its numbers scaled back.
        """
        reached = max(rtol, min(floor / self.rhs_norm, math.sqrt(self.eps)))
        residual = max(norm / self.rhs_norm, self.floor(0, 0) / self.rhs_norm)
        return LinearResult(
            # Views of one storage would be a trap for who trains on them.
            self.flat.copied(x * self._scale),
            residual,
            steps,
            self.products,
            residual <= reached,
            ritz,
            indefinite,
        )


def solve_flat(
    method: Callable[[System], LinearResult],
    operator: Operator,
    rhs: Tree,
    start: Tree | None,
    damping: float = 0.0,
) -> LinearResult:
    """`method` of the flat system, without a graph; zero if `rhs` is zero."""
    with autodiff.paused():
        system = System(operator, rhs, start, damping)
        if system.rhs_norm:
            return method(system)
        return LinearResult(system.flat.tree(system.flat.zeros()), 0.0, 0, 0, converged=True)


def dot(a: Tensor, b: Tensor) -> float:
    """Dot product of flat vectors."""
    return torch.dot(a, b).item()


def finite(value: float, step: int) -> float:
    """`value`, if it is finite.

    Args:
        value: a scalar that the iteration goes on with.
        step: iterations begun, from 1.

    Returns:
        `value`.

    Raises:
        DivergenceError: naming the step.
    """
    if not math.isfinite(value):
        raise DivergenceError(
            f"the linear solve met {value} at step {step}: the operator returned a value that is "
            "not finite, or the iteration grew without bound. Check the operator at the present "
            "point."
        )
    return value


def refuse_asymmetric(operator: Operator, method: str) -> None:
    """Refuse an operator that is not known to be symmetric.

    Args:
        operator: of the system.
        method: which needs it.

    Raises:
        ArgumentError: naming methods that do not.
    """
    if not operator.symmetric:
        raise ArgumentError(
            f"{method} needs a symmetric operator, got symmetric=False; use GMRES, or NormalCG "
            "with an adjoint, or pass symmetric=True if Re<A v, w> = Re<v, A w>."
        )


def check_settings(
    *, rtol: float, damping: float = 0.0, positive: dict[str, float | None] | None = None
) -> None:
    """Refuse settings out of range.

    Args:
        rtol: finite, >= 0.
        damping: finite, >= 0.
        positive: by name, whole numbers >= 1, or None.

    Raises:
        ArgumentError: naming the setting.
    """
    for name, value in (("rtol", rtol), ("damping", damping)):
        if not (value >= 0 and math.isfinite(value)):
            raise ArgumentError(f"{name} must be finite and >= 0, got {value}.")
    for name, value in (positive or {}).items():
        if value is not None and (value < 1 or value != int(value)):
            raise ArgumentError(f"{name} must be a whole number >= 1, got {value}.")
