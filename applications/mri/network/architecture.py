"""Sizes and options of the network, and the presets."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from applications.errors import InputError
from applications.settings import check_counts


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
