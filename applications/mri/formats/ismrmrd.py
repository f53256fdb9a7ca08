"""ISMRMRD raw data in HDF5: Cartesian 2-D scans of one or more slices; see `acquired`.

Inati et al. 2017, ISMRM Raw data format, DOI 10.1002/mrm.26089.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.mri.formats.acquired import acquired_volumes
from applications.mri.formats.base import Acquisitions, Format, Reader
from applications.mri.formats.hdf5 import opened
from applications.mri.formats.ismrmrd_header import checked_encoding, read_header
from applications.mri.formats.lines import CALIBRATION, NAVIGATOR, has, imaging_lines


@dataclass(frozen=True, eq=False)
class IsmrmrdAcquisitions(Acquisitions):
    """The acquisitions of one group of a file.

    Attributes:
        path: the file.
        group: that holds the scan.
    """

    path: Path
    group: str

    def values(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:  # noqa: D102
        with opened(self.path) as file:
            yield from _acquisitions(file, self.group).fields("data")[numbers]


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
    imaging, _ = imaging_lines(heads, path)
    other = has(imaging, CALIBRATION)
    spaces = np.unique(imaging["encoding_space_ref"][~other if (~other).any() else other])
    if len(spaces) != 1 or spaces[0] >= len(header.encoding):
        raise InputError(
            f"{path}: all lines must be of one of the {len(header.encoding)} encodings in the "
            f"header, got {spaces.tolist()}; split the scan."
        )
    encoding = checked_encoding(header.encoding[spaces[0]], header, path)
    _align_calibration(heads, header, int(spaces[0]))
    return acquired_volumes(IsmrmrdAcquisitions(path, group[0]), heads, encoding)


def _align_calibration(heads: NDArray[Any], header: Any, space: int) -> None:
    """Counts the steps of calibration in other encodings as the image does.

    Samples of one field of view lie on one grid, whatever their number; those of another field of
    view are left out, as navigators are.
    """
    views, centres = [], []
    for one in header.encoding:
        view, size = one.encodedSpace.fieldOfView_mm, one.encodedSpace.matrixSize
        limit = one.encodingLimits.kspace_encoding_step_1
        views.append((view.x, view.y))
        centres.append(size.y // 2 if limit is None else limit.center)
    away = has(heads, CALIBRATION) & (heads["encoding_space_ref"] != space)
    for number in np.unique(heads["encoding_space_ref"][away]):
        lines = away & (heads["encoding_space_ref"] == number)
        same = number < len(views) and np.allclose(views[number], views[space], rtol=0.02)
        if same:
            steps = heads["idx"]["kspace_encode_step_1"][lines].astype(np.int64)
            heads["idx"]["kspace_encode_step_1"][lines] = steps + centres[space] - centres[number]
        else:
            heads["flags"][lines] |= np.uint64(1 << (NAVIGATOR - 1))


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
