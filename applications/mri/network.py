"""The modules of an unrolled reconstruction network without coil sensitivities.

The state is the batch of coil images u(t), complex, ``(batch, coils, rows, columns)``; the control
is one tree of weights per phase, theta_t, and theta_0 for the initial network g0.
Source: Bian, Chen & Ye 2022, An optimal control framework for joint-channel parallel MRI
reconstruction without coil sensitivities, Magnetic Resonance Imaging 89; MLM preprint, section 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from applications.errors import InputError, check_counts
from applications.mri.consistency import times
from applications.mri.layers import complex_net, soft_threshold, to_complex, to_planes
from applications.mri.operators import ifft2c, sample, sample_adjoint


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network, and where it departs from the paper.

    Attributes:
        n_coils: coils c of the data the network is built for.
        n_phases: number of phases, T.
        filters: width of g0, J and J~.
        features: width of G and G~.
        kernel: side of the filters of g0, J and J~ [pixels], odd.
        feature_kernel: side of the filters of G and G~ [pixels], odd.
        step: where the learned data-consistency steps rho start.
        scale_input: divide k-space by the maximum of its zero-filled image, and multiply the
            result, so that the scanner's units do not matter.
        start_at_identity: the last layers of g0 and J~ start from 0, so that the untrained network
            leaves the coil images to data consistency.
        self_consistency: iterations of `consistent_image` that fill k-space before g0; each phase
            then also takes a learned step towards K u = u. 0 switches both off.
        demodulate: J and J~ see each coil image without the phase of its low-resolution image, so
            that real and imaginary parts do not change sign with the scan.
        expand_sees_coils: J~ receives b beside the combined image, c + 1 channels. A convolution of
            the combined image alone cannot weigh a correction by the sensitivity of each coil.
        rss_skip: the image is |J u(T) + RSS(u(T))| instead of |J u(T)|, so that J learns only what
            the root sum of squares gets wrong.

    Raises:
        InputError: if a size is not positive, or a filter side is even.
    """

    n_coils: int = 8
    n_phases: int = 4
    filters: int = 64
    features: int = 32
    kernel: int = 3
    feature_kernel: int = 9
    step: float = 0.1
    scale_input: bool = False
    start_at_identity: bool = False
    self_consistency: int = 0
    demodulate: bool = False
    expand_sees_coils: bool = False
    rss_skip: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, "n_coils", "n_phases", "filters", "features", "kernel", "feature_kernel")
        for name in ("kernel", "feature_kernel"):
            if getattr(self, name) % 2 == 0:
                raise InputError(f"{name} must be odd, got {getattr(self, name)}.")
        if self.self_consistency < 0:
            raise InputError(f"self_consistency must be >= 0, got {self.self_consistency}.")


def paper(n_coils: int = 8) -> Architecture:
    """The network of the paper: 4.1 million real parameters at 8 coils."""
    return Architecture(n_coils)


def light(n_coils: int = 8) -> Architecture:
    """Many phases of narrow 3 x 3 filters for CPUs, with every improvement on."""
    return Architecture(
        n_coils,
        n_phases=8,
        filters=16,
        features=8,
        feature_kernel=3,
        step=1.0,
        scale_input=True,
        start_at_identity=True,
        self_consistency=16,
        demodulate=True,
        expand_sees_coils=True,
        rss_skip=True,
    )


def tiny(n_coils: int = 8) -> Architecture:
    """`light` with 3 phases of width 8, for studies of many trainings on a CPU."""
    return replace(light(n_coils), n_phases=3, filters=8, features=4)


PRESETS: dict[str, Callable[[int], Architecture]] = {"paper": paper, "light": light, "tiny": tiny}


def preset_named(name: str, n_coils: int) -> Architecture:
    """A preset as the command line names it.

    Args:
        name: of `PRESETS`.
        n_coils: of the data.

    Returns:
        The architecture.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name](n_coils)


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
