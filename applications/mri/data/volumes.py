"""Scans of any format of `applications.mri.formats`, read slice by slice."""

from dataclasses import dataclass, field
from pathlib import Path

from applications.errors import InputError
from applications.inputs import checked_size, reading
from applications.mri.data.values import Slice, UnusableSliceError, slice_of
from applications.mri.formats import Facts, Reader, cfl, fastmri, ismrmrd, m4raw, twix
from applications.mri.formats.nifti import is_nifti

_MOST, _MOST_COILS = 10_000, 1024  # volumes and slices; coils
_VALUES = 2**26  # of a slice


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
    def label(self) -> str:
        """What tables and outputs call it: the file without suffix, and which volume of several."""
        return self.path.stem if self.n_volumes == 1 else f"{self.path.stem}_volume{self.volume}"

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
        with reading(reader.path, f"slice {index} of a complete scan"):
            raw = reader.read(index)
        return slice_of(raw, self.path, reader.path, index, self.max)

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
    if path.exists() and not path.is_dir():
        checked_size(path, "a scan")
    for one in FORMATS:
        with reading(path, f"a complete scan, {one.name},"):
            if one.recognises(path):
                readers = one.volumes(path)
                _check_counts(path, readers)
                return readers
    if is_nifti(path):
        raise InputError(
            f"{path}: k-space was needed, NIfTI holds images; simulate a scan of them with "
            "simulate --anatomies."
        )
    there = "is none of them" if path.exists() else "does not exist"
    raise InputError(
        f"{path}: a scan was needed, one of {', '.join(one.name for one in FORMATS)}; this {there}."
    )


def _check_counts(path: Path, readers: tuple[Reader, ...]) -> None:
    """Refuses sizes that no scan has, before anything is made of them."""
    counts = [("volumes", len(readers), _MOST)]
    for facts in {id(one.facts): one.facts for one in readers}.values():
        counts += [("slices", facts.n_slices, _MOST), ("coils", facts.n_coils, _MOST_COILS)]
        rows, columns = facts.shape
        n = facts.n_coils * rows * columns
        counts.append((f"positions of a slice, {facts.n_coils} x {rows} x {columns},", n, _VALUES))
    for what, n, most in counts:
        if not 1 <= n <= most:
            raise InputError(f"{path}: 1 to {most} {what} were expected, got {n}; split the scan.")
