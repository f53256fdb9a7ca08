"""Multi-coil k-space from a magnitude image: random phase, coils by the Biot-Savart law, correlated noise.

The field of view is the square [-1, 1] x [-1, 1] in the plane z = 0, x along the columns and y along the rows.
Every function is deterministic given its generator.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from applications.mri.errors import InputError
from applications.mri.operators import fft2c, rss

_SEGMENTS = 32


@dataclass(frozen=True)
class Loops:
    """Circular receive loops, lengths in halves of the field of view.

    Attributes:
        centres: ``(coils, 3)``, each row ``x, y, z``.
        normals: ``(coils, 3)``, unit vectors.
        radii: ``(coils,)``.
    """

    centres: Tensor
    normals: Tensor
    radii: Tensor


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
) -> Simulation:
    r"""Simulates one slice, :math:`f_c = F(s_c u e^{i\phi}) + n_c`.

    Args:
        image: magnitude in [0, 1], shape ``(rows, columns)``.
        n_coils: number of coils.
        generator: the only source of chance; phase, coils and noise are drawn in this order.
        noise_std: standard deviation of the real part, and of the imaginary part, of the noise of the average
            coil, in units of image magnitude; the same in k-space and image, as the transform is orthonormal.
        coils: sensitivities ``(n_coils, rows, columns)`` to use instead of random ones, as the slices of one
            volume share them.
        phase: largest image phase [rad].
        correlation: between the noise of neighbouring coils, in [0, 1).

    Returns:
        The record `Simulation`.

    Raises:
        InputError: if the image or the coils do not fit, or a setting is out of range.
    """
    if image.ndim != 2 or image.is_complex() or not image.is_floating_point():
        raise InputError(
            f"image must be real floating point of shape (rows, columns), got {image.dtype} {tuple(image.shape)}; "
            "simulate one slice at a time."
        )
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise InputError(
            f"image magnitudes must lie in [0, 1], got {image.min():g} to {image.max():g}; divide by the maximum."
        )
    if not noise_std >= 0:
        raise InputError(f"noise_std must be >= 0, got {noise_std}.")
    shape = (image.shape[0], image.shape[1])
    angle = smooth_phase(shape, generator, phase)
    if coils is None:
        coils = biot_savart_coils(shape, n_coils, generator)
    elif coils.shape != (n_coils, *shape):
        raise InputError(
            f"coils must have shape {(n_coils, *shape)}, got {tuple(coils.shape)}; pass coils=None to draw them."
        )
    coils = coils.to(torch.complex64)
    complex_image = torch.polar(image.float(), angle)
    clean = coils * complex_image
    factor = torch.linalg.cholesky(noise_covariance(n_coils, generator, correlation))
    white = torch.view_as_complex(torch.randn(n_coils, *shape, 2, generator=generator))
    noise = torch.einsum("cd,dxy->cxy", factor.to(torch.complex64), white)
    return Simulation(fft2c(clean) + noise_std * noise, clean, rss(clean), complex_image, coils)


def biot_savart_coils(
    shape: tuple[int, int],
    n_coils: int,
    generator: torch.Generator,
    *,
    ring: float = 1.55,
    jitter: float = 0.1,
) -> Tensor:
    r"""Receive sensitivities :math:`B_1^- = B_x - i B_y` of loops on a ring around the field of view.

    Neighbouring loops overlap by a tenth. The root sum of squares is not made uniform: only one factor for all
    coils and pixels brings its root mean square over the inscribed ellipse to 1, so that magnitudes and noise keep
    the scale of the image on average.

    Args:
        shape: ``(rows, columns)``.
        n_coils: number of loops.
        generator: draws the rotation of the ring (uniform), and radius, place, tilt and height of each loop.
        ring: distance of the loops from the centre, in halves of the field of view; above sqrt(2) no wire
            crosses the image.
        jitter: standard deviation of angles [rad], of heights [half field of view] and of relative radii.

    Returns:
        Sensitivities, complex64, shape ``(n_coils, rows, columns)``.

    Raises:
        InputError: if there is no coil, or the ring cuts the field of view.
    """
    if n_coils < 1 or not ring > math.sqrt(2) or not 0 <= jitter <= 0.3:
        raise InputError(
            "n_coils must be >= 1, ring > sqrt(2) and jitter in [0, 0.3], got "
            f"{n_coils}, {ring} and {jitter}."
        )
    loops = _ring_of_loops(n_coils, generator, ring, jitter)
    y, x = (_centres(n) for n in shape)
    coils = receive_field(loops, y, x)
    inside = (y.square()[:, None] + x.square()[None, :]) <= 1
    energy = coils[:, inside].abs().square().sum(0).mean()
    return (coils / energy.sqrt()).to(torch.complex64)


def receive_field(loops: Loops, y: Tensor, x: Tensor, segments: int = _SEGMENTS) -> Tensor:
    r"""Field of unit currents in the plane z = 0, by the law of Biot and Savart.

    .. math:: B(r) = \frac{1}{4 \pi} \oint \frac{dl \times (r - l)}{|r - l|^3}

    in units of :math:`\mu_0 I` per unit of length. The integrand is periodic and analytic, hence the midpoint rule
    converges geometrically, its error being about exp(-segments * distance from the wire / radius).

    Args:
        loops: the loops.
        y: row positions, shape ``(rows,)``.
        x: column positions, shape ``(columns,)``.
        segments: points of the midpoint rule on each loop.

    Returns:
        :math:`B_x - i B_y`, complex, precision of the loops, shape ``(coils, rows, columns)``.
    """
    points, steps = _wires(loops, segments)
    fields: list[Tensor] = []
    for (lx, ly, lz), (dx, dy, dz) in zip(points, steps, strict=True):
        # In the plane, r - l = (x - lx, y - ly, -lz), so each component of the field is a sum over the segments
        # of |r - l|^-3 times a number, plus x or y times another such sum: three matrix products per coil.
        squares = (y[None, :, None] - ly[:, None, None]).square() + (
            (x[None, :] - lx[:, None]).square() + lz[:, None].square()
        )[:, None, :]
        inverse_cube = squares.rsqrt().div(squares).flatten(1)
        weights = torch.stack([dz * ly - dy * lz, dx * lz - dz * lx, dz])
        sum_x, sum_y, sum_z = (weights @ inverse_cube).unflatten(1, (len(y), len(x)))
        fields.append(torch.complex(sum_x - y[:, None] * sum_z, -(sum_y + x[None, :] * sum_z)))
    return torch.stack(fields) / (4 * math.pi)


def smooth_phase(shape: tuple[int, int], generator: torch.Generator, strength: float) -> Tensor:
    """A random cubic polynomial of both coordinates, as the phase of a gradient-echo image varies slowly.

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
    y, x = (_centres(n).float()[:, None] ** orders for n in shape)
    phase = y @ coefficients @ x.T
    return phase * (strength / phase.abs().max())


def noise_covariance(n_coils: int, generator: torch.Generator, correlation: float) -> Tensor:
    r"""Covariance of the noise of coils on a ring, :math:`\Psi_{jk} = g_j g_k \rho^{d(j, k)} e^{i(\alpha_j - \alpha_k)}`.

    ``d`` counts the steps along the ring. The exponential of the distance along a circle is positive definite,
    and gains and phases keep it so.

    Args:
        n_coils: number of coils.
        generator: draws the gains (10 % spread) and the phases.
        correlation: magnitude ``rho`` between neighbours, in [0, 1).

    Returns:
        Hermitian positive definite matrix with mean diagonal 1, complex128, shape ``(n_coils, n_coils)``.

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


def _centres(n: int) -> Tensor:
    """Pixel positions in [-1, 1), 0 at the index n // 2."""
    return (torch.arange(n) - n // 2) / (n / 2)


def _ring_of_loops(n_coils: int, generator: torch.Generator, ring: float, jitter: float) -> Loops:
    start, *_ = 2 * math.pi * torch.rand(1, generator=generator)
    tilt, place, height, size = jitter * torch.randn(4, n_coils, generator=generator)
    spacing = 2 * math.pi / n_coils
    # A place varies by at most a good part of the spacing, so that loops keep their order on the ring.
    angle = start + spacing * (torch.arange(n_coils) + place.clamp(-0.4, 0.4))
    radii = min(1.1 * ring * math.sin(spacing / 2), 0.6) if n_coils > 2 else 0.6
    centres = torch.stack([ring * angle.cos(), ring * angle.sin(), height], dim=1)
    facing = angle + tilt
    normals = torch.stack([facing.cos(), facing.sin(), torch.zeros(n_coils)], dim=1)
    return Loops(centres, normals, radii * torch.exp(size))


def _wires(loops: Loops, segments: int) -> tuple[Tensor, Tensor]:
    """Points on each loop and the vectors ``dl`` there, both ``(coils, 3, segments)``."""
    upward = torch.zeros_like(loops.normals)
    upward[:, 2] = 1.0  # any vector that is not along a normal; loops face the ring's centre
    first = torch.nn.functional.normalize(torch.linalg.cross(upward, loops.normals), dim=1)
    second = torch.linalg.cross(loops.normals, first)
    angle = 2 * math.pi * (torch.arange(segments).to(loops.radii) + 0.5) / segments
    radius = loops.radii[:, None, None]
    circle = first[:, :, None] * angle.cos() + second[:, :, None] * angle.sin()
    tangent = second[:, :, None] * angle.cos() - first[:, :, None] * angle.sin()
    return loops.centres[:, :, None] + radius * circle, radius * tangent * (2 * math.pi / segments)
