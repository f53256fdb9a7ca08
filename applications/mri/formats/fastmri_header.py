"""The ISMRMRD header that files in the layout of fastMRI carry: written, and what is read of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import h5py

from applications.errors import InputError
from applications.inputs import checked_xml
from applications.mri.formats.base import Geometry
from applications.mri.formats.hdf5 import Contents

_LARGEST = 1e9  # what is larger, or not finite, is not stated


@dataclass(frozen=True)
class Declared:
    """What a header declares.

    Attributes:
        geometry: sizes of the voxels, or None.
        shown: matrix size ``(rows, columns)`` of the image to be shown, or None.
    """

    geometry: Geometry | None = None
    shown: tuple[int, int] | None = None


def minimal_header(encoded: Sequence[int], shown: Sequence[int]) -> str:
    """ISMRMRD XML of a Cartesian 2-D scan at 3 T with 1 mm pixels: readout x along the rows.

    Args:
        encoded: matrix size of k-space, ``(rows, columns)``.
        shown: matrix size of the reference image, ``(rows, columns)``.

    Returns:
        The document; it has what the schema and the readers of fastMRI require.
    """

    def space(tag: str, size: Sequence[int]) -> str:
        x, y = size
        return (
            f"<{tag}><matrixSize><x>{x}</x><y>{y}</y><z>1</z></matrixSize>"
            f"<fieldOfView_mm><x>{x}</x><y>{y}</y><z>1</z></fieldOfView_mm></{tag}>"
        )

    n_columns = encoded[1]
    return (
        '<?xml version="1.0" encoding="utf-8"?>'
        '<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        "<experimentalConditions><H1resonanceFrequency_Hz>127740000</H1resonanceFrequency_Hz>"
        "</experimentalConditions><encoding>"
        f"{space('encodedSpace', encoded)}{space('reconSpace', shown)}"
        "<encodingLimits><kspace_encoding_step_1><minimum>0</minimum>"
        f"<maximum>{n_columns - 1}</maximum><center>{n_columns // 2}</center>"
        "</kspace_encoding_step_1></encodingLimits><trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"
    )


def declared(file: Contents, path: Path, shape: tuple[int, int]) -> Declared:
    """What the header of a file declares; nothing where there is none that can be read.

    Args:
        file: what the file holds.
        path: its path, for messages.
        shape: matrix size ``(rows, columns)`` of k-space.

    Returns:
        The record.

    Raises:
        InputError: if the scan is encoded in three dimensions, its readout lies along the columns,
            or the header has a document type.
    """
    header = file.get("ismrmrd_header")
    if not isinstance(header, h5py.Dataset) or header.size != 1:
        return Declared()
    text: Any = file.read(header).reshape(-1)[0]
    if not isinstance(text, bytes | str):
        return Declared()
    document = checked_xml(path, text, "ismrmrd_header")
    try:
        root = ElementTree.fromstring(document)
    except (ElementTree.ParseError, ValueError, LookupError):
        return Declared()  # some data sets have no valid header, and nothing depends on it
    encoded = root.find("{*}encoding/{*}encodedSpace")
    matrix, view = _numbers(encoded, "matrixSize"), _numbers(encoded, "fieldOfView_mm")
    if matrix[2] > 1:
        raise InputError(
            f"{path}: a 2-D scan was needed, the header states an encoded matrix size z of "
            f"{matrix[2]:g}; transform k-space along z, store slices, and write z as 1."
        )
    if shape[0] != shape[1] and tuple(matrix[:2]) == (shape[1], shape[0]):
        raise InputError(
            f"{path}: kspace must have the readout along its rows, {matrix[0]:g} x {matrix[1]:g} "
            f"by the header, got {shape[0]} x {shape[1]}; swap its last two axes."
        )
    sizes = [length / n if n > 0 else 0 for length, n in zip(view, matrix, strict=True)]
    geometry = Geometry((sizes[0], sizes[1], sizes[2])) if min(sizes) > 0 else None
    shown = _numbers(root.find("{*}encoding/{*}reconSpace"), "matrixSize")[:2]
    if not min(shown) >= 1:
        return Declared(geometry)
    # A larger matrix is interpolation, which is left out.
    return Declared(geometry, (min(int(shown[0]), shape[0]), min(int(shown[1]), shape[1])))


def _numbers(space: ElementTree.Element | None, kind: str) -> list[float]:
    """The values along x, y and z; 0 where none is stated."""
    found = []
    for axis in "xyz":
        text = None if space is None else space.findtext(f"{{*}}{kind}/{{*}}{axis}")
        try:
            value = float(text or 0)
        except ValueError:
            value = 0.0
        found.append(value if abs(value) < _LARGEST else 0.0)
    return found
