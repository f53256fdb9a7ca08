"""Which k-space positions are measured: Cartesian columns, Poisson discs, radial spokes.

A mask is a boolean tensor ``(rows, columns)`` with the zero frequency at ``(rows // 2, columns //
2)``. It is a function of the settings, the shape and the state of the generator, and of nothing
else.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from applications.mri.darts import poisson_discs
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

    Of ``N`` columns the ``L = round(N * center_fraction)`` central ones are kept, each other one
    with probability :math:`(N / a - L) / (N - L)`, so that ``N / a`` columns are expected.

    Attributes:
        acceleration: ``a``, all columns over expected kept columns, > 1.
        center_fraction: fraction of all columns that form the fully sampled centre, in (0, 1].

    Zbontar et al. 2018, fastMRI: An Open Dataset and Benchmarks for Accelerated MRI,
    arXiv:1811.08839, sec. 6.
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

    The spacing :math:`a (N - L) / (N - a L)` exceeds ``a`` just so much that together with the
    ``L`` central columns ``N / a`` are kept; columns ``offset + k * spacing`` are rounded to the
    grid and the offset is drawn from the integers below the rounded spacing.

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
        spacing = self.acceleration * (n_columns - n_low) / (n_columns - self.acceleration * n_low)
        offset = int(torch.randint(max(round(spacing), 1), (1,), generator=generator))
        kept = torch.zeros(n_columns, dtype=torch.bool)
        kept[torch.from_numpy(np.around(np.arange(offset, n_columns - 1, spacing))).long()] = True
        return _columns(kept, n_low, shape[0])


@dataclass(frozen=True)
class PoissonDisc(Sampling):
    r"""Two-dimensional variable-density Poisson discs: random, but no two samples close together.

    Darts are thrown at all positions in random order; one that lands at ``k`` keeps later ones out
    of the disc of radius :math:`r(k) = s (1/4 + |k|)` around it, ``|k|`` being the distance from
    the centre over half the matrix size; where r <= 1 every position is kept. Squared radii are
    rounded to integers at random, as rings of equal density would appear otherwise. The scale ``s``
    is bisected such that slightly more samples than asked fit; the last are left out. Thus exactly
    ``round(rows * columns / acceleration)`` are kept, and the squared distance of any two outside
    the calibration square is at least the integer part of the smaller of their r^2.

    Attributes:
        acceleration: all positions over kept ones, > 1.
        calibration: side of the fully sampled central square [positions], 0 for none.

    Bridson 2007, Fast Poisson disk sampling, DOI 10.1145/1278780.1278807, for the idea.
    """

    acceleration: float = 8.0
    calibration: int = 24

    def __post_init__(self) -> None:
        _check_acceleration(self.acceleration)
        if self.calibration < 0:
            raise InputError(f"calibration must be >= 0, got {self.calibration}; 0 means none.")

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        rows, columns = _check_shape(shape)
        n_samples, side = round(rows * columns / self.acceleration), self.calibration
        if n_samples < max(side**2, 1) or side > min(shape):
            raise InputError(
                f"acceleration {self.acceleration:g} leaves {n_samples} samples of a {rows} x "
                f"{columns} "
                f"matrix, which must hold a {side} x {side} calibration square; lower either."
            )
        kept = torch.zeros(shape, dtype=torch.bool)
        top, left = rows // 2 - side // 2, columns // 2 - side // 2
        kept[top : top + side, left : left + side] = True
        order = torch.randperm(rows * columns, generator=generator)
        order = order[~kept.view(-1)[order]]
        kept.view(-1)[poisson_discs(order, shape, n_samples - side**2, generator)] = True
        return kept


@dataclass(frozen=True)
class Radial(Sampling):
    """Straight spokes through the centre, rounded to the grid, from a random first angle.

    A spoke reaches the edge of the ellipse inscribed in the matrix; the corners stay empty.

    Attributes:
        spokes: number of diameters, >= 1.
        golden: step by the golden angle, pi / 1.618 (any number of spokes is then nearly uniform,
            and masks of fewer spokes are contained in those of more), instead of pi / spokes.

    Winkelmann et al. 2007, DOI 10.1109/TMI.2006.885337, for the golden angle.
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
    """The acceleration that a boolean mask achieves: all positions over kept ones.

    Args:
        mask: boolean, any shape, not all false.

    Returns:
        A number >= 1.
    """
    check_mask(mask, tuple(mask.shape))
    return mask.numel() / int(mask.sum())


def samples_columns(mask: Tensor) -> bool:
    """Whether a mask, shape ``(..., rows, columns)``, keeps whole columns or nothing of them."""
    return bool((mask == mask[..., :1, :]).all())


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
            f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}; draw it anew."
        )
    if not bool(mask.any()):
        raise InputError(
            f"{name} must keep at least one position, it keeps none; lower the acceleration."
        )


def _check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"the matrix size must be (rows, columns), both >= 1, got {tuple(shape)}.")
    return shape


def _check_acceleration(acceleration: float) -> None:
    if not 1 < acceleration < math.inf:
        raise InputError(
            f"acceleration must be > 1, got {acceleration}; full sampling is a mask of ones."
        )


def _check_cartesian(acceleration: float, center_fraction: float) -> None:
    _check_acceleration(acceleration)
    if not 0 < center_fraction <= 1:
        raise InputError(f"center_fraction must lie in (0, 1], got {center_fraction}.")
    if center_fraction >= 1 / acceleration:
        raise InputError(
            f"center_fraction must be below 1 / acceleration = {1 / acceleration:.4g}, got "
            f"{center_fraction}: the centre alone exceeds the columns to keep; lower either."
        )


def _n_low(n_columns: int, acceleration: float, center_fraction: float) -> int:
    n_low = round(n_columns * center_fraction)
    if not 1 <= n_low < n_columns / acceleration:
        raise InputError(
            f"of {n_columns} columns acceleration {acceleration:g} keeps "
            f"{n_columns / acceleration:g} and center_fraction {center_fraction:g} takes {n_low} "
            "of "
            "them; at least one must be central and one not. Change either."
        )
    return n_low


def _columns(kept: Tensor, n_low: int, n_rows: int) -> Tensor:
    first = (kept.numel() - n_low + 1) // 2
    kept[first : first + n_low] = True
    return kept.repeat(n_rows, 1)
