"""Multi-coil k-space of a magnitude image, with random phase, coils and correlated noise.

Every function is deterministic given its generator.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.physics.operators import fft2c, rss
from applications.mri.simulation.coils import biot_savart_coils, pixel_centres
from applications.mri.simulation.local_phase import with_local_phase


@dataclass(frozen=True)
class Simulation:
    """One simulated slice.

    Attributes:
        kspace: noisy, fully sampled k-space, complex64, ``(coils, rows, columns)``.
        clean: coil images without noise, complex64, ``(coils, rows, columns)``.
        reference: root sum of squares of ``clean``, float32, ``(rows, columns)``.
        image: the image times its phase, complex64, ``(rows, columns)``.
        coils: sensitivities, complex64, ``(coils, rows, columns)``.
    """

    kspace: Tensor
    clean: Tensor
    reference: Tensor
    image: Tensor
    coils: Tensor


def simulate(
    image: Tensor,
    n_coils: int,
    generator: torch.Generator,
    noise_std: float = 0.01,
    coils: Tensor | None = None,
    *,
    phase: float = math.pi / 2,
    correlation: float = 0.2,
    local_phase: float = 0.0,
) -> Simulation:
    r"""Simulates one slice, :math:`f_c = F(s_c u e^{i\phi}) + n_c`.

    Args:
        image: magnitude in [0, 1], shape ``(rows, columns)``.
        n_coils: number of coils.
        generator: the only source of chance; phase, coils and noise are drawn in this order.
        noise_std: standard deviation of the real part, and of the imaginary part, of the noise of
            the average coil, in units of image magnitude; the same in k-space and image, as the
            transform is orthonormal.
        coils: sensitivities ``(n_coils, rows, columns)`` to use instead of random ones, as the
            slices of one volume share them.
        phase: largest image phase [rad].
        correlation: between the noise of neighbouring coils, in [0, 1).
        local_phase: strength of `local_phase.with_local_phase`, 1 as in life.

    Returns:
        The record `Simulation`.

    Raises:
        InputError: if the image or the coils do not fit, or a setting is out of range.
    """
    _check(image, noise_std)
    if not local_phase >= 0:
        raise InputError(f"local_phase must be >= 0, got {local_phase}.")
    shape = (image.shape[0], image.shape[1])
    angle = smooth_phase(shape, generator, phase)
    if coils is None:
        coils = biot_savart_coils(shape, n_coils, generator)
    elif coils.shape != (n_coils, *shape):
        raise InputError(
            f"coils must have shape {(n_coils, *shape)}, got {tuple(coils.shape)}; pass coils=None "
            "to draw them."
        )
    coils = coils.to(torch.complex64)
    complex_image = torch.polar(image.float(), angle)
    if local_phase:
        turned = with_local_phase(image, generator, local_phase)
        complex_image = turned * torch.polar(torch.ones_like(angle), angle)
    clean = coils * complex_image
    factor = torch.linalg.cholesky(noise_covariance(n_coils, generator, correlation))
    white = torch.view_as_complex(torch.randn(*clean.shape, 2, generator=generator))
    noise = torch.einsum("cd,dxy->cxy", factor.to(torch.complex64), white)
    return Simulation(fft2c(clean) + noise_std * noise, clean, rss(clean), complex_image, coils)


def _check(image: Tensor, noise_std: float) -> None:
    if image.ndim != 2 or image.is_complex() or not image.is_floating_point():
        raise InputError(
            f"image must be real floating point of shape (rows, columns), got {image.dtype} "
            f"{tuple(image.shape)}; simulate one slice at a time."
        )
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise InputError(
            f"image magnitudes must lie in [0, 1], got {image.min():g} to {image.max():g}; divide "
            "by the maximum."
        )
    if not noise_std >= 0:
        raise InputError(f"noise_std must be >= 0, got {noise_std}.")


def smooth_phase(shape: tuple[int, int], generator: torch.Generator, strength: float) -> Tensor:
    """A random cubic polynomial of both coordinates, like the slow phase of a gradient echo.

    Args:
        shape: ``(rows, columns)``.
        generator: draws the coefficients, those of order n with standard deviation 1 / (1 + n).
        strength: largest absolute phase [rad], reached at some pixel.

    Returns:
        Phase [rad], float32, shape ``(rows, columns)``.
    """
    orders = torch.arange(4)
    scale = 1.0 / (1 + orders[:, None] + orders[None, :])
    coefficients = torch.randn(4, 4, generator=generator) * scale
    coefficients = torch.where(orders[:, None] + orders[None, :] <= 3, coefficients, 0.0)
    y, x = (pixel_centres(n).float()[:, None] ** orders for n in shape)
    phase = y @ coefficients @ x.T
    return phase * (strength / phase.abs().max())


def noise_covariance(n_coils: int, generator: torch.Generator, correlation: float) -> Tensor:
    r"""Covariance of the noise of coils on a ring.

    .. math:: \Psi_{jk} = g_j g_k \rho^{d(j, k)} e^{i(\alpha_j - \alpha_k)}

    ``d`` counts the steps along the ring. The exponential of the distance along a circle is
    positive definite, and gains and phases keep it so.

    Args:
        n_coils: number of coils.
        generator: draws the gains (10 % spread) and the phases.
        correlation: magnitude ``rho`` between neighbours, in [0, 1).

    Returns:
        Hermitian positive definite matrix with mean diagonal 1, complex128, shape ``(n_coils,
        n_coils)``.

    Raises:
        InputError: if the correlation is out of range.
    """
    if not 0 <= correlation < 1:
        raise InputError(f"correlation must lie in [0, 1), got {correlation}.")
    gains = torch.exp(0.1 * torch.randn(n_coils, generator=generator, dtype=torch.float64))
    gains = gains / gains.square().mean().sqrt()
    phases = 2 * math.pi * torch.rand(n_coils, generator=generator, dtype=torch.float64)
    coil = torch.arange(n_coils)
    apart = (coil[:, None] - coil[None, :]).abs()
    distance = torch.minimum(apart, n_coils - apart).double()
    unit = torch.polar(gains, phases)
    return unit[:, None] * correlation**distance * unit.conj()[None, :]
