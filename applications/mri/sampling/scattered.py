"""Samplings of single positions: Poisson discs, Gaussian density, radial spokes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.sampling.base import Sampling, check_acceleration, check_shape
from applications.mri.sampling.darts import poisson_discs


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
        check_scattered(self.acceleration, self.calibration)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        kept = calibration_square(shape, self.acceleration, self.calibration)
        order = torch.randperm(kept.numel(), generator=generator)
        order = order[~kept.view(-1)[order]]
        missing = round(kept.numel() / self.acceleration) - self.calibration**2
        kept.view(-1)[poisson_discs(order, shape, missing, generator)] = True
        return kept


_MOST_SPOKES = 10_000  # far more than fill any image


@dataclass(frozen=True)
class Radial(Sampling):
    """Straight spokes through the centre, rounded to the grid, from a random first angle.

    A spoke reaches the edge of the ellipse inscribed in the matrix; the corners stay empty.

    Attributes:
        spokes: number of diameters, 1 to 10000.
        golden: step by the golden angle, pi / 1.618 (any number of spokes is then nearly uniform,
            and masks of fewer spokes are contained in those of more), instead of pi / spokes.

    Winkelmann et al. 2007, DOI 10.1109/TMI.2006.885337, for the golden angle.
    """

    spokes: int = 32
    golden: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.spokes <= _MOST_SPOKES:
            raise InputError(f"spokes must lie in 1 to {_MOST_SPOKES}, got {self.spokes}.")

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        rows, columns = check_shape(shape)
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


def check_scattered(acceleration: float, calibration: int) -> None:
    """Refuses settings that no matrix can meet.

    Args:
        acceleration: all positions over kept ones.
        calibration: side of the central square [positions].

    Raises:
        InputError: if one is out of range.
    """
    check_acceleration(acceleration)
    if calibration < 0:
        raise InputError(f"calibration must be >= 0, got {calibration}; 0 means none.")


def calibration_square(shape: tuple[int, int], acceleration: float, side: int) -> Tensor:
    """The fully sampled central square alone.

    Args:
        shape: matrix size ``(rows, columns)``.
        acceleration: all positions over kept ones.
        side: of the square [positions].

    Returns:
        Boolean mask, shape ``(rows, columns)``.

    Raises:
        InputError: if the square holds more positions than are to be kept, or does not fit.
    """
    rows, columns = check_shape(shape)
    n_samples = round(rows * columns / acceleration)
    if n_samples < max(side**2, 1) or side > min(shape):
        raise InputError(
            f"acceleration {acceleration:g} leaves {n_samples} samples of a {rows} x {columns} "
            f"matrix, which must hold a {side} x {side} calibration square; lower either."
        )
    kept = torch.zeros(shape, dtype=torch.bool)
    top, left = rows // 2 - side // 2, columns // 2 - side // 2
    kept[top : top + side, left : left + side] = True
    return kept
