"""The slices of several scans as one data set, and what training needs to know of a slice."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from applications.errors import InputError
from applications.mri.data.volumes import Slice, VolumeFile
from applications.mri.physics.operators import ifft2c, rss


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
