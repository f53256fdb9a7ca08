"""Checked access to HDF5: errors name file, key and remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from applications.errors import InputError

_LOCKED = ("unable to lock file", "already open for write", "already open for read")


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
    except PermissionError as error:
        raise InputError(
            f"{path}: the file may not be read ({error}); change its permissions."
        ) from error
    except OSError as error:
        if any(sign in str(error) for sign in _LOCKED):
            raise InputError(
                f"{path}: another program has the file open for writing, it is locked; close it "
                f"there ({error})."
            ) from error
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
