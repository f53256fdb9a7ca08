"""Samplings of Gaussian density: many columns, or positions, near the centre and few far from it.

What is kept is drawn without replacement: noise of Gumbel's distribution is added to the logarithms
of the density, and the largest sums are kept. The number kept is therefore exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.sampling.base import Sampling, check_shape
from applications.mri.sampling.cartesian import check_cartesian, columns_around, n_central
from applications.mri.sampling.scattered import calibration_square, check_scattered


@dataclass(frozen=True)
class GaussianColumns(Sampling):
    r"""Exactly ``round(N / a)`` of ``N`` columns, those outside the centre by a Gaussian density.

    The density at column ``k`` is :math:`\exp(-\tfrac12 ((k - \lfloor N/2 \rfloor) / (w N))^2)`.

    Attributes:
        acceleration: ``a``, all columns over kept columns, > 1.
        center_fraction: fraction of all columns that form the fully sampled centre, in (0, 1].
        width: ``w``, standard deviation as a share of the columns, > 0.
    """

    acceleration: float = 4.0
    center_fraction: float = 0.08
    width: float = 1 / 6

    def __post_init__(self) -> None:
        check_cartesian(self.acceleration, self.center_fraction)
        _check_width(self.width)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        n_columns = check_shape(shape)[1]
        n_low = n_central(n_columns, self.acceleration, self.center_fraction)
        centre = columns_around(torch.zeros(n_columns, dtype=torch.bool), n_low, 1)[0]
        missing = round(n_columns / self.acceleration) - n_low
        density = _log_gaussian(n_columns, self.width)
        return (centre | _drawn(density, centre, missing, generator)).repeat(shape[0], 1)


@dataclass(frozen=True)
class GaussianPoints(Sampling):
    r"""Exactly ``round(rows * columns / acceleration)`` positions by a Gaussian density.

    The density is the product of that of `GaussianColumns` over rows and over columns.

    Attributes:
        acceleration: all positions over kept ones, > 1.
        calibration: side of the fully sampled central square [positions], 0 for none.
        width: standard deviation as a share of the matrix, along rows and along columns, > 0.
    """

    acceleration: float = 8.0
    calibration: int = 24
    width: float = 1 / 6

    def __post_init__(self) -> None:
        check_scattered(self.acceleration, self.calibration)
        _check_width(self.width)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: D102
        centre = calibration_square(shape, self.acceleration, self.calibration)
        missing = round(centre.numel() / self.acceleration) - self.calibration**2
        along_rows, along_columns = (_log_gaussian(n, self.width) for n in shape)
        density = along_rows[:, None] + along_columns[None, :]
        return centre | _drawn(density, centre, missing, generator)


def _log_gaussian(n: int, width: float) -> Tensor:
    return -0.5 * ((torch.arange(n, dtype=torch.float64) - n // 2) / (width * n)).square()


def _drawn(
    log_density: Tensor, excluded: Tensor, n_drawn: int, generator: torch.Generator
) -> Tensor:
    """`n_drawn` positions outside `excluded`, without replacement, as a mask."""
    uniform = torch.rand(log_density.shape, generator=generator, dtype=torch.float64)
    # Gumbel noise -log(-log U); U = 0 gives -inf, the last to be drawn, and U < 1 always.
    keys = (log_density - (-uniform.log()).log()).masked_fill(excluded, -torch.inf)
    kept = torch.zeros(log_density.numel(), dtype=torch.bool)
    kept[keys.flatten().topk(max(n_drawn, 0)).indices] = True
    return kept.view(log_density.shape)


def _check_width(width: float) -> None:
    if not 0 < width < torch.inf:
        raise InputError(f"width must be > 0, got {width}; 1 / 6 reaches the edge at 3 sigma.")
