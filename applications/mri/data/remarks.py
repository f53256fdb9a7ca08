"""What users should know of slices and volumes, gathered while they are read."""

from applications.mri.data.values import Slice, UnusableSliceError
from applications.mri.data.volumes import VolumeFile


class Remarks:
    """What users should know of slices, gathered and said once a file."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._by_text: dict[tuple[str, str], list[int]] = {}

    @property
    def lines(self) -> tuple[str, ...]:
        """All of them."""
        found = [
            f"{name}: of slice {', '.join(map(str, indices))}, {text}"
            for (name, text), indices in self._by_text.items()
        ]
        return (*self._lines, *found)

    def add(self, one: Slice) -> None:
        """What was found in a slice."""
        for text in one.remarks:
            self._by_text.setdefault((one.path.name, text), []).append(one.index)

    def leave_out(self, error: UnusableSliceError) -> None:
        """A slice that is left out, and why."""
        self._lines.append(f"Left out {error}")

    def tell(self, line: str) -> None:
        """Something else."""
        self._lines.append(line)

    def of(self, file: VolumeFile) -> None:
        """What was done to a volume; of the volumes of a file the same is said once."""
        lines = [f"{file.path.name}: {text}" for text in file.facts.remarks]
        self._lines += [line for line in lines if line not in self._lines]
