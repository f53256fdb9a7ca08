"""Samplings by the names that command lines and task lists give them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from applications.errors import InputError
from applications.mri.sampling.base import Sampling
from applications.mri.sampling.cartesian import CartesianEquispaced, CartesianMagic, CartesianRandom
from applications.mri.sampling.from_file import SUFFIXES, FromFile
from applications.mri.sampling.gaussian import GaussianColumns, GaussianPoints
from applications.mri.sampling.scattered import PoissonDisc, Radial

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
