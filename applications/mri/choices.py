"""Options that several commands have, and samplings as the command line names them."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from applications.errors import InputError
from applications.mri.mask_files import SUFFIXES, FromFile
from applications.mri.network import PRESETS
from applications.mri.sampling import (
    CartesianEquispaced,
    CartesianMagic,
    CartesianRandom,
    GaussianColumns,
    GaussianPoints,
    PoissonDisc,
    Radial,
    Sampling,
)

_NAMED: dict[str, type[Any]] = {
    "random": CartesianRandom,
    "equispaced": CartesianEquispaced,
    "magic": CartesianMagic,
    "gaussian": GaussianColumns,
    "gaussian-2d": GaussianPoints,
    "poisson": PoissonDisc,
    "radial": Radial,
}
_FLAGS = {"center_fraction": "center"}

Preset = Annotated[str | None, typer.Option(help=f"Network: {', '.join(PRESETS)}; light.")]
Init = Annotated[
    str | None, typer.Option(help="Weights to begin with; pretrained: the bundled ones.")
]
TaskFile = Annotated[Path | None, typer.Option(help="Task list, YAML.")]
TaskTexts = Annotated[
    list[str] | None, typer.Option(help="One more task: name=...,anatomy=...,acceleration=...")
]
MaskOption = Annotated[
    str, typer.Option(help=f"Sampling: {', '.join(_NAMED)}, or a file ({', '.join(SUFFIXES)}).")
]
Acceleration = Annotated[
    float | None,
    typer.Option(help="All positions over measured ones; 4, for poisson and gaussian-2d 8."),
]
Centre = Annotated[
    float | None, typer.Option(help="Masks of columns: fully sampled share of them; 0.08.")
]
Calibration = Annotated[
    int | None, typer.Option(help="poisson, gaussian-2d: side of the fully sampled square; 24.")
]
Width = Annotated[
    float | None,
    typer.Option(help="gaussian, gaussian-2d: standard deviation as share of the matrix; 0.167."),
]
Spokes = Annotated[int | None, typer.Option(help="radial: number of spokes; 32.")]


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
    kind = _NAMED.get(mask)
    if kind is None and Path(mask).suffix not in SUFFIXES:
        raise InputError(
            f"--mask must be one of {', '.join(_NAMED)}, or a file ending in one of "
            f"{', '.join(SUFFIXES)}, got {mask!r}."
        )
    given = {name: value for name, value in options.items() if value is not None}
    fitting = set() if kind is None else {field.name for field in fields(kind)}
    for name in sorted(given.keys() - fitting):
        raise InputError(
            f"--{_FLAGS.get(name, name)} does not belong to --mask {mask}; leave it out."
        )
    return FromFile(Path(mask)) if kind is None else kind(**given)
