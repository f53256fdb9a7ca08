"""What becomes of the coils of scans on their way into a network, in numbers and in words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from applications.mri.data.volumes import VolumeFile
from applications.mri.physics.coil_counts import energy_kept


@dataclass(frozen=True)
class CoilFit:
    """Volumes of one coil count.

    Attributes:
        came: coils of the scans.
        needed: coils of the network.
        volumes: how many there are.
        energy_kept: least share that compression keeps of the energy of a middle slice.
    """

    came: int
    needed: int
    volumes: int
    energy_kept: float

    @property
    def done(self) -> str:
        """In words."""
        if self.came > self.needed:
            percent = 100 * self.energy_kept
            return f"{self.came} coils compressed to {self.needed}, {percent:.1f} % of the energy"
        if self.came < self.needed:
            return f"{self.came} coils padded with zeros to {self.needed}"
        return f"{self.came} coils"


def coil_fits(files: Sequence[VolumeFile], n_coils: int) -> tuple[CoilFit, ...]:
    """What becomes of the coils of volumes; reads the middle slice of those to be compressed.

    Args:
        files: the volumes.
        n_coils: of the network; 0 for one that takes any.

    Returns:
        One record a coil count, in rising order.

    Raises:
        InputError: if a slice cannot be read.
    """
    volumes: Counter[int] = Counter()
    kept: dict[int, float] = {}
    for file in files:
        volumes[file.n_coils] += 1
        share = 1.0
        if file.n_coils > n_coils > 0:
            share = energy_kept(file.middle_slice().kspace, n_coils)
        kept[file.n_coils] = min(share, kept.get(file.n_coils, 1.0))
    return tuple(CoilFit(c, n_coils or c, n, kept[c]) for c, n in sorted(volumes.items()))


def changes(fits: Sequence[CoilFit]) -> list[str]:
    """What is done to coils, in words, for users who did not ask.

    Args:
        fits: of the scans.

    Returns:
        One line a coil count that is not the network's.
    """
    return [f"Coils    {fit.done}" for fit in fits if fit.came != fit.needed]
