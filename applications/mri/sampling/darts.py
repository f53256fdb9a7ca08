"""Dart throwing: random grid positions whose mutual distance grows away from the centre."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def poisson_discs(
    order: Tensor, shape: tuple[int, int], n_darts: int, generator: torch.Generator
) -> Tensor:
    """Keeps darts that land in no disc of an earlier one, at nearly the largest scale with enough.

    Args:
        order: flat positions on the grid in the order of the darts.
        shape: ``(rows, columns)`` of the grid.
        n_darts: how many to keep, at most ``order.numel()``.
        generator: rounds the squared radii.

    Returns:
        The first ``n_darts`` flat positions that fit.
    """
    rows, columns = shape
    k_row = (torch.arange(rows) - rows // 2) / (rows / 2)
    k_column = (torch.arange(columns) - columns // 2) / (columns / 2)
    profile = 0.25 + torch.hypot(k_row[:, None], k_column[None, :]).flatten()[order].numpy()
    rounding = torch.rand(order.numel(), generator=generator).numpy()
    row, column = (order // columns).numpy(), (order % columns).numpy()
    low, high = (
        0.0,
        math.hypot(rows, columns),
    )  # at scale 0 all fit; at the other end one disc covers half the grid
    fitting = np.arange(order.numel())
    # The number that fits falls about as 1 / scale**2, so the geometric mean is the better middle.
    for _ in range(30):
        # Closer than 3 % the pattern looks the same: leaving the last darts out is a slight random
        # thinning.
        if fitting.size <= 1.03 * n_darts:
            break
        middle = math.sqrt(max(low, 0.5) * high)
        squared_radius = np.floor((middle * profile) ** 2 + rounding).astype(np.int64)
        kept = _throw(row, column, squared_radius, shape)
        if kept.size >= n_darts:
            low, fitting = middle, kept
        else:
            high = middle
    return order[torch.from_numpy(fitting[:n_darts])]


def _throw(
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    squared_radius: NDArray[np.int64],
    shape: tuple[int, int],
) -> NDArray[np.int64]:
    """Throws the darts and tells which land in no disc of an earlier one.

    A Python loop over plain bytes is the fast form here: each test costs 50 ns, and painting a disc
    is one indexed write through a NumPy view of the same bytes.

    Returns:
        Indices of the darts kept, in their order.
    """
    reach = max(shape)  # no larger disc matters
    squared_radius = squared_radius.clip(1, reach**2)
    margin = math.isqrt(int(squared_radius.max()))
    width = shape[1] + 2 * margin
    blocked = bytearray((shape[0] + 2 * margin) * width)
    view = np.frombuffer(blocked, dtype=np.uint8)
    discs: dict[int, NDArray[np.int64]] = {}
    kept: list[int] = []
    positions = ((row + margin) * width + column + margin).tolist()
    for dart, (position, squared) in enumerate(
        zip(positions, squared_radius.tolist(), strict=True)
    ):
        if not blocked[position]:
            kept.append(dart)
            if squared not in discs:
                discs[squared] = _disc(squared, width)
            view[position + discs[squared]] = 1
    return np.array(kept, dtype=np.int64)


def _disc(squared_radius: int, width: int) -> NDArray[np.int64]:
    """Flat offsets, in a grid ``width`` wide, of all positions nearer than the radius."""
    reach = math.isqrt(squared_radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    near = rows**2 + columns**2 < squared_radius
    return rows[near] * width + columns[near]
