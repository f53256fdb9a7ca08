"""Reconstructs all slices of a scan, whatever its format, one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.data import Slice, UnusableSliceError, open_scan
from applications.mri.data.coil_fits import CoilFit, coil_fits
from applications.mri.data.images import image_writer
from applications.mri.data.remarks import Remarks
from applications.mri.evaluation.scan_slices import ScanSlices
from applications.mri.evaluation.verdicts import Checked, attributes
from applications.mri.network.architecture import ANY
from applications.mri.network.checked import reconstruct
from applications.mri.network.reconstruction import Reconstruction, classical_reconstruction
from applications.mri.network.weights import Trained, on_device
from applications.mri.physics.masks import acceleration_of
from applications.mri.physics.operators import centre_crop
from applications.mri.sampling import Sampling
from applications.mri.training.adaptation import adapted
from applications.settings import setting

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
        checked: what became of each slice, in the order of `data_residuals`.
    """

    middle: Tensor
    acceleration: float
    oriented: bool
    coils: tuple[CoilFit, ...]
    data_residuals: tuple[float, ...]
    left_out: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    checked: tuple[Checked, ...] = ()


@dataclass(frozen=True)
class Checks:
    """What is done to be sure of the images of a network.

    Attributes:
        check: hold samples of each slice out and predict them, see `held_out`.
        fallback: give images of l1-SPIRiT where the check says so.
        adapt: steps of self-supervised training on the scan, see `adaptation`.
    """

    check: bool = setting(True, "Hold samples of each slice out, predict them, mark bad slices.")
    fallback: bool = setting(True, "Give images of l1-SPIRiT where the check says so.")
    adapt: int = setting(0, "Steps of training on the scan itself, without a reference.", least=0)


@dataclass(frozen=True, eq=False)
class Making:
    """How images are made of slices.

    Attributes:
        trained: network and weights; None: `l1_spirit`, with the threshold of each slice's own
            noise.
        checks: of the network's images.
        device: where it works, as torch names it.
    """

    trained: Trained | None
    checks: Checks = Checks()
    device: str = "cpu"

    @property
    def n_coils(self) -> int:
        """Coils that slices are brought to, or `ANY`."""
        return ANY if self.trained is None else self.trained.network.architecture.n_coils

    def __post_init__(self) -> None:
        """Bring the weights to the device."""
        if self.trained is not None:
            control = on_device(self.trained.control, self.device)
            object.__setattr__(self, "trained", replace(self.trained, control=control))


@dataclass(eq=False)
class _Done:
    """What has been found of the slices so far."""

    accelerations: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)

    def record(self) -> dict[str, object]:
        """What is kept beside the images."""
        lines = "\n".join(self.remarks.lines)[:_LONGEST]
        return {"left_out": self.left_out, "remarks": lines} | attributes(self.checked)


def reconstruct_scan(
    scan: Path,
    making: Making,
    out: Path,
    given: Sampling | None = None,
    report: Callable[[float], None] | None = None,
    record: Mapping[str, str] | None = None,
) -> ScanImages:
    """Writes the images of a scan; one slice is held in memory at a time, with `adapt` some more.

    Args:
        scan: in any format of `applications.mri.formats`.
        making: how; the scan gets the coil count of the network, see `coil_counts`.
        out: HDF5 or NIfTI, see `images.image_writer`.
        given: mask to use instead of the scan's; it must lie within what was measured.
        report: told of the share done.
        record: how the images came about, kept in HDF5.

    Returns:
        The record `ScanImages`.

    Raises:
        InputError: if the scan, the mask or the network do not fit together.
        UnusableSliceError: if there is no slice that can be reconstructed.
    """
    volumes = open_scan(scan)
    first = volumes[0]
    slices = ScanSlices(volumes, given, making.device)
    making, adaptation = _adapted(making, slices)
    n_slices, shape = first.n_slices, first.image_shape
    n_images = len(slices)
    done, content = _Done(), dict[str, object](record or {})
    middle: Tensor | None = None
    layout = (len(volumes), n_slices, *shape)
    with image_writer(out, layout, first.facts.geometry, content) as add:
        for k in range(n_images):
            try:
                image = _image(making, slices, k, done)
                middle = image if middle is None or k <= n_slices // 2 else middle
            except UnusableSliceError as error:
                if k == n_images - 1 and len(done.left_out) == k:
                    raise
                image = torch.zeros(shape)
                done.residuals.append(float("nan"))
                done.checked.append(Checked(k))
                done.left_out.append(k)
                done.remarks.leave_out(error)
            add(image)
            if report is not None:
                report((k + 1) / n_images)
        for volume in volumes:
            done.remarks.of(volume)
        if adaptation:
            done.remarks.tell(adaptation)
        content |= done.record()
    geometry = first.facts.geometry
    return ScanImages(
        torch.zeros(shape) if middle is None else middle,
        fmean(done.accelerations),
        geometry is not None and geometry.affine is not None,
        coil_fits(volumes, making.n_coils),
        tuple(done.residuals),
        tuple(done.left_out),
        done.remarks.lines,
        tuple(done.checked),
    )


def _adapted(making: Making, slices: ScanSlices) -> tuple[Making, str]:
    """The network adapted to a scan if that was asked for, and what came of it."""
    if not making.checks.adapt or making.trained is None:
        return making, ""
    slices.keep()
    try:
        found = adapted(making.trained, slices, making.checks.adapt)
    except UnusableSliceError:
        raise
    except InputError as error:
        raise InputError(f"{slices.volumes[0].path}: --adapt: {error}") from error
    return replace(making, trained=found.trained), str(found)


def _image(making: Making, slices: ScanSlices, k: int, done: _Done) -> Tensor:
    """The image of one slice, and what is to be told of it."""
    one, volume = slices.read(k), slices.volume(k)
    slices.forget(k)
    try:
        mask = slices.mask(k, one)
        found = reconstructed(making, one, mask)
    except InputError as error:
        raise InputError(f"{one.path}: {error} This is slice {one.index}.") from error
    done.remarks.add(one)
    done.accelerations.append(acceleration_of(mask))
    done.checked.append(Checked(len(done.checked), found.certificate, found.method))
    done.residuals.append(float(found.data_residual))
    return centre_crop(found.image[0].cpu(), volume.image_shape) * one.unit


def reconstructed(making: Making, one: Slice, mask: Tensor) -> Reconstruction:
    """What is made of a slice.

    Args:
        making: how.
        one: the slice, of any coil count.
        mask: of what is used of it, ``(rows, columns)``.

    Returns:
        The reconstruction, over `Slice.unit`.

    Raises:
        InputError: if the slice does not fit.
    """
    there, calibration = making.device, one.calibration
    kspace = torch.where(mask, one.kspace, 0).to(there)
    calibration = None if calibration is None else calibration.to(there)
    if making.trained is None:
        return classical_reconstruction(kspace, mask.to(there), calibration=calibration)
    return reconstruct(
        kspace,
        mask.to(there),
        making.trained,
        check=making.checks.check,
        fallback=making.checks.fallback,
        calibration=calibration,
    )
