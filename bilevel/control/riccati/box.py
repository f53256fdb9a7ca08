"""Small quadratic problems on boxes, many side by side, by projected Newton steps."""

from typing import NamedTuple

import torch
from torch import Tensor

ITERATIONS = 60
_HALVINGS = 12


class BoxMinimum(NamedTuple):
    """Where x^T H x / 2 + g^T x is least on low <= x <= high.

    Attributes:
        x: the minimiser, shape ``(b, m)``.
        free: which numbers no bound holds.
        factor: Cholesky factor of H on the free numbers, the identity elsewhere.
        failed: where H is not positive definite on the free numbers.
    """

    x: Tensor
    free: Tensor
    factor: Tensor
    failed: Tensor


def box_minimum(H: Tensor, g: Tensor, low: Tensor, high: Tensor) -> BoxMinimum:
    """Minimise from 0, which lies in the box (Tassa, Mansard & Todorov 2014, algorithm 1).

    Args:
        H: symmetric, shape ``(b, m, m)``.
        g: shape ``(b, m)``.
        low: at most 0, shape ``(b, m)``.
        high: at least 0, shape ``(b, m)``.

    Returns:
        The minimum of each problem.
    """
    if g.shape[1] == 1:
        return _of_one_number(H[:, :, 0], g, low, high)
    x = torch.zeros_like(g)
    identity = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
    shrunk = 0.5 ** torch.arange(_HALVINGS, dtype=g.dtype, device=g.device).view(-1, 1, 1)
    eps = torch.finfo(g.dtype).eps
    free, factor = torch.ones_like(g, dtype=torch.bool), H
    info = torch.zeros(len(g), dtype=torch.int32, device=g.device)
    for _ in range(ITERATIONS):
        slope = g + _times(H, x)
        free = ~(((x <= low) & (slope > 0)) | ((x >= high) & (slope < 0)))
        both = free.unsqueeze(1) & free.unsqueeze(2)
        factor, info = torch.linalg.cholesky_ex(torch.where(both, H, identity))
        step = -torch.cholesky_solve((slope * free).unsqueeze(2), factor).squeeze(2)
        trials = torch.minimum(torch.maximum(x + shrunk * step, low), high)  # (halvings, b, m)
        moved = trials - x
        change = ((slope + _times(H, moved) / 2) * moved).sum(2)
        enough = change <= 0.1 * (slope * moved).sum(2)
        # The longest step that lowers enough; none where rounding hides what is left.
        first = enough.to(torch.int8).argmax(0)
        best = trials.gather(0, first.view(1, -1, 1).expand(1, *x.shape))[0]
        # A full step that no bound cut off ends at the minimum over the free numbers.
        whole = ((x + step) == trials[0]).all(1)
        go = enough.any(0) & (info == 0)
        before, x = x, torch.where(go.unsqueeze(1), best, x)
        small = (x - before).abs().amax(1) <= eps * x.abs().amax(1)
        after = g + _times(H, x)
        now = ~(((x <= low) & (after > 0)) | ((x >= high) & (after < 0)))
        settled = (whole | small | ~go) & (now == free).all(1)
        if bool((settled | (info != 0)).all()):
            break
    return BoxMinimum(x, free, factor, info != 0)


def _of_one_number(h: Tensor, g: Tensor, low: Tensor, high: Tensor) -> BoxMinimum:
    """The same for one number, where it is a formula."""
    convex = h > 0
    inside = torch.where(convex, -g / torch.where(convex, h, 1.0), 0.0)
    x = torch.minimum(torch.maximum(inside, low), high)
    slope = torch.where(x == inside, torch.where(convex, 0.0, g), g + h * x)
    free = ~(((x <= low) & (slope > 0)) | ((x >= high) & (slope < 0)))
    factor = torch.where(free & convex, h, 1.0).sqrt().unsqueeze(2)
    return BoxMinimum(x, free, factor, (free & ~convex)[:, 0])


def _times(H: Tensor, x: Tensor) -> Tensor:
    return (H @ x.unsqueeze(-1)).squeeze(-1)
