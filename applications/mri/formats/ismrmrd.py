"""ISMRMRD raw data in HDF5: Cartesian 2-D scans of one or more slices.

The lines of a slice are placed by their phase encoding step; the readout lies along the rows, its
oversampling is removed by cropping the image. Lines of other averages are averaged; repetitions,
contrasts, phases and sets are volumes, in this order, the last running fastest. Lines of
calibration belong to the image where the header calls them embedded or interleaved and are left out
otherwise; noise scans, navigators and the like are left out. Slices are in the order of their
positions where these are known, of their counters elsewhere.

Inati et al. 2017, ISMRM Raw data format, DOI 10.1002/mrm.26089.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from applications.errors import InputError
from applications.mri.formats.base import Facts, Format, RawSlice, Reader
from applications.mri.formats.hdf5 import opened
from applications.mri.formats.ismrmrd_header import (
    Encoding,
    checked_encoding,
    geometry_of,
    read_header,
)
from applications.mri.formats.ismrmrd_lines import (
    columns_of,
    imaging_lines,
    is_calibration,
    ordered_slices,
    readout_of,
    repeated_line,
)

_VOLUME = ("repetition", "contrast", "phase", "set")


@dataclass(frozen=True, eq=False)
class IsmrmrdVolume(Reader):
    """One volume of a file.

    Attributes:
        path: the file.
        facts: what is known of it.
        group: of the file that holds the scan.
        encoding: sizes.
        readout: what of a line is read.
        lines: for each slice the numbers of its acquisitions, in order, and their columns.
    """

    path: Path
    facts: Facts
    group: str
    encoding: Encoding
    readout: slice
    lines: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]

    def read(self, index: int) -> RawSlice:  # noqa: D102
        numbers, columns = self.lines[index]
        n_coils, (n_rows, n_columns) = self.facts.n_coils, self.facts.shape
        kspace = np.zeros((n_coils, n_rows, n_columns), np.complex64)
        with opened(self.path) as file:
            values = _acquisitions(file, self.group).fields("data")[numbers]
        for number, line, column in zip(numbers, values, columns, strict=True):
            samples = np.ascontiguousarray(line, np.float32)
            if samples.size % (2 * n_coils) or samples.size < 2 * n_coils * self.readout.stop:
                raise InputError(
                    f"{self.path}: acquisition {number} must hold complex values of {n_coils} "
                    f"coils, at least {self.readout.stop} each, got {samples.size} numbers; copy "
                    "the file again."
                )
            line = samples.view(np.complex64).reshape(n_coils, -1)[:, self.readout]
            kspace[:, :, column] += without_oversampling(line, n_rows)
        counts = np.bincount(columns, minlength=n_columns)
        kspace /= np.maximum(counts, 1).astype(np.float32)
        return RawSlice(kspace, torch.from_numpy(counts > 0).repeat(n_rows, 1))


def without_oversampling(line: NDArray[np.complex64], n: int) -> NDArray[np.complex64]:
    """A readout of the central pixels alone.

    Args:
        line: centred, shape ``(coils, samples)``.
        n: pixels to keep.

    Returns:
        Shape ``(coils, n)``; pixels keep their values under `operators.ifft2c`.
    """
    n_samples = line.shape[1]
    if n_samples == n:
        return line
    image = np.fft.ifft(np.fft.ifftshift(line, axes=1), axis=1, norm="ortho")
    first = n_samples // 2 - n // 2
    image = np.fft.fftshift(image, axes=1)[:, first : first + n]
    smaller = np.fft.fft(np.fft.ifftshift(image, axes=1), axis=1, norm="ortho")
    return np.fft.fftshift(smaller, axes=1).astype(np.complex64)


def _volumes(path: Path) -> tuple[Reader, ...]:
    with opened(path) as file:
        group = _groups(file)
        if len(group) != 1:
            raise InputError(
                f"{path}: one scan was needed, the file holds {sorted(group)}; copy one out."
            )
        heads = _acquisitions(file, group[0]).fields("head")[:]
        document: Any = file[group[0]]["xml"]  # pyright: ignore[reportIndexIssue]
        document = np.asarray(document).reshape(-1)[0]
    header = read_header(document, path)
    heads, numbers = imaging_lines(heads, path)
    spaces = np.unique(heads["encoding_space_ref"])
    if len(spaces) != 1 or spaces[0] >= len(header.encoding):
        raise InputError(
            f"{path}: all lines must be of one of the {len(header.encoding)} encodings in the "
            f"header, got {spaces.tolist()}; split the scan."
        )
    encoding = checked_encoding(header.encoding[spaces[0]], header, path)
    readout = readout_of(heads, encoding, path)
    columns = columns_of(heads, encoding, path)
    keys = np.stack([heads["idx"][name] for name in _VOLUME], axis=1)
    volumes = []
    for key in np.unique(keys, axis=0):
        of_it = (keys == key).all(axis=1)
        volumes.append(
            _volume(path, group[0], encoding, readout, heads[of_it], numbers[of_it], columns[of_it])
        )
    counts = [one.facts.n_slices for one in volumes]
    if len(set(counts)) > 1:
        raise InputError(
            f"{path}: every volume must have the same number of slices, got {counts}; the scan was "
            "interrupted, or its volumes have to be split."
        )
    return tuple(volumes)


def _volume(
    path: Path,
    group: str,
    encoding: Encoding,
    readout: slice,
    heads: NDArray[Any],
    numbers: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> IsmrmrdVolume:
    embedded = is_calibration(heads)
    if not encoding.calibration:
        heads, numbers, columns = heads[~embedded], numbers[~embedded], columns[~embedded]
        embedded = embedded[~embedded]
    where = np.stack([heads["idx"]["slice"], columns, heads["idx"]["average"]], axis=1)
    # A line may be measured for the image and for calibration too; the image's is taken.
    image = {tuple(row) for row in where[~embedded]}
    kept = ~embedded | np.array([tuple(row) not in image for row in where], dtype=bool)
    repeated = repeated_line(where[kept])
    if repeated is not None:
        raise InputError(
            f"{path}: a line must be measured once a volume and average, slice {repeated[0]} has "
            f"phase encoding column {repeated[1]} twice; split segments and other loops."
        )
    heads, numbers, columns = heads[kept], numbers[kept], columns[kept]
    if not len(heads):
        raise InputError(f"{path}: every volume must have lines of an image, one has none.")
    counters = heads["idx"]["slice"]
    order, places = ordered_slices(heads, path)
    directions = np.stack([heads[f"{name}_dir"] for name in ("read", "phase", "slice")], axis=1)
    facts = Facts(
        len(order),
        int(heads["active_channels"][0]),
        (encoding.n_rows, encoding.encoded[1]),
        image_shape=(encoding.n_rows, encoding.n_columns),
        acquisition=encoding.acquisition,
        geometry=geometry_of(encoding, directions.astype(float), places, path),
    )
    lines = tuple((numbers[counters == k], columns[counters == k]) for k in order)
    return IsmrmrdVolume(path, facts, group, encoding, readout, lines)


def _groups(file: h5py.File) -> list[str]:
    """The groups that hold a header and acquisitions."""
    found = []
    for name, one in file.items():
        data = one.get("data") if isinstance(one, h5py.Group) and "xml" in one else None
        if isinstance(data, h5py.Dataset) and {"head", "data"} <= set(data.dtype.names or ()):
            found.append(name)
    return found


def _recognises(path: Path) -> bool:
    try:
        with opened(path) as file:
            return bool(_groups(file))
    except InputError:
        return False


FORMAT = Format("ISMRMRD (.h5, .mrd)", _recognises, _volumes)


def _acquisitions(file: h5py.File, group: str) -> h5py.Dataset:
    return file[group]["data"]  # pyright: ignore[reportIndexIssue, reportReturnType]
