"""Sensitivities of circular receive coils by the law of Biot and Savart.

The field of view is the square [-1, 1] x [-1, 1] in the plane z = 0, x along the columns and y
along the rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from applications.errors import InputError


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


def biot_savart_coils(
    shape: tuple[int, int],
    n_coils: int,
    generator: torch.Generator,
    *,
    ring: float = 1.55,
    jitter: float = 0.1,
) -> Tensor:
    r"""Sensitivities :math:`B_1^- = B_x - i B_y` of loops on a ring around the field of view.

    Neighbouring loops overlap by a tenth. The root sum of squares is not made uniform: only one
    factor for all coils and pixels brings its root mean square over the inscribed ellipse to 1, so
    that magnitudes and noise keep the scale of the image on average.

    Args:
        shape: ``(rows, columns)``.
        n_coils: number of loops.
        generator: draws the rotation of the ring (uniform), and radius, place, tilt and height of
            each loop.
        ring: distance of the loops from the centre, in halves of the field of view; above sqrt(2)
            no wire crosses the image.
        jitter: standard deviation of angles [rad], of heights [half field of view] and of relative
            radii.

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
    y, x = (pixel_centres(n) for n in shape)
    coils = receive_field(loops, y, x)
    inside = (y.square()[:, None] + x.square()[None, :]) <= 1
    energy = coils[:, inside].abs().square().sum(0).mean()
    return (coils / energy.sqrt()).to(torch.complex64)


def receive_field(loops: Loops, y: Tensor, x: Tensor, segments: int = 32) -> Tensor:
    r"""Field of unit currents in the plane z = 0, by the law of Biot and Savart.

    .. math:: B(r) = \frac{1}{4 \pi} \oint \frac{dl \times (r - l)}{|r - l|^3}

    in units of :math:`\mu_0 I` per unit of length. The integrand is periodic and analytic, hence
    the midpoint rule converges geometrically, its error being about exp(-segments * distance from
    the wire / radius).

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
        # In the plane, r - l = (x - lx, y - ly, -lz), so each component of the field is a sum over
        # the segments of |r - l|^-3 times a number, plus x or y times another such sum: three
        # matrix products per coil.
        squares = (y[None, :, None] - ly[:, None, None]).square() + (
            (x[None, :] - lx[:, None]).square() + lz[:, None].square()
        )[:, None, :]
        inverse_cube = squares.rsqrt().div(squares).flatten(1)
        weights = torch.stack([dz * ly - dy * lz, dx * lz - dz * lx, dz])
        sum_x, sum_y, sum_z = (weights @ inverse_cube).unflatten(1, (len(y), len(x)))
        fields.append(torch.complex(sum_x - y[:, None] * sum_z, -(sum_y + x[None, :] * sum_z)))
    return torch.stack(fields) / (4 * math.pi)


def pixel_centres(n: int) -> Tensor:
    """Pixel positions along one axis of the field of view.

    Args:
        n: number of pixels.

    Returns:
        Positions in [-1, 1), 0 at the index ``n // 2``, shape ``(n,)``.
    """
    return (torch.arange(n) - n // 2) / (n / 2)


def _ring_of_loops(n_coils: int, generator: torch.Generator, ring: float, jitter: float) -> Loops:
    start, *_ = 2 * math.pi * torch.rand(1, generator=generator)
    tilt, place, height, size = jitter * torch.randn(4, n_coils, generator=generator)
    spacing = 2 * math.pi / n_coils
    # A place varies by at most a good part of the spacing, so that loops keep their order on the
    # ring.
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
