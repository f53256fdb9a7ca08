"""What becomes of the scans of a task on their way into a network, counted."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from applications.mri.coil_counts import energy_kept
from applications.mri.data import fully_sampled
from applications.mri.tasks import Task


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


@dataclass(frozen=True, eq=False)
class TaskFacts:
    """One task.

    Attributes:
        name: of the task.
        sampling: what undersamples it.
        slices: number by role.
        sizes: slices by matrix size; a minibatch has one batch a size.
        coils: by coil count.
    """

    name: str
    sampling: str
    slices: dict[str, int]
    sizes: dict[tuple[int, int], int]
    coils: tuple[CoilFit, ...]

    @property
    def summary(self) -> str:
        """One line."""
        slices = ", ".join(f"{role} {n}" for role, n in self.slices.items())
        sizes = ", ".join(f"{rows} x {columns}" for rows, columns in self.sizes)
        several = f", in batches of {len(self.sizes)} sizes" if len(self.sizes) > 1 else ""
        coils = "; ".join(fit.done for fit in self.coils)
        return f"{self.name}: {self.sampling}; slices {slices}; {sizes}{several}; {coils}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "sampling": self.sampling,
            "slices": self.slices,
            "sizes": [{"matrix": list(size), "slices": n} for size, n in self.sizes.items()],
            "coils": [vars(fit) for fit in self.coils],
        }


def facts_of(task: Task, n_coils: int) -> TaskFacts:
    """Counts what a task holds; reads the middle slice of volumes that will be compressed.

    Args:
        task: the task.
        n_coils: of the network.

    Returns:
        The facts.

    Raises:
        InputError: if a slice cannot be read.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    volumes: Counter[int] = Counter()
    kept: dict[int, float] = {}
    for part in task.parts.values():
        for file in part.files:
            sizes[file.shape] += file.n_slices
            volumes[file.n_coils] += 1
            share = 1.0
            if file.n_coils > n_coils:
                share = energy_kept(fully_sampled(file.read_slice(file.n_slices // 2))[0], n_coils)
            kept[file.n_coils] = min(share, kept.get(file.n_coils, 1.0))
    fits = tuple(CoilFit(c, n_coils, n, kept[c]) for c, n in sorted(volumes.items()))
    slices = {role: len(part) for role, part in task.parts.items()}
    return TaskFacts(task.name, repr(task.sampling), slices, dict(sorted(sizes.items())), fits)
