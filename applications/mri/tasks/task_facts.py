"""What becomes of the scans of a task on their way into a network, counted."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from applications.mri.data.coil_fits import CoilFit, coil_fits
from applications.mri.tasks.tasks import Task


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
    files = [file for part in task.parts.values() for file in part.files]
    sizes: Counter[tuple[int, int]] = Counter()
    for file in files:
        sizes[file.shape] += file.n_slices
    slices = {role: len(part) for role, part in task.parts.items()}
    fits = coil_fits(files, n_coils)
    return TaskFacts(task.name, repr(task.sampling), slices, dict(sorted(sizes.items())), fits)
