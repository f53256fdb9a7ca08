"""Sampling by a mask from a file."""

import io
import math
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.inputs import check_announced, content, listed, reading
from applications.mri.formats.cfl import Cfl
from applications.mri.formats.hdf5 import Contents, opened
from applications.mri.physics.masks import check_mask
from applications.mri.sampling.base import Sampling

_MOST_BYTES, _MOST_VALUES = 2**28, 2**26  # of a file, of a mask
_PNG_HEAD = 24  # bytes until the sizes have been told
SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".cfl", ".hdr", ".png")


@dataclass(frozen=True)
class FromFile(Sampling):
    """The mask of a file, the same at every draw.

    A file holds one array of 0 and 1 (in PNG, grey: black and white), over the columns or over rows
    and columns: `.npy`; `.npz` and HDF5, under the name `mask` or as the only array; BART's `.cfl`
    with its `.hdr`, axes of size 1 apart; `.png`.

    Attributes:
        path: the file.

    Raises:
        InputError: if the file is damaged, or holds no mask.
    """

    path: Path
    _kept: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        path = self.path
        values = _values(path)
        if values.ndim not in {1, 2} or values.size == 0:
            raise InputError(
                f"{path}: a mask over columns or over rows and columns was needed, got shape "
                f"{values.shape}; choose one."
            )
        if values.dtype.kind not in "biufc" or not np.isin(values, (0, 1)).all():
            raise InputError(
                f"{path}: a mask must hold 0 and 1 only, this holds others ({values.dtype}); "
                "threshold it."
            )
        kept = torch.from_numpy(values != 0)
        if not bool(kept.any()):
            raise InputError(f"{path}: a mask must keep at least one position; draw it anew.")
        object.__setattr__(self, "_kept", kept)

    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:  # noqa: ARG002, D102
        kept = self._kept
        if kept.shape != shape and kept.numel() == shape[1] and 1 in kept.shape:
            kept = kept.reshape(-1)  # columns as MATLAB stores them
        if kept.shape == shape[1:]:
            kept = kept.repeat(shape[0], 1)
        check_mask(kept, shape, f"{self.path}: mask")
        return kept.clone()


def _values(path: Path) -> NDArray[Any]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: a mask file must end in one of {', '.join(SUFFIXES)}; convert it."
        )
    if suffix in {".cfl", ".hdr"}:
        file = Cfl(path)
        _check_size(path, file.shape)
        return np.squeeze(np.array(file.open()))
    if suffix in {".h5", ".hdf5"}:
        with opened(path) as file:
            arrays = {n: one for n in file.names() for one in [_array(file, n)] if one is not None}
            chosen = arrays[_chosen(path, list(arrays))]
            _check_size(path, chosen.shape)
            return file.read(chosen)
    packed = content(path, "a mask file", _MOST_BYTES)
    with reading(path, f"a complete {suffix} file", "write it again"):
        if suffix == ".png":
            return _gray(path, packed)
        return _numpy(path, packed)


def _array(file: Contents, name: str) -> h5py.Dataset | None:
    found = file.get(name)
    return found if isinstance(found, h5py.Dataset) else None


def _check_size(path: Path, shape: tuple[int, ...] | None) -> None:
    if math.prod(shape or ()) > _MOST_VALUES:
        raise InputError(
            f"{path}: a mask of at most {_MOST_VALUES} positions was needed, got shape {shape}; "
            "choose a part."
        )


def _numpy(path: Path, packed: bytes) -> NDArray[Any]:
    """The array of a .npy file, or of the one that is meant in a .npz file."""
    if packed.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            names = [one.removesuffix(".npy") for one in archive.namelist()]
            place = archive.infolist()[names.index(_chosen(path, names))]
            check_announced(path, f"{place.filename!r}", place.file_size, len(packed))
            with archive.open(place) as file:
                packed = file.read(place.file_size)
    stream = io.BytesIO(packed)
    version = np.lib.format.read_magic(stream)
    heads = {(1, 0): np.lib.format.read_array_header_1_0}
    shape, _, dtype = heads.get(version, np.lib.format.read_array_header_2_0)(stream)
    _check_size(path, shape)
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > len(packed):
        raise ValueError(f"{n_bytes} bytes are announced, it has {len(packed)}")
    return np.load(io.BytesIO(packed), allow_pickle=False)


def _chosen(path: Path, names: list[str]) -> str:
    if "mask" in names:
        return "mask"
    if len(names) != 1:
        raise InputError(
            f"{path}: an array named 'mask', or one array alone, was needed, got {listed(names)}; "
            "rename the mask."
        )
    return names[0]


def _gray(path: Path, packed: bytes) -> NDArray[Any]:
    from matplotlib.image import imread  # slow to import

    if len(packed) < _PNG_HEAD or packed[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("it does not begin as PNG does")
    _check_size(path, struct.unpack(">II", packed[16:_PNG_HEAD]))
    picture = imread(io.BytesIO(packed), format="png")
    if picture.ndim != 2:
        raise InputError(
            f"{path}: a grey picture was needed, got {picture.shape[2]} colours; convert it."
        )
    return picture
