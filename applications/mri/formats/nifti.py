"""NIfTI: magnitude images to simulate scans from, and the header of images that are written.

Images are oriented by the file: `Plane` says which way they are cut, and rows and columns are then
as radiologists look at them, the patient's right at the left side.
"""

import gzip
import math
import struct
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.inputs import content, reading, unpacked
from applications.mri.formats.base import Geometry, optional

SUFFIXES = (".nii", ".nii.gz")
_OFFSET = 352  # of the data: 348 bytes of header and 4 that say that no extension follows
_MOST_BYTES = 2**31  # of a file
_MOST_VALUES = 2**27  # of a volume
_MOST_BEFORE = 2**24  # bytes before the values
# By the length of the header: the class of nibabel; then place and form of the sizes of the axes,
# their number first; of the type of the values and its bits; of the place of the values; and of the
# sides of a voxel.
_KINDS = {
    348: ("Nifti1Image", 40, "8h", 70, "2h", 108, "f", 80, "3f"),
    540: ("Nifti2Image", 16, "8q", 12, "2h", 168, "q", 112, "3d"),
}
_SIGNAL = 0.1
_STRETCHED = 32  # most, of a voxel's sides
_MARK = b"bilevel-mri reconstruction"  # description of the files that are written


class Plane(StrEnum):
    """How a volume is cut into slices; `stored` takes rows, columns and slices as they lie."""

    AXIAL = "axial"
    CORONAL = "coronal"
    SAGITTAL = "sagittal"
    STORED = "stored"


# Axes of rows, columns and slices in a volume whose axes run right, anterior, superior; of each
# whether it is reversed.
_CUTS = {
    Plane.AXIAL: ((1, True), (0, True), (2, False)),
    Plane.CORONAL: ((2, True), (0, True), (1, False)),
    Plane.SAGITTAL: ((2, True), (1, True), (0, False)),
    Plane.STORED: ((0, False), (1, False), (2, False)),
}


def is_nifti(path: Path) -> bool:
    """Whether a path has a suffix of NIfTI."""
    return path.name.endswith(SUFFIXES)


def is_written(path: Path) -> bool:
    """Whether a file begins with a header of `header_of`."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read(_OFFSET)[148 : 148 + len(_MARK)] == _MARK  # where descriptions stand


def read_images(path: Path, plane: Plane = Plane.AXIAL) -> Tensor:
    """The slices of a volume that show something, over the largest value of all.

    Slices at either end whose largest value is below a tenth of the volume's are left out. Zeros
    at the sides make the field of view square, so that `anatomy.resize` does not stretch it.

    Args:
        path: file of one 3-D volume, real and >= 0.
        plane: of the slices.

    Returns:
        Images in [0, 1], float32, shape ``(slices, rows, columns)``; the slices run along
        increasing right, anterior or superior coordinates.

    Raises:
        InputError: if the file is damaged, holds something else, or contradicts itself; or if the
            package nibabel is missing.
    """
    nibabel = optional("nibabel", path)
    what, remedy = "a complete NIfTI file", "copy or convert it again"
    packed = content(path, "a NIfTI file", _MOST_BYTES)
    quiet = nibabel.imageglobals.LoggingOutputSuppressor()  # it says what it mends of a header
    with reading(path, what, remedy), quiet:
        stored = unpacked(path, packed, what)
        image = getattr(nibabel, _kind(stored)).from_bytes(stored)
        values = np.asanyarray(image.dataobj)
    values = _checked(path, values)
    spacing = image.header.get_zooms()[:3]
    if plane is not Plane.STORED:
        with reading(path, "an orientation", "correct the header, or take --plane stored"):
            _check_orientation(path, nibabel, image)
            turn = nibabel.io_orientation(image.affine)
            values = nibabel.apply_orientation(values, turn)
            spacing = [spacing[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3)]
    cut = _CUTS[plane]
    for axis, reversed_ in cut:
        values = np.flip(values, axis) if reversed_ else values
    rows, columns, slices = (axis for axis, _ in cut)
    images = values.transpose(slices, rows, columns)
    peaks = images.max(axis=(1, 2))
    shown = np.flatnonzero(peaks >= _SIGNAL * peaks.max())
    images = images[shown[0] : shown[-1] + 1] / peaks.max()
    height, width = float(spacing[rows]), float(spacing[columns])
    stretched = max(height, width) > _STRETCHED * min(height, width)
    if not all(0 < one < math.inf for one in (height, width)) or stretched:
        raise InputError(
            f"{path}: voxels must be of positive size and at most {_STRETCHED} times as long as "
            f"wide, got {height:g} x {width:g} mm; correct the header."
        )
    return torch.from_numpy(_square(images, height, width))


def header_of(path: Path, shape: tuple[int, ...], geometry: Geometry | None) -> bytes:
    """All that precedes the values of a NIfTI file of float32.

    Args:
        path: the file to be written, for messages.
        shape: of the values; the first axis runs fastest.
        geometry: None leaves size and orientation of the voxels undeclared.

    Returns:
        The header.

    Raises:
        InputError: if the package nibabel is missing.
    """
    header = optional("nibabel", path).Nifti1Header()
    header["descrip"] = _MARK
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    header.set_data_offset(_OFFSET)
    if geometry is not None:
        header.set_zooms((*geometry.spacing, *[1.0] * (len(shape) - 3)))
        header.set_xyzt_units("mm")
        if geometry.affine is not None:
            header.set_sform(np.array(geometry.affine), code=1)
            header.set_qform(np.array(geometry.affine), code=1)
    return header.binaryblock.ljust(_OFFSET, b"\0")


def _kind(stored: bytes) -> str:
    """The class of nibabel that reads a file, whose sizes have been compared with the file."""
    if len(stored) < _OFFSET:
        raise ValueError(f"a header has {_OFFSET} bytes, it has {len(stored)}")
    order = "<" if int.from_bytes(stored[:4], "little") in _KINDS else ">"
    length = int.from_bytes(stored[:4], "little" if order == "<" else "big")
    if length not in _KINDS:
        raise ValueError(f"its header does not begin with 348 or 540 but with {length}")
    name, at_shape, of_shape, at_type, of_type, at_begin, of_begin, at_voxel, of_voxel = _KINDS[
        length
    ]
    n_axes, *sides = struct.unpack_from(order + of_shape, stored, at_shape)
    _, bits = struct.unpack_from(order + of_type, stored, at_type)
    (begin,) = struct.unpack_from(order + of_begin, stored, at_begin)
    sides = sides[: max(n_axes, 0)]
    n = math.prod(max(side, 0) for side in sides)
    voxel = struct.unpack_from(order + of_voxel, stored, at_voxel)
    if not all(0 < abs(one) < math.inf for one in voxel):
        raise ValueError(f"voxels of {' x '.join(map(str, voxel))} mm are announced")
    if n > _MOST_VALUES or not 0 <= begin <= _MOST_BEFORE:
        raise ValueError(f"{n} values from byte {begin:g} on are announced, by sizes {sides}")
    if begin + n * max(bits, 8) // 8 > len(stored):
        raise ValueError(f"{n} values of {bits} bits are announced, it has {len(stored)} bytes")
    return name


def _checked(path: Path, values: NDArray[Any]) -> NDArray[np.float32]:
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3 or values.size == 0:
        raise InputError(
            f"{path}: one volume of three axes was needed, got shape {values.shape}; split it."
        )
    if values.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: real magnitudes were needed, got {values.dtype}; take absolute values."
        )
    with np.errstate(over="ignore"):  # the infinite values that arise are noticed
        values = values.astype(np.float32)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() <= 0:
        raise InputError(
            f"{path}: magnitudes must be finite, >= 0 and not all 0, got {values.min():g} to "
            f"{values.max():g}; take absolute values, and replace what is not finite."
        )
    return values


def _check_orientation(path: Path, nibabel: Any, image: Any) -> None:
    stated = {
        nibabel.aff2axcodes(affine)
        for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True))
        if code > 0
    }
    if len(stated) != 1:
        what = " and ".join("".join(map(str, axes)) for axes in sorted(stated)) or "none"
        raise InputError(
            f"{path}: one orientation must be declared, qform and sform state {what}; correct the "
            "header, or take --plane stored."
        )


def _square(images: NDArray[np.float32], height: float, width: float) -> NDArray[np.float32]:
    """Zeros at the sides until rows x height equals columns x width, to half a pixel."""
    n_rows, n_columns = images.shape[1:]
    view = max(n_rows * height, n_columns * width)
    padding = [(0, 0)]
    for n, size in ((n_rows, height), (n_columns, width)):
        missing = max(round(view / size) - n, 0)
        padding.append((missing // 2, missing - missing // 2))
    return np.pad(images, padding)
