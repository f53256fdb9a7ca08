"""Checked access to one file in the layout of fastMRI: errors name file, key and remedy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.mri.errors import InputError
from applications.mri.sampling import check_mask


class Facts(NamedTuple):
    """What is known of a volume before any slice of k-space is read; see `VolumeFile`."""

    n_slices: int
    n_coils: int
    shape: tuple[int, int]
    reference_shape: tuple[int, int] | None
    acquisition: str
    max: float | None


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Opens a file for reading, and words what goes wrong there or while it is read.

    Args:
        path: the file.

    Yields:
        The open file.

    Raises:
        InputError: if it is missing, not HDF5, or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: an HDF5 file was needed, there is no such file; check the path.")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"{path}: a complete HDF5 file was needed, it cannot be read ({error}); copy or "
            "download it again."
        ) from error


def dataset(file: h5py.File, path: Path, name: str, kind: str, axes: str) -> h5py.Dataset:
    """A dataset of the expected rank and dtype.

    Args:
        file: the open file.
        path: its path, for messages.
        name: key of the dataset.
        kind: NumPy dtype kinds allowed, for example ``"c"`` for complex.
        axes: its axes in words, separated by commas; their number is the rank.

    Returns:
        The dataset, unread.

    Raises:
        InputError: if it is missing, of other rank or dtype, or empty.
    """
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise InputError(
            f"{path}: dataset {name!r} was needed, the file has {sorted(file)}; rename or convert "
            "the data."
        )
    if found.ndim != axes.count(",") + 1:
        raise InputError(
            f"{path}: {name} must have the axes ({axes}), got shape {found.shape}; add or remove "
            "axes."
        )
    if found.dtype.kind not in kind:
        needed = {"c": "complex64", "f": "float32", "u": "uint8"}[kind[0]]
        raise InputError(f"{path}: {name} must be {needed}, got {found.dtype}; convert it.")
    if found.size == 0:
        raise InputError(
            f"{path}: {name} must not be empty, got shape {found.shape}; export it again."
        )
    return found


def read_facts(file: h5py.File, path: Path) -> Facts:
    """Checks the layout of a file.

    Args:
        file: the open file.
        path: its path, for messages.

    Returns:
        The facts.

    Raises:
        InputError: if the file is not in the layout.
    """
    n_slices, n_coils, *shape = dataset(file, path, "kspace", "c", "slice, coil, row, column").shape
    shape = (shape[0], shape[1])
    reference_shape, maximum = None, None
    if "reconstruction_rss" in file:
        reference = dataset(file, path, "reconstruction_rss", "f", "slice, row, column")
        if reference.shape[0] != n_slices:
            raise InputError(
                f"{path}: reconstruction_rss must have the {n_slices} slices of kspace, got "
                f"{reference.shape[0]}; write the file again."
            )
        reference_shape = (reference.shape[1], reference.shape[2])
        stated = file.attrs.get("max")
        maximum = float(np.max(reference[()] if stated is None else np.asarray(stated)))
    if "mask" in file:
        read_mask(file, path, shape)
    acquisition = file.attrs.get("acquisition", "unknown")
    acquisition = acquisition.decode() if isinstance(acquisition, bytes) else str(acquisition)
    return Facts(n_slices, n_coils, shape, reference_shape, acquisition, maximum)


def read_finite(file: h5py.File, path: Path, name: str, index: int) -> NDArray[Any]:
    """One slice of a dataset.

    Args:
        file: the open file.
        path: its path, for messages.
        name: key of the dataset.
        index: the slice.

    Returns:
        The values as stored.

    Raises:
        InputError: if any is infinite or NaN.
    """
    found = file[name]
    values = np.asarray(found[index] if isinstance(found, h5py.Dataset) else np.nan)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise InputError(
            f"{path}: {name} must be finite, slice {index} holds {bad} values that are not; export "
            "it again or leave the slice out."
        )
    return values


def read_mask(file: h5py.File, path: Path, shape: tuple[int, int]) -> Tensor:
    """The mask of a file, over columns or positions, as a mask of positions.

    Args:
        file: the open file, which has ``mask``.
        path: its path, for messages.
        shape: ``(rows, columns)`` of k-space.

    Returns:
        Boolean mask of that shape.

    Raises:
        InputError: if it has another shape, values besides 0 and 1, or keeps nothing.
    """
    values = np.asarray(file["mask"])
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError(f"{path}: mask must hold 0 and 1 only, it has {values.dtype} with others.")
    mask = torch.from_numpy(values != 0)
    if mask.shape == (shape[1],):
        mask = mask.repeat(shape[0], 1)
    check_mask(mask, shape, f"{path}: mask")
    return mask


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
