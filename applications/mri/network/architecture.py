"""Sizes and options of the network, and the presets."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from applications.errors import InputError
from applications.settings import check_counts

ANY = 0  # coils
_MOST_COILS = 1024


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network, and where it departs from the paper.

    Attributes:
        n_coils: coils c of the data the network is built for; `ANY`: see `gains`.
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
        gains: width of the network that predicts, from joint magnitudes over coils, by how much a
            phase shrinks each wavelet coefficient; see `wavelet_phases`. 0: the phases of the
            paper, of which all options above but `n_phases` and `scale_input` speak; otherwise
            none of them matters, and `n_coils` is `ANY`.
        warm_up: steps of l1-SPIRiT that make u(0), where `gains` is not 0.

    Raises:
        InputError: if a size is not positive, a filter side is even, or phases that shrink
            wavelets are not for any number of coils and scaled.
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
    gains: int = 0
    warm_up: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.gains:
            check_counts(self, "gains", "n_phases", "warm_up")
            if self.n_coils != ANY or not self.scale_input:
                raise InputError(
                    "phases that shrink wavelets take any number of coils and scale their input: "
                    f"n_coils must be {ANY} and scale_input True, got {self.n_coils} and "
                    f"{self.scale_input}."
                )
            return
        check_counts(self, "n_coils", "n_phases", "filters", "features", "kernel", "feature_kernel")
        if self.n_coils > _MOST_COILS:
            raise InputError(f"n_coils must be at most {_MOST_COILS}, got {self.n_coils}.")
        for name in ("kernel", "feature_kernel"):
            if getattr(self, name) % 2 == 0:
                raise InputError(f"{name} must be odd, got {getattr(self, name)}.")
        if self.self_consistency < 0:
            raise InputError(f"self_consistency must be >= 0, got {self.self_consistency}.")

    @property
    def least_weights(self) -> int:
        """Real weights that the network has at the least, to be compared with a file."""
        if self.gains:
            return 9 * self.n_phases * self.gains**2
        inner = 2 * self.filters**2 * self.kernel**2 + self.features**2 * self.feature_kernel**2
        outer = self.n_coils * self.filters * self.kernel**2
        return 4 * self.n_phases * (inner + outer)

    def coils_of(self, count: int) -> int:
        """Coils that the network needs of a scan with so many, see `physics.coil_counts`."""
        return self.n_coils or count


def paper(n_coils: int = 8) -> Architecture:
    """The network of the paper: 4.1 million real parameters at 8 coils."""
    return Architecture(n_coils)


def light(n_coils: int = ANY) -> Architecture:
    """Unrolled l1-SPIRiT with learned gains of wavelet coefficients, for any number of coils."""
    if n_coils != ANY:
        raise InputError(
            f"the preset light takes scans of any number of coils, got {n_coils}; leave the number "
            "out."
        )
    return Architecture(ANY, n_phases=8, scale_input=True, gains=24, warm_up=24)


def narrow(n_coils: int = 8) -> Architecture:
    """The phases of the paper for CPUs: many, of narrow 3 x 3 filters, with every option on."""
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
    """`narrow` with 3 phases of width 8, for studies of many trainings on a CPU."""
    return replace(narrow(n_coils), n_phases=3, filters=8, features=4)


PRESETS: dict[str, Callable[..., Architecture]] = {"paper": paper, "light": light, "tiny": tiny}


def preset_named(name: str, n_coils: int | None = None) -> Architecture:
    """A preset as the command line names it.

    Args:
        name: of `PRESETS`.
        n_coils: of the data; None: 8, or any number where the preset takes any.

    Returns:
        The architecture.

    Raises:
        InputError: if there is none of that name, or it takes any number of coils and one is given.
    """
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]() if n_coils is None else PRESETS[name](n_coils)
