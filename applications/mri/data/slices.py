"""The slices of several scans as one data set, and what training needs to know of a slice."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from applications.errors import InputError
from applications.mri.data.remarks import Remarks
from applications.mri.data.values import Slice, UnusableSliceError
from applications.mri.data.volumes import VolumeFile, open_scan
from applications.mri.formats.fastmri import SUFFIXES
from applications.mri.physics.operators import centre_crop, ifft2c, rss

_MOST = 0.7  # of k-space
_OTHER, _ALIKE = 10.0, 0.9  # times as bright; correlation of two images of one object


def scans_in(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The scans of a folder.

    Args:
        folder: to look in; folders in it and hidden files, such as the `._a.h5` of macOS, are left
            out. Links to nothing are not: opening them says so.
        suffixes: of scans, in any case; those of fastMRI's layout unless stated.

    Returns:
        The files in alphabetical order.
    """
    return sorted(
        one
        for one in folder.iterdir()
        if one.suffix.lower() in suffixes
        and not one.name.startswith(".")
        and (one.is_file() or (one.is_symlink() and not one.exists()))
    )


class SliceDataset(Dataset[Slice]):
    """All slices of several files in order, of any coil counts and matrix sizes.

    Use it in a ``DataLoader`` with ``batch_size=None``, since slices of different size make no
    batch.

    Args:
        source: a folder, whose scans are read in alphabetical order, see `scans_in`; or a sequence
            of files. All volumes of a file count, one after the other; of those that have been
            opened as a `VolumeFile`, that volume.

    Raises:
        InputError: if there is no file, or one is not in the layout of this module.
    """

    def __init__(self, source: Path | str | Sequence[Path | str | VolumeFile]) -> None:
        if isinstance(source, (str, Path)):
            folder = Path(source)
            if not folder.is_dir():
                raise InputError(
                    f"{folder}: a folder of .h5 files was needed; this is none. Check the path."
                )
            source = scans_in(folder)
            if not source:
                raise InputError(
                    f"{folder}: at least one .h5 file was needed, the folder has none."
                )
        if not source:
            raise InputError("source must name at least one file, got an empty sequence.")
        self.files: tuple[VolumeFile, ...] = tuple(
            volume
            for one in source
            for volume in ((one,) if isinstance(one, VolumeFile) else open_scan(Path(one)))
        )
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

    Zeros around a measured rectangle or ellipse that is most of k-space, as scanners pad it, are no
    gaps; `Slice.measured` tells where they are.

    Args:
        one: the slice.

    Returns:
        k-space ``(coils, rows, columns)``, and the stored reference, or the root sum of squares of
        the coil images where none is stored.

    Raises:
        InputError: if positions were not measured, or the reference is larger than k-space.
        UnusableSliceError: if the reference is not finite.
    """
    measured = one.measured
    if one.mask is not None and not bool(measured.all()):
        raise InputError(
            f"{one.path}: fully sampled k-space was needed, the mask in the file leaves out "
            f"{int((~measured).sum())} positions of slice {one.index}; use other scans."
        )
    if not bool(measured.all()) and not _padded(measured):
        raise InputError(
            f"{one.path}: fully sampled k-space was needed, of slice {one.index} "
            f"{'; '.join(one.remarks)}; use other scans."
        )
    if one.reference is None:
        return one.kspace, rss(ifft2c(one.kspace))
    bad = int((~torch.isfinite(one.reference)).sum())
    if bad:
        raise UnusableSliceError(
            f"{one.path}: the reference must be finite, that of slice {one.index} holds {bad} "
            "values that are not; export it again or leave the slice out."
        )
    shape, whole = tuple(one.reference.shape), tuple(one.kspace.shape[-2:])
    if shape[0] > whole[0] or shape[1] > whole[1]:
        raise InputError(
            f"{one.path}: a reference of at most {whole[0]} x {whole[1]}, the size of k-space, was "
            f"needed, got {shape[0]} x {shape[1]} (slice {one.index}): it was interpolated, or is "
            "of another scan; crop or replace it."
        )
    _check_unit(one, one.reference)
    return one.kspace, one.reference


def _check_unit(one: Slice, reference: Tensor) -> None:
    """Refuses a reference in other units than k-space, which no method can be measured by."""
    image = centre_crop(rss(ifft2c(one.kspace)), (reference.shape[0], reference.shape[1]))
    norms = [float(torch.linalg.vector_norm(x.double())) for x in (image, reference)]
    if not min(norms) > 0:
        return
    alike = float((image.double() * reference.double()).sum()) / (norms[0] * norms[1])
    times = norms[1] / norms[0]
    # Noise makes images brighter, and unlike.
    if times > _OTHER or (times < 1 / _OTHER and alike > _ALIKE):
        raise InputError(
            f"{one.path}: a reference in the units of k-space was needed, that of slice "
            f"{one.index} is {times:.3g} times as bright as the image of k-space: it is scaled, or "
            "of another scan; divide it by that, or replace it."
        )


def _padded(measured: Tensor) -> bool:
    """Whether what was measured has no gaps, holds the centre, and is most of k-space."""
    rows, columns = measured.shape
    if not bool(measured[rows // 2, columns // 2]) or float(measured.float().mean()) < _MOST:
        return False
    return all(_without_gaps(x) for x in (measured, measured.mT))


def _without_gaps(measured: Tensor) -> bool:
    """Whether what was measured of each row is one run."""
    steps = torch.nn.functional.pad(measured.int(), (1, 1)).diff(dim=-1)
    return bool(((steps == 1).sum(-1) <= 1).all())


@dataclass(frozen=True, eq=False)
class Examined:
    """Slices that have been looked at.

    Attributes:
        slices: those that can be used.
        remarks: what was left out, and what else users should know.
    """

    slices: SliceDataset
    remarks: tuple[str, ...]


def examined(
    slices: SliceDataset, *, full: bool = True, report: Callable[[float], None] | None = None
) -> Examined:
    """Reads every slice once, and leaves out those that are zero or not finite.

    Args:
        slices: to look at.
        full: whether they must be fully sampled.
        report: told of the share done.

    Returns:
        What is left.

    Raises:
        InputError: if a file is bad otherwise, or undersampled where it must not be.
        UnusableSliceError: if a file has no slice that can be used.
    """
    kept, remarks, done = [], Remarks(), 0
    for file in slices.files:
        good: list[int] = []
        for index in range(file.n_slices):
            try:
                one = file.read_slice(index)
                if full:
                    fully_sampled(one)
                good.append(one.index)
                remarks.add(one)
            except UnusableSliceError as error:
                if not good and index == file.n_slices - 1:
                    raise
                remarks.leave_out(error)
            done += 1
            if report is not None:
                report(done / len(slices))
        remarks.of(file)
        whole = len(good) == file.n_slices
        kept.append(
            file if whole else VolumeFile(file.path, file.volume, file.readers, tuple(good))
        )
    return Examined(SliceDataset(kept), remarks.lines)
