"""One slice as users get it: checked, its squares finite, with what was measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.mri.data.centre import check_beyond, check_centre
from applications.mri.formats import RawSlice, UnusableSliceError
from applications.mri.physics.operators import unit_of


def implied_mask(kspace: Tensor) -> Tensor:
    """The positions where any coil is not exactly zero: the mask of zero-filled k-space.

    Args:
        kspace: shape ``(..., coils, rows, columns)``.

    Returns:
        Boolean mask, shape ``(..., rows, columns)``.
    """
    return (kspace != 0).any(dim=-3)


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


def slice_of(raw: RawSlice, scan: Path, path: Path, index: int, largest: float | None) -> Slice:
    """What a format holds of a slice, made ready.

    Args:
        raw: the slice.
        scan: that it is of, a file or what the files have in common.
        path: the file that holds it.
        index: of the slice.
        largest: reference value of the volume, or None.

    Returns:
        The slice.

    Raises:
        InputError: if k-space has its peak far from its centre.
        UnusableSliceError: if k-space is zero throughout, not finite, or has values beyond those of
            its centre.
    """
    _check_finite(path, "kspace", raw.kspace, index)
    kspace = torch.from_numpy(raw.kspace)
    measured, remarks = _measured(path, kspace, raw.mask, index)
    unit, stored = unit_of(kspace), kspace
    kspace = kspace if unit == 1 else kspace / unit
    check_centre(kspace, measured, f"{path}: slice {index}")
    check_beyond(stored, f"{path}: slice {index}")
    reference, calibration = raw.reference, raw.calibration
    if reference is not None:
        reference = torch.from_numpy((reference / unit).astype(np.float32))
    if calibration is not None:
        _check_finite(path, "calibration", calibration, index)
        calibration = torch.from_numpy(calibration) / unit
    largest = None if largest is None else largest / unit
    return Slice(kspace, raw.mask, reference, largest, scan, index, unit, calibration, remarks)


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


def _check_finite(path: Path, name: str, values: NDArray[Any], index: int) -> None:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise UnusableSliceError(
            f"{path}: {name} must be finite, slice {index} holds {bad} values that are not; export "
            "it again or leave the slice out."
        )
