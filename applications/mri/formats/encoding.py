"""What a raw file says of a Cartesian 2-D scan, whatever its format, and where its voxels lie."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.mri.formats.base import Geometry


@dataclass(frozen=True)
class Encoding:
    """Sizes of a Cartesian 2-D scan, as its header declares them.

    Attributes:
        encoded: matrix size ``(readout, phase encoding)`` that was measured.
        n_rows: samples of the readout without oversampling.
        n_columns: columns of the image without oversampling of the phase encoding.
        step_centre: phase encoding step of the zero frequency.
        spacing: of the voxels [mm].
        calibration: whether lines of calibration belong to the image.
        acquisition: name of the protocol.
    """

    encoded: tuple[int, int]
    n_rows: int
    n_columns: int
    step_centre: int
    spacing: tuple[float, float, float]
    calibration: bool
    acquisition: str


def geometry_of(
    encoding: Encoding, directions: NDArray[np.float64], positions: NDArray[np.float64], path: Path
) -> Geometry:
    """Where the voxels of the image lie.

    Args:
        encoding: sizes.
        directions: of readout, phase encoding and slices, of each line, ``(lines, 3, 3)``, in
            left-posterior-superior coordinates; zeros where they are not known.
        positions: of the centre of each slice [mm], in the order of the slices.
        path: the file, for messages.

    Returns:
        Geometry; without affine where directions are not known, or the slices are not equally
        apart.

    Raises:
        InputError: if the lines have different directions, or these are not at right angles.
    """
    if not directions.any():
        return Geometry(encoding.spacing)
    axes = directions[0]
    if not np.allclose(directions, axes, atol=1e-3):
        raise InputError(
            f"{path}: all lines of a volume must have the same directions, they have several; "
            "split the scan."
        )
    if not np.allclose(axes @ axes.T, np.eye(3), atol=1e-2):
        raise InputError(
            f"{path}: directions of readout, phase encoding and slices must be of length 1 and at "
            f"right angles, got {np.round(axes, 3).tolist()}; correct the acquisition headers."
        )
    dx, dy, thickness = encoding.spacing
    steps = np.diff(positions, axis=0) if len(positions) > 1 else axes[2:] * thickness
    apart = float(np.linalg.norm(steps[0]))
    if apart == 0 or np.abs(steps - steps[0]).max() > 0.01 * apart:
        return Geometry(encoding.spacing)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([axes[0] * dx, axes[1] * dy, steps[0]], axis=1)
    n = encoding.encoded[1]
    # The pixel that a centred transform puts at the centre, after the columns have been cropped.
    centre = (encoding.n_rows // 2, n // 2 - (n - encoding.n_columns) // 2)
    affine[:3, 3] = positions[0] - affine[:3, :2] @ centre
    affine[:2] *= -1  # to right-anterior-superior
    return Geometry((dx, dy, apart), tuple(tuple(map(float, row)) for row in affine))
