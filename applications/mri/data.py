"""Scans in the HDF5 layout of fastMRI: written whole, read slice by slice.

A file holds ``kspace`` ``[slice, coil, row, column]`` complex64; with luck ``reconstruction_rss``
``[slice, row, column]`` float32, smaller than k-space where the readout was oversampled; ``mask``,
over the columns or over rows and columns; ``ismrmrd_header``, XML; attributes ``acquisition``,
``max``, ``norm``, ``patient_id``.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from applications.mri.errors import InputError
from applications.mri.files import whole_file
from applications.mri.hdf5 import minimal_header, opened, read_facts, read_finite, read_mask
from applications.mri.operators import ifft2c, rss


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


@dataclass(frozen=True)
class Slice:
    """One slice of a file.

    Attributes:
        kspace: complex64, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``, or None where the file has none.
        reference: float32, shape ``(rows, columns)`` or a centred crop of it, or None.
        max: largest reference value of the volume, the data range of its metrics, or None.
        path: the file.
        index: the slice in the file.
    """

    kspace: Tensor
    mask: Tensor | None
    reference: Tensor | None
    max: float | None
    path: Path
    index: int


@dataclass(frozen=True)
class VolumeFile:
    """A file whose header has been checked and whose slices are read one at a time.

    No file stays open between calls, so that the object can be sent to the workers of a data
    loader.

    Attributes:
        path: the file.
        n_slices: number of slices.
        n_coils: number of coils.
        shape: matrix size ``(rows, columns)`` of k-space.
        reference_shape: ``(rows, columns)`` of the reference images, or None.
        acquisition: sequence and contrast, ``"unknown"`` if not stated.
        max: largest reference value of the volume, or None.

    Raises:
        InputError: if the file is missing, unreadable, or not in the layout of this module.
    """

    path: Path
    n_slices: int = field(init=False)
    n_coils: int = field(init=False)
    shape: tuple[int, int] = field(init=False)
    reference_shape: tuple[int, int] | None = field(init=False)
    acquisition: str = field(init=False)
    max: float | None = field(init=False)

    def __post_init__(self) -> None:
        path = Path(self.path)
        with opened(path) as file:
            facts = read_facts(file, path)
        for name, value in [("path", path), *zip(facts._fields, facts, strict=True)]:
            object.__setattr__(self, name, value)

    @property
    def has_reference(self) -> bool:
        """Whether a fully sampled reference image exists for each slice."""
        return self.reference_shape is not None

    def read_slice(self, index: int) -> Slice:
        """Reads one slice.

        Args:
            index: from 0 to ``n_slices - 1``.

        Returns:
            The slice.

        Raises:
            InputError: if there is no such slice, or it holds values that are not finite.
        """
        if not 0 <= index < self.n_slices:
            raise InputError(
                f"{self.path}: slice must lie in 0 to {self.n_slices - 1}, got {index}."
            )
        with opened(self.path) as file:
            kspace = read_finite(file, self.path, "kspace", index).astype(np.complex64)
            mask = read_mask(file, self.path, self.shape) if "mask" in file else None
            reference = None
            if self.has_reference:
                reference = read_finite(file, self.path, "reconstruction_rss", index)
                reference = torch.from_numpy(reference.astype(np.float32))
        return Slice(torch.from_numpy(kspace), mask, reference, self.max, self.path, index)


class SliceDataset(Dataset[Slice]):
    """All slices of several files in order, of any coil counts and matrix sizes.

    Use it in a ``DataLoader`` with ``batch_size=None``, since slices of different size make no
    batch.

    Args:
        source: a folder, all ``*.h5`` in it being read in alphabetical order, or a sequence of
            files.

    Raises:
        InputError: if there is no file, or one is not in the layout of this module.
    """

    def __init__(self, source: Path | str | Sequence[Path | str]) -> None:
        if isinstance(source, (str, Path)):
            folder = Path(source)
            if not folder.is_dir():
                raise InputError(
                    f"{folder}: a folder of .h5 files was needed; this is none. Check the path."
                )
            source = sorted(folder.glob("*.h5"))
            if not source:
                raise InputError(
                    f"{folder}: at least one .h5 file was needed, the folder has none."
                )
        if not source:
            raise InputError("source must name at least one file, got an empty sequence.")
        self.files: tuple[VolumeFile, ...] = tuple(VolumeFile(Path(path)) for path in source)
        self._ends = list(accumulate(file.n_slices for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Slice:
        if not 0 <= index < len(self):
            raise IndexError(f"slice must lie in 0 to {len(self) - 1}, got {index}.")
        which = bisect_right(self._ends, index)
        return self.files[which].read_slice(
            index - (self._ends[which] - self.files[which].n_slices)
        )


def fully_sampled(one: Slice) -> tuple[Tensor, Tensor]:
    """The k-space of a slice that leaves nothing out, and its reference image.

    Args:
        one: the slice.

    Returns:
        k-space ``(coils, rows, columns)``, and the stored reference, or the root sum of squares of
        the coil images where none is stored.

    Raises:
        InputError: if a mask in the file leaves out positions.
    """
    if one.mask is not None and not bool(one.mask.all()):
        raise InputError(
            f"{one.path}: fully sampled k-space was needed, the mask in the file leaves out "
            f"{int((~one.mask).sum())} positions; use other scans."
        )
    reference = rss(ifft2c(one.kspace)) if one.reference is None else one.reference
    return one.kspace, reference


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
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
        file["kspace"] = volume.kspace.detach().cpu().to(torch.complex64).numpy()
        header = volume.header
        if header is None:
            shown = volume.kspace if volume.reference is None else volume.reference
            header = minimal_header(volume.kspace.shape[2:], shown.shape[-2:])
        file.create_dataset("ismrmrd_header", data=header, dtype=h5py.string_dtype())
        file.attrs["acquisition"] = volume.acquisition
        file.attrs["patient_id"] = volume.patient_id
        if volume.mask is not None:
            file["mask"] = volume.mask.cpu().numpy()
        if volume.reference is not None:
            reference = volume.reference.detach().cpu().float().numpy()
            file["reconstruction_rss"] = reference
            file.attrs["max"] = float(reference.max())
            file.attrs["norm"] = float(np.linalg.norm(reference))


def implied_mask(kspace: Tensor) -> Tensor:
    """The positions where any coil is not exactly zero: the mask of zero-filled k-space.

    Args:
        kspace: shape ``(..., coils, rows, columns)``.

    Returns:
        Boolean mask, shape ``(..., rows, columns)``.
    """
    return (kspace != 0).any(dim=-3)
