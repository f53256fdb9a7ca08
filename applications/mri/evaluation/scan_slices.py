"""The slices of all volumes of a scan, read when they are asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.data import Slice, VolumeFile
from applications.mri.sampling import Sampling

_KEPT = 2**29  # bytes of slices that are kept for another time


class ScanSlices(Sequence[tuple[Tensor, ...]]):
    """What is used of each slice, on a device; the slices of one volume after the other.

    An item is k-space, mask, and what the coils are calibrated by if that is no part of the image.

    Args:
        volumes: of one scan.
        given: mask to use instead of the scan's, or None.
        device: of what is given out.
    """

    def __init__(
        self, volumes: Sequence[VolumeFile], given: Sampling | None, device: str = "cpu"
    ) -> None:
        """Nothing is read yet."""
        self.volumes, self.given, self.device = volumes, given, device
        self._kept: dict[int, Slice] = {}
        self._room = 0

    def __len__(self) -> int:
        return sum(one.n_slices for one in self.volumes)

    def __getitem__(self, k: Any) -> Any:
        one = self.read(k)
        mask = self.mask(k, one)
        extra = () if one.calibration is None else (one.calibration,)
        used = torch.where(mask, one.kspace, 0), mask, *extra
        return tuple(x.to(self.device) for x in used)

    def keep(self) -> None:
        """From now on keep what is read, as far as there is room, until `forget`."""
        self._room = _KEPT

    def forget(self, k: int) -> None:
        """Make room."""
        one = self._kept.pop(k, None)
        self._room += 0 if one is None else one.kspace.nbytes

    def volume(self, k: int) -> VolumeFile:
        """The volume of a slice, counted through all of them."""
        return self.volumes[k // self.volumes[0].n_slices]

    def read(self, k: int) -> Slice:
        """A slice.

        Args:
            k: its number, counted through all volumes.

        Returns:
            The slice.

        Raises:
            UnusableSliceError: if it is zero throughout, or not finite.
        """
        if k in self._kept:
            return self._kept[k]
        volume = self.volume(k)
        one = volume.read_slice(k % volume.n_slices)
        if one.kspace.nbytes <= self._room:
            self._kept[k] = one
            self._room -= one.kspace.nbytes
        return one

    def mask(self, k: int, one: Slice) -> Tensor:
        """What is used of a slice.

        Args:
            k: its number.
            one: the slice.

        Returns:
            Boolean, ``(rows, columns)``.

        Raises:
            InputError: if a given mask does not lie within what was measured.
        """
        measured = one.measured
        if self.given is None:
            return measured
        mask = self.given.mask(self.volume(k).shape, torch.Generator())
        outside = int((mask & ~measured).sum())
        if outside:
            raise InputError(
                f"the mask must lie within what was measured, {outside} of its {int(mask.sum())} "
                "positions were not; leave --mask out, or draw it anew."
            )
        return mask
