"""Ritz values: what conjugate gradients learn of the spectrum on their way.

In Python floats: that is a tenth of LAPACK's cost through torch at n = 20, and linear in n.
"""

import itertools
import math
from collections.abc import Sequence


def smallest_ritz(runs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Smallest eigenvalue of the Lanczos matrices of runs of conjugate gradients.

    Args:
        runs: a pair each: the matrix is `L diag(pivots) L^T` with `L` unit lower bidiagonal; the
            pivots, and the squares of the entries below the diagonal of `L`.

    Returns:
        The eigenvalue; None before the first step.
    """
    found = [_of_run(pivots, ratios) for pivots, ratios in runs if pivots]
    return min(found, default=None)


def _of_run(pivots: Sequence[float], ratios: Sequence[float]) -> float:
    beside = [c * q * q for c, q in zip(ratios, pivots, strict=False)][: len(pivots) - 1]
    carried = [0.0, *(c * q for c, q in zip(ratios, pivots, strict=False))]
    return smallest_eigenvalue([q + c for q, c in zip(pivots, carried, strict=False)], beside)


def smallest_eigenvalue(diagonal: Sequence[float], beside: Sequence[float]) -> float:
    r"""Smallest eigenvalue of a symmetric tridiagonal matrix.

    Laguerre's iteration from below, which never passes it. The pivots :math:`d_j(x)` of
    :math:`T - x I` and their derivatives :math:`-u_j` give
    :math:`S_1 = \sum_i (\lambda_i - x)^{-1} = \sum_j u_j / d_j` and its derivative
    :math:`S_2 = \sum_i (\lambda_i - x)^{-2}`.

    Args:
        diagonal: n entries.
        beside: squares of the n - 1 entries next to it.

    Returns:
        The eigenvalue, to rounding.
    """
    n = len(diagonal)
    squares = [0.0, *beside]
    roots = [*map(math.sqrt, squares), 0.0]
    radii = [a + b for a, b in itertools.pairwise(roots)]
    x = min(a - b for a, b in zip(diagonal, radii, strict=True))  # Gershgorin
    scale = max(abs(a) + b for a, b in zip(diagonal, radii, strict=True))
    for _ in range(100):
        d, u, du, s1, s2 = 1.0, 0.0, 0.0, 0.0, 0.0
        for a, b in zip(diagonal, squares, strict=True):
            c = b / d
            u, du = 1 + c / d * u, c / d * (du + 2 * u * u / d)
            d = a - x - c
            if d <= 0:
                return x
            s1 += u / d
            s2 += du / d + (u / d) ** 2
        step = n / (s1 + math.sqrt(max(0.0, (n - 1) * (n * s2 - s1 * s1))))
        x += step
        if not step > 1e-16 * scale:
            break
    return x
