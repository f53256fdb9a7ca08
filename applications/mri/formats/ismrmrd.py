"""ISMRMRD raw data in HDF5: Cartesian 2-D scans of one or more slices; see `acquired`.

Inati et al. 2017, ISMRM Raw data format, DOI 10.1002/mrm.26089.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.inputs import checked_xml, links_followed, listed, reading
from applications.mri.formats.acquired import acquired_volumes
from applications.mri.formats.base import Acquisitions, Format, Reader
from applications.mri.formats.hdf5 import Contents, opened
from applications.mri.formats.ismrmrd_header import checked_encoding, read_header
from applications.mri.formats.lines import CALIBRATION, HEAD, NAVIGATOR, has, imaging_lines

_MOST_GROUPS = 1000  # that are looked at


@dataclass(frozen=True, eq=False)
class IsmrmrdAcquisitions(Acquisitions):
    """The acquisitions of one group of a file.

    Attributes:
        path: the file.
        group: that holds the scan.
        follow: whether the file may read others.
    """

    path: Path
    group: str
    follow: bool = field(default_factory=links_followed)

    def values(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:  # noqa: D102
        with opened(self.path, self.follow) as file:
            for value in _acquisitions(file, self.group).fields("data")[numbers]:
                yield np.asarray(value, np.float32)


def _volumes(path: Path) -> tuple[Reader, ...]:
    with opened(path) as file:
        group = _groups(file)
        if len(group) != 1:
            raise InputError(
                f"{path}: one scan was needed, the file holds {listed(group)}; copy one out."
            )
        with reading(path, f"'{group[0]}/data' with heads of ISMRMRD"):
            heads = _heads(_acquisitions(file, group[0]).fields("head")[:])
        document = _document(file, f"{group[0]}/xml")
    header = read_header(checked_xml(path, document, f"{group[0]}/xml"), path)
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


def _heads(found: NDArray[Any]) -> NDArray[Any]:
    """Heads with the fields that are read, each of its kind."""
    heads = np.zeros(len(found), HEAD)
    for place, values in ((heads, found), (heads["idx"], found["idx"])):
        for name in place.dtype.names or ():
            if name == "idx":
                continue
            place[name] = values[name]
            if place[name].dtype.kind == "u" and (place[name] != values[name]).any():
                raise ValueError(f"{name} of the heads has values that are no counts")
    return heads


def _document(file: Contents, name: str) -> bytes | str:
    """The header of a scan."""
    found = file.get(name)
    text: Any = None
    if isinstance(found, h5py.Dataset) and found.size:
        text = file.read(found).reshape(-1)[0]
    if not isinstance(text, bytes | str):
        raise InputError(f"{file.path}: {name} must hold a header in XML; convert the scan again.")
    return text


def _groups(file: Contents) -> list[str]:
    """The groups that hold a header and acquisitions."""
    found = []
    for name in file.names()[:_MOST_GROUPS]:
        if not isinstance(file.get(name), h5py.Group) or file.get(f"{name}/xml") is None:
            continue
        data = file.get(f"{name}/data")
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


def _acquisitions(file: Contents, group: str) -> h5py.Dataset:
    found = file.get(f"{group}/data")
    if not isinstance(found, h5py.Dataset):
        raise InputError(f"{file.path}: '{group}/data' was needed, it is gone; copy it again.")
    return found
