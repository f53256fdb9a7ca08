"""The Fourier transform, the sampled Fourier transform with its adjoint, and coil combination.

The last two axes of every image or k-space are ``[row, column]``, the coil axis is ``-3``, and
whatever stands before it is a batch. The zero frequency lies at index ``n // 2`` of each axis, for
odd ``n`` too.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from applications.errors import InputError

_IMAGE_AXES = (-2, -1)
_COIL_AXIS = -3
_EXPONENTS = -126, 127  # of powers of two that float32 holds in full
_SMALLEST, _LARGEST = 1e-13, 1e13  # whose squares, summed over a slice, are far from the limits


def fft2c(image: Tensor) -> Tensor:
    r"""Centred orthonormal Fourier transform :math:`F u`, a unitary operator.

    Args:
        image: complex or real, shape ``(..., rows, columns)``.

    Returns:
        k-space of the same shape, complex.

    Raises:
        InputError: if there are fewer than two axes, or an empty one.
    """
    _check_image("image", image)
    return _centred(torch.fft.fft2, image)


def ifft2c(kspace: Tensor) -> Tensor:
    r"""Inverse, and adjoint, of `fft2c`: :math:`F^{-1} f = F^H f`.

    Args:
        kspace: shape ``(..., rows, columns)``.

    Returns:
        Image of the same shape, complex.

    Raises:
        InputError: if there are fewer than two axes, or an empty one.
    """
    _check_image("kspace", kspace)
    return _centred(torch.fft.ifft2, kspace)


def sample(image: Tensor, mask: Tensor) -> Tensor:
    r"""Sampled k-space :math:`P F u`: zero wherever the mask is false.

    Args:
        image: shape ``(..., rows, columns)``.
        mask: boolean, shape ``(rows, columns)``; or as many axes as ``image``, broadcastable to it
            (one mask per sample: ``(batch, 1, rows, columns)``).

    Returns:
        k-space of the shape of ``image``, complex.

    Raises:
        InputError: if the mask does not fit the image.
    """
    _check_image("image", image)
    _check_fit("image", image, mask)
    return fft2c(image) * mask


def sample_adjoint(kspace: Tensor, mask: Tensor) -> Tensor:
    r"""Adjoint of `sample`: :math:`F^H P f`, so that Re<P F u, f> = Re<u, F^H P f>.

    Args:
        kspace: shape ``(..., rows, columns)``.
        mask: as in `sample`.

    Returns:
        Image of the shape of ``kspace``, complex.

    Raises:
        InputError: if the mask does not fit the k-space.
    """
    _check_image("kspace", kspace)
    _check_fit("kspace", kspace, mask)
    return ifft2c(kspace * mask)


def rss(coil_images: Tensor) -> Tensor:
    r"""Root sum of squares over the coils, :math:`\sqrt{\sum_c |u_c|^2}`.

    Where all coils vanish the square root has no derivative. There the root is taken of 1 instead
    and the result replaced by 0, so that the value is exact and the gradient 0, not NaN: both
    derivatives of ``where`` are finite, and the one that is not chosen is multiplied by zero.

    Args:
        coil_images: complex or real, shape ``(..., coils, rows, columns)``.

    Returns:
        Real image, shape ``(..., rows, columns)``.

    Raises:
        InputError: if there are fewer than three axes, or an empty one.
    """
    if coil_images.ndim < 3 or coil_images.shape[_COIL_AXIS] == 0:
        raise InputError(
            "coil_images must have shape (..., coils, rows, columns) with at least one coil, got "
            f"{tuple(coil_images.shape)}; for a single coil add the axis with "
            "coil_images.unsqueeze(-3)."
        )
    _check_image("coil_images", coil_images)
    if coil_images.is_complex():
        squares = coil_images.real.square() + coil_images.imag.square()
    else:
        squares = coil_images.square()
    energy = squares.sum(dim=_COIL_AXIS)
    zero = energy == 0  # not energy > 0, which would turn NaN into 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, energy).sqrt())


def centre_crop(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """The centred part of an image, as fastMRI crops a reconstruction to the size of its reference.

    Args:
        image: shape ``(..., rows, columns)``.
        shape: rows and columns to keep.

    Returns:
        A view of shape ``(..., *shape)``.

    Raises:
        InputError: if the image is smaller than the shape.
    """
    rows, columns = image.shape[-2:]
    if shape[0] > rows or shape[1] > columns:
        raise InputError(f"an image of at least {tuple(shape)} is needed, got {(rows, columns)}.")
    top, left = (rows - shape[0]) // 2, (columns - shape[1]) // 2
    return image[..., top : top + shape[0], left : left + shape[1]]


def between(
    start: Tensor, end: Tensor, weight: Tensor | float, *, overwrite: bool = False
) -> Tensor:
    """`torch.lerp` of complex tensors, in one pass over their parts: a fifth of its time.

    Args:
        start: what a weight of 0 gives, complex.
        end: what a weight of 1 gives, complex, of the same shape.
        weight: real, one number, in [0, 1] or beyond.
        overwrite: whether ``start`` is needed no more: under `torch.no_grad` the result takes its
            place, which saves the time of making room.

    Returns:
        ``start + weight * (end - start)``.
    """
    first, last = torch.view_as_real(start), torch.view_as_real(end)
    if overwrite and not torch.is_grad_enabled():
        first.lerp_(last, weight)
        return start
    return torch.view_as_complex(torch.lerp(first, last, weight))


def unit_of(kspace: Tensor) -> float:
    """A power of two that brings extreme values to about 1; it changes no digit.

    Args:
        kspace: complex, finite.

    Returns:
        1, but for values so large or small that their squares leave the range of float32.

    Example:
        >>> (
        ...     unit_of(torch.full((1, 2, 2), 3 + 4j)),
        ...     unit_of(torch.full((1, 2, 2), 1e20 + 0j)),
        ... )
        (1.0, 7.378697629483821e+19)
    """
    largest = float(torch.view_as_real(kspace.resolve_conj()).abs().max())
    if largest == 0 or _SMALLEST <= largest <= _LARGEST:
        return 1.0
    return 2.0 ** min(max(round(math.log2(largest)), _EXPONENTS[0]), _EXPONENTS[1])


def in_units_of(kspace: Tensor, calibration: Tensor) -> Tensor:
    """A calibration that was measured apart, in the units of the image.

    Another flip angle, bandwidth or repetition time makes it stronger or weaker, and what the noise
    of a scan is worth is counted in units of its image.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``, zeros where nothing was measured.
        calibration: the same.

    Returns:
        The calibration times one number, by the energy where both were measured; if there is no
        such place, by that of the places between the outermost ones of the calibration.
    """
    image, known = (one.to(torch.complex128) for one in (kspace, calibration))
    here, there = ((one != 0).any(0) for one in (image, known))
    common = here & there
    if not bool(common.any()):
        rows, columns = (there.any(axis).nonzero()[:, 0] for axis in (1, 0))
        common = torch.zeros_like(there)
        if len(rows):
            common[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    strengths = [
        torch.linalg.vector_norm(one[:, common & places]) / (common & places).sum() ** 0.5
        for one, places in ((image, here), (known, there))
    ]
    factor = float(strengths[0] / strengths[1])
    if not 0 < factor < math.inf:
        return calibration
    return (known * factor).to(calibration.dtype)


def _centred(transform: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A Fourier transform whose zero is at index n // 2, before and after."""
    rows, columns = x.shape[-2:]
    if rows % 2 or columns % 2:
        shifted = torch.fft.ifftshift(x, dim=_IMAGE_AXES)
        return torch.fft.fftshift(transform(shifted, norm="ortho"), dim=_IMAGE_AXES)
    # A shift by half of an even n is a change of every other sign on the other side, which takes a
    # twentieth of the time of moving the values: (j - n/2)(k - n/2) = jk - (j + k) n/2 + n^2/4.
    signs, whole = _signs(rows, columns, x.device)
    return transform(x * signs, norm="ortho") * whole


def _signs(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The signs before and after a centred transform of even sides."""
    down, across = (1 - 2 * (torch.arange(n, device=device) % 2) for n in (rows, columns))
    signs = torch.outer(down, across).to(torch.int8)
    return signs, -signs if (rows + columns) % 4 else signs


def _check_image(name: str, image: Tensor) -> None:
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise InputError(
            f"{name} must have shape (..., rows, columns) with at least one pixel, got "
            f"{tuple(image.shape)}; put the image axes last."
        )


def _check_fit(name: str, image: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be boolean, got {mask.dtype}; convert it with mask != 0.")
    # A mask of shape (batch, rows, columns) would broadcast against the coils without a word.
    same_rank = mask.ndim == image.ndim and all(
        m in {1, n} for m, n in zip(mask.shape[:-2], image.shape[:-2], strict=True)
    )
    if mask.shape[-2:] != image.shape[-2:] or not (mask.ndim == 2 or same_rank):
        raise InputError(
            f"mask must have shape {tuple(image.shape[-2:])}, or {image.ndim} axes that broadcast "
            f"to the {name} of shape {tuple(image.shape)}, got {tuple(mask.shape)}; make the mask "
            "for this matrix size."
        )
