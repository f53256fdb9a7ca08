"""Sampling by a mask from a file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.mri.formats.cfl import Cfl
from applications.mri.formats.hdf5 import opened
from applications.mri.physics.masks import check_mask
from applications.mri.sampling.base import Sampling

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
        if kept.shape == shape[1:]:
            kept = kept.repeat(shape[0], 1)
        check_mask(kept, shape, f"{self.path}: mask")
        return kept.clone()


def _values(path: Path) -> NDArray[Any]:
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: a mask file must end in one of {', '.join(SUFFIXES)}; convert it."
        )
    if path.suffix in {".cfl", ".hdr"}:
        return np.squeeze(np.array(Cfl(path).open()))
    if path.suffix in {".h5", ".hdf5"}:
        with opened(path) as file:
            arrays = {name: one for name, one in file.items() if isinstance(one, h5py.Dataset)}
            return np.asarray(arrays[_chosen(path, list(arrays))])
    if not path.is_file():
        raise InputError(f"{path}: a mask file was needed, there is no such file; check the path.")
    try:
        if path.suffix == ".png":
            return _gray(path)
        with path.open("rb") as file:  # np.load would leave a damaged archive open
            found = np.load(file, allow_pickle=False)
            return found if isinstance(found, np.ndarray) else found[_chosen(path, found.files)]
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:  # of NumPy, zipfile or Pillow
        raise InputError(
            f"{path}: a complete {path.suffix} file was needed, it cannot be read ({error}); write "
            "it again."
        ) from error


def _chosen(path: Path, names: list[str]) -> str:
    if "mask" in names:
        return "mask"
    if len(names) != 1:
        raise InputError(
            f"{path}: an array named 'mask', or one array alone, was needed, got {sorted(names)}; "
            "rename the mask."
        )
    return names[0]


def _gray(path: Path) -> NDArray[Any]:
    from matplotlib.image import imread  # slow to import

    picture = imread(path)
    if picture.ndim != 2:
        raise InputError(
            f"{path}: a grey picture was needed, got {picture.shape[2]} colours; convert it."
        )
    return picture
