"""What the header of an ISMRMRD file says of a Cartesian 2-D scan, and whether it can be so."""

import math
import warnings
from pathlib import Path
from typing import Any

from applications.errors import InputError
from applications.inputs import reading
from applications.mri.formats.base import optional
from applications.mri.formats.encoding import Encoding

_EMBEDDED = {"embedded", "interleaved"}
_MOST = 2**16 - 1  # samples of a line, and steps
_LOOSE = 1.05  # scanners round what they declare


def read_header(xml: bytes | str, path: Path) -> Any:
    """A header as `ismrmrd` reads it.

    Args:
        xml: the document.
        path: the file, for messages.

    Returns:
        The header.

    Raises:
        InputError: if the document is not a header, or the package is missing.
    """
    schema = optional("ismrmrd.xsd", path)
    what, remedy = "a header in ISMRMRD's XML", "convert the scan again"
    with reading(path, what, remedy), warnings.catch_warnings():
        warnings.simplefilter("error")  # a value of the wrong type is only warned of
        return schema.CreateFromDocument(xml)


def checked_encoding(encoding: Any, header: Any, path: Path) -> Encoding:
    """The sizes of a Cartesian 2-D scan.

    Args:
        encoding: one encoding.
        header: the header it is of.
        path: the file, for messages.

    Returns:
        The record `Encoding`.

    Raises:
        InputError: if the scan is not of this kind, or its sizes contradict each other.
    """
    trajectory = encoding.trajectory.value
    if trajectory != "cartesian":
        raise InputError(
            f"{path}: the trajectory must be cartesian, got {trajectory}; grid the scan first."
        )
    measured, shown = encoding.encodedSpace, encoding.reconSpace
    if measured.matrixSize.z != 1:
        raise InputError(
            f"{path}: a 2-D scan was needed, encoded matrix size z must be 1, got "
            f"{measured.matrixSize.z}; transform 3-D scans along one axis and store them as slices."
        )
    n_rows = _inside(measured, shown, "x", path)
    n_columns = _inside(measured, shown, "y", path)
    encoded = (measured.matrixSize.x, measured.matrixSize.y)
    limit = encoding.encodingLimits.kspace_encoding_step_1
    parallel = encoding.parallelImaging
    mode = None if parallel is None else parallel.calibrationMode
    about = header.measurementInformation
    view = measured.fieldOfView_mm
    if not 0 <= view.z < math.inf:
        raise InputError(
            f"{path}: the field of view along z must be finite, got {view.z} mm; correct the "
            "header."
        )
    return Encoding(
        encoded,
        n_rows,
        n_columns,
        encoded[1] // 2 if limit is None else limit.center,
        (view.x / encoded[0], view.y / encoded[1], view.z),
        mode is not None and mode.value in _EMBEDDED,
        (None if about is None else about.protocolName) or "unknown",
    )


def _inside(measured: Any, shown: Any, axis: str, path: Path) -> int:
    """Pixels of the encoded field of view that lie inside the shown one."""
    n, n_shown = (getattr(space.matrixSize, axis) for space in (measured, shown))
    length, length_shown = (getattr(space.fieldOfView_mm, axis) for space in (measured, shown))
    sizes = 1 <= min(n, n_shown) <= max(n, n_shown) <= _MOST
    if not sizes or not 0 < min(length, length_shown) <= max(length, length_shown) < math.inf:
        raise InputError(
            f"{path}: matrix sizes and fields of view along {axis} must be > 0, and sizes at most "
            f"{_MOST}, got {n} and {n_shown}, {length} and {length_shown} mm; correct the header."
        )
    inside = round(min(n * length_shown / length, 2.0 * _MOST))
    # A larger shown matrix is interpolation, which is left out. A smaller one is a coarser image,
    # usual along the phase encoding; along the readout it says oversampling, as the views must too.
    if inside < 1 or inside > _LOOSE * n or (axis == "x" and _LOOSE * n_shown < inside):
        raise InputError(
            f"{path}: oversampling along {axis} must be the same in matrix size and field of view, "
            f"got {n} of {length:g} mm encoded for {n_shown} of {length_shown:g} mm shown; correct "
            "the header."
        )
    return min(inside, n)
