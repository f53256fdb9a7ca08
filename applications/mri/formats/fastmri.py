"""HDF5 in the layout of fastMRI, which `data.writing` describes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.formats.base import Facts, Format, Geometry, RawSlice, Reader
from applications.mri.formats.hdf5 import dataset, opened
from applications.mri.physics.masks import check_mask

SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class FastMRIVolume(Reader):
    """The volume of one file.

    Attributes:
        path: the file.
        facts: what is known of it.

    Raises:
        InputError: if the file is missing, unreadable, or not in the layout.
    """

    path: Path
    facts: Facts = field(init=False)

    def __post_init__(self) -> None:
        with opened(self.path) as file:
            object.__setattr__(self, "facts", _facts(file, self.path))

    def read(self, index: int) -> RawSlice:  # noqa: D102
        with opened(self.path) as file:
            kspace = dataset(file, self.path, "kspace", "c", _AXES)[index].astype(np.complex64)
            mask = _mask(file, self.path, self.facts.shape) if "mask" in file else None
            reference = None
            if self.facts.reference_shape is not None:
                reference = _reference(file, self.path)[index]
        return RawSlice(kspace, mask, reference)


FORMAT = Format(
    "fastMRI HDF5 (.h5)",
    lambda path: path.suffix in SUFFIXES or (path.is_file() and h5py.is_hdf5(path)),
    lambda path: (FastMRIVolume(path),),
)
_AXES = "slice, coil, row, column"


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


def _facts(file: h5py.File, path: Path) -> Facts:
    n_slices, n_coils, rows, columns = dataset(file, path, "kspace", "c", _AXES).shape
    shape = (rows, columns)
    reference_shape, maximum = None, None
    if "reconstruction_rss" in file:
        reference = _reference(file, path)
        if reference.shape[0] != n_slices:
            raise InputError(
                f"{path}: reconstruction_rss must have the {n_slices} slices of kspace, got "
                f"{reference.shape[0]}; write the file again."
            )
        reference_shape = (reference.shape[1], reference.shape[2])
        stated = file.attrs.get("max")
        maximum = float(np.asarray(stated)) if stated is not None else _largest(reference)
    if "mask" in file:
        _mask(file, path, shape)
    acquisition = file.attrs.get("acquisition", "unknown")
    return Facts(
        n_slices,
        n_coils,
        shape,
        reference_shape=reference_shape,
        acquisition=acquisition.decode() if isinstance(acquisition, bytes) else str(acquisition),
        max=maximum,
        geometry=_geometry(file, path, shape),
    )


def _reference(file: h5py.File, path: Path) -> h5py.Dataset:
    return dataset(file, path, "reconstruction_rss", "f", "slice, row, column")


def _largest(reference: h5py.Dataset) -> float:
    return max(float(reference[index].max()) for index in range(reference.shape[0]))


def _mask(file: h5py.File, path: Path, shape: tuple[int, int]) -> Tensor:
    """The mask, over columns or positions, as a mask of positions."""
    values = np.asarray(file["mask"])
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError(f"{path}: mask must hold 0 and 1 only, it has {values.dtype} with others.")
    mask = torch.from_numpy(values != 0)
    if mask.shape == (shape[1],):
        mask = mask.repeat(shape[0], 1)
    check_mask(mask, shape, f"{path}: mask")
    return mask


def _geometry(file: h5py.File, path: Path, shape: tuple[int, int]) -> Geometry | None:
    """Voxel sizes as the header states them; None where it does not."""
    header = file.get("ismrmrd_header")
    if not isinstance(header, h5py.Dataset) or header.shape != ():
        return None
    try:
        space = ElementTree.fromstring(header[()]).find("{*}encoding/{*}encodedSpace")
    except ElementTree.ParseError:  # some data sets have no valid header, and nothing depends on it
        return None
    if space is None:
        return None
    matrix, view = (
        [float(space.findtext(f"{{*}}{kind}/{{*}}{axis}", "nan")) for axis in "xyz"]
        for kind in ("matrixSize", "fieldOfView_mm")
    )
    if shape[0] != shape[1] and tuple(matrix[:2]) == (shape[1], shape[0]):
        raise InputError(
            f"{path}: kspace must have the readout along its rows, {matrix[0]:g} x {matrix[1]:g} "
            f"by the header, got {shape[0]} x {shape[1]}; swap its last two axes."
        )
    x, y, z = (length / n for length, n in zip(view, matrix, strict=True))
    return Geometry((x, y, z)) if min(x, y, z) > 0 else None
