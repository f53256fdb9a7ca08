"""Scans written in the HDF5 layout of fastMRI.

A file holds ``kspace`` ``[slice, coil, row, column]`` complex64; with luck ``reconstruction_rss``
``[slice, row, column]`` float32, smaller than k-space where the readout was oversampled; ``mask``,
over the columns or over rows and columns; ``ismrmrd_header``, XML; attributes ``acquisition``,
``max``, ``norm``, ``patient_id``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.files import whole_file
from applications.mri.formats.fastmri_header import minimal_header


@dataclass(frozen=True)
class Volume:
    """What `write_volume` writes.

    Attributes:
        kspace: complex, shape ``(slices, coils, rows, columns)``; stored as complex64.
        reference: root sum of squares of the fully sampled coil images, real, shape ``(slices,
            rows, columns)`` (rows and columns may be cropped), or None where no such image exists.
        mask: boolean, shape ``(columns,)`` or ``(rows, columns)``, or None.
        acquisition: sequence and contrast, for example ``"AXT2"``.
        patient_id: any identifier.
        header: ISMRMRD XML; None writes a minimal one with the matrix sizes and 1 mm pixels.
    """

    kspace: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    acquisition: str = "unknown"
    patient_id: str = "unknown"
    header: str | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.kspace.shape)
        if len(shape) != 4 or 0 in shape or not self.kspace.is_complex():
            raise InputError(
                "kspace must be complex of shape (slices, coils, rows, columns), got "
                f"{self.kspace.dtype} {shape}."
            )
        if self.reference is not None and (
            self.reference.ndim != 3 or self.reference.shape[0] != shape[0]
        ):
            raise InputError(
                f"reference must have shape ({shape[0]}, rows, columns), got "
                f"{tuple(self.reference.shape)}."
            )
        if self.mask is not None and tuple(self.mask.shape) not in {shape[3:], shape[2:]}:
            raise InputError(
                f"mask must have shape {shape[3:]} or {shape[2:]}, got {tuple(self.mask.shape)}."
            )


class _Patient:
    """A file for HDF5 that puts off the error of a full disk until HDF5 has closed it."""

    def __init__(self, file: FileIO) -> None:
        # HDF5 2.0 frees a file twice where the last writes fail, which ends the process.
        self._file = file
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        """Write, or note that it was not possible."""
        written = 0
        try:
            while self.error is None and written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            self.error = error
        return len(data)

    def readinto(self, data: memoryview) -> int:
        """Read what there is; zeros where it was not written."""
        count = self._file.readinto(data) or 0
        if self.error is not None and count < len(data):
            data[count:] = bytes(len(data) - count)
            return len(data)
        return count

    def read(self, size: int = -1) -> bytes:
        """Bytes; that there is such a method tells h5py that this is a file."""
        return self._file.read(size) or b""

    def truncate(self, size: int) -> int:
        """As long as HDF5 says."""
        with suppress(OSError):
            self._file.truncate(size)
        return size

    def seek(self, offset: int, whence: int = 0) -> int:
        """To a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place."""
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is buffered."""


@contextmanager
def hdf5_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file that either is complete or does not appear, on a full disk too.

    Args:
        path: the file, replaced if it exists.

    Yields:
        The open file.

    Raises:
        InputError: if it cannot be written.
    """
    with whole_file(path) as temporary, FileIO(temporary, "w+") as raw:
        patient = _Patient(raw)
        # Before HDF5 1.8 attributes had 64 KiB at most: some thousand slices.
        with h5py.File(patient, "w", libver=("v108", "v108")) as file:
            yield file
        if patient.error is not None:
            raise patient.error


def set_attributes(file: h5py.File, values: Mapping[str, Any]) -> None:
    r"""Puts values beside the data, texts as HDF5 takes them.

    Args:
        file: open for writing.
        values: by name; of texts, NUL and what is no character in UTF-8, as in names of files that
            have another encoding, is written as an escape such as ``\udcff``.
    """
    for name, value in values.items():
        if isinstance(value, str):
            value = value.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
        file.attrs[name] = value


def write_volume(path: Path | str, volume: Volume) -> None:
    """Writes a file that either is complete or does not appear: it is renamed into place when done.

    Args:
        path: the file, replaced if it exists; its folder must exist.
        volume: what to write.

    Raises:
        InputError: if the folder does not exist or cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first.")
    with hdf5_file(path) as file:
        file["kspace"] = volume.kspace.detach().cpu().to(torch.complex64).numpy()
        header = volume.header
        if header is None:
            shown = volume.kspace if volume.reference is None else volume.reference
            header = minimal_header(volume.kspace.shape[2:], shown.shape[-2:])
        file.create_dataset("ismrmrd_header", data=header, dtype=h5py.string_dtype())
        about = {"acquisition": volume.acquisition, "patient_id": volume.patient_id}
        set_attributes(file, about)
        if volume.mask is not None:
            file["mask"] = volume.mask.cpu().numpy()
        if volume.reference is not None:
            reference = volume.reference.detach().cpu().float().numpy()
            file["reconstruction_rss"] = reference
            file.attrs["max"] = float(reference.max())
            file.attrs["norm"] = float(np.linalg.norm(reference))
