"""Systems that have no solution, or one that rounding made up, told by the smallest value met."""

import math

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.linear.operator import LinearResult, Operator
from bilevel.tree import Tree

SINGULAR = 1e-7  # smallest value met, beside that of a random direction
NO_DERIVATIVE = (
    "The solution is no differentiable function of what it depends on there: add a decay, remove "
    "equations that say the same, or differentiate what does not see the free direction."
)


def shortcoming(operator: Operator, b: Tree, found: LinearResult) -> str:
    """What is to be said of a linear solve by which a solution is differentiated.

    Args:
        operator: A, the derivative of the residual in the solution, or its adjoint.
        b: the right-hand side.
        found: what a solver answered.

    Returns:
        A sentence or two that name the smallest value met; empty if nothing is wrong.
    """
    with autodiff.paused():
        columns, z = operator.columns, random_like(b)
        size = _least_ratio(_norms(operator.apply(z), columns), _norms(z, columns))
        met = _least_ratio(_norms(b, columns), _norms(found.solution, columns))
        eps = max((torch.finfo(y.dtype).eps for y in _tensors(b)), default=0.0)
        if found.converged and not (math.isfinite(met) and met <= 16 * eps * size):
            return ""
        left = tree.subtract(b, tree.filled(operator.apply(found.solution), b))
        if operator.adjoint is not None:
            # What is left of a least squares solution lies in the null space of the adjoint.
            along = _least_ratio(_norms(operator.adjoint(left), columns), _norms(left, columns))
            met = min(met, along)
    if found.ritz is not None:
        met = min(met, abs(found.ritz))
    if met <= max(SINGULAR, 16 * eps) * size or not size:
        return (
            "the derivative of the residual in the solution is singular, or nearly so: the "
            f"smallest value met is {met:.1e}, beside {size:.1e} along a random direction; the "
            f"linear system is left with relative residual {found.residual:.1e}. {NO_DERIVATIVE}"
        )
    return f"{found.message} The smallest value met is {met:.1e}, beside {size:.1e}."


def random_like(b: Tree) -> Tree:
    """A random vector of a space, the same each time and on every device."""
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        kind = torch.complex128 if x.is_complex() else torch.float64
        return torch.randn(x.shape, dtype=kind, generator=generator, device="cpu").to(x)

    return tree.map_leaves(drawn, b)


def _tensors(vector: Tree) -> list[Tensor]:
    return [x for x in tree.leaves_of(vector) if x is not None]


def _norms(vector: Tree, columns: int | None) -> list[float]:
    """Norm of each column."""
    xs = _tensors(vector)
    if columns is None:
        return [tree.norm(xs)]
    return [tree.norm([x[k] for x in xs]) for k in range(columns)]


def _least_ratio(above: list[float], below: list[float]) -> float:
    """The least of the columns that have one."""
    ratios = [a / b for a, b in zip(above, below, strict=True) if b > 0]
    return min(ratios, default=math.inf)
