"""NIfTI: magnitude images to simulate scans from, and the header of images that are written.

Images are oriented by the file: `Plane` says which way they are cut, and rows and columns are then
as radiologists look at them, the patient's right at the left side.
"""

import gzip
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.mri.formats.base import Geometry, optional

SUFFIXES = (".nii", ".nii.gz")
_OFFSET = 352  # of the data: 348 bytes of header and 4 that say that no extension follows
_SIGNAL = 0.1
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
    if not path.is_file():
        raise InputError(f"{path}: a NIfTI file was needed, there is no such file; check the path.")
    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
    except Exception as error:  # of nibabel, NumPy, zlib, or the operating system
        raise InputError(
            f"{path}: a complete NIfTI file was needed, it cannot be read ({error}); copy or "
            "convert it again."
        ) from error
    values = _checked(path, values)
    spacing = image.header.get_zooms()[:3]
    if plane is not Plane.STORED:
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
    return torch.from_numpy(_square(images, float(spacing[rows]), float(spacing[columns])))


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
