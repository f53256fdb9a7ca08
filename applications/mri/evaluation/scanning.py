"""Reconstructs all slices of a scan, whatever its format, one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.data import Slice, VolumeFile, implied_mask, open_scan
from applications.mri.data.coil_fits import CoilFit, coil_fits
from applications.mri.data.images import image_writer
from applications.mri.network.architecture import ANY
from applications.mri.network.reconstruction import Reconstruction, classical_reconstruction
from applications.mri.network.weights import Trained
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import centre_crop
from applications.mri.sampling import Sampling


@dataclass(frozen=True, eq=False)
class ScanImages:
    """What is known of the images besides their file.

    Attributes:
        middle: the middle slice of the first volume, ``(rows, columns)``.
        acceleration: of the masks, in the mean over slices.
        oriented: whether the scan states where the images lie in the patient.
        coils: what became of the coils of the scan on their way into the network.
        data_residuals: of `Reconstruction`, slice by slice of one volume after the other.
    """

    middle: Tensor
    acceleration: float
    oriented: bool
    coils: tuple[CoilFit, ...]
    data_residuals: tuple[float, ...]


def reconstruct_scan(
    scan: Path,
    trained: Trained | None,
    out: Path,
    given: Sampling | None = None,
    report: Callable[[float], None] | None = None,
    record: Mapping[str, str] | None = None,
) -> ScanImages:
    """Writes the images of a scan; one slice is held in memory at a time.

    Args:
        scan: in any format of `applications.mri.formats`.
        trained: network and weights; the scan gets its coil count, see `coil_counts`. None:
            `l1_spirit`, with the threshold of each slice's own noise.
        out: HDF5 or NIfTI, see `images.image_writer`.
        given: mask to use instead of the scan's; it must lie within what was measured.
        report: told of the share done.
        record: how the images came about, kept in HDF5.

    Returns:
        The record `ScanImages`.

    Raises:
        InputError: if the scan, the mask or the network do not fit together.
    """
    volumes = open_scan(scan)
    first = volumes[0]
    n_slices, shape = first.n_slices, first.image_shape
    accelerations: list[float] = []
    residuals: list[float] = []
    middle = torch.zeros(shape)
    layout = (len(volumes), n_slices, *shape)
    with image_writer(out, layout, first.facts.geometry, record or {}) as add:
        for volume in volumes:
            for index in range(n_slices):
                one = volume.read_slice(index)
                try:
                    mask = _mask(one, volume, given)
                    found = _reconstructed(trained, one, mask)
                except InputError as error:
                    raise InputError(f"{one.path}: {error}") from error
                image = centre_crop(found.image[0], shape)
                residuals.append(float(found.data_residual))
                add(image)
                accelerations.append(acceleration_of(mask))
                if volume is first and index == n_slices // 2:
                    middle = image
                if report is not None:
                    report(len(accelerations) / (len(volumes) * n_slices))
    geometry = first.facts.geometry
    oriented = geometry is not None and geometry.affine is not None
    coils = coil_fits(volumes, ANY if trained is None else trained.network.architecture.n_coils)
    return ScanImages(middle, fmean(accelerations), oriented, coils, tuple(residuals))


def _mask(one: Slice, volume: VolumeFile, given: Sampling | None) -> Tensor:
    measured = implied_mask(one.kspace) if one.mask is None else one.mask
    if given is None:
        return measured
    mask = given.mask(volume.shape, torch.Generator())
    outside = int((mask & ~measured).sum())
    if outside:
        raise InputError(
            f"the mask must lie within what was measured, {outside} of its {int(mask.sum())} "
            f"positions were not (slice {one.index}); leave --mask out, or draw it anew."
        )
    return mask


def _reconstructed(trained: Trained | None, one: Slice, mask: Tensor) -> Reconstruction:
    kspace = torch.where(mask, one.kspace, 0)
    if trained is None:
        return classical_reconstruction(kspace, mask)
    matrix = coil_matrix(kspace, trained.network.architecture.coils_of(len(kspace)))
    scan = trained.network.prepare(with_coils(matrix, kspace)[None], mask)
    return trained.network.reconstruct(scan, trained.control)
