"""Samplings by the names that command lines and task lists give them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from applications.errors import InputError
from applications.mri.sampling.base import Sampling
from applications.mri.sampling.cartesian import CartesianEquispaced, CartesianMagic, CartesianRandom
from applications.mri.sampling.from_file import SUFFIXES, FromFile
from applications.mri.sampling.gaussian import GaussianColumns, GaussianPoints
from applications.mri.sampling.scattered import PoissonDisc, Radial
from applications.settings import setting

NAMED: dict[str, type[Any]] = {
    "random": CartesianRandom,
    "equispaced": CartesianEquispaced,
    "magic": CartesianMagic,
    "gaussian": GaussianColumns,
    "gaussian-2d": GaussianPoints,
    "poisson": PoissonDisc,
    "radial": Radial,
}
_FLAGS = {"center_fraction": "center"}


def chosen_sampling(mask: str, **options: float | None) -> Sampling:
    """The sampling of a name or a file; an option that it does not have is an error, not ignored.

    Args:
        mask: name, or path of a file.
        options: fields of the sampling; None leaves the default.

    Returns:
        The sampling.

    Raises:
        InputError: if there is no such name, an option does not belong to it, or the file is bad.
    """
    kind = NAMED.get(mask)
    if kind is None and Path(mask).suffix not in SUFFIXES:
        raise InputError(
            f"--mask must be one of {', '.join(NAMED)}, or a file ending in one of "
            f"{', '.join(SUFFIXES)}, got {mask!r}."
        )
    given = {name: value for name, value in options.items() if value is not None}
    fitting = set() if kind is None else {field.name for field in fields(kind)}
    for name in sorted(given.keys() - fitting):
        raise InputError(
            f"--{_FLAGS.get(name, name)} does not belong to --mask {mask}; leave it out."
        )
    return FromFile(Path(mask)) if kind is None else kind(**given)


@dataclass(frozen=True)
class Masking:
    """A sampling as command lines and task lists write it.

    Attributes:
        mask: name, or path of a file.
        acceleration: of the sampling, like the next four; None: the default.
        center: fully sampled share of the columns.
        calibration: side of the fully sampled square.
        width: standard deviation of a Gaussian density.
        spokes: of a radial mask.
    """

    mask: str = setting(
        "random", f"Sampling: {', '.join(NAMED)}, or a file ({', '.join(SUFFIXES)})."
    )
    acceleration: float | None = setting(
        None, "All positions over measured ones; 4, for poisson and gaussian-2d 8."
    )
    center: float | None = setting(None, "Masks of columns: fully sampled share of them; 0.08.")
    calibration: int | None = setting(
        None, "poisson, gaussian-2d: side of the fully sampled square; 24."
    )
    width: float | None = setting(
        None, "gaussian, gaussian-2d: standard deviation as share of the matrix; 0.167."
    )
    spokes: int | None = setting(None, "radial: number of spokes; 32.")

    @property
    def sampling(self) -> Sampling:
        """The sampling; an option that it does not have raises InputError."""
        return chosen_sampling(
            self.mask,
            acceleration=self.acceleration,
            center_fraction=self.center,
            calibration=self.calibration,
            width=self.width,
            spokes=self.spokes,
        )
