r"""l1-SPIRiT: coil images that fit the data, are self-consistent, and sparse in wavelets together.

.. math:: \min_u \tfrac12 \|P F u - f\|^2 + \tfrac c2 \|(K - I) u\|^2
          + \lambda \sum_j \Bigl(\sum_i |(W u_i)_j|^2\Bigr)^{1/2}

No sensitivity map is formed and nothing is trained. The magnitude that shrinks is that of a
coefficient in all coils together, so that phases, and what the coils see of them, are left alone.

Lustig & Pauly 2010, SPIRiT, DOI 10.1002/mrm.22428; Beck & Teboulle 2009, A fast iterative
shrinkage-thresholding algorithm, DOI 10.1137/080716542; Figueiredo & Nowak 2003 for the shifts of
the grid from step to step, DOI 10.1109/TIP.2003.814255.
"""

import math

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.physics.consistency import (
    bounded,
    fitted_kernels,
    noise_level,
    normal_of,
)
from applications.mri.physics.masks import check_mask
from applications.mri.physics.measured import Measured
from applications.mri.physics.operators import between, ifft2c, in_units_of, rss, unit_of
from applications.mri.physics.products import times
from applications.mri.physics.wavelets import Wavelets, spread

CONSISTENCY = 0.5  # c
_LARGEST = 2.0  # eigenvalue of N
_TINY = 1e-38  # square of a magnitude that divides
_SPARSITY, _LEAST, _MOST = 5.0, 0.001, 0.02  # of `threshold_of_noise`


def l1_spirit(
    kspace: Tensor,
    mask: Tensor,
    threshold: float | None = None,
    steps: int = 60,
    calibration: Tensor | None = None,
) -> Tensor:
    """The coil images of one slice.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``; values outside the mask are ignored.
        mask: boolean, shape ``(rows, columns)``, with a fully sampled centre of at least 5 x 5.
        threshold: lambda over the maximum of the zero-filled image; None: `threshold_of_noise`.
        steps: of the accelerated proximal gradient method.
        calibration: shape of ``kspace``, zeros where nothing was measured: what the coils are
            calibrated by where that is no part of the image; None: the centre of ``kspace``.

    Returns:
        Coil images, complex64, shape of ``kspace``; their `rss` is the image.

    Raises:
        InputError: if the shapes do not fit, k-space is not finite or zero, or the centre is too
            small.
    """
    _check(kspace, mask, threshold, steps)
    f = kspace.to(torch.complex64) * mask
    unit = unit_of(f)
    scale = unit * rss(ifft2c(f / unit)).max()
    if not bool(scale > 0):
        raise InputError("kspace is zero wherever the mask samples; check the mask.")
    f = f / scale
    centre, measured = f, mask
    if calibration is not None:
        centre = in_units_of(f, calibration).to(f)
        measured = (centre != 0).any(0)
    shrink = threshold_of_noise(centre, measured) if threshold is None else threshold
    normal = normal_of(fitted_kernels(centre, measured), (mask.shape[0], mask.shape[1]))
    normal = CONSISTENCY * bounded(normal, _LARGEST)
    with torch.autocast(f.device.type, enabled=False):
        return scale * _fista(f, mask, normal, shrink, steps)


def _fista(f: Tensor, mask: Tensor, normal: Tensor, threshold: float, steps: int) -> Tensor:
    """The iteration, in units of the zero-filled maximum; ``normal`` is c N."""
    length = 1 / (1 + CONSISTENCY * _LARGEST)
    shape = (f.shape[-2], f.shape[-1])
    u, before = ifft2c(f), ifft2c(f)
    data = Measured.of(f, mask)
    for step, momentum in enumerate(momenta(steps)):
        ahead = between(before, u, 1 + momentum, overwrite=True)
        b = data.towards(ahead, length).sub_(times(normal, ahead), alpha=length)
        wavelets = Wavelets(shape, shift=spread(shape, step))
        before = u
        u = soft_threshold_jointly(b, wavelets, length * threshold)
    return u


def momenta(steps: int) -> list[float]:
    """How far each step of the accelerated method goes on in the direction of the last one.

    Args:
        steps: how many are wanted.

    Returns:
        Factors from 0 towards 1 (Beck & Teboulle 2009).

    Example:
        >>> [round(one, 3) for one in momenta(4)]
        [0.0, 0.282, 0.434, 0.531]
    """
    found, now = [], 1.0
    for _ in range(steps):
        after = (1 + math.sqrt(1 + 4 * now**2)) / 2
        found.append((now - 1) / after)
        now = after
    return found


def quick_steps(
    f: Tensor, mask: Tensor, consistent: Tensor, threshold: float, steps: int, every: int
) -> tuple[Tensor, Tensor]:
    """Steps of l1-SPIRiT that cost less and go farther: what a network starts from.

    Consistency is met by its proximal map instead of by its gradient, so that the data allow steps
    of length 1, and wavelets shrink after every few steps only, by as much more.

    Args:
        f: k-space over the maximum of its zero-filled image, ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.
        consistent: from `consistency.towards_consistency`.
        threshold: lambda.
        steps: how many.
        every: steps from one shrinkage to the next.

    Returns:
        The last coil images, and those of the step before, from which momentum goes on.
    """
    shape = (f.shape[-2], f.shape[-1])
    u, before = ifft2c(f), ifft2c(f)
    data = Measured.of(f, mask)
    for step, momentum in enumerate(momenta(steps), start=1):
        ahead = between(before, u, 1 + momentum, overwrite=True)
        before = u
        u = times(consistent, data.towards(ahead))
        if step % every == 0:
            wavelets = Wavelets(shape, shift=spread(shape, step // every))
            u = soft_threshold_jointly(u, wavelets, every * threshold)
    return u, before


def soft_threshold_jointly(coil_images: Tensor, wavelets: Wavelets, threshold: float) -> Tensor:
    """Shrinks the details of all coils by their joint magnitude; the coarsest low pass stays.

    Args:
        coil_images: complex, shape ``(coils, rows, columns)``.
        wavelets: of their size.
        threshold: taken off the root sum of squares over coils of each coefficient.

    Returns:
        Shape of ``coil_images``.
    """
    low, *details = wavelets.forward(coil_images)
    for i, band in enumerate(details):
        magnitude = band.square().sum((0, 1)).clamp_min(_TINY).sqrt()
        details[i] = band * (1 - threshold / magnitude).clamp_min(0)
    return wavelets.adjoint([low, *details], of_complex=True)


def threshold_of_noise(kspace: Tensor, mask: Tensor) -> float:
    r"""A threshold for a scan whose noise is what its fully sampled centre says.

    For coefficients with the density :math:`e^{-|w| / s}` and noise of variance
    :math:`\sigma^2` the most probable image has a threshold of :math:`\sigma^2 / s`; 1 / s = 5 was
    found on measured and simulated scans. Aliasing asks for some threshold without any noise.

    Args:
        kspace: over the maximum of its zero-filled image, ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.

    Returns:
        lambda, 0.001 to 0.02.
    """
    return min(max(_SPARSITY * noise_level(kspace, mask) ** 2, _LEAST), _MOST)


def check_slice(kspace: Tensor) -> None:
    """Refuses what is not the k-space of one slice.

    Args:
        kspace: any tensor.

    Raises:
        InputError: if it is not complex of shape ``(coils, rows, columns)``.
    """
    if not isinstance(kspace, Tensor):
        raise InputError(
            f"kspace must be a tensor, got {type(kspace).__name__}; torch.as_tensor makes one of "
            "an array."
        )
    if kspace.ndim != 3 or not kspace.is_complex() or 0 in kspace.shape:
        raise InputError(
            "kspace must be complex of shape (coils, rows, columns), with at least one coil, got "
            f"{kspace.dtype} {tuple(kspace.shape)}; pass one slice."
        )


def _check(kspace: Tensor, mask: Tensor, threshold: float | None, steps: int) -> None:
    check_slice(kspace)
    check_mask(mask, (kspace.shape[1], kspace.shape[2]))
    if not bool(torch.isfinite(kspace).all()):
        raise InputError("kspace must be finite; leave out the slice, or export it again.")
    if steps < 1 or not (threshold is None or threshold >= 0):
        raise InputError(f"steps must be >= 1 and threshold >= 0, got {steps} and {threshold}.")
