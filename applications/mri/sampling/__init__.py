"""Which k-space positions are measured: columns, Poisson discs, Gaussian density, radial spokes.

Read `base`, `cartesian`, `darts`, `scattered`, `gaussian`, `from_file`, `named`.
"""

from applications.mri.sampling.base import Sampling
from applications.mri.sampling.cartesian import (
    CartesianEquispaced,
    CartesianMagic,
    CartesianRandom,
)
from applications.mri.sampling.from_file import FromFile
from applications.mri.sampling.gaussian import GaussianColumns, GaussianPoints
from applications.mri.sampling.named import Masking, chosen_sampling
from applications.mri.sampling.scattered import PoissonDisc, Radial

__all__ = [
    "CartesianEquispaced",
    "CartesianMagic",
    "CartesianRandom",
    "FromFile",
    "GaussianColumns",
    "GaussianPoints",
    "Masking",
    "PoissonDisc",
    "Radial",
    "Sampling",
    "chosen_sampling",
]
