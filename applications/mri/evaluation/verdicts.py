"""What the check said of the slices of a scan, kept beside the images and told in a few lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from applications.mri.network.certificate import SliceCertificate
from applications.mri.network.reconstruction import NETWORK


@dataclass(frozen=True)
class Checked:
    """What became of one slice.

    Attributes:
        index: of the image, counted through all volumes.
        certificate: of the check; None where there was none.
        method: what the image is of; empty where the slice was left out.
    """

    index: int
    certificate: SliceCertificate | None = None
    method: str = ""

    @property
    def replaced(self) -> bool:
        """Whether the image is not that of the network, because the check said so."""
        return self.certificate is not None and self.method != NETWORK

    @property
    def doubtful(self) -> bool:
        """Whether the image is one that the check does not trust."""
        found = self.certificate
        return found is not None and not found.trustworthy and not self.replaced

    def as_json(self) -> dict[str, Any]:
        """The method, and what the check found."""
        found = {} if self.certificate is None else self.certificate.as_json()
        return {"slice": self.index, "method": self.method or "left out"} | found


def attributes(checked: Sequence[Checked]) -> dict[str, object]:
    """What HDF5 keeps of a check, a value for each slice.

    Args:
        checked: the slices.

    Returns:
        Nothing where none was checked; NaN and "" stand for a slice that was not.
    """
    if all(one.certificate is None for one in checked):
        return {}
    nothing = float("nan")
    found = [one.certificate for one in checked]
    return {
        "held_out_errors": [nothing if one is None else one.error for one in found],
        "l1_spirit_errors": [nothing if one is None else one.classical for one in found],
        "trustworthy": [one is not None and one.trustworthy for one in found],
        "methods": [one.method for one in checked],
    }


def told(checked: Sequence[Checked]) -> list[str]:
    """The verdicts in words, slices with the same one together.

    Args:
        checked: the slices.

    Returns:
        Lines; none where every slice is trusted or was not checked.
    """
    lines: dict[str, list[str]] = {}
    for one in checked:
        if one.certificate is None or one.certificate.trustworthy:
            continue
        done = "; its image is that of l1-SPIRiT" if one.replaced else ""
        lines.setdefault(f"{one.certificate.reason}{done}", []).append(str(one.index))
    return [
        f"Slice {', '.join(slices)} is not trustworthy: {reason}."
        for reason, slices in lines.items()
    ]
