"""HDF5 in the layout of fastMRI, which `data.writing` describes, and what others make of it.

`kspace` is ``[slice, coil, row, column]``; of one coil ``[slice, row, column]``; with averages
before, ``[average, slice, coil, row, column]``, of which positions that were measured are averaged.
Its values are complex numbers; or pairs of real ones, in a last axis of 2 or in records of a real
and an imaginary part, as MATLAB writes them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.mri.formats.base import Facts, Format, RawSlice, Reader
from applications.mri.formats.fastmri_header import declared
from applications.mri.formats.hdf5 import dataset, opened
from applications.mri.physics.masks import check_mask

SUFFIXES = (".h5", ".hdf5")
_AXES = "slice, coil, row, column"
_PARTS = ({"real", "imag"}, {"re", "im"}, {"r", "i"})


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
            kspace = _slice(file["kspace"], index)
            mask = reference = None
            if "mask" in file:
                mask = _mask(file, self.path, self.facts.n_slices, self.facts.shape)
                mask = mask if mask.ndim == 2 else mask[index]
            if self.facts.reference_shape is not None:
                reference = _reference(file, self.path)[index]  # pyright: ignore[reportOptionalSubscript]
        return RawSlice(kspace, mask, reference)


FORMAT = Format(
    "fastMRI HDF5 (.h5)",
    lambda path: path.suffix.lower() in SUFFIXES or (path.is_file() and h5py.is_hdf5(path)),
    lambda path: (FastMRIVolume(path),),
)


def _facts(file: h5py.File, path: Path) -> Facts:
    n_slices, n_coils, rows, columns = _shape(file, path)
    shape = (rows, columns)
    reference_shape, maximum = None, None
    reference = _reference(file, path)
    if reference is not None:
        if reference.shape[0] != n_slices:
            raise InputError(
                f"{path}: {_named(reference)} must have the {n_slices} slices of kspace, got "
                f"{reference.shape[0]}; write the file again."
            )
        reference_shape = (reference.shape[1], reference.shape[2])
        maximum = _maximum(file, reference)
    if "mask" in file:
        _mask(file, path, n_slices, shape)
    acquisition = file.attrs.get("acquisition", "unknown")
    header = declared(file, path, shape)
    return Facts(
        n_slices,
        n_coils,
        shape,
        image_shape=header.shown,
        reference_shape=reference_shape,
        acquisition=acquisition.decode() if isinstance(acquisition, bytes) else str(acquisition),
        max=maximum,
        geometry=header.geometry,
        remarks=_remarks(file),
    )


def _shape(file: h5py.File, path: Path) -> tuple[int, int, int, int]:
    """Slices, coils, rows and columns."""
    found = file.get("kspace")
    if isinstance(found, h5py.Dataset) and found.size:
        pairs = _is_pairs(found)
        shape = found.shape[:-1] if pairs else found.shape
        if len(shape) in (3, 4, 5) and (pairs or _parts(found) or found.dtype.kind == "c"):
            return _counts(shape)
    return _counts(dataset(file, path, "kspace", "c", _AXES).shape)


def _counts(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    if len(shape) == 3:
        return shape[0], 1, shape[1], shape[2]
    return shape[-4], shape[-3], shape[-2], shape[-1]


def _parts(values: h5py.Dataset) -> tuple[str, str] | None:
    """The names of the real and the imaginary part of records."""
    names = {name.lower(): name for name in values.dtype.names or ()}
    for pair in _PARTS:
        if set(names) == pair:
            return tuple(names[one] for one in sorted(pair, reverse=True))  # pyright: ignore[reportReturnType]
    return None


def _is_pairs(values: h5py.Dataset) -> bool:
    return values.dtype.kind in "fiu" and values.ndim >= 4 and values.shape[-1] == 2


def _slice(kspace: Any, index: int) -> NDArray[np.complex64]:
    """One slice as complex numbers, ``(coils, rows, columns)``."""
    pairs, parts = _is_pairs(kspace), _parts(kspace)
    n_axes = kspace.ndim - pairs
    values = kspace[:, index] if n_axes == 5 else kspace[index]
    if parts is not None:
        values = values[parts[0]] + 1j * values[parts[1]]
    elif pairs:
        values = values[..., 0] + 1j * values[..., 1]
    with np.errstate(over="ignore"):  # the infinite values that arise are noticed
        values = values.astype(np.complex64)
    if n_axes == 3:
        return values[None]
    if n_axes == 4:
        return values
    measured = (values != 0).any(axis=1)  # by average
    counts = np.maximum(measured.sum(axis=0), 1).astype(np.float32)
    return values.sum(axis=0) / counts


def _reference(file: h5py.File, path: Path) -> h5py.Dataset | None:
    """The reference images: those of the single coil where k-space is of one, else of all."""
    single = isinstance(file["kspace"], h5py.Dataset) and _single(file["kspace"])
    for name in ["reconstruction_esc"] * single + ["reconstruction_rss"]:
        if name in file:
            return dataset(file, path, name, "f", "slice, row, column")
    return None


def _single(kspace: Any) -> bool:
    return kspace.ndim - _is_pairs(kspace) == 3


def _named(values: h5py.Dataset) -> str:
    return str(values.name).lstrip("/")


def _maximum(file: h5py.File, reference: h5py.Dataset) -> float:
    """As stated, or the largest value."""
    stated = np.asarray(file.attrs.get("max", ()))
    if stated.size == 1 and stated.dtype.kind in "fiu":
        return float(stated.reshape(-1)[0])
    return max(float(reference[index].max()) for index in range(reference.shape[0]))


def _mask(file: h5py.File, path: Path, n_slices: int, shape: tuple[int, int]) -> Tensor:
    """The mask of positions, ``(rows, columns)``, or one a slice; the file may have columns."""
    values = np.asarray(file["mask"])
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError(f"{path}: mask must hold 0 and 1 only, it has {values.dtype} with others.")
    mask = torch.from_numpy(values != 0)
    rows, columns = shape
    known = {(columns,), shape, (n_slices, columns), (n_slices, *shape)}
    if tuple(mask.shape) not in known:
        mask = mask.squeeze()
        mask = mask[None] if mask.ndim == 0 else mask
    found = tuple(mask.shape)
    if found == (columns,):
        mask = mask.repeat(rows, 1)
    elif found == (n_slices, columns) and found != shape:
        mask = mask[:, None].repeat(1, rows, 1)
    check_mask(mask, (n_slices, *shape) if mask.ndim == 3 else shape, f"{path}: mask")
    return mask


def _remarks(file: h5py.File) -> tuple[str, ...]:
    kspace: Any = file["kspace"]
    if kspace.ndim - _is_pairs(kspace) != 5:
        return ()
    return (f"{kspace.shape[0]} averages are averaged",)
