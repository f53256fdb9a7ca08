r"""Phases that cannot cancel signal: l1-SPIRiT with learned gains of wavelet coefficients.

The state is the pair of coil images of this step and of the last, from which momentum goes on. A
phase takes steps towards the data and towards self-consistency, and multiplies each wavelet
coefficient of all coils with one number in [0, 1],

.. math:: w \mapsto \max\bigl(0, 1 - \tau e^{\delta} / |w|\bigr)\, w,
          \qquad |w| = \bigl(\sum_i |w_i|^2\bigr)^{1/2},

where :math:`\delta` is what a small real network makes of :math:`\log |w|` around, at the other
orientations, and at the next coarser level. Only joint magnitudes enter it. So phases of the
image, be they smooth or not, and numbers and order of coils change nothing but the coil images'
own phases and order; no sign can be turned, and nothing is added to an image that was not in it.
Untrained, :math:`\delta = 0` and the phases are steps of l1-SPIRiT.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from applications.mri.network.architecture import Architecture
from applications.mri.physics.l1_spirit import momenta
from applications.mri.physics.measured import Measured
from applications.mri.physics.operators import between, ifft2c
from applications.mri.physics.products import times
from applications.mri.physics.wavelets import Wavelets, spread

STEPS = 3  # towards data and consistency, a phase
EVERY = 3  # steps of the warm-up from one shrinkage to the next
_LEVELS = 4
_ORIENTATIONS = 3
_MOST = 4.0  # |delta|: thresholds change by a factor of at most e^4

State = tuple[Tensor, Tensor]


class Begin(nn.Module):
    """u(0), and the coil images of the step before it, from the k-space of both."""

    def forward(self, kspace: State) -> State:
        """Two coil images, both ``(batch, coils, rows, columns)``."""
        return ifft2c(kspace[0]), ifft2c(kspace[1])


class Gains(nn.Module):
    """Numbers in [0, 1] from joint magnitudes of wavelet coefficients, level by level alike."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        """Draw the weights; the last layer starts from 0."""
        super().__init__()
        seen = 2 * _ORIENTATIONS + 1
        self.first = _convolution(seen, width, generator)
        self.second = _convolution(width, width, generator)
        self.last = nn.Conv2d(width, _ORIENTATIONS, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(_bias(self.last))
        self.level_bias = nn.Parameter(torch.zeros(_LEVELS, width))
        self.log_threshold = nn.Parameter(torch.zeros(_LEVELS, _ORIENTATIONS))

    def forward(
        self, magnitude: Tensor, coarser: Tensor | None, threshold: Tensor, level: int
    ) -> Tensor:
        """The gains of one level.

        Args:
            magnitude: ``(batch, 3, m, n)``.
            coarser: magnitudes of the next coarser level, or None at the coarsest.
            threshold: tau, ``(batch, 1, 1, 1)``.
            level: 0 at the finest.

        Returns:
            Shape of ``magnitude``.
        """
        own = threshold * self.log_threshold[level].exp()[:, None, None]
        seen = _logarithm(magnitude / own)
        above = torch.zeros_like(seen)
        if coarser is not None:
            above = F.interpolate(_logarithm(coarser / own), size=seen.shape[-2:])
        noise = threshold.log10().expand(-1, 1, *seen.shape[-2:])
        hidden = self.first(torch.cat([seen, above, noise], 1))
        hidden = F.relu(hidden + self.level_bias[level][:, None, None])
        delta = self.last(F.relu(self.second(hidden))).to(magnitude.dtype)
        scaled = own * (_MOST * torch.tanh(delta / _MOST)).exp()
        return F.relu(1 - scaled / magnitude.clamp_min(1e-12))


class WaveletPhase(nn.Module):
    """g: steps towards data and consistency, then the gains."""

    def __init__(self, a: Architecture, number: int, generator: torch.Generator) -> None:
        """Draw the weights of phase ``number``, from 0."""
        super().__init__()
        done = a.warm_up + STEPS * number
        self.number = done // EVERY + number  # of the shift of the grid
        self.step = nn.Parameter(torch.ones(STEPS))
        self.consistency = nn.Parameter(torch.ones(STEPS))
        self.momentum = nn.Parameter(torch.tensor(momenta(done + STEPS)[done:]))
        self.gains = Gains(a.gains, generator)

    def forward(
        self,
        state: State,
        samples: Tensor,
        mask: Tensor,
        consistent: Tensor,
        threshold: Tensor,
    ) -> State:
        """u(t) and u(t-1) from u(t-1) and u(t-2), by samples and mask of a `Measured`."""
        u, before = state
        data = Measured(samples, mask)
        for i in range(STEPS):
            # The first two states are the caller's.
            ahead = between(before, u, 1 + self.momentum[i], overwrite=i > 1)
            b = data.towards(ahead, self.step[i])
            u, before = between(b, times(consistent, b), self.consistency[i], overwrite=True), u
        return self.shrunk(u, STEPS * threshold), before

    def shrunk(self, coil_images: Tensor, threshold: Tensor) -> Tensor:
        """Coil images with the gains on their wavelet coefficients; the low pass stays."""
        shape = (coil_images.shape[-2], coil_images.shape[-1])
        wavelets = Wavelets(shape, _LEVELS, spread(shape, self.number, _LEVELS))
        low, *details = wavelets.forward(coil_images)
        magnitudes = [_joint(band) for band in details]
        for i, magnitude in enumerate(magnitudes):
            coarser = magnitudes[i - 1] if i else None
            level = len(details) - 1 - i
            gains = self.gains(magnitude, coarser, threshold, level)
            details[i] = details[i] * gains[:, None, None]
        return wavelets.adjoint([low, *details], of_complex=True)


def _joint(band: Tensor) -> Tensor:
    """Root sum of squares over coils and parts; tiny, not 0, so that it has a derivative."""
    return (band.square().sum((1, 2)) + 1e-20).sqrt()


def _logarithm(ratio: Tensor) -> Tensor:
    """0 far below the threshold, and the logarithm above it."""
    return 0.5 * torch.log1p(ratio.square())


def _convolution(n_in: int, n_out: int, generator: torch.Generator) -> nn.Conv2d:
    layer = nn.Conv2d(n_in, n_out, 3, padding=1)
    std = (2 / (9 * n_in)) ** 0.5  # He et al. 2015
    with torch.no_grad():
        layer.weight.copy_(std * torch.randn(layer.weight.shape, generator=generator))
        _bias(layer).zero_()
    return layer


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
