"""Scans of any format of `applications.mri.formats`, read slice by slice."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.mri.data.centre import check_centre
from applications.mri.formats import Facts, Reader, cfl, fastmri, ismrmrd, m4raw, twix
from applications.mri.formats.nifti import is_nifti

_SMALLEST, _LARGEST = 1e-13, 1e13  # whose squares, summed over a slice, are far from the limits


def implied_mask(kspace: Tensor) -> Tensor:
    """The positions where any coil is not exactly zero: the mask of zero-filled k-space.

    Args:
        kspace: shape ``(..., coils, rows, columns)``.

    Returns:
        Boolean mask, shape ``(..., rows, columns)``.
    """
    return (kspace != 0).any(dim=-3)


class UnusableSliceError(InputError):
    """A slice that was not measured, or holds values that are not finite: it can be left out."""


@dataclass(frozen=True)
class Slice:
    """One slice of a file.

    Attributes:
        kspace: complex64, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``, or None where the file has none; `measured` is
            what was measured.
        reference: float32, shape ``(rows, columns)`` or a centred crop of it, or None.
        max: largest reference value of the volume, the data range of its metrics, or None.
        path: the file.
        index: the slice in the file.
        unit: what `kspace`, `reference` and `max` were divided by: 1, but for values so large or
            small that their squares leave the range of float32.
        calibration: complex64, shape of `kspace`, zeros where nothing was measured: what calibrates
            the coils if it is no part of the image, or None.
        remarks: what was found that users should know.
    """

    kspace: Tensor
    mask: Tensor | None
    reference: Tensor | None
    max: float | None
    path: Path
    index: int
    unit: float = 1.0
    calibration: Tensor | None = None
    remarks: tuple[str, ...] = ()

    @property
    def measured(self) -> Tensor:
        """The mask without what is zero in all coils: boolean, shape ``(rows, columns)``."""
        implied = implied_mask(self.kspace)
        return implied if self.mask is None else self.mask & implied


@dataclass(frozen=True)
class VolumeFile:
    """A volume whose file has been checked and whose slices are read one at a time.

    The format is told from the file; see `applications.mri.formats`. No file stays open between
    calls, so that the object can be sent to the workers of a data loader.

    Attributes:
        path: the file, or what the files of a scan have in common.
        volume: which, where a file holds several: repetitions, echoes and the like.
        readers: of all volumes, where they have been opened already.
        block: numbers of the slices that count, as if the volume had no others; None: all.
        n_volumes: number of volumes in the file.
        facts: all that is known of the volume.

    Raises:
        InputError: if the file is missing, unreadable, or in no known format, or has no such
            volume.
    """

    path: Path
    volume: int = 0
    readers: tuple[Reader, ...] = field(default=(), repr=False, compare=False)
    block: tuple[int, ...] | None = None
    n_volumes: int = field(init=False)
    facts: Facts = field(init=False)

    def __post_init__(self) -> None:
        path = Path(self.path)
        readers = self.readers or open_volumes(path)
        if not 0 <= self.volume < len(readers):
            raise InputError(
                f"{path}: volume must lie in 0 to {len(readers) - 1}, got {self.volume}."
            )
        facts = readers[self.volume].facts
        outside = [i for i in self.block or () if not 0 <= i < facts.n_slices]
        if outside or self.block == ():
            raise InputError(
                f"{path}: a block must name slices in 0 to {facts.n_slices - 1}, at least one, got "
                f"{self.block}."
            )
        for name, value in (
            ("path", path),
            ("readers", readers),
            ("n_volumes", len(readers)),
            ("facts", facts),
        ):
            object.__setattr__(self, name, value)

    @property
    def n_slices(self) -> int:
        """Number of slices."""
        return self.facts.n_slices if self.block is None else len(self.block)

    @property
    def n_coils(self) -> int:
        """Number of coils."""
        return self.facts.n_coils

    @property
    def shape(self) -> tuple[int, int]:
        """Matrix size ``(rows, columns)`` of k-space."""
        return self.facts.shape

    @property
    def image_shape(self) -> tuple[int, int]:
        """Centred part ``(rows, columns)`` of the image that was to be shown."""
        return self.facts.image_shape or self.facts.shape

    @property
    def reference_shape(self) -> tuple[int, int] | None:
        """``(rows, columns)`` of the reference images, or None."""
        return self.facts.reference_shape

    @property
    def acquisition(self) -> str:
        """Sequence and contrast, ``"unknown"`` if not stated."""
        return self.facts.acquisition

    @property
    def max(self) -> float | None:
        """Largest reference value of the volume, or None."""
        return self.facts.max

    @property
    def has_reference(self) -> bool:
        """Whether a fully sampled reference image exists for each slice."""
        return self.facts.reference_shape is not None

    def read_slice(self, index: int) -> Slice:
        """Reads one slice.

        Args:
            index: from 0 to ``n_slices - 1``.

        Returns:
            The slice.

        Raises:
            InputError: if there is no such slice, or its file is damaged.
            UnusableSliceError: if k-space is zero throughout, or not finite.
        """
        if not 0 <= index < self.n_slices:
            raise InputError(
                f"{self.path}: slice must lie in 0 to {self.n_slices - 1}, got {index}."
            )
        index = index if self.block is None else self.block[index]
        reader = self.readers[self.volume]
        raw = reader.read(index)
        _check_finite(reader.path, "kspace", raw.kspace, index)
        kspace = torch.from_numpy(raw.kspace)
        measured, remarks = _measured(reader.path, kspace, raw.mask, index)
        unit = _unit(kspace)
        kspace = kspace if unit == 1 else kspace / unit
        check_centre(kspace, measured, f"{reader.path}: slice {index}")
        reference, calibration = raw.reference, raw.calibration
        if reference is not None:
            reference = torch.from_numpy((reference / unit).astype(np.float32))
        if calibration is not None:
            _check_finite(reader.path, "calibration", calibration, index)
            calibration = torch.from_numpy(calibration) / unit
        return Slice(
            kspace,
            raw.mask,
            reference,
            None if self.max is None else self.max / unit,
            self.path,
            index,
            unit,
            calibration,
            remarks,
        )

    def middle_slice(self) -> Slice:
        """The slice nearest the middle that can be used.

        Returns:
            The slice.

        Raises:
            UnusableSliceError: if there is none.
        """
        middle = self.n_slices // 2
        order = sorted(range(self.n_slices), key=lambda index: abs(index - middle))
        for index in order:
            try:
                return self.read_slice(index)
            except UnusableSliceError:
                if index == order[-1]:
                    raise
        raise UnusableSliceError(f"{self.path}: at least one slice was needed, it has none.")


def open_scan(path: Path) -> tuple[VolumeFile, ...]:
    """All volumes of a scan.

    Args:
        path: the file, or what the files of a scan have in common.

    Returns:
        The volumes, at least one.

    Raises:
        InputError: if the file is missing, unreadable, or in no known format.
    """
    readers = open_volumes(path)
    return tuple(VolumeFile(path, volume, readers) for volume in range(len(readers)))


def _measured(
    path: Path, kspace: Tensor, stated: Tensor | None, index: int
) -> tuple[Tensor, tuple[str, ...]]:
    """The stated mask without what is zero, and what to say of that."""
    measured = implied_mask(kspace)
    if not bool(measured.any()):
        raise UnusableSliceError(
            f"{path}: slice {index} is zero throughout, a mask must keep at least one position; "
            "measure it again or leave the slice out."
        )
    mask = measured if stated is None else stated & measured
    if not bool(mask.any()):
        raise UnusableSliceError(
            f"{path}: mask must keep at least one position, of slice {index} it keeps none that is "
            "not zero; correct the mask or leave the slice out."
        )
    missing = int((~measured).sum() if stated is None else (stated & ~measured).sum())
    if not missing:
        return mask, ()
    columns = int((~measured.any(dim=0)).sum())
    what = f"{missing} of {measured.numel()} positions"
    if columns * measured.shape[0] == missing:
        what = f"{columns} of {measured.shape[1]} columns"
    return mask, (f"{what} are zero in all coils and count as not measured",)


def _unit(kspace: Tensor) -> float:
    """A power of two that brings extreme values to about 1; it changes no digit."""
    low, high = torch.view_as_real(kspace).aminmax()
    largest = max(-float(low), float(high))
    if _SMALLEST <= largest <= _LARGEST:
        return 1.0
    return 2.0 ** round(math.log2(largest))


def _check_finite(path: Path, name: str, values: NDArray[Any], index: int) -> None:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise UnusableSliceError(
            f"{path}: {name} must be finite, slice {index} holds {bad} values that are not; export "
            "it again or leave the slice out."
        )


# A format that recognises less stands before one that recognises more.
FORMATS = (m4raw.FORMAT, cfl.FORMAT, ismrmrd.FORMAT, twix.FORMAT, fastmri.FORMAT)


def open_volumes(path: Path) -> tuple[Reader, ...]:
    """All volumes of a scan, in the format that recognises it.

    Args:
        path: file, or what the files of a scan have in common.

    Returns:
        One reader a volume, at least one.

    Raises:
        InputError: if no format recognises the path, or the file is bad.
    """
    for one in FORMATS:
        if one.recognises(path):
            return one.volumes(path)
    if is_nifti(path):
        raise InputError(
            f"{path}: k-space was needed, NIfTI holds images; simulate a scan of them with "
            "simulate --anatomies."
        )
    there = "is none of them" if path.exists() else "does not exist"
    raise InputError(
        f"{path}: a scan was needed, one of {', '.join(one.name for one in FORMATS)}; this {there}."
    )
