"""What a network must beat: zero filling, l1-SPIRiT, SENSE and wavelets by SigPy, and BART.

SENSE and wavelet compressed sensing have one ESPIRiT map: where the field of view wraps around, two
places of the object share a pixel, one map cannot tell them apart, and both methods break.
l1-SPIRiT forms no map, and BART has two.

All take undersampled k-space ``(coils, rows, columns)`` with zeros where nothing was measured, and
return magnitude images ``(rows, columns)``. ESPIRiT maps have root sum of squares 1 where they are
not 0, therefore the magnitude of a SENSE image estimates the root sum of squares of the coil images
and is compared with it directly.

Before, k-space is divided by the maximum of its zero-filled image, and after, the image is
multiplied by it: ``lamda`` is relative to an image of maximum about 1, whatever the unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError
from applications.mri.evaluation.metrics import score
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.masks import check_mask
from applications.mri.physics.operators import ifft2c, rss

_LARGEST_CALIBRATION = 24
_KERNEL = 6

Method = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``(kspace, mask, maps, lamda)`` to a magnitude image, as `sense` and `l1_wavelet`."""


@dataclass(frozen=True)
class Case:
    """One slice to try settings on.

    Attributes:
        kspace: undersampled, complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.
        maps: sensitivities, complex, shape ``(coils, rows, columns)``.
        reference: fully sampled magnitude, shape ``(rows, columns)``.
    """

    kspace: Tensor
    mask: Tensor
    maps: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Sweep:
    """Outcome of `best_lamda`.

    Attributes:
        lamda: the best value.
        lamdas: all values tried, in increasing order.
        psnrs: mean PSNR [dB] of each.
    """

    lamda: float
    lamdas: tuple[float, ...]
    psnrs: tuple[float, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the smallest or largest tried, so the range was too narrow."""
        return self.lamda in {self.lamdas[0], self.lamdas[-1]}


def zero_filled(kspace: Tensor) -> Tensor:
    """Root sum of squares of the inverse transform, what was not measured being taken as zero.

    Args:
        kspace: complex, shape ``(..., coils, rows, columns)``.

    Returns:
        Magnitude image, shape ``(..., rows, columns)``.
    """
    return rss(ifft2c(kspace))


def calibration_width(mask: Tensor) -> int:
    """Side of the largest fully sampled square at the centre, at most 24.

    With Cartesian columns this is the number of fully sampled central columns.

    Args:
        mask: boolean, shape ``(rows, columns)``.

    Returns:
        The side [positions]; 0 if the zero frequency itself is missing.

    Raises:
        InputError: if the mask is not boolean, not two-dimensional, or keeps nothing.
    """
    check_mask(mask, tuple(mask.shape[-2:]))
    rows, columns = mask.shape
    for width in range(min(_LARGEST_CALIBRATION, rows, columns), 0, -1):
        top, left = rows // 2 - width // 2, columns // 2 - width // 2
        if bool(mask[top : top + width, left : left + width].all()):
            return width
    return 0


def espirit_maps(kspace: Tensor, calibration: int, crop: float = 0.5) -> Tensor:
    """Coil sensitivities from the fully sampled centre of k-space, one set, by ESPIRiT.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``.
        calibration: side of the fully sampled central square, for example from `calibration_width`;
            >= 4.
        crop: maps are set to 0 where the largest eigenvalue is below, in [0, 1]. It removes the
            empty background (4 dB for SENSE at 4-fold), but close to 1 with few calibration lines
            it removes the object as well; 0 keeps all.

    Returns:
        Maps with root sum of squares 1 or 0, complex64, shape ``(coils, rows, columns)``.

    Raises:
        InputError: if the calibration does not fit, or the k-space is empty.

    Uecker et al. 2014, ESPIRiT: An Eigenvalue Approach to Autocalibrating Parallel MRI, DOI
    10.1002/mrm.24751.
    """
    _check_kspace(kspace)
    if not 4 <= calibration <= min(kspace.shape[-2:]):
        raise InputError(
            f"calibration must lie in 4 to {min(kspace.shape[-2:])}, got {calibration}; sample "
            "more of the centre."
        )
    from sigpy.mri.app import EspiritCalib  # takes seconds to import, since it compiles

    scaled, _ = _scaled(kspace)
    maps = EspiritCalib(
        scaled,
        calib_width=calibration,
        kernel_width=min(_KERNEL, calibration // 2 + 1),
        crop=crop,
        show_pbar=False,
    ).run()
    return torch.from_numpy(np.ascontiguousarray(maps, dtype=np.complex64))


def sense(kspace: Tensor, mask: Tensor, maps: Tensor, lamda: float, iterations: int = 30) -> Tensor:
    r"""SENSE by conjugate gradients.

    .. math:: \min_m \tfrac12 \|P F S m - f\|^2 + \tfrac{\lambda}{2} \|m\|^2

    Args:
        kspace: complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.
        maps: sensitivities, shape of ``kspace``.
        lamda: weight of the penalty, >= 0, see the units of this module.
        iterations: of conjugate gradients.

    Returns:
        Magnitude image, float32, shape ``(rows, columns)``.

    Raises:
        InputError: if the shapes do not fit, or lamda is negative.

    Pruessmann et al. 2001, DOI 10.1002/mrm.1241.
    """
    weights, sensitivities = _checked(kspace, mask, maps, lamda)
    from sigpy.mri.app import SenseRecon

    scaled, scale = _scaled(kspace)
    solver = SenseRecon(
        scaled,
        sensitivities,
        lamda,  # pyright: ignore[reportArgumentType] - SigPy's default 0 passes for an int type
        weights=weights,
        max_iter=iterations,
        show_pbar=False,
    )
    return _magnitude(solver, scale)


def l1_wavelet(
    kspace: Tensor, mask: Tensor, maps: Tensor, lamda: float, iterations: int = 60
) -> Tensor:
    r"""Compressed sensing with Daubechies-4 wavelets ``W``.

    .. math:: \min_m \tfrac12 \|P F S m - f\|^2 + \lambda \|W m\|_1

    Args:
        kspace: complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.
        maps: sensitivities, shape of ``kspace``.
        lamda: weight of the penalty, >= 0, see the units of this module.
        iterations: of the accelerated proximal gradient method.

    Returns:
        Magnitude image, float32, shape ``(rows, columns)``.

    Raises:
        InputError: if the shapes do not fit, or lamda is negative.

    Lustig et al. 2007, Sparse MRI, DOI 10.1002/mrm.21391.
    """
    weights, sensitivities = _checked(kspace, mask, maps, lamda)
    from sigpy.mri.app import L1WaveletRecon

    scaled, scale = _scaled(kspace)
    # The norm of P F S is at most that of S. Without a step size SigPy estimates the norm from the
    # global random state of NumPy: slower, not reproducible, and a side effect.
    step_size = 1 / float((np.abs(sensitivities) ** 2).sum(axis=0).max())
    solver = L1WaveletRecon(
        scaled,
        sensitivities,
        lamda,
        weights=weights,
        alpha=step_size,
        max_iter=iterations,
        show_pbar=False,
    )
    return _magnitude(solver, scale)


def sparse_spirit(kspace: Tensor, mask: Tensor, _maps: Tensor, lamda: float) -> Tensor:
    """The image of `l1_spirit`, in the form of the other methods.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.
        lamda: its threshold.

    Returns:
        Magnitude image, float32, shape ``(rows, columns)``.
    """
    return rss(l1_spirit(kspace, mask, lamda))


def best_lamda(method: Method, lamdas: Sequence[float], cases: Sequence[Case]) -> Sweep:
    """The regularisation of highest mean PSNR; choose it on validation slices, never on test ones.

    Args:
        method: `sense`, `l1_wavelet`, or a function of the same arguments.
        lamdas: values to try.
        cases: slices to try them on.

    Returns:
        The best value, with the PSNR of all.

    Raises:
        InputError: if there is nothing to try.
    """
    if not lamdas or not cases:
        raise InputError(
            f"at least one lamda and one case are needed, got {len(lamdas)} and {len(cases)}."
        )
    tried = tuple(sorted(set(lamdas)))
    psnrs = tuple(
        fmean(
            score(c.reference[None], method(c.kspace, c.mask, c.maps, lamda)[None]).psnr
            for c in cases
        )
        for lamda in tried
    )
    return Sweep(tried[psnrs.index(max(psnrs))], tried, psnrs)


def _check_kspace(kspace: Tensor) -> None:
    if kspace.ndim != 3 or not kspace.is_complex():
        raise InputError(
            f"kspace must be complex of shape (coils, rows, columns), got {kspace.dtype} "
            f"{tuple(kspace.shape)}; "
            "pass one slice."
        )
    if not bool(torch.isfinite(kspace).all()) or not bool((kspace != 0).any()):
        raise InputError("kspace must be finite and not all zero; leave this slice out.")


def _checked(
    kspace: Tensor, mask: Tensor, maps: Tensor, lamda: float
) -> tuple[NDArray[np.float32], NDArray[np.complex64]]:
    """The mask as weights and the maps as an array."""
    _check_kspace(kspace)
    check_mask(mask, tuple(kspace.shape[-2:]))
    if maps.shape != kspace.shape or not bool((maps != 0).any()):
        raise InputError(
            f"maps must have the shape {tuple(kspace.shape)} of kspace and not all be zero, got "
            f"{tuple(maps.shape)}; lower crop in espirit_maps."
        )
    if not lamda >= 0:
        raise InputError(f"lamda must be >= 0, got {lamda}.")
    return mask.cpu().numpy().astype(np.float32), maps.cpu().numpy().astype(np.complex64)


def _magnitude(solver: Any, scale: float) -> Tensor:
    return scale * torch.from_numpy(np.abs(solver.run()).astype(np.float32))


def _scaled(kspace: Tensor) -> tuple[NDArray[np.complex64], float]:
    """The k-space over the maximum of its zero-filled image, and that maximum."""
    scale = float(zero_filled(kspace).max())
    return (kspace / scale).cpu().numpy().astype(np.complex64), scale
