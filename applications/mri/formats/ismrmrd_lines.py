"""Which acquisitions of an ISMRMRD file are lines of an image, and where they belong.

``heads`` are the headers of acquisitions as they are stored, a structured array.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.mri.formats.ismrmrd_header import Encoding

# Bits of the flags, counted from 1: noise, navigator, phase correction, feedback, dummy scans, coil
# correction, phase stabilisation.
_LEFT_OUT = (19, 23, 24, 26, 27, 28, 29, 30, 31)
_CALIBRATION, _REVERSE = 20, 22


def is_calibration(heads: NDArray[Any]) -> NDArray[np.bool_]:
    """Which lines were measured for calibration only."""
    return _has(heads, _CALIBRATION)


def imaging_lines(heads: NDArray[Any], path: Path) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Leaves out what is no part of an image.

    Args:
        heads: of all acquisitions.
        path: the file, for messages.

    Returns:
        The heads that are left, calibration included, and their numbers in the file.

    Raises:
        InputError: if none is left, or one cannot be used.
    """
    unwanted = np.logical_or.reduce([_has(heads, bit) for bit in _LEFT_OUT])
    numbers = np.flatnonzero(~unwanted)
    heads = heads[numbers]
    if not len(heads):
        raise InputError(
            f"{path}: lines of an image were needed, all {len(unwanted)} are noise scans, "
            "navigators or the like; convert the scan again."
        )
    if _has(heads, _REVERSE).any():
        raise InputError(
            f"{path}: readouts must all run in one direction, {int(_has(heads, _REVERSE).sum())} "
            "are reversed; correct and flip them first."
        )
    if (heads["idx"]["kspace_encode_step_2"] != 0).any():
        raise InputError(f"{path}: a 2-D scan was needed, lines have a second phase encoding.")
    return heads, numbers


def readout_of(heads: NDArray[Any], encoding: Encoding, path: Path) -> slice:
    """What of each line is read.

    Args:
        heads: of lines of an image.
        encoding: sizes the header declares.
        path: the file, for messages.

    Returns:
        The samples.

    Raises:
        InputError: if the lines differ, or are not what the header declares.
    """
    for name in ("number_of_samples", "active_channels", "discard_pre", "discard_post"):
        if len(np.unique(heads[name])) > 1:
            raise InputError(
                f"{path}: all lines must have the same {name}, got "
                f"{np.unique(heads[name]).tolist()}; split the scan."
            )
    first = heads[0]
    before, n_samples = int(first["discard_pre"]), int(first["number_of_samples"])
    n = n_samples - before - int(first["discard_post"])
    if n != encoding.encoded[0]:
        raise InputError(
            f"{path}: a readout of {encoding.encoded[0]} samples was declared (encoded matrix size "
            f"x, oversampling included), got {n}; correct the header, or fill up partial echoes."
        )
    centres = [int(centre) - before for centre in np.unique(heads["center_sample"])]
    if centres != [n // 2]:
        raise InputError(
            f"{path}: the centre of k-space must be sample {n // 2} of {n}, got {centres}; shift "
            "the lines."
        )
    return slice(before, before + n)


def columns_of(heads: NDArray[Any], encoding: Encoding, path: Path) -> NDArray[np.int64]:
    """Where lines belong in k-space.

    Args:
        heads: of lines of an image.
        encoding: sizes the header declares.
        path: the file, for messages.

    Returns:
        The column of each.

    Raises:
        InputError: if one lies outside.
    """
    n = encoding.encoded[1]
    steps = heads["idx"]["kspace_encode_step_1"].astype(np.int64)
    columns = steps - encoding.step_centre + n // 2
    if columns.min() < 0 or columns.max() >= n:
        raise InputError(
            f"{path}: phase encoding steps {steps.min()} to {steps.max()} around "
            f"{encoding.step_centre} must fit the encoded matrix size y of {n}; correct the header."
        )
    return columns


def ordered_slices(heads: NDArray[Any], path: Path) -> tuple[list[int], NDArray[np.float64]]:
    """The slices in order of position where these are known and different, else of counter.

    Args:
        heads: of the lines of a volume.
        path: the file, for messages.

    Returns:
        The counters, and the positions [mm], ``(slices, 3)``.

    Raises:
        InputError: if the lines of one slice have several positions.
    """
    counters, first = np.unique(heads["idx"]["slice"], return_index=True)
    positions = heads["position"].astype(float)
    for counter, one in zip(counters, first, strict=True):
        spread = np.abs(positions[heads["idx"]["slice"] == counter] - positions[one]).max()
        if spread > 1e-2:
            raise InputError(
                f"{path}: the lines of slice {counter} must have one position, they are up to "
                f"{spread:g} mm apart; correct the acquisition headers."
            )
    along = positions[first] @ heads["slice_dir"][0].astype(float)
    distinct = len(np.unique(np.round(along, 3))) == len(along)
    order = np.argsort(along, kind="stable") if distinct else np.arange(len(along))
    return [int(counters[k]) for k in order], positions[first][order]


def repeated_line(rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """A row that occurs more than once.

    Args:
        rows: what tells lines apart, one row a line.

    Returns:
        One of them, or None.
    """
    different, counts = np.unique(rows, axis=0, return_counts=True)
    return different[counts > 1][0] if (counts > 1).any() else None


def _has(heads: NDArray[Any], bit: int) -> NDArray[np.bool_]:
    return (heads["flags"] & np.uint64(1 << (bit - 1))) != 0
