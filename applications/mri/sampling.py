"""Which k-space positions are measured: Cartesian columns, variable-density Poisson discs, radial spokes.

A mask is a boolean tensor ``(rows, columns)`` with the zero frequency at ``(rows // 2, columns // 2)``. It is a
function of the settings, the shape and the state of the generator, and of nothing else.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.mri.errors import InputError


class Sampling(ABC):
    """A way to choose the measured positions of k-space."""

    @abstractmethod
    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draws one mask.

        Args:
            shape: matrix size ``(rows, columns)``.
            generator: the only source of chance; it advances.

        Returns:
            Boolean mask, shape ``(rows, columns)``.

        Raises:
            InputError: if the settings cannot be met for this matrix size.
        """


@dataclass(frozen=True)
class CartesianRandom(Sampling):
    r"""Columns kept at random around a fully sampled centre, by the definition of fastMRI.

    Of ``N`` columns the ``L = round(N * center_fraction)`` central ones are kept, each other one with
    probability :math:`(N / a - L) / (N - L)`, so that ``N / a`` columns are expected.

    Attributes:
        acceleration: ``a``, all columns over expected kept columns, > 1.
        center_fraction: fraction of all columns that form the fully sampled centre, in (0, 1].

    Zbontar et al. 2018, fastMRI: An Open Dataset and Benchmarks for Accelerated MRI, arXiv:1811.08839, sec. 6.
    """

    acceleration: float = 4.0
    center_fraction: float = 0.08

    def __post_init__(self) -> None:
        _check_cartesian(self.acceleration, self.center_fraction)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        n_columns = _check_shape(shape)[1]
        n_low = _n_low(n_columns, self.acceleration, self.center_fraction)
        probability = (n_columns / self.acceleration - n_low) / (n_columns - n_low)
        kept = torch.rand(n_columns, generator=generator, dtype=torch.float64) < probability
        return _columns(kept, n_low, shape[0])


@dataclass(frozen=True)
class CartesianEquispaced(Sampling):
    r"""Columns at an equal spacing around a fully sampled centre, by the definition of fastMRI.

    The spacing :math:`a (N - L) / (N - a L)` exceeds ``a`` just so much that together with the ``L`` central
    columns ``N / a`` are kept; columns ``offset + k * spacing`` are rounded to the grid and the offset is drawn
    from the integers below the rounded spacing.

    Attributes:
        acceleration: ``a``, all columns over kept columns, > 1.
        center_fraction: fraction of all columns that form the fully sampled centre, in (0, 1].

    Zbontar et al. 2018, arXiv:1811.08839; the class is called EquispacedMaskFractionFunc there.
    """

    acceleration: float = 4.0
    center_fraction: float = 0.08

    def __post_init__(self) -> None:
        _check_cartesian(self.acceleration, self.center_fraction)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        n_columns = _check_shape(shape)[1]
        n_low = _n_low(n_columns, self.acceleration, self.center_fraction)
        spacing = (
            self.acceleration * (n_columns - n_low) / (n_columns - self.acceleration * n_low)
        )
        offset = int(torch.randint(max(round(spacing), 1), (1,), generator=generator))
        kept = torch.zeros(n_columns, dtype=torch.bool)
        kept[torch.from_numpy(np.around(np.arange(offset, n_columns - 1, spacing))).long()] = True
        return _columns(kept, n_low, shape[0])


@dataclass(frozen=True)
class PoissonDisc(Sampling):
    r"""Two-dimensional variable-density Poisson discs: random, but nowhere two samples close together.

    Darts are thrown at all grid positions in random order; one that lands at ``k`` keeps later ones out of the
    disc of radius :math:`r(k) = s (1/4 + |k|)` around it, :math:`|k|` being the distance from the centre relative
    to half the matrix size; where r <= 1 every position is kept. On the grid only the integer above r^2 counts, so
    that rings of equal density would appear; r^2 is instead rounded to a neighbouring integer at random, r^2 in the
    mean. The scale ``s`` is found by bisection such that slightly more samples than asked fit; the last ones are
    left out. The number of samples is thus ``round(rows * columns / acceleration)`` exactly, and the squared
    distance of any two outside the calibration square is at least the integer part of the smaller of their r^2.

    Attributes:
        acceleration: all positions over kept ones, > 1.
        calibration: side of the fully sampled central square [positions], 0 for none.

    Bridson 2007, Fast Poisson disk sampling in arbitrary dimensions, DOI 10.1145/1278780.1278807, for the idea.
    """

    acceleration: float = 8.0
    calibration: int = 24

    def __post_init__(self) -> None:
        _check_acceleration(self.acceleration)
        if self.calibration < 0:
            raise InputError(f"calibration must be >= 0, got {self.calibration}; 0 means no centre.")

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        rows, columns = _check_shape(shape)
        n_darts = round(rows * columns / self.acceleration) - self.calibration**2
        if n_darts < 0 or self.calibration > min(shape):
            raise InputError(
                f"a {self.calibration} x {self.calibration} calibration square must fit into the "
                f"{rows * columns / self.acceleration:.0f} samples that acceleration {self.acceleration:g} leaves "
                f"of a {rows} x {columns} matrix; lower calibration or acceleration."
            )
        kept = torch.zeros(shape, dtype=torch.bool)
        top, left = (n // 2 - self.calibration // 2 for n in shape)
        kept[top : top + self.calibration, left : left + self.calibration] = True
        order = torch.randperm(rows * columns, generator=generator)
        order = order[~kept.view(-1)[order]]
        kept.view(-1)[_poisson_discs(order, shape, n_darts, generator)] = True
        return kept


@dataclass(frozen=True)
class Radial(Sampling):
    """Straight spokes through the centre of k-space, rounded to the grid, from a random first angle.

    A spoke reaches the edge of the ellipse inscribed in the matrix; the corners stay empty.

    Attributes:
        spokes: number of diameters, >= 1.
        golden: step by the golden angle, pi / 1.618 (any number of spokes is then nearly uniform, and masks of
            fewer spokes are contained in those of more), instead of pi / spokes.

    Winkelmann et al. 2007, An Optimal Radial Profile Order Based on the Golden Ratio, DOI 10.1109/TMI.2006.885337.
    """

    spokes: int = 32
    golden: bool = True

    def __post_init__(self) -> None:
        if self.spokes < 1:
            raise InputError(f"spokes must be >= 1, got {self.spokes}.")

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        rows, columns = _check_shape(shape)
        start = math.pi * torch.rand(1, generator=generator, dtype=torch.float64)
        step = math.pi * (math.sqrt(5) - 1) / 2 if self.golden else math.pi / self.spokes
        angle = (start + step * torch.arange(self.spokes, dtype=torch.float64)).unsqueeze(1)
        # Twice as many points as positions along the longer axis leave no hole in a spoke.
        along = torch.linspace(-1, 1, 4 * (max(shape) // 2) + 1, dtype=torch.float64)
        row = (rows // 2 + angle.sin() * along * (rows // 2)).round().long()
        column = (columns // 2 + angle.cos() * along * (columns // 2)).round().long()
        inside = (row < rows) & (column < columns)  # an even axis ends one short of +n/2
        kept = torch.zeros(shape, dtype=torch.bool)
        kept[row[inside], column[inside]] = True
        return kept


def acceleration_of(mask: Tensor) -> float:
    """All positions over kept ones: the acceleration that a mask achieves.

    Args:
        mask: boolean, any shape.

    Returns:
        A number >= 1.

    Raises:
        InputError: if the mask keeps nothing.
    """
    check_mask(mask, tuple(mask.shape))
    return mask.numel() / int(mask.sum())


def check_mask(mask: Tensor, shape: tuple[int, ...], name: str = "mask") -> None:
    """Refuses a mask that does not fit.

    Args:
        mask: the mask to check.
        shape: the shape it must have, ``(rows, columns)``.
        name: what the message calls it, for example ``"scan.h5: mask"``.

    Raises:
        InputError: if the mask is not boolean, has another shape, or keeps nothing.
    """
    if mask.dtype != torch.bool:
        raise InputError(f"{name} must be boolean, got {mask.dtype}; convert it with mask != 0.")
    if tuple(mask.shape) != tuple(shape):
        raise InputError(
            f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}; draw it for this matrix size."
        )
    if not bool(mask.any()):
        raise InputError(f"{name} must keep at least one position, it keeps none; lower the acceleration.")


def _check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"the matrix size must be (rows, columns), both >= 1, got {tuple(shape)}.")
    return shape


def _check_acceleration(acceleration: float) -> None:
    if not 1 < acceleration < math.inf:
        raise InputError(
            f"acceleration must be > 1 and finite, got {acceleration}; for full sampling use a mask of ones."
        )


def _check_cartesian(acceleration: float, center_fraction: float) -> None:
    _check_acceleration(acceleration)
    if not 0 < center_fraction <= 1:
        raise InputError(f"center_fraction must lie in (0, 1], got {center_fraction}.")
    if center_fraction >= 1 / acceleration:
        raise InputError(
            f"center_fraction must be below 1 / acceleration = {1 / acceleration:.4g}, got {center_fraction}: the "
            "centre alone would exceed the columns to keep; lower center_fraction or acceleration."
        )


def _n_low(n_columns: int, acceleration: float, center_fraction: float) -> int:
    n_low = round(n_columns * center_fraction)
    if not 1 <= n_low < n_columns / acceleration:
        raise InputError(
            f"of {n_columns} columns center_fraction {center_fraction:g} makes {n_low} central ones, and acceleration "
            f"{acceleration:g} keeps {n_columns / acceleration:g}; at least one central column is needed, and one "
            "outside the centre. Change center_fraction or acceleration."
        )
    return n_low


def _columns(kept: Tensor, n_low: int, n_rows: int) -> Tensor:
    first = (kept.numel() - n_low + 1) // 2
    kept[first : first + n_low] = True
    return kept.repeat(n_rows, 1)


def _poisson_discs(
    order: Tensor, shape: tuple[int, int], n_darts: int, generator: torch.Generator
) -> Tensor:
    """The first ``n_darts`` flat positions of ``order`` that fit at nearly the largest scale where so many do."""
    rows, columns = shape
    k_row = (torch.arange(rows) - rows // 2) / (rows / 2)
    k_column = (torch.arange(columns) - columns // 2) / (columns / 2)
    profile = 0.25 + torch.hypot(k_row[:, None], k_column[None, :]).flatten()[order].numpy()
    rounding = torch.rand(order.numel(), generator=generator).numpy()
    row, column = (order // columns).numpy(), (order % columns).numpy()
    low, high = 0.0, math.hypot(rows, columns)  # at scale 0 all fit; at the other end one disc covers half the grid
    fitting = np.arange(order.numel())
    # The number that fits falls about as 1 / scale**2, so the geometric mean is the better middle.
    for _ in range(30):
        # Closer than 3 % the pattern looks the same: leaving the last darts out is a slight random thinning.
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
    """Indices of the darts that land in no disc of an earlier one.

    A Python loop over plain bytes is the fast form here: each test costs 50 ns, and painting a disc is one
    indexed write through a NumPy view of the same bytes.
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
    for dart, (position, squared) in enumerate(zip(positions, squared_radius.tolist(), strict=True)):
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
