"""Writes reconstructed images as HDF5 or NIfTI, slice by slice."""

import gzip
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from applications.errors import InputError
from applications.files import whole_file
from applications.mri.data.writing import hdf5_file, set_attributes
from applications.mri.formats import Geometry
from applications.mri.formats.hdf5 import opened
from applications.mri.formats.nifti import SUFFIXES as NIFTI, header_of, is_nifti, is_written
from applications.outputs import Kind

_HDF5 = (".h5", ".hdf5")
SUFFIXES = (*_HDF5, *NIFTI)
_NAME, _MARK = "reconstruction", "source"  # dataset, and an attribute that every scan gives


def _is_images(path: Path) -> bool:
    if is_nifti(path):
        return is_written(path)
    with opened(path) as file:  # others, such as fastMRI's code, call their images so too
        return file.names() == [_NAME] and _MARK in file.attributes


IMAGES = Kind("a file of such images", _is_images)


def check_image_path(path: Path) -> None:
    """Refuses a file name that does not say the format.

    Args:
        path: to be written.

    Raises:
        InputError: if it ends in no known suffix.
    """
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            f"{path}: the name must end in one of {', '.join(SUFFIXES)}, which says the "
            "format; change it."
        )


@contextmanager
def image_writer(
    path: Path,
    shape: tuple[int, int, int, int],
    geometry: Geometry | None,
    record: Mapping[str, Any],
) -> Iterator[Callable[[Tensor], None]]:
    """A file of images that appears when all of them are written.

    HDF5 gets the dataset `reconstruction` ``[slice, row, column]``, of several volumes ``[volume,
    slice, row, column]``, and the record as attributes; NIfTI the axes row, column, slice and, of
    several volumes, volume.

    Args:
        path: the file, replaced if it exists; its suffix says the format.
        shape: volumes, slices, rows and columns.
        geometry: size and place of voxels, for NIfTI.
        record: how the images came about, for HDF5; read when all images are written.

    Yields:
        Writes the next image, ``(rows, columns)``; the slices of a volume follow each other.

    Raises:
        InputError: if the suffix is unknown, the file cannot be written, a package is missing, or
            an image is not finite.
    """
    check_image_path(path)
    n_volumes, n_slices, rows, columns = shape
    volumes = (n_volumes,) if n_volumes > 1 else ()
    places = [(*v, k) for v in _indices(volumes) for k in range(n_slices)]
    with ExitStack() as stack:
        if is_nifti(path):
            temporary = stack.enter_context(whole_file(path))
            header = header_of(path, (rows, columns, n_slices, *volumes), geometry)
            opener = gzip.open if path.suffix == ".gz" else open
            file = stack.enter_context(opener(temporary, "wb"))
            file.write(header)

            def write_next(_place: tuple[int, ...], image: Tensor) -> None:
                file.write(image.cpu().numpy().astype("<f4").tobytes(order="F"))

            write = write_next
        else:
            written = stack.enter_context(hdf5_file(path))
            stack.callback(lambda: set_attributes(written, record))
            images = written.create_dataset(_NAME, (*volumes, n_slices, rows, columns), "f4")

            def write_at(place: tuple[int, ...], image: Tensor) -> None:
                images[place] = image.cpu().numpy()

            write = write_at
        waiting = iter(places)

        def add(image: Tensor) -> None:
            place = next(waiting)
            bad = int((~torch.isfinite(image)).sum())
            if bad:
                raise InputError(
                    f"{path}: images must be finite, that of slice {place[-1]} has {bad} values "
                    "that are not; use other weights, or leave the slice out of the scan."
                )
            write(place, image)

        yield add


def _indices(volumes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(k,) for k in range(volumes[0])] if volumes else [()]
