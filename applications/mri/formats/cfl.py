"""BART's pairs of files: `.hdr`, text with the sizes of 16 axes, and `.cfl`, their values.

The values are complex64, little-endian, the first axis running fastest. Of the axes that BART
names, a scan may use

====== ============================= ==============================
axis   BART                          here
====== ============================= ==============================
0-2    READ, PHS1, PHS2              rows and columns: the two above 1
3      COIL                          coils
5      TE (echo)                     volumes
10, 11 TIME, TIME2                   volumes
13     SLICE                         slices
14, 15 AVG, BATCH                    volumes
====== ============================= ==============================

Volumes are counted with the lowest axis running fastest. BART centres its Fourier transform where
`operators.fft2c` does. Positions where every coil is 0 are not measured.
"""

import math
import os
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from applications.errors import InputError
from applications.inputs import checked_size, content
from applications.mri.formats.base import Facts, Format, RawSlice, Reader

_SPACE, _COIL, _SLICE = (0, 1, 2), 3, 13
_VOLUMES = (5, 10, 11, 14, 15)
_MOST, _MOST_HEADER = 10_000, 2**20  # volumes; bytes, of which BART's history takes some
_MOST_AXES, _LONGEST = 32, 2**40
_SCATTERED = 30.0  # bits that exponents of k-space never differ by
_BYTES = np.dtype("<c8").itemsize


@dataclass(frozen=True)
class Cfl:
    """A pair of files whose sizes have been found to agree.

    Attributes:
        path: the `.cfl` file.
        shape: sizes of the axes, at least 16.

    Raises:
        InputError: if a file is missing or damaged, or they do not belong together.
    """

    path: Path
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        base = pair(self.path)
        for file in base:
            if not file.is_file():
                raise InputError(
                    f"{file}: a pair of .hdr and .cfl was needed, this one is missing; copy both."
                )
        header, values = base
        shape = _sizes(header)
        needed, found = _BYTES * math.prod(shape), checked_size(values, "a .cfl file")
        if found != needed:
            half = 2 * found == needed
            what = "the values are real, or half of them missing: convert" if half else "copy"
            raise InputError(
                f"{values}: {needed} bytes were needed, complex64 of the shape "
                f"{' x '.join(map(str, _used(shape)))} in {header.name}, got {found}; {what} or "
                "export the pair again."
            )
        object.__setattr__(self, "path", values)
        object.__setattr__(self, "shape", shape)

    def open(self) -> NDArray[np.complex64]:
        """The values, on disk until they are read."""
        return np.memmap(self.path, "<c8", "r", shape=self.shape, order="F")


def pair(path: Path) -> tuple[Path, Path]:
    """The files of a pair.

    Args:
        path: either, or what they have in common, as BART's commands take it.

    Returns:
        `.hdr` and `.cfl`.
    """
    base = os.fspath(path)
    base = base[:-4] if path.suffix in {".cfl", ".hdr"} else base
    return Path(base + ".hdr"), Path(base + ".cfl")


@dataclass(frozen=True)
class CflVolume(Reader):
    """One volume of a pair of files.

    Attributes:
        path: the `.cfl` file.
        facts: what is known of it.
        file: the pair.
        place: index along each axis of volumes.
    """

    path: Path = field(init=False)
    facts: Facts = field(init=False)
    file: Cfl
    place: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = self.file.shape
        rows, columns = (shape[axis] for axis in _plane(self.file))
        object.__setattr__(self, "path", self.file.path)
        facts = Facts(shape[_SLICE], shape[_COIL], (rows, columns))
        object.__setattr__(self, "facts", facts)

    def read(self, index: int) -> RawSlice:  # noqa: D102
        where: list[int | slice] = [0] * len(self.file.shape)
        for axis, position in zip(_VOLUMES, self.place, strict=True):
            where[axis] = position
        where[_SLICE] = index
        for axis in (*_plane(self.file), _COIL):
            where[axis] = slice(None)
        values = self.file.open()[tuple(where)]  # (rows, columns, coils)
        _check_order(self.path, values)
        return RawSlice(np.ascontiguousarray(np.moveaxis(values, -1, 0), dtype=np.complex64))


def _volumes(path: Path) -> tuple[Reader, ...]:
    file = Cfl(path)
    n = math.prod(file.shape[axis] for axis in _VOLUMES)
    if n > _MOST:
        raise InputError(f"{path}: at most {_MOST} volumes were expected, got {n}; choose some.")
    counts = [range(file.shape[axis]) for axis in reversed(_VOLUMES)]
    return tuple(CflVolume(file, place[::-1]) for place in product(*counts))


FORMAT = Format(
    "BART (.cfl with .hdr)",
    lambda path: (
        path.suffix in {".cfl", ".hdr"}
        or (not path.exists() and all(one.is_file() for one in pair(path)))
    ),
    _volumes,
)


def _sizes(header: Path) -> tuple[int, ...]:
    found = content(header, "a .hdr file", _MOST_HEADER)
    lines = found.decode("utf-8", "replace").splitlines()
    try:
        first = [line.strip() for line in lines].index("# Dimensions") + 1
        sizes = [int(word) for word in lines[first].split()]
    except (ValueError, IndexError):
        sizes = []
    if not 1 <= len(sizes) <= _MOST_AXES or not 1 <= min(sizes) <= max(sizes) <= _LONGEST:
        raise InputError(
            f"{header}: a line '# Dimensions' was needed and below it sizes >= 1, it has none; "
            "export the pair again."
        )
    return tuple(sizes + [1] * (16 - len(sizes)))


def _check_order(path: Path, values: NDArray[np.complex64]) -> None:
    """Refuses values whose bytes lie the other way round: their exponents are drawn by lot."""
    stored = np.ascontiguousarray(values).view("<f4").ravel()
    stored = stored[:: max(1, stored.size // 4096)]
    little, big = _spread(stored), _spread(stored.byteswap())
    if little > _SCATTERED > 2 * big:
        raise InputError(
            f"{path}: little-endian values were needed, these are big-endian; swap the bytes of "
            "each number, or export the pair again."
        )


def _spread(values: NDArray[np.float32]) -> float:
    """Standard deviation of the exponents, of base 2."""
    values = np.abs(values[np.isfinite(values) & (values != 0)])
    return float(np.log2(values).std()) if values.size > 1 else 0.0


def _used(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones at the end."""
    last = max((axis for axis, n in enumerate(shape) if n > 1), default=0)
    return shape[: last + 1]


def _plane(file: Cfl) -> tuple[int, int]:
    """The axes of rows and columns."""
    shape = file.shape
    long = [axis for axis in _SPACE if shape[axis] > 1]
    if len(long) != 2:
        raise InputError(
            f"{file.path}: two of the axes 0, 1 and 2 must be above 1, got {shape[:3]}; of a 3-D "
            "scan, transform the readout (bart fft -iu 1) and make it slices (bart transpose 0 13)."
        )
    allowed = {*_SPACE, _COIL, _SLICE, *_VOLUMES}
    for axis, n in enumerate(shape):
        if n > 1 and axis not in allowed:
            raise InputError(
                f"{file.path}: axis {axis} must be 1, got {n}; choose one with bart slice {axis}."
            )
    return long[0], long[1]
