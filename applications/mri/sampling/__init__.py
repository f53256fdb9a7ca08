"""Which k-space positions are measured: columns, Poisson discs, Gaussian density, radial spokes."""

from applications.mri.sampling.base import (
    Sampling,
    acceleration_of,
    check_mask,
    samples_columns,
)
from applications.mri.sampling.cartesian import (
    CartesianEquispaced,
    CartesianMagic,
    CartesianRandom,
)
from applications.mri.sampling.gaussian import GaussianColumns, GaussianPoints
from applications.mri.sampling.scattered import PoissonDisc, Radial

__all__ = [
    "CartesianEquispaced",
    "CartesianMagic",
    "CartesianRandom",
    "GaussianColumns",
    "GaussianPoints",
    "PoissonDisc",
    "Radial",
    "Sampling",
    "acceleration_of",
    "check_mask",
    "samples_columns",
]
