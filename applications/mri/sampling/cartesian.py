"""Samplings of whole columns around a fully sampled centre."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.sampling.base import Sampling, check_acceleration, check_shape


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
        check_cartesian(self.acceleration, self.center_fraction)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        n_columns = check_shape(shape)[1]
        n_low = n_central(n_columns, self.acceleration, self.center_fraction)
        probability = (n_columns / self.acceleration - n_low) / (n_columns - n_low)
        kept = torch.rand(n_columns, generator=generator, dtype=torch.float64) < probability
        return columns_around(kept, n_low, shape[0])


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
        check_cartesian(self.acceleration, self.center_fraction)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        n_columns = check_shape(shape)[1]
        n_low = n_central(n_columns, self.acceleration, self.center_fraction)
        spacing = self.acceleration * (n_columns - n_low) / (n_columns - self.acceleration * n_low)
        offset = int(torch.randint(max(round(spacing), 1), (1,), generator=generator))
        kept = torch.zeros(n_columns, dtype=torch.bool)
        kept[torch.from_numpy(np.around(np.arange(offset, n_columns - 1, spacing))).long()] = True
        return columns_around(kept, n_low, shape[0])


@dataclass(frozen=True)
class CartesianMagic(Sampling):
    r"""Offset sampling by the definition of fastMRI: equal spacing, the two halves interleaved.

    The k-space of a real image is conjugate symmetric. Columns at the frequencies :math:`p + k s`
    and :math:`-(q + k s)`, with ``p`` and ``q`` apart by 2, measure each other's gaps, while an
    equal spacing over both halves may measure the same twice. Of the integer offset ``o`` in 0 to
    s - 1, ``p = o + 1`` and ``q = o + 3`` where it is even, ``p = o + 2`` and ``q = o`` where it is
    odd. The spacing :math:`s = N / (N / a - L)`, rounded, is coarse: 4-fold often comes out near
    4.3-fold. What a mask achieves is `acceleration_of`.

    Attributes:
        acceleration: ``a``, all columns over kept columns, > 1.
        center_fraction: fraction of all columns that form the fully sampled centre, in (0, 1].

    Defazio 2019, Offset Sampling Improves Deep Learning based Accelerated MRI Reconstructions by
    Exploiting Symmetry, arXiv:1912.01101; the class is called MagicMaskFractionFunc in fastMRI.
    """

    acceleration: float = 4.0
    center_fraction: float = 0.08

    def __post_init__(self) -> None:
        check_cartesian(self.acceleration, self.center_fraction)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        n_columns = check_shape(shape)[1]
        n_low = n_central(n_columns, self.acceleration, self.center_fraction)
        n_outer = max(round(n_columns / self.acceleration) - n_low, 1)
        spacing = max(round(n_columns / n_outer), 1)
        offset = int(torch.randint(spacing, (1,), generator=generator))
        first, opposite = (offset + 1, offset + 3) if offset % 2 == 0 else (offset + 2, offset)
        centre = n_columns // 2
        kept = torch.zeros(n_columns, dtype=torch.bool)
        kept[centre + first :: spacing] = True
        kept[torch.arange(centre - opposite, -1, -spacing)] = True
        return columns_around(kept, n_low, shape[0])


def check_cartesian(acceleration: float, center_fraction: float) -> None:
    """Refuses settings that no number of columns can meet.

    Args:
        acceleration: all columns over kept columns.
        center_fraction: fraction of all columns that form the fully sampled centre.

    Raises:
        InputError: if one is out of range, or the centre alone exceeds the columns to keep.
    """
    check_acceleration(acceleration)
    if not 0 < center_fraction <= 1:
        raise InputError(f"center_fraction must lie in (0, 1], got {center_fraction}.")
    if center_fraction >= 1 / acceleration:
        raise InputError(
            f"center_fraction must be below 1 / acceleration = {1 / acceleration:.4g}, got "
            f"{center_fraction}: the centre alone exceeds the columns to keep; lower either."
        )


def n_central(n_columns: int, acceleration: float, center_fraction: float) -> int:
    """The number of central columns.

    Args:
        n_columns: number of all columns.
        acceleration: all columns over kept columns.
        center_fraction: fraction of all columns that form the fully sampled centre.

    Returns:
        ``round(n_columns * center_fraction)``.

    Raises:
        InputError: if that is none, or all that are to be kept.
    """
    n_low = round(n_columns * center_fraction)
    if not 1 <= n_low < n_columns / acceleration:
        raise InputError(
            f"of {n_columns} columns acceleration {acceleration:g} keeps "
            f"{n_columns / acceleration:g} and center_fraction {center_fraction:g} takes {n_low} "
            "of them; at least one must be central and one not. Change either."
        )
    return n_low


def columns_around(kept: Tensor, n_low: int, n_rows: int) -> Tensor:
    """A mask of whole columns, the central ones included.

    Args:
        kept: boolean, shape ``(columns,)``.
        n_low: number of central columns.
        n_rows: number of rows.

    Returns:
        Boolean mask, shape ``(n_rows, columns)``.
    """
    kept = kept.clone()
    first = (kept.numel() - n_low + 1) // 2
    kept[first : first + n_low] = True
    return kept.repeat(n_rows, 1)
