"""Magnitude images by anatomy, bundled or from files, and their division into blocks of slices."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.inputs import check_announced
from applications.mri.bundled.paths import bundled
from applications.mri.formats.hdf5 import opened
from applications.mri.formats.nifti import Plane, is_nifti, read_images


@dataclass(frozen=True)
class Split:
    """Slice numbers by role, each a contiguous block in anatomical order.

    Attributes:
        train: for the weights.
        validation: for the choice of settings, and the outer objective.
        test: for the numbers that are reported.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def load_anatomies(
    path: Path | str | None = None,
    plane: Plane | None = None,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Reads the images of anatomies.

    Args:
        path: HDF5 file with one group per anatomy that holds ``images``, uint8; or NIfTI, a
            magnitude volume that gets the name of the file; None for the bundled file, whose group
            attributes state source and licence.
        plane: of the slices of a NIfTI volume, None for axial ones.
        names: of the anatomies to read, None for all.

    Returns:
        The images by name in alphabetical order, float32 in [0, 1], shape ``(slices, rows,
        columns)`` (256 x 256 in the bundled file), slices in anatomical order.

    Raises:
        InputError: if the file is not of this form, a name is none of its anatomies, or a plane is
            given for HDF5.
    """
    path = bundled("anatomy.h5") if path is None else Path(path)
    if is_nifti(path):
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        _check_names(names, [name])
        return {name: read_images(path, plane or Plane.AXIAL)}
    if plane is not None:
        raise InputError(
            f"{path}: a plane can be chosen for NIfTI only, the slices of HDF5 are as stored; "
            "leave it out."
        )
    with opened(path) as file:
        known = file.names()
        if not known:
            raise InputError(
                f"{path}: at least one group with images was needed, the file is empty."
            )
        _check_names(names, known)
        read = [n for n in known if names is None or n in names]
        found = {n: file.dataset(f"{n}/images", "u", "slice, row, column") for n in read}
        n_bytes = sum(int(one.size or 0) for one in found.values())
        check_announced(path, f"images of {len(read)} groups", n_bytes, file.size)
        return {
            name: torch.from_numpy(file.read(one).astype(np.float32)) / 255
            for name, one in found.items()
        }


def _check_names(names: Collection[str] | None, known: Sequence[str]) -> None:
    for name in names or ():
        if name not in known:
            raise InputError(
                f"the anatomy must be one of {', '.join(known)}, got {name!r}; choose one."
            )


def wraps(path: Path | str | None = None) -> dict[str, float]:
    """The shares of the columns that scans of anatomies see, where the file states them.

    Args:
        path: as `load_anatomies` takes it.

    Returns:
        By name, the attribute ``wrap`` of the groups; nothing for NIfTI.

    Raises:
        InputError: if one does not lie in 0 to 1.
    """
    path = bundled("anatomy.h5") if path is None else Path(path)
    if is_nifti(path):
        return {}
    found = {}
    with opened(path) as file:
        for name in file.names():
            group = file.get(name)
            if group is not None and "wrap" in group.attrs:
                stated: Any = group.attrs["wrap"]
                found[name] = float(stated)
                if not 0 < found[name] <= 1:
                    raise InputError(
                        f"{path}: the attribute 'wrap' of {name} must lie in 0 to 1, got "
                        f"{found[name]:g}; correct it."
                    )
    return found


def resize(images: Tensor, size: int) -> Tensor:
    """Down-sampling by exact areas: a new pixel is the mean over what it covers of the old image.

    Old pixels on a border count by the fraction covered, so that the mean of the image is kept and
    no frequency folds back as it would by picking pixels.

    Args:
        images: real, shape ``(..., rows, columns)``.
        size: new number of rows and of columns, at most the old ones.

    Returns:
        Shape ``(..., size, size)``.

    Raises:
        InputError: if the size is larger than the image, or not positive.
    """
    if not 1 <= size <= min(images.shape[-2:]):
        raise InputError(
            f"size must lie in 1 to {min(images.shape[-2:])}, the smaller side of the images, got "
            f"{size}; "
            "images are only made smaller."
        )
    rows, columns = (_area_weights(n, size) for n in images.shape[-2:])
    # In float64, so that images of largest value 1 do not come out a rounding error above it.
    return (rows @ images.double() @ columns.T).to(images.dtype)


def split(
    n_slices: int,
    *,
    train: float = 0.6,
    validation: float = 0.15,
    test: float = 0.15,
    gap: int = 1,
) -> Split:
    """Divides a volume into training, validation and test blocks, dropping slices in between.

    Neighbouring slices, 1 to 5 mm apart, show nearly the same image: a random division would test
    on what was trained on. A gap makes the leak smaller but not nil, as all roles still share one
    head; claims about other people need a whole anatomy held out.

    Args:
        n_slices: slices of the volume.
        train: share of training slices; they also take what rounding leaves.
        validation: share of validation slices, at least one.
        test: share of test slices, at least one.
        gap: slices dropped between two blocks, >= 1.

    Returns:
        The slice numbers.

    Raises:
        InputError: if the shares exceed 1, or the volume is too small.

    Example:
        >>> split(9)
        Split(train=(0, 1, 2, 3, 4), validation=(6,), test=(8,))
    """
    shares = (train, validation, test)
    if min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise InputError(f"the shares must be > 0 with a sum of at most 1, got {shares}.")
    if gap < 1:
        raise InputError(f"gap must be >= 1, got {gap}: neighbouring slices show the same image.")
    n_validation = max(1, round(n_slices * validation))
    n_test = max(1, round(n_slices * test))
    n_train = n_slices - 2 * gap - n_validation - n_test
    if n_train < 1:
        raise InputError(
            f"{n_validation} validation and {n_test} test slices and two gaps of {gap} leave no "
            "training slice of "
            f"{n_slices}; use more slices or a smaller gap."
        )
    after_train = n_train + gap
    after_validation = after_train + n_validation + gap
    return Split(
        tuple(range(n_train)),
        tuple(range(after_train, after_train + n_validation)),
        tuple(range(after_validation, n_slices)),
    )


def _area_weights(n: int, size: int) -> Tensor:
    """Matrix ``(size, n)``: the fraction of a new pixel that an old one fills; rows sum to 1."""
    width = n / size
    start = width * torch.arange(size, dtype=torch.float64)[:, None]
    old = torch.arange(n, dtype=torch.float64)[None, :]
    overlap = torch.minimum(start + width, old + 1) - torch.maximum(start, old)
    return overlap.clamp(min=0) / width
