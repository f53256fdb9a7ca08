"""Conjugate gradients inside a ball, which leave by the first direction of negative curvature."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from bilevel import tree

Vector = list[Tensor]


class Truncated(NamedTuple):
    """A minimiser of b . x + x . A x / 2 in a ball, roughly.

    Attributes:
        x: it.
        predicted: the value there; not positive.
        products: applications of A.
        boundary: whether it lies on the sphere.
        curvature: of the last direction, <p, A p> / <p, p>.
    """

    x: Vector
    predicted: float
    products: int
    boundary: bool
    curvature: float


def steihaug(
    product: Callable[[Vector], Vector],
    b: Vector,
    radius: Callable[[float, float], float],
    rtol: float,
    max_steps: int,
) -> Truncated:
    """Steihaug (1983), doi:10.1137/0720042, algorithm 2.1.

    Args:
        product: A, symmetric.
        b: a vector that is not zero.
        radius: of the ball, asked where a direction leaves: `radius(curvature, length of x)`; a
            radius may wait for the curvature to be known.
        rtol: stop at |A x + b| <= rtol |b|.
        max_steps: products at most.

    Returns:
        The last iterate, or where the last direction leaves the ball.
    """
    x = [y * 0 for y in b]
    Ax = [y * 0 for y in b]
    r = [-y for y in b]
    p = [y.clone() for y in r]
    rr = start = tree.norm(b) ** 2
    k, curvature = 0, math.inf
    while k < max_steps and math.sqrt(rr) > rtol * math.sqrt(start):
        Ap = product(p)
        k += 1
        pp, pAp = tree.norm(p) ** 2, float(tree.inner(p, Ap))
        curvature = pAp / pp
        alpha = rr / pAp if pAp > 0 else math.inf
        ball = radius(curvature, tree.norm(x))
        ahead = [y + alpha * d for y, d in zip(x, p, strict=True)] if pAp > 0 else None
        if ahead is None or tree.norm(ahead) > ball:
            tau = _exit(x, p, ball)
            x = [y + tau * d for y, d in zip(x, p, strict=True)]
            Ax = [y + tau * d for y, d in zip(Ax, Ap, strict=True)]
            return Truncated(x, _value(b, x, Ax), k, True, curvature)
        x = ahead
        Ax = [y + alpha * d for y, d in zip(Ax, Ap, strict=True)]
        r = [y - alpha * d for y, d in zip(r, Ap, strict=True)]
        before, rr = rr, tree.norm(r) ** 2
        p = [y + rr / before * d for y, d in zip(r, p, strict=True)]
    return Truncated(x, _value(b, x, Ax), k, False, curvature)


def _exit(x: Vector, p: Vector, radius: float) -> float:
    """The positive tau with |x + tau p| = radius."""
    a, b, c = tree.norm(p) ** 2, float(tree.inner(x, p)), tree.norm(x) ** 2 - radius**2
    root = math.sqrt(max(0.0, b * b - a * c))
    # The root that does not cancel.
    return -c / (b + root) if b > 0 else (root - b) / a


def _value(b: Vector, x: Vector, Ax: Vector) -> float:
    return float(tree.inner(b, x)) + float(tree.inner(x, Ax)) / 2
