"""HDF5 in the layout of fastMRI, which `data.writing` describes, and what others make of it.

`kspace` is ``[slice, coil, row, column]``; of one coil ``[slice, row, column]``; with averages
before, ``[average, slice, coil, row, column]``, of which positions that were measured are averaged.
Its values are complex numbers; or pairs of real ones, in a last axis of 2 or in records of a real
and an imaginary part, as MATLAB writes them.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.inputs import links_followed
from applications.mri.formats.base import Facts, Format, RawSlice, Reader, UnusableSliceError
from applications.mri.formats.fastmri_header import declared
from applications.mri.formats.hdf5 import Contents, opened
from applications.mri.physics.masks import check_mask

SUFFIXES = (".h5", ".hdf5")
_AXES = "slice, coil, row, column"
_LONGEST = 1000  # characters of a name
_SMALLEST = float(np.finfo(np.float32).tiny)
_PARTS = ({"real", "imag"}, {"re", "im"}, {"r", "i"})


@dataclass(frozen=True)
class FastMRIVolume(Reader):
    """The volume of one file.

    Attributes:
        path: the file.
        facts: what is known of it.
        follow: whether the file may read others.

    Raises:
        InputError: if the file is missing, unreadable, or not in the layout.
    """

    path: Path
    facts: Facts = field(init=False)
    follow: bool = field(default_factory=links_followed)

    def __post_init__(self) -> None:
        with opened(self.path, self.follow) as file:
            object.__setattr__(self, "facts", _facts(file, self.path))

    def read(self, index: int) -> RawSlice:  # noqa: D102
        with opened(self.path, self.follow) as file:
            kspace = _slice(file, _kspace(file), index)
            mask = _mask(file, self.path, self.facts.n_slices, self.facts.shape)
            mask = mask if mask is None or mask.ndim == 2 else mask[index]
            images = None if self.facts.reference_shape is None else _reference(file)
            reference = None if images is None else file.read(images, index)
        return RawSlice(kspace, mask, reference)


FORMAT = Format(
    "fastMRI HDF5 (.h5)",
    lambda path: path.suffix.lower() in SUFFIXES or (path.is_file() and h5py.is_hdf5(path)),
    lambda path: (FastMRIVolume(path),),
)


def _facts(file: Contents, path: Path) -> Facts:
    n_slices, n_coils, rows, columns = _shape(_kspace(file))
    shape = (rows, columns)
    reference_shape, maximum = None, None
    reference = _reference(file)
    if reference is not None:
        if reference.shape[0] != n_slices:
            raise InputError(
                f"{path}: {_named(reference)} must have the {n_slices} slices of kspace, got "
                f"{reference.shape[0]}; write the file again."
            )
        reference_shape = (reference.shape[1], reference.shape[2])
        maximum = _maximum(file, reference)
    _mask(file, path, n_slices, shape)
    acquisition = file.attributes.get("acquisition", "unknown")
    header = declared(file, path, shape)
    return Facts(
        n_slices,
        n_coils,
        shape,
        image_shape=header.shown,
        reference_shape=reference_shape,
        acquisition=_text(acquisition),
        max=maximum,
        geometry=header.geometry,
        remarks=_remarks(file),
    )


def _kspace(file: Contents) -> h5py.Dataset:
    """K-space in one of the layouts."""
    found = file.get("kspace")
    if isinstance(found, h5py.Dataset) and found.size:
        pairs = _is_pairs(found)
        n_axes = found.ndim - pairs
        if n_axes in (3, 4, 5) and (pairs or _parts(found) or found.dtype.kind == "c"):
            return found
    return file.dataset("kspace", "c", _AXES)


def _shape(kspace: h5py.Dataset) -> tuple[int, int, int, int]:
    """Slices, coils, rows and columns."""
    shape = kspace.shape[:-1] if _is_pairs(kspace) else kspace.shape
    if len(shape) == 3:
        return shape[0], 1, shape[1], shape[2]
    return shape[-4], shape[-3], shape[-2], shape[-1]


def _parts(values: h5py.Dataset) -> tuple[str, str] | None:
    """The names of the real and the imaginary part of records."""
    names = {name.lower(): name for name in values.dtype.names or ()}
    kinds = {values.dtype[name].kind for name in names.values()}
    for pair in _PARTS:
        if set(names) == pair and kinds <= set("fiu"):
            return tuple(names[one] for one in sorted(pair, reverse=True))  # pyright: ignore[reportReturnType]
    return None


def _is_pairs(values: h5py.Dataset) -> bool:
    return values.dtype.kind in "fiu" and values.ndim >= 4 and values.shape[-1] == 2


def _slice(file: Contents, kspace: h5py.Dataset, index: int) -> NDArray[np.complex64]:
    """One slice as complex numbers, ``(coils, rows, columns)``."""
    pairs, parts = _is_pairs(kspace), _parts(kspace)
    n_axes = kspace.ndim - pairs
    values = file.read(kspace, (slice(None), index) if n_axes == 5 else index)
    if parts is not None:
        values = values[parts[0]] + 1j * values[parts[1]]
    elif pairs:
        values = values[..., 0] + 1j * values[..., 1]
    values = _single(values, f"{file.path}: slice {index}")
    if n_axes == 3:
        return values[None]
    if n_axes == 4:
        return values
    measured = (values != 0).any(axis=1)  # by average
    counts = np.maximum(measured.sum(axis=0), 1).astype(np.float32)
    return values.sum(axis=0) / counts


def _single(values: NDArray[Any], what: str) -> NDArray[np.complex64]:
    """Values as complex64, if that holds them."""
    with np.errstate(over="ignore", under="ignore"):
        found = values.astype(np.complex64)
    lost = np.isfinite(values) & ~np.isfinite(found)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    if lost.any() or 0 < largest < _SMALLEST:  # below, digits are lost
        raise UnusableSliceError(
            f"{what} has values up to {largest:.3g}, kspace must lie within the range of single "
            "precision, 1e-38 to 3e38; divide it by a number before, or leave the slice out."
        )
    return found


def _reference(file: Contents) -> h5py.Dataset | None:
    """The reference images: those of the single coil where k-space is of one, else of all."""
    kspace = _kspace(file)
    single = kspace.ndim - _is_pairs(kspace) == 3
    for name in ["reconstruction_esc"] * single + ["reconstruction_rss"]:
        if file.get(name) is not None:
            return file.dataset(name, "f", "slice, row, column")
    return None


def _named(values: h5py.Dataset) -> str:
    return str(values.name).lstrip("/")


def _maximum(file: Contents, reference: h5py.Dataset) -> float:
    """As stated, or the largest value that is finite."""
    stated = np.asarray(file.attributes.get("max", ()))
    if stated.size == 1 and stated.dtype.kind in "fiu":
        largest = float(stated.reshape(-1)[0])
        if not 0 <= largest < math.inf:
            raise InputError(
                f"{file.path}: the attribute 'max' must be the largest value of "
                f"{_named(reference)}, >= 0 and finite, got {largest:g}; correct or remove it."
            )
        return largest
    largest = 0.0
    for index in range(reference.shape[0]):
        image = file.read(reference, index)
        largest = max(largest, float(image[np.isfinite(image)].max(initial=0)))
    return largest


def _mask(file: Contents, path: Path, n_slices: int, shape: tuple[int, int]) -> Tensor | None:
    """The mask of positions, ``(rows, columns)``, or one a slice; the file may have columns."""
    found = file.get("mask")
    if found is None:
        return None
    most = max(2 * n_slices * math.prod(shape), 2**16)  # what else does not fit is told below
    if not isinstance(found, h5py.Dataset) or (found.size or 0) > most:
        raise InputError(
            f"{path}: mask must be a dataset of at most {most} values, one a position, got "
            f"{found.size if isinstance(found, h5py.Dataset) else 'a group'}; draw it anew."
        )
    values = file.read(found)
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError(
            f"{path}: mask must hold 0 and 1 only, it has others ({values.dtype}); threshold it."
        )
    mask = torch.from_numpy(np.atleast_1d(values != 0))
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


def _text(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text[:_LONGEST]


def _remarks(file: Contents) -> tuple[str, ...]:
    kspace = _kspace(file)
    if kspace.ndim - _is_pairs(kspace) != 5:
        return ()
    return (f"{kspace.shape[0]} averages are averaged",)
