"""One slice reconstructed, checked by samples held out, and replaced where the check fails."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.mri.network.held_out import certified
from applications.mri.network.reconstruction import Reconstruction, classical_reconstruction
from applications.mri.network.weights import Trained, pretrained
from applications.mri.physics.coil_counts import fitted
from applications.mri.physics.l1_spirit import check_slice
from applications.mri.physics.masks import over_columns
from applications.mri.physics.operators import unit_of

Array = Tensor | NDArray[Any]
_SMALLEST, _LARGEST = 1e-38, 3e38  # of single precision


@torch.no_grad()
def reconstruct(
    kspace: Array,
    mask: Array | None = None,
    trained: Trained | None = None,
    *,
    check: bool = True,
    fallback: bool = True,
    calibration: Array | None = None,
) -> Reconstruction:
    """The image of one slice, of any number of coils.

    Args:
        kspace: complex, a tensor or an array of numpy, shape ``(coils, rows, columns)``; values
            outside the mask are ignored. It is worked on as complex64, without derivatives.
        mask: boolean, shape ``(rows, columns)``, or ``(columns,)`` where whole columns were
            measured; None: where any coil has a value. Where all coils are zero nothing was
            measured, whatever the mask says.
        trained: network and weights, on the device of ``kspace``; None: the bundled ones.
        check: hold samples out and predict them; a second reconstruction is its price.
        fallback: where the check says that l1-SPIRiT is the better choice, give its images.
        calibration: shape of ``kspace``, zeros where nothing was measured: what the coils are
            calibrated by where that is no part of the image; None: the centre of ``kspace``.

    Returns:
        A batch of one, in the units of ``kspace``; `certificate` is what the check found, and
        `method` says whose images they are.

    Raises:
        InputError: if the slice does not fit, is not finite, or nothing was measured.

    Warns:
        UserWarning: if the mask names positions where all coils are zero.

    Example:
        >>> import torch
        >>> from applications.mri.physics.operators import fft2c
        >>> places = torch.arange(64.0) - 32
        >>> disc = ((places[:, None] ** 2 + places**2) < 400).float()
        >>> coils = torch.stack([torch.linspace(0, 1, 64), torch.linspace(1, 0, 64)])[
        ...     :, None
        ... ]
        >>> kspace = fft2c((coils * disc).to(torch.complex64))
        >>> mask = torch.zeros(64, 64, dtype=torch.bool)
        >>> mask[:, ::2] = mask[:, 24:40] = True
        >>> found = reconstruct(kspace, mask)
        >>> found.image.shape, found.method, found.certificate.trustworthy
        (torch.Size([1, 64, 64]), 'network', True)
    """
    given, places, extra, unit = _given(kspace, mask, calibration)
    trained = pretrained() if trained is None else trained
    if not isinstance(trained, Trained):
        raise InputError(
            f"trained must be network and weights, got {type(trained).__name__}; read a file with "
            "load_weights."
        )
    with torch.autocast(given.device.type, enabled=False):
        found = _found(given, places, trained, extra, check=check, fallback=fallback)
    if unit != 1:
        found = replace(found, image=found.image * unit, coil_images=found.coil_images * unit)
    if not bool(torch.isfinite(found.image).all()):
        raise InputError(
            "images must be finite, that of this slice leaves the range of single precision; "
            "divide kspace by a number before, or use other weights."
        )
    return found


def _found(
    kspace: Tensor,
    mask: Tensor,
    trained: Trained,
    calibration: Tensor | None,
    *,
    check: bool,
    fallback: bool,
) -> Reconstruction:
    """What `reconstruct` gives for a slice that fits."""
    n_coils = trained.network.architecture.coils_of(len(kspace))
    given, extra = fitted(kspace, calibration, n_coils)
    scan = trained.network.prepare(given[None], mask, None if extra is None else extra[None])
    found = trained.network.reconstruct(scan, trained.control)
    if not check:
        return found
    certificate = certified(trained, given, mask, extra, scan)
    if fallback and certificate.replaceable:
        found = classical_reconstruction(kspace, mask, calibration=calibration)
    return replace(found, certificate=certificate)


def _given(
    kspace: Array, mask: Array | None, calibration: Array | None
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """k-space, mask and calibration as tensors that fit together, and the unit they are over."""
    given = _tensor(kspace, "kspace")
    places = None if mask is None else _tensor(mask, "mask")
    if places is not None and places.is_complex() and not given.is_complex():
        raise InputError(
            f"kspace, complex, and then mask, boolean, were needed, got {given.dtype} "
            f"{tuple(given.shape)} and {places.dtype} {tuple(places.shape)}: they are swapped; "
            "call reconstruct(kspace, mask)."
        )
    check_slice(given)
    given = given.to(torch.promote_types(given.dtype, torch.complex64))  # from half precision
    extra = None if calibration is None else _tensor(calibration, "calibration").to(given.device)
    if extra is not None and (extra.shape != given.shape or not extra.is_complex()):
        raise InputError(
            f"calibration must be complex of the shape of kspace, {tuple(given.shape)}, got "
            f"{extra.dtype} {tuple(extra.shape)}; put zeros where nothing was measured."
        )
    places = (given != 0).any(0) if places is None else places.to(given.device)
    places = over_columns(places, tuple(given.shape[1:]))
    given = torch.where(places, given, 0)
    places = _measured(given, places)
    for name, values in (("kspace", given), ("calibration", extra)):
        bad = 0 if values is None else int((~torch.isfinite(values)).sum())
        if bad:
            raise InputError(
                f"{name} must be finite, {bad} of its values are not; leave out the slice, or "
                "export it again."
            )
    largest = float(torch.view_as_real(given.resolve_conj()).abs().max())
    if largest and not _SMALLEST <= largest <= _LARGEST:
        raise InputError(
            f"kspace must lie within the range of single precision, {_SMALLEST:g} to {_LARGEST:g}, "
            f"its largest value is {largest:.3g}; divide it by a number before."
        )
    unit = unit_of(given)
    given = (given / unit).to(torch.complex64)
    if extra is not None:
        extra = (extra / unit_of(extra)).to(torch.complex64)
    return given, places, extra, unit


def _measured(kspace: Tensor, mask: Tensor) -> Tensor:
    """The mask without what is zero in all coils, as in files."""
    measured = mask & (kspace != 0).any(0)
    missing = int((mask & ~measured).sum())
    if not missing or not bool(measured.any()):  # zeros alone are told of later
        return mask
    warnings.warn(
        f"{missing} of the {int(mask.sum())} positions of the mask are zero in all coils and count "
        "as not measured.",
        UserWarning,
        stacklevel=5,
    )
    return measured


def _tensor(values: Any, name: str) -> Tensor:
    """A tensor or an array as a tensor."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_meta:
            raise InputError(
                f"{name} must be a dense tensor that holds values, got one of {values.layout} on "
                f"{values.device}; convert it with .to_dense, or read the values."
            )
        return values.detach()
    try:
        if isinstance(values, np.ma.MaskedArray):
            values = values.filled(0)
        if isinstance(values, np.ndarray):
            # In the order and the byte order of this machine, as torch takes them.
            native = values.dtype.newbyteorder("=")
            return torch.from_numpy(np.require(values, native, ("C", "W")))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} must hold numbers that torch takes, got an array of {values.dtype}; convert "
            "it with .astype."
        ) from error
    raise InputError(
        f"{name} must be a tensor or an array of numpy, got {type(values).__name__}; convert it "
        "with torch.as_tensor."
    )
