"""Whether an adjoint is one, and whether a gradient is one, along a random direction."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_whole
from bilevel.testing.vectors import eps_of, random_like, unit_like
from bilevel.tree import Tree


@dataclass(frozen=True)
class DotProductTest:
    """Re<A v, w> and Re<v, A^* w> of random v and w.

    Attributes:
        forward: the first.
        adjoint: the second.
        difference: of the two, relative to |A v| |w|.

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> found = dot_product_test(
        ...     lambda v: matrix @ v, lambda w: matrix.T @ w, torch.zeros(2), torch.zeros(3)
        ... )
        >>> found.difference < 1e-6
        True
    """

    forward: float
    adjoint: float
    difference: float


def dot_product_test(
    apply: Callable[[Tree], Tree],
    adjoint: Callable[[Tree], Tree],
    domain: Tree,
    image: Tree | None = None,
    *,
    seed: int = 0,
) -> DotProductTest:
    """Whether `adjoint` is the adjoint of `apply` under Re<., .>.

    Args:
        apply: a real-linear map of trees.
        adjoint: what should be its adjoint.
        domain: tree like the arguments of `apply`; values do not count.
        image: tree like its results; None where that is the domain.
        seed: of the random vectors.

    Returns:
        Both inner products and their difference; for an adjoint it is a few times the rounding.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> found = dot_product_test(
        ...     lambda v: A @ v, lambda w: A.T @ w, torch.ones(2), torch.ones(3)
        ... )
        >>> found.difference < 1e-6
        True
    """
    generator = torch.Generator().manual_seed(seed)
    v = random_like(domain, generator)
    w = random_like(domain if image is None else image, generator)
    Av = apply(v)
    forward, backward = float(tree.inner(Av, w)), float(tree.inner(v, adjoint(w)))
    size = tree.norm(Av) * tree.norm(w)
    return DotProductTest(forward, backward, abs(forward - backward) / size if size else 0.0)


@dataclass(frozen=True)
class TaylorTest:
    """Remainders of a first-order expansion.

    Attributes:
        steps: h.
        remainders: |f(x + h d) - f(x) - h Re<g, d>|.
        order: at which they fall with h, from those above rounding: 2 for a right gradient, 1 for
            a wrong one; infinite if all are rounding.

    Example:
        >>> point = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> found = taylor_test(lambda x: (x**3).sum(), 3 * point**2, point)
        >>> round(found.order)
        2
    """

    steps: tuple[float, ...]
    remainders: tuple[float, ...]
    order: float


def taylor_test(
    function: Callable[[Tree], Tensor],
    gradient: Tree,
    point: Tree,
    *,
    seed: int = 0,
    largest: float = 1e-1,
    n_steps: int = 6,
) -> TaylorTest:
    """Whether `gradient` is that of `function` at `point`, along a random direction.

    Args:
        function: of a tree, a real scalar.
        gradient: a vector of the space of `point`; None counts as zero.
        point: floating-point or complex tensors; other leaves stay as they are.
        seed: of the direction, which has norm 1.
        largest: first step; each is half of the one before.
        n_steps: how many, at least 2.

    Returns:
        The remainders and their order.

    Raises:
        ArgumentError: if there are fewer than two steps.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> right = taylor_test(lambda x: (x**3).sum(), 3 * x**2, x)
        >>> wrong = taylor_test(lambda x: (x**3).sum(), 3 * x, x)
        >>> round(right.order), round(wrong.order)
        (2, 1)
    """
    check_whole(n_steps, "n_steps", 2)
    direction = unit_like(point, torch.Generator().manual_seed(seed))
    value, slope = float(function(point)), float(tree.inner(gradient, direction))
    steps = [largest / 2**i for i in range(n_steps)]
    values = [float(function(tree.moved(point, direction, -h))) for h in steps]
    remainders = [abs(v - value - h * slope) for v, h in zip(values, steps, strict=True)]
    floor = 100 * eps_of(point) * max(map(abs, (value, *values)))
    seen = [(math.log(h), math.log(r)) for h, r in zip(steps, remainders, strict=True) if r > floor]
    return TaylorTest(tuple(steps), tuple(remainders), _slope(seen))


def _slope(points: list[tuple[float, float]]) -> float:
    if len(points) < 2:
        return math.inf
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)
