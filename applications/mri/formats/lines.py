"""Which acquisitions of a raw file are lines of an image, and where they belong.

Formats bring the heads of their acquisitions as an array of `HEAD`, which has the names and the
flags of ISMRMRD.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.mri.formats.encoding import Encoding

VOLUME = ("repetition", "contrast", "phase", "set")  # counters of volumes, the last fastest
_COUNTERS = ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", *VOLUME)
_COUNTS = ("number_of_samples", "active_channels", "discard_pre", "discard_post")
HEAD = np.dtype(
    [
        ("flags", "<u8"),
        *((name, "<u2") for name in (*_COUNTS, "center_sample", "encoding_space_ref")),
        *((name, "<f4", 3) for name in ("position", "read_dir", "phase_dir", "slice_dir")),
        ("idx", [(name, "<u2") for name in _COUNTERS]),
    ]
)
# Bits of the flags, counted from 1.
NOISE, CALIBRATION, REVERSE, NAVIGATOR = 19, 20, 22, 23
# Noise, navigator, phase correction, feedback, dummy scans, coil correction, phase stabilisation.
_LEFT_OUT = (NOISE, NAVIGATOR, 24, 26, 27, 28, 29, 30, 31)


@dataclass(frozen=True, eq=False)
class Placed:
    """Where the samples of lines belong in k-space, row by row.

    Attributes:
        begin: first sample that is read, of each line, in the order of rows.
        first: row that it belongs to.
        count: samples that are read.
        reverse: whether a line was read backwards, so that its samples are flipped before.
        whole: whether every line covers all rows.
        dropped: most samples of a line that fall outside the declared matrix.
    """

    begin: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    reverse: NDArray[np.bool_]
    whole: bool
    dropped: int

    def of(self, chosen: NDArray[np.bool_]) -> "Placed":
        """The places of some of the lines."""
        begin, first, count = (one[chosen] for one in (self.begin, self.first, self.count))
        return Placed(begin, first, count, self.reverse[chosen], self.whole, self.dropped)


def has(heads: NDArray[Any], bit: int) -> NDArray[np.bool_]:
    """Which heads have a flag."""
    return (heads["flags"] & np.uint64(1 << (bit - 1))) != 0


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
    unwanted = np.logical_or.reduce([has(heads, bit) for bit in _LEFT_OUT])
    numbers = np.flatnonzero(~unwanted)
    heads = heads[numbers]
    if not len(heads):
        raise InputError(
            f"{path}: lines of an image were needed, all {len(unwanted)} are noise scans, "
            "navigators or the like; convert the scan again."
        )
    if (heads["idx"]["kspace_encode_step_2"] != 0).any():
        raise InputError(
            f"{path}: a 2-D scan was needed, lines have a second phase encoding; transform 3-D "
            "scans along one axis and store them as slices."
        )
    if len(np.unique(heads["active_channels"])) > 1:
        raise InputError(
            f"{path}: all lines must have the same active_channels, got "
            f"{np.unique(heads['active_channels']).tolist()}; split the scan."
        )
    return heads, numbers


def placed(heads: NDArray[Any], encoding: Encoding, path: Path) -> Placed:
    """Where the samples of each line belong.

    The zero frequency of a line, its `center_sample`, comes to the middle of the rows: what partial
    and asymmetric echoes leave out is not measured.

    Args:
        heads: of lines of an image.
        encoding: sizes the header declares.
        path: the file, for messages.

    Returns:
        The places.

    Raises:
        InputError: if lines are not what the header declares.
    """
    n = encoding.encoded[0]
    samples, before, after, centre = (
        heads[name].astype(np.int64)
        for name in ("number_of_samples", "discard_pre", "discard_post", "center_sample")
    )
    kept = samples - before - after
    centre = centre - before
    # Of lower resolution, as scans for calibration may be.
    coarse = (kept < n - 1) & (centre == kept // 2)
    wrong = (kept > n) | (kept < 1) | (coarse & ~has(heads, CALIBRATION))
    if wrong.any() and len(np.unique(kept)) > 1:
        raise InputError(
            f"{path}: all lines must have the same number_of_samples, got "
            f"{np.unique(kept).tolist()}; split the scan."
        )
    if wrong.any():
        raise InputError(
            f"{path}: a readout of {n} samples was declared (encoded matrix size x, oversampling "
            f"included), got {kept[wrong][0]}; correct the header."
        )
    outside = (centre < 0) | (centre >= kept)
    if outside.any():
        raise InputError(
            f"{path}: the zero frequency must be a sample of each line, got sample "
            f"{centre[outside][0]} of {kept[outside][0]}; correct center_sample."
        )
    reverse = has(heads, REVERSE)
    # Some declare the centre of a reversed line as if it ran forwards: a whole line fits anyway.
    first = n // 2 - np.where(reverse, kept - 1 - centre, centre)
    first = np.where(reverse & (kept == n) & (first == 1), 0, first)
    start, stop = np.maximum(first, 0), np.minimum(first + kept, n)
    skipped = start - first
    return Placed(
        np.where(reverse, after, before) + skipped,
        start,
        stop - start,
        reverse,
        bool((stop - start == n)[~coarse].all()),
        int((kept - (stop - start)).max()),
    )


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


def check_repeated(where: NDArray[np.int64], path: Path) -> None:
    """Refuses lines that were measured twice.

    Args:
        where: slice, column and average of each line.
        path: the file, for messages.

    Raises:
        InputError: naming the first.
    """
    different, counts = np.unique(where, axis=0, return_counts=True)
    if (counts > 1).any():
        repeated = different[counts > 1][0]
        raise InputError(
            f"{path}: a line must be measured once a volume and average, slice {repeated[0]} has "
            f"phase encoding column {repeated[1]} twice; split segments and other loops."
        )
