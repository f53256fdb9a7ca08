"""Layers of the network: complex convolutions on planes of real and imaginary parts."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_planes(image: Tensor) -> Tensor:
    """Real and imaginary parts as channels: ``(b, c, h, w)`` complex to ``(b, 2c, h, w)`` real."""
    return torch.cat([image.real, image.imag], dim=1)


def to_complex(planes: Tensor) -> Tensor:
    """The inverse of `to_planes`; what autocast made bfloat16 is float32 again."""
    wide = planes.to(torch.promote_types(planes.dtype, torch.float32))
    real, imaginary = wide.chunk(2, dim=1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


class ComplexConv2d(nn.Module):
    """Complex convolution without bias, same size, on planes of real and imaginary parts.

    The weight is complex, shape ``(out, in, k, k)``. Xavier: real and imaginary part have variance
    1 / (fan_in + fan_out) each, so that the complex weight has 2 / (fan_in + fan_out) (Glorot &
    Bengio 2010, Understanding the difficulty of training deep feedforward neural networks;
    Trabelsi et al. 2018, Deep complex networks, arXiv:1705.09792, sec. 3.6).
    """

    def __init__(
        self, n_in: int, n_out: int, kernel: int, generator: torch.Generator, *, zero: bool = False
    ) -> None:
        """Draw the weights; `zero` starts them from 0."""
        super().__init__()
        std = (kernel**2 * (n_in + n_out)) ** -0.5
        shape = n_out, n_in, kernel, kernel, 2
        parts = torch.randn(shape, generator=generator, dtype=torch.float32) * std
        self.weight = nn.Parameter(torch.view_as_complex(parts * (0.0 if zero else 1.0)))
        self.padding = kernel // 2

    def forward(self, planes: Tensor) -> Tensor:
        """``(batch, 2 in, rows, columns)`` to ``(batch, 2 out, rows, columns)``, real."""
        real, imaginary = self.weight.real, self.weight.imag
        stacked = torch.cat(
            [torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)]
        )
        return F.conv2d(planes, stacked, padding=self.padding)


def complex_net(
    widths: Sequence[int], kernel: int, generator: torch.Generator, *, zero: bool = False
) -> nn.Sequential:
    """Complex convolutions with ReLU on real and imaginary parts between them."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        layers.append(ComplexConv2d(n_in, n_out, kernel, generator, zero=zero and last))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def soft_threshold(planes: Tensor, threshold: Tensor) -> Tensor:
    """Shrinks complex magnitudes: x max(|x| - threshold, 0) / |x|, and 0 at 0.

    Args:
        planes: real and imaginary parts, shape ``(batch, 2c, rows, columns)``.
        threshold: scalar; where training makes it negative, magnitudes grow.

    Returns:
        Shape of ``planes``.
    """
    real, imaginary = planes.chunk(2, dim=1)
    energy = real.square() + imaginary.square()
    positive = energy > 0
    magnitude = torch.where(positive, energy, 1.0).sqrt()
    factor = torch.where(positive, F.relu(1 - threshold / magnitude), 0.0)
    return planes * torch.cat([factor, factor], dim=1)
