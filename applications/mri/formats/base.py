"""What every file format of scans offers: volumes whose slices are read one at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError

EXTRA = "mri-formats"


class UnusableSliceError(InputError):
    """A slice that was not measured, or holds values that are not finite: it can be left out."""


@dataclass(frozen=True)
class Geometry:
    """Size and place of the voxels of the images.

    Attributes:
        spacing: distance of neighbours along rows' index, columns' index and slices [mm].
        affine: takes ``(row, column, slice, 1)`` to the patient's right-anterior-superior
            coordinates [mm], 4 x 4; None where the orientation is not known.
    """

    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a volume before any slice of k-space is read.

    Attributes:
        n_slices: number of slices.
        n_coils: number of coils.
        shape: matrix size ``(rows, columns)`` of k-space.
        image_shape: centred part of the image that was to be shown; None is all of it.
        reference_shape: ``(rows, columns)`` of the reference images, or None.
        acquisition: sequence and contrast.
        max: largest reference value of the volume, or None.
        geometry: of the images, or None.
        remarks: what was done to the data that users should know.
    """

    n_slices: int
    n_coils: int
    shape: tuple[int, int]
    image_shape: tuple[int, int] | None = None
    reference_shape: tuple[int, int] | None = None
    acquisition: str = "unknown"
    max: float | None = None
    geometry: Geometry | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RawSlice:
    """What a format holds of one slice.

    Attributes:
        kspace: complex64, shape ``(coils, rows, columns)``, zeros where nothing was measured; the
            readout lies along the rows' index.
        mask: boolean, shape ``(rows, columns)``, or None where the format has none.
        reference: real, shape ``reference_shape``, or None.
        calibration: complex64, shape of `kspace`, zeros where nothing was measured: what calibrates
            the coils where that is no part of the image; None: the centre of the image does.
    """

    kspace: NDArray[np.complex64]
    mask: Tensor | None = None
    reference: NDArray[Any] | None = None
    calibration: NDArray[np.complex64] | None = None


class Reader(ABC):
    """One volume of a file, checked when made; it keeps no file open and no data.

    Attributes:
        path: the file.
        facts: what is known of it.
    """

    path: Path
    facts: Facts

    @abstractmethod
    def read(self, index: int) -> RawSlice:
        """Reads one slice and nothing else.

        Args:
            index: from 0 to ``facts.n_slices - 1``.

        Returns:
            The slice, its values not yet checked to be finite.

        Raises:
            InputError: if the file is damaged.
        """


class Acquisitions(ABC):
    """The acquisitions of a file, read when asked for; it keeps no file open and no data.

    Attributes:
        path: the file.
    """

    path: Path

    @abstractmethod
    def values(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """The values of acquisitions, one after the other.

        Args:
            numbers: of them, rising.

        Yields:
            Real and imaginary parts in turn, coil after coil, flat.
        """


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: in messages.
        recognises: whether a path, existing or not, is to be read as this format.
        volumes: opens all volumes at a path; it raises InputError for a bad file.
    """

    name: str
    recognises: Callable[[Path], bool]
    volumes: Callable[[Path], tuple[Reader, ...]]


def optional(package: str, path: Path) -> Any:
    """An optional package.

    Args:
        package: its name.
        path: the file that needs it.

    Returns:
        The module.

    Raises:
        InputError: if it is not installed; the message says how to install it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(
            f"{path}: the package {package} is needed for this format and cannot be imported "
            f"({error}); pip install 'bilevel[{EXTRA}]'."
        ) from error
