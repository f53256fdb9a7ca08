"""An unrolled reconstruction network without coil sensitivities, as a `bilevel.Dynamics`.

The state is the batch of multi-coil images u(t), complex, ``(batch, coils, rows, columns)``; the
control is one tree of weights per phase, theta_t, and theta_0 for the initial network g0.
Source: Bian, Chen & Ye 2022, An optimal control framework for joint-channel parallel MRI
reconstruction without coil sensitivities, Magnetic Resonance Imaging 89, and the MLM preprint, sec.
2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel as bl
from applications.mri.errors import InputError
from applications.mri.operators import ifft2c, sample, sample_adjoint


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network, and what it does otherwise than the paper.

    Attributes:
        n_coils: coils c of the data the network is built for.
        n_phases: number of phases, T.
        filters: width of g0, J and J~.
        features: width of G and G~.
        kernel: side of the filters of g0, J and J~ [pixels], odd.
        feature_kernel: side of the filters of G and G~ [pixels], odd.
        step: where the learned data-consistency steps rho start.
        start_at_identity: the last layers of g0 and J~ start from 0, so that the untrained network
            does data consistency alone; the paper starts them like the others.
        combine_rss: J's output is scaled by ... 
    """

    n_coils: int = 8
    n_phases: int = 4
    filters: int = 64
    features: int = 32
    kernel: int = 3
    feature_kernel: int = 9
    step: float = 0.1
    start_at_identity: bool = False


def to_planes(image: Tensor) -> Tensor:
    """Real and imaginary parts as channels: ``(b, c, h, w)`` complex to ``(b, 2c, h, w)`` real."""
    return torch.cat([image.real, image.imag], dim=1)


def to_complex(planes: Tensor) -> Tensor:
    """The inverse of `to_planes`."""
    real, imaginary = planes.chunk(2, dim=1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


class ComplexConv2d(nn.Module):
    """Complex convolution without bias, same size, on planes of real and imaginary parts.

    The weight is complex, ``(out, in, k, k)``. Xavier: real and imaginary part have variance
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
        parts = torch.randn(n_out, n_in, kernel, kernel, 2, generator=generator) * std
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
    for i, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        last = i == len(widths) - 2
        layers.append(ComplexConv2d(n_in, n_out, kernel, generator, zero=zero and last))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class InitialNet(nn.Module):
    """g0: a residual network on k-space, then the inverse Fourier transform."""

    def __init__(self, a: Architecture, generator: torch.Generator) -> None:
        """Draw the weights."""
        super().__init__()
        w = a.filters
        self.net = complex_net(
            (a.n_coils, w, w, w, a.n_coils), a.kernel, generator, zero=a.start_at_identity
        )

    def forward(self, kspace: Tensor) -> Tensor:
        """u(0) from measured k-space, both ``(batch, coils, rows, columns)``."""
        return ifft2c(kspace + to_complex(self.net(to_planes(kspace))))


class Phase(nn.Module):
    """g: a data-consistency step and a learned proximal step on the combined image."""

    def __init__(self, a: Architecture, generator: torch.Generator) -> None:
        """Draw the weights."""
        super().__init__()
        c, w, d = a.n_coils, a.filters, a.features
        self.step = nn.Parameter(torch.full((2,), a.step))
        self.threshold = nn.Parameter(torch.zeros(()))
        self.combine = complex_net((c, w, w, w, 1), a.kernel, generator)
        self.analyse = complex_net((1, d, d, d), a.feature_kernel, generator)
        self.synthesise = complex_net((d, d, d, 1), a.feature_kernel, generator)
        self.expand = complex_net(
            (1, w, w, w, c), a.kernel, generator, zero=a.start_at_identity
        )

    def forward(self, state: Tensor, kspace: Tensor, mask: Tensor) -> Tensor:
        """u(t) from u(t-1), both ``(batch, coils, rows, columns)``."""
        residual = sample_adjoint(sample(state, mask) - kspace, mask)
        b = state - torch.complex(self.step[0] * residual.real, self.step[1] * residual.imag)
        features = self.analyse(self.combine(to_planes(b)))
        image = self.synthesise(soft_threshold(features, self.threshold))
        return b + to_complex(self.expand(image))


def soft_threshold(planes: Tensor, threshold: Tensor) -> Tensor:
    """Shrink complex magnitudes: x max(|x| - threshold, 0) / |x|, and 0 at 0."""
    real, imaginary = planes.chunk(2, dim=1)
    energy = real.square() + imaginary.square()
    positive = energy > 0
    magnitude = torch.where(positive, energy, 1.0).sqrt()
    factor = torch.where(positive, F.relu(1 - threshold / magnitude), 0.0)
    return planes * torch.cat([factor, factor], dim=1)
