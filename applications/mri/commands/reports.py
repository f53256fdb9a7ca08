"""What `reconstruct` tells of its images, of one scan and of a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from applications.command_line import console, say
from applications.errors import InputError
from applications.mri.data.coil_fits import changes
from applications.mri.data.images import IMAGES
from applications.mri.evaluation.scanning import ScanImages
from applications.mri.evaluation.verdicts import told
from applications.mri.formats.nifti import is_nifti
from applications.mri.network.reconstruction import L1_SPIRIT
from applications.outputs import PICTURE, Output


@dataclass(frozen=True)
class Job:
    """A scan, and what is made of it.

    Attributes:
        scan: the file.
        out: images to write.
        png: picture to write, or None.
    """

    scan: Path
    out: Path
    png: Path | None = None

    @property
    def outputs(self) -> list[Output]:
        """What will be written."""
        picture = [] if self.png is None else [Output(self.png, PICTURE)]
        return [Output(self.out, IMAGES), *picture]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a scan.

    Attributes:
        job: the scan, and what was to be made of it.
        found: what is known of the images, or why there are none.
    """

    job: Job
    found: ScanImages | InputError

    def as_json(self) -> dict[str, Any]:
        """The scan, its images, and what became of each slice."""
        record = {"scan": self.job.scan.name, "images": self.job.out.name}
        if isinstance(self.found, InputError):
            return record | {"skipped": str(self.found)}
        return record | {
            "acceleration": self.found.acceleration,
            "slices": [one.as_json() for one in self.found.checked],
        }


def print_images(outcome: Outcome) -> None:
    """What users should know of the images of one scan.

    Args:
        outcome: of the scan.
    """
    found, out = outcome.found, outcome.job.out
    if isinstance(found, InputError):
        raise found
    console.print(f"Acceleration {found.acceleration:.2f} in the mean over slices")
    for line in [*changes(found.coils), *found.remarks, *told(found.checked)]:
        say(line)
    doubtful = [str(i) for i, residual in enumerate(found.data_residuals) if residual > 1]
    if doubtful:
        console.print(
            f"Look at slice {', '.join(doubtful)} before use: farther from what was measured than "
            "an empty image, so mostly noise, or not like anything the weights were trained on."
        )
    if is_nifti(out) and not found.oriented:
        console.print("The scan states no orientation; the images have none.")
    say(f"Images   {out}")


def print_outcomes(outcomes: Sequence[Outcome], folder: Path) -> None:
    """A table of the scans of a folder, and what else users should know.

    Args:
        outcomes: of the scans.
        folder: of the images.

    Raises:
        InputError: if there are no images of any.
    """
    table = Table(title="Reconstructed scans")
    table.add_column("scan", overflow="fold", no_wrap=True)
    for name in ("slices", "left out", "acceleration", "trusted", "l1-SPIRiT", "to look at"):
        table.add_column(name, justify="right")
    for one in outcomes:
        table.add_row(one.job.scan.name, *_cells(one.found))
    console.print(table)
    for one in outcomes:
        if isinstance(one.found, InputError):
            say(f"Skipped  {one.found}")
            continue
        lines = [*changes(one.found.coils), *one.found.remarks, *told(one.found.checked)]
        for line in dict.fromkeys(lines):
            say(line if one.job.scan.name in line else f"{one.job.scan.name}: {line}")
    written = sum(isinstance(one.found, ScanImages) for one in outcomes)
    if not written:
        raise InputError("at least one scan was needed that can be used, the folder has none.")
    say(f"Images   {written} of {len(outcomes)} scans in {folder}")


def _cells(found: ScanImages | InputError) -> tuple[str, ...]:
    if isinstance(found, InputError):
        return ("skipped", "", "", "", "", "")
    trusted = sum(
        one.certificate is not None and one.certificate.trustworthy for one in found.checked
    )
    far = {i for i, residual in enumerate(found.data_residuals) if residual > 1}
    return (
        str(len(found.data_residuals)),
        str(len(found.left_out)),
        f"{found.acceleration:.2f}",
        str(trusted) if any(one.certificate for one in found.checked) else "-",
        str(sum(one.method == L1_SPIRIT for one in found.checked)),
        str(len(far | {one.index for one in found.checked if one.doubtful})),
    )
