r"""Phases as tissue, vessels and fields leave them: what a smooth polynomial leaves out.

All act on a magnitude image in [0, 1] and are deterministic given the generator. Each strength is
drawn anew for each image, so that some have little of it and some much.
"""

import math

import torch
from torch import Tensor

from applications.mri.simulation.coils import pixel_centres

_OBJECT = 0.05  # magnitude above which a pixel is tissue


def with_local_phase(image: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """A magnitude image with local phase, and small structures of any phase put into it.

    Args:
        image: magnitude, shape ``(rows, columns)``.
        generator: the only source of chance.
        strength: 1 as in life, 0 for none; scales all angles, and the number of structures.

    Returns:
        Complex64, shape of ``image``.
    """
    angle = tissue_phase(image, generator) + dipole_phase(image, generator)
    angle = angle + rough_phase(image, generator)
    complex_image = torch.polar(image.float(), (strength * angle).float())
    return with_structures(complex_image, generator, strength)


def tissue_phase(image: Tensor, generator: torch.Generator) -> Tensor:
    """Water and fat: up to three patches of tissue of like intensity have a phase of their own.

    Args:
        image: magnitude, shape ``(rows, columns)``.
        generator: of ranges, places and phases.

    Returns:
        Angle [rad], shape of ``image``.
    """
    angle = torch.zeros_like(image)
    for _ in range(_count(3, generator)):
        low, width = _uniform(0.0, 0.8, generator), _uniform(0.1, 0.5, generator)
        alike = torch.sigmoid((image - low) / 0.02) * torch.sigmoid((low + width - image) / 0.02)
        patch = torch.sigmoid(smooth_noise(image, 0.2, generator) / 0.1)
        angle = angle + _uniform(-math.pi, math.pi, generator) * alike * patch
    return angle


def dipole_phase(image: Tensor, generator: torch.Generator) -> Tensor:
    r"""The field of air and bone, whose susceptibility is not that of tissue.

    .. math:: \Delta B / B_0 = F^{-1} \Bigl(\tfrac13 - \frac{(k \cdot b)^2}{|k|^2}\Bigr) F \chi

    in the plane, with the direction b of the main field drawn at random (Salomir, de Senneville &
    Moonen 2003, DOI 10.1002/cmr.b.10083).

    Args:
        image: magnitude, shape ``(rows, columns)``.
        generator: of the direction and the strength, 0 to 6 rad over the range of the field.

    Returns:
        Angle [rad], shape of ``image``.
    """
    chi = torch.sigmoid((_OBJECT - image) / 0.01)
    down, across = (torch.fft.fftfreq(n) for n in image.shape)
    turn = _uniform(0, math.pi, generator)
    along = math.cos(turn) * down[:, None] + math.sin(turn) * across[None, :]
    squares = (down[:, None] ** 2 + across[None, :] ** 2).clamp_min(1e-12)
    field = torch.fft.ifft2(torch.fft.fft2(chi) * (1 / 3 - along**2 / squares)).real
    return _uniform(0, 6, generator) * field / (field.max() - field.min()).clamp_min(1e-12)


def rough_phase(image: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of phase at three scales between 1 % and 15 % of the image.

    Args:
        image: magnitude, shape ``(rows, columns)``.
        generator: of scales, noise, and strengths of 0 to 0.5 rad.

    Returns:
        Angle [rad], shape of ``image``.
    """
    angle = torch.zeros_like(image)
    for _ in range(3):
        scale = 0.01 * 15 ** _uniform(0, 1, generator)
        strength = 0.5 * _uniform(0, 1, generator)
        angle = angle + strength * smooth_noise(image, scale, generator)
    return angle


def with_structures(image: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """An image with vessels and other small things of any phase, brighter or darker than tissue.

    Args:
        image: complex, shape ``(rows, columns)``.
        generator: draws up to 25 ellipses with half axes of 2 to 20 pixels (of 256), more of the
            small, a third of them thin and drawn out as vessels.
        strength: of `with_local_phase`.

    Returns:
        Complex, shape of ``image``, of magnitude at most 1.
    """
    rows, columns = image.shape
    size = max(rows, columns)
    inside = (image.abs() > _OBJECT).flatten().nonzero()[:, 0]
    if not len(inside):
        return image
    y, x = (n * pixel_centres(n) / 2 for n in (rows, columns))
    for _ in range(round(strength * _count(25, generator))):
        place = int(inside[torch.randint(len(inside), (), generator=generator)])
        top, left = float(y[place // columns]), float(x[place % columns])
        radius = max(2.0, 2 * 10 ** _uniform(0, 1, generator) * size / 256)
        longer = _uniform(1.0, 1.7, generator)
        if _uniform(0, 3, generator) < 1:  # a vessel
            radius, longer = max(2.0, radius / 3), _uniform(3, 12, generator)
        turn = _uniform(0, math.pi, generator)
        dy, dx = y[:, None] - top, x[None, :] - left
        along = (math.cos(turn) * dy + math.sin(turn) * dx) / longer
        off = math.cos(turn) * dx - math.sin(turn) * dy
        cover = torch.sigmoid((radius - (along**2 + off**2).sqrt()) / 0.4)
        value = torch.polar(
            torch.tensor(_uniform(0.05, 1.0, generator)),
            torch.tensor(_uniform(-math.pi, math.pi, generator)),
        )
        image = image * (1 - cover) + value * cover
    return image


def smooth_noise(image: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 1, smoothed.

    Args:
        image: of the wanted shape.
        scale: standard deviation of the smoothing over the larger side.
        generator: of the noise.

    Returns:
        Real, shape of ``image``.
    """
    noise = torch.randn(image.shape, generator=generator)
    width = scale * max(image.shape)
    down, across = (torch.fft.fftfreq(n) for n in image.shape)
    squares = down[:, None] ** 2 + across[None, :] ** 2
    smooth = torch.fft.ifft2(
        torch.fft.fft2(noise) * torch.exp(-2 * (math.pi * width) ** 2 * squares)
    ).real
    return smooth / smooth.std().clamp_min(1e-12)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _count(most: int, generator: torch.Generator) -> int:
    return int(torch.randint(most + 1, (), generator=generator))
