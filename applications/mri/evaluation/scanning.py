"""Reconstructs all slices of a scan, whatever its format, one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.data import Slice, UnusableSliceError, VolumeFile, open_scan
from applications.mri.data.coil_fits import CoilFit, coil_fits
from applications.mri.data.images import image_writer
from applications.mri.data.remarks import Remarks
from applications.mri.network.architecture import ANY
from applications.mri.network.reconstruction import Reconstruction, classical_reconstruction
from applications.mri.network.weights import Trained, on_device
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import centre_crop
from applications.mri.sampling import Sampling

_LONGEST = 30_000  # characters of an attribute; HDF5 takes 64 KiB


@dataclass(frozen=True, eq=False)
class ScanImages:
    """What is known of the images besides their file.

    Attributes:
        middle: the middle slice of the first volume, or the last before it that was not left out,
            ``(rows, columns)``.
        acceleration: of the masks, in the mean over slices.
        oriented: whether the scan states where the images lie in the patient.
        coils: what became of the coils of the scan on their way into the network.
        data_residuals: of `Reconstruction`, slice by slice of one volume after the other; NaN where
            a slice was left out.
        left_out: numbers of the slices that are zero or not finite, counted through all volumes;
            their images are zeros.
        remarks: what users should know of the scan.
    """

    middle: Tensor
    acceleration: float
    oriented: bool
    coils: tuple[CoilFit, ...]
    data_residuals: tuple[float, ...]
    left_out: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(eq=False)
class _Done:
    """What has been found of the slices so far."""

    accelerations: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)


def reconstruct_scan(
    scan: Path,
    trained: Trained | None,
    out: Path,
    given: Sampling | None = None,
    report: Callable[[float], None] | None = None,
    record: Mapping[str, str] | None = None,
    device: str = "cpu",
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
        device: where the network works, as torch names it.

    Returns:
        The record `ScanImages`.

    Raises:
        InputError: if the scan, the mask or the network do not fit together.
        UnusableSliceError: if there is no slice that can be reconstructed.
    """
    volumes = open_scan(scan)
    first = volumes[0]
    n_slices, shape = first.n_slices, first.image_shape
    n_images = len(volumes) * n_slices
    trained = replace(trained, control=on_device(trained.control, device))
    done, content = _Done(), dict[str, object](record or {})
    middle: Tensor | None = None
    layout = (len(volumes), n_slices, *shape)
    with image_writer(out, layout, first.facts.geometry, content) as add:
        for k in range(n_images):
            volume, index = volumes[k // n_slices], k % n_slices
            try:
                image = _image(trained, volume, index, given, device, done)
                middle = image if middle is None or k <= n_slices // 2 else middle
            except UnusableSliceError as error:
                if k == n_images - 1 and len(done.left_out) == k:
                    raise
                image = torch.zeros(shape)
                done.residuals.append(float("nan"))
                done.left_out.append(k)
                done.remarks.leave_out(error)
            add(image)
            if report is not None:
                report((k + 1) / n_images)
        done.remarks.of(first)
        content |= {"left_out": done.left_out, "remarks": "\n".join(done.remarks.lines)[:_LONGEST]}
    geometry = first.facts.geometry
    return ScanImages(
        torch.zeros(shape) if middle is None else middle,
        fmean(done.accelerations),
        geometry is not None and geometry.affine is not None,
        coil_fits(volumes, ANY if trained is None else trained.network.architecture.n_coils),
        tuple(done.residuals),
        tuple(done.left_out),
        done.remarks.lines,
    )


def _image(
    trained: Trained | None,
    volume: VolumeFile,
    index: int,
    given: Sampling | None,
    device: str,
    done: _Done,
) -> Tensor:
    """The image of one slice, and what is to be told of it."""
    one = volume.read_slice(index)
    try:
        mask = _mask(one, volume, given)
        found = reconstructed(trained, one, mask, device)
    except InputError as error:
        raise InputError(f"{one.path}: {error} This is slice {one.index}.") from error
    done.remarks.add(one)
    done.accelerations.append(acceleration_of(mask))
    done.residuals.append(float(found.data_residual))
    return centre_crop(found.image[0].cpu(), volume.image_shape) * one.unit


def _mask(one: Slice, volume: VolumeFile, given: Sampling | None) -> Tensor:
    measured = one.measured
    if given is None:
        return measured
    mask = given.mask(volume.shape, torch.Generator())
    outside = int((mask & ~measured).sum())
    if outside:
        raise InputError(
            f"the mask must lie within what was measured, {outside} of its {int(mask.sum())} "
            "positions were not; leave --mask out, or draw it anew."
        )
    return mask


def reconstructed(
    trained: Trained | None, one: Slice, mask: Tensor, device: str = "cpu"
) -> Reconstruction:
    """What a network makes of a slice.

    Args:
        trained: network and weights, on the device; None: l1-SPIRiT.
        one: the slice, of any coil count.
        mask: of what is used of it, ``(rows, columns)``.
        device: where the network works, as torch names it.

    Returns:
        The reconstruction, over `Slice.unit`.

    Raises:
        InputError: if the slice does not fit.
    """
    kspace = torch.where(mask, one.kspace, 0)
    if trained is None:
        return classical_reconstruction(kspace.to(device), mask.to(device))
    matrix = coil_matrix(kspace, trained.network.architecture.coils_of(len(kspace)))
    calibration = None if one.calibration is None else with_coils(matrix, one.calibration)[None]
    scan = trained.network.prepare(
        with_coils(matrix, kspace)[None].to(device),
        mask.to(device),
        None if calibration is None else calibration.to(device),
    )
    return trained.network.reconstruct(scan, trained.control)
