"""Scans of any format of `applications.mri.formats`, read slice by slice."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from applications.errors import InputError
from applications.mri.formats import Facts, Reader, open_volumes
from applications.mri.operators import ifft2c, rss


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
            InputError: if there is no such slice, or it holds values that are not finite.
        """
        if not 0 <= index < self.n_slices:
            raise InputError(
                f"{self.path}: slice must lie in 0 to {self.n_slices - 1}, got {index}."
            )
        index = index if self.block is None else self.block[index]
        reader = self.readers[self.volume]
        raw = reader.read(index)
        _check_finite(reader.path, "kspace", raw.kspace, index)
        reference = raw.reference
        if reference is not None:
            _check_finite(reader.path, "reconstruction_rss", reference, index)
            reference = torch.from_numpy(reference.astype(np.float32))
        kspace = torch.from_numpy(raw.kspace)
        return Slice(kspace, raw.mask, reference, self.max, self.path, index)


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


class SliceDataset(Dataset[Slice]):
    """All slices of several files in order, of any coil counts and matrix sizes.

    Use it in a ``DataLoader`` with ``batch_size=None``, since slices of different size make no
    batch.

    Args:
        source: a folder, all ``*.h5`` in it being read in alphabetical order, or a sequence of
            files, which may have been opened.

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
            source = sorted(folder.glob("*.h5"))
            if not source:
                raise InputError(
                    f"{folder}: at least one .h5 file was needed, the folder has none."
                )
        if not source:
            raise InputError("source must name at least one file, got an empty sequence.")
        self.files: tuple[VolumeFile, ...] = tuple(
            one if isinstance(one, VolumeFile) else VolumeFile(Path(one)) for one in source
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


def implied_mask(kspace: Tensor) -> Tensor:
    """The positions where any coil is not exactly zero: the mask of zero-filled k-space.

    Args:
        kspace: shape ``(..., coils, rows, columns)``.

    Returns:
        Boolean mask, shape ``(..., rows, columns)``.
    """
    return (kspace != 0).any(dim=-3)


def _check_finite(path: Path, name: str, values: NDArray[Any], index: int) -> None:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise InputError(
            f"{path}: {name} must be finite, slice {index} holds {bad} values that are not; export "
            "it again or leave the slice out."
        )
