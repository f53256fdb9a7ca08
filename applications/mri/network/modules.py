"""The modules of an unrolled reconstruction network without coil sensitivities.

The state is the batch of coil images u(t), complex, ``(batch, coils, rows, columns)``; the control
is one tree of weights per phase, theta_t, and theta_0 for the initial network g0.
Source: Bian, Chen & Ye 2022, An optimal control framework for joint-channel parallel MRI
reconstruction without coil sensitivities, Magnetic Resonance Imaging 89; MLM preprint, section 2.
"""

import torch
from torch import Tensor, nn

from applications.mri.network.architecture import Architecture
from applications.mri.network.layers import complex_net, soft_threshold, to_complex, to_planes
from applications.mri.physics.operators import ifft2c, sample, sample_adjoint
from applications.mri.physics.products import times


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
        """u(0) from k-space, both ``(batch, coils, rows, columns)``."""
        return ifft2c(kspace + to_complex(self.net(to_planes(kspace))))


class Phase(nn.Module):
    """g: a data-consistency step, then a learned proximal step on the combined image."""

    def __init__(self, a: Architecture, generator: torch.Generator) -> None:
        """Draw the weights."""
        super().__init__()
        c, w, d = a.n_coils, a.filters, a.features
        self.step = nn.Parameter(torch.full((2,), a.step))
        if a.self_consistency:
            self.consistency_step = nn.Parameter(torch.tensor(0.1))
        self.threshold = nn.Parameter(torch.zeros(()))
        self.combine = complex_net((c, w, w, w, 1), a.kernel, generator)
        self.analyse = complex_net((1, d, d, d), a.feature_kernel, generator)
        self.synthesise = complex_net((d, d, d, 1), a.feature_kernel, generator)
        seen = c + 1 if a.expand_sees_coils else 1
        self.expand = complex_net((seen, w, w, w, c), a.kernel, generator, zero=a.start_at_identity)
        self.expand_sees_coils = a.expand_sees_coils

    def forward(
        self,
        state: Tensor,
        kspace: Tensor,
        mask: Tensor,
        normal: Tensor | None,
        phases: Tensor | None,
    ) -> Tensor:
        """u(t) from u(t-1), both ``(batch, coils, rows, columns)``."""
        residual = sample_adjoint(sample(state, mask) - kspace, mask)
        b = state - torch.complex(self.step[0] * residual.real, self.step[1] * residual.imag)
        if normal is not None:
            b = b - self.consistency_step * times(normal, state)
        seen = b if phases is None else b * phases.conj()
        features = self.analyse(self.combine(to_planes(seen)))
        image = self.synthesise(soft_threshold(features, self.threshold))
        if self.expand_sees_coils:
            image = to_planes(torch.cat([to_complex(image), seen], dim=1))
        correction = to_complex(self.expand(image))
        return b + (correction if phases is None else correction * phases)
