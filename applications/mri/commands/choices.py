"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from applications.mri.network.architecture import PRESETS
from applications.mri.sampling.from_file import SUFFIXES
from applications.mri.sampling.named import NAMED

Preset = Annotated[str | None, typer.Option(help=f"Network: {', '.join(PRESETS)}; light.")]
Init = Annotated[
    str | None, typer.Option(help="Weights to begin with; pretrained: the bundled ones.")
]
TaskFile = Annotated[Path | None, typer.Option(help="Task list, YAML.")]
TaskTexts = Annotated[
    list[str] | None, typer.Option(help="One more task: name=...,anatomy=...,acceleration=...")
]
MaskOption = Annotated[
    str, typer.Option(help=f"Sampling: {', '.join(NAMED)}, or a file ({', '.join(SUFFIXES)}).")
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
