"""Volumes put together from acquisitions, line by line, as ISMRMRD and TWIX store them.

Lines of other averages are averaged; repetitions, contrasts, phases and sets are volumes. Readouts
that ran backwards are flipped, partial echoes leave rows unmeasured, the oversampling of whole
readouts is removed by cropping the image. Lines of calibration belong to the image where the header
calls them embedded or interleaved; others calibrate the coils alone. Scans of noise prewhiten.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from applications.errors import InputError
from applications.inputs import check_announced, checked_size
from applications.mri.formats.base import Acquisitions, Facts, RawSlice, Reader
from applications.mri.formats.encoding import Encoding, geometry_of
from applications.mri.formats.lines import (
    CALIBRATION,
    NOISE,
    VOLUME,
    Placed,
    check_repeated,
    columns_of,
    has,
    imaging_lines,
    ordered_slices,
    placed,
)
from applications.mri.formats.noise import measured_whitening

_SMEARED = 2  # rows
_MOST_PAIRS = 2**28  # of a line and a volume or a slice that it may be of


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines of one slice and purpose.

    Attributes:
        numbers: of the acquisitions, rising.
        columns: that they belong to.
        places: of their samples.
    """

    numbers: NDArray[np.int64]
    columns: NDArray[np.int64]
    places: Placed


@dataclass(frozen=True, eq=False)
class AcquiredVolume(Reader):
    """One volume of a file.

    Attributes:
        path: the file.
        facts: what is known of it.
        acquisitions: of the file.
        n_samples: rows of k-space before oversampling is removed.
        image: lines of the image, by slice.
        calibration: lines that calibrate alone, by slice; None where there are none.
        white: matrix that makes the noise white, or None.
    """

    path: Path
    facts: Facts
    acquisitions: Acquisitions
    n_samples: int
    image: tuple[Lines, ...]
    calibration: tuple[Lines | None, ...]
    white: NDArray[np.complex64] | None

    def read(self, index: int) -> RawSlice:  # noqa: D102
        kspace, measured = self._gridded(self.image[index])
        alone, calibration = self.calibration[index], None
        if alone is not None:
            calibration, calibrated = self._gridded(alone)
            if not _covers_centre(calibrated):  # lines of the image lie between those
                calibration = np.where(calibrated, calibration, kspace)
        return RawSlice(kspace, torch.from_numpy(measured), None, calibration)

    def _gridded(self, lines: Lines) -> tuple[NDArray[np.complex64], NDArray[np.bool_]]:
        """Means of what was measured, and where it was."""
        n_coils, (n_rows, n_columns) = self.facts.n_coils, self.facts.shape
        kspace = np.zeros((n_coils, n_rows, n_columns), np.complex64)
        counts = np.zeros((n_rows, n_columns), np.int64)
        places = lines.places
        values = self.acquisitions.values(lines.numbers)
        for k, (number, column, value) in enumerate(
            zip(lines.numbers, lines.columns, values, strict=True)
        ):
            line = self._line(number, value, places, k)
            begin, end = int(places.first[k]), int(places.first[k] + places.count[k])
            if n_rows < self.n_samples:
                whole = np.pad(line, ((0, 0), (begin, self.n_samples - end)))
                line = without_oversampling(whole, n_rows)
                if end - begin < self.n_samples:  # the ends of a coarse line are smeared
                    begin = -(-begin * n_rows // self.n_samples) + _SMEARED
                    end = end * n_rows // self.n_samples - _SMEARED
                else:
                    begin, end = 0, n_rows
                line = line[:, begin:end]
            rows = slice(begin, end)
            kspace[:, rows, column] += line
            counts[rows, column] += 1
        kspace /= np.maximum(counts, 1).astype(np.float32)
        if self.white is not None:
            kspace = np.einsum("dc,cyx->dyx", self.white, kspace)
        return kspace, counts > 0

    def _line(
        self, number: np.int64, value: NDArray[np.float32], places: Placed, k: int
    ) -> NDArray[np.complex64]:
        n_coils = self.facts.n_coils
        samples = np.ascontiguousarray(value, np.float32)
        needed = int(places.begin[k] + places.count[k])
        if samples.size % (2 * n_coils) or samples.size < 2 * n_coils * needed:
            raise InputError(
                f"{self.path}: acquisition {number} must hold complex values of {n_coils} coils, "
                f"at least {needed} each, got {samples.size} numbers; copy the file again."
            )
        line = samples.view(np.complex64).reshape(n_coils, -1)
        line = line[:, ::-1] if places.reverse[k] else line
        return line[:, places.begin[k] : needed]


def without_oversampling(line: NDArray[np.complex64], n: int) -> NDArray[np.complex64]:
    """A readout of the central pixels alone.

    Args:
        line: centred, shape ``(coils, samples)``.
        n: pixels to keep.

    Returns:
        Shape ``(coils, n)``; pixels keep their values under `operators.ifft2c`.
    """
    n_samples = line.shape[1]
    image = np.fft.ifft(np.fft.ifftshift(line, axes=1), axis=1, norm="ortho")
    first = n_samples // 2 - n // 2
    image = np.fft.fftshift(image, axes=1)[:, first : first + n]
    smaller = np.fft.fft(np.fft.ifftshift(image, axes=1), axis=1, norm="ortho")
    return np.fft.fftshift(smaller, axes=1).astype(np.complex64)


def acquired_volumes(
    acquisitions: Acquisitions, heads: NDArray[Any], encoding: Encoding
) -> tuple[AcquiredVolume, ...]:
    """All volumes of a file.

    Args:
        acquisitions: of the file.
        heads: of all of them, an array of `lines.HEAD`.
        encoding: sizes that the header declares.

    Returns:
        One record a volume, at least one.

    Raises:
        InputError: if lines contradict each other or the header.
    """
    path = acquisitions.path
    noise = np.flatnonzero(has(heads, NOISE))
    channels = heads[noise]["active_channels"]
    heads, numbers = imaging_lines(heads, path)
    n_coils = int(heads["active_channels"][0])
    _check_sizes(path, encoding, n_coils, heads)
    white, remarks = measured_whitening(acquisitions, noise, channels, n_coils)
    columns = columns_of(heads, encoding, path)
    keys = np.stack([heads["idx"][name] for name in VOLUME], axis=1)
    calibrating = has(heads, CALIBRATION)
    apart = calibrating if (~calibrating).any() else ~calibrating
    # What has lines of calibration alone is no volume: it was measured once for all of them.
    different = np.unique(keys[~apart], axis=0)
    _check_pairs(path, "volumes", len(different), len(heads))
    shared = _shared(keys, calibrating)
    volumes = []
    for key in different:
        own = (keys == key).all(axis=1)
        having = np.unique(heads["idx"]["slice"][own & calibrating])
        lent = shared & ~own & ~np.isin(heads["idx"]["slice"], having)
        one = own | lent
        parts = heads[one], numbers[one], columns[one], lent[one]
        volumes.append(_volume(acquisitions, encoding, white, remarks, *parts))
    counts = [one.facts.n_slices for one in volumes]
    if len(set(counts)) > 1:
        raise InputError(
            f"{path}: every volume must have the same number of slices, got {counts}; the scan was "
            "interrupted, or its volumes have to be split."
        )
    return tuple(volumes)


def _shared(keys: NDArray[np.int64], calibrating: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The lines of calibration of the first volume that has any, which others may go by."""
    found = keys[calibrating]
    if not len(found):
        return calibrating
    return calibrating & (keys == np.unique(found, axis=0)[0]).all(axis=1)


def _volume(
    acquisitions: Acquisitions,
    encoding: Encoding,
    white: NDArray[np.complex64] | None,
    remarks: tuple[str, ...],
    heads: NDArray[Any],
    numbers: NDArray[np.int64],
    columns: NDArray[np.int64],
    lent: NDArray[np.bool_],
) -> AcquiredVolume:
    path = acquisitions.path
    calibrating = has(heads, CALIBRATION)
    where = np.stack([heads["idx"]["slice"], columns, heads["idx"]["average"]], axis=1)
    # A line may be measured for the image and for calibration too; the image's is taken.
    image = {tuple(row) for row in where[~calibrating]}
    kept = ~calibrating | np.array([tuple(row) not in image for row in where], dtype=bool)
    of_image = kept & ~lent if encoding.calibration else ~calibrating
    check_repeated(where[of_image], path)
    if not of_image.any():
        raise InputError(
            f"{path}: every volume must have lines of an image, one has none but those of "
            "calibration; convert the scan again."
        )
    alone = lent if encoding.calibration else calibrating
    counters = heads["idx"]["slice"]
    _check_pairs(path, "slices", len(np.unique(counters)), len(heads))
    order, positions = ordered_slices(heads[of_image], path)
    directions = np.stack([heads[f"{name}_dir"] for name in ("read", "phase", "slice")], axis=1)
    places = placed(heads, encoding, path)
    if alone.any():
        remarks += ("lines of calibration are no part of the image and calibrate the coils",)
    if lent.any():
        remarks += ("a volume without lines of calibration is calibrated by those of another",)
    n_samples, n_columns = encoding.encoded
    facts = Facts(
        len(order),
        int(heads["active_channels"][0]),
        (encoding.n_rows if places.whole else n_samples, n_columns),
        image_shape=(encoding.n_rows, encoding.n_columns),
        acquisition=encoding.acquisition,
        geometry=geometry_of(encoding, directions[of_image].astype(float), positions, path),
        remarks=remarks + _remarks(places),
    )

    def lines(chosen: NDArray[np.bool_]) -> Lines:
        return Lines(numbers[chosen], columns[chosen], places.of(chosen))

    by_slice = [counters == k for k in order]
    return AcquiredVolume(
        path,
        facts,
        acquisitions,
        n_samples,
        tuple(lines(of_image & one) for one in by_slice),
        tuple(lines(alone & one) if (alone & one).any() else None for one in by_slice),
        white,
    )


def _check_sizes(path: Path, encoding: Encoding, n_coils: int, heads: NDArray[Any]) -> None:
    """Refuses k-space that is far larger than the file, and places that are no numbers."""
    rows, columns = encoding.encoded
    if n_coils < 1:
        raise InputError(f"{path}: active_channels must be at least 1, got {n_coils}; correct it.")
    what = f"k-space of {n_coils} coils, {rows} x {columns}"
    check_announced(path, what, 8 * n_coils * rows * columns, checked_size(path, "a scan"))
    for name in ("position", "read_dir", "phase_dir", "slice_dir"):
        if not np.isfinite(heads[name]).all():
            raise InputError(
                f"{path}: {name} of every line must be finite, some is not; correct the "
                "acquisition headers."
            )


def _check_pairs(path: Path, what: str, n: int, n_lines: int) -> None:
    if n * n_lines > _MOST_PAIRS:
        raise InputError(
            f"{path}: fewer {what} were expected of {n_lines} lines, got {n}; split it."
        )


def _remarks(places: Placed) -> tuple[str, ...]:
    """What is done to lines that users should know."""
    said = []
    if places.reverse.any():
        said.append(
            f"{int(places.reverse.sum())} of {len(places.reverse)} readouts ran backwards and are "
            "flipped; differences of phase between the directions are not corrected"
        )
    if not places.whole:
        said.append("echoes are partial; what they leave out counts as not measured")
    if places.dropped:
        said.append(f"up to {places.dropped} samples a line lie outside the matrix, left out")
    return tuple(said)


def _covers_centre(measured: NDArray[np.bool_]) -> bool:
    """Whether columns are measured without gaps, the centre among them."""
    columns = np.flatnonzero(measured.any(axis=0))
    whole = len(columns) == columns[-1] - columns[0] + 1
    return bool(whole and columns[0] <= measured.shape[1] // 2 <= columns[-1])
