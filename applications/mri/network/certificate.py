"""What a check of a slice found: the record that a reconstruction carries."""

import math
from dataclasses import dataclass
from typing import Any

WORSE = 1.05  # times the error of l1-SPIRiT, above which a network is not trusted
HOPELESS = 1.0  # error of an image of zeros
CORRUPTED = 2.5  # `consistency.centre_noise`, above which a centre cannot calibrate


@dataclass(frozen=True)
class SliceCertificate:
    """What samples that were held out say of a slice.

    Attributes:
        error: of the network, relative, where samples were held out; 1 predicts nothing.
        classical: of l1-SPIRiT there.
        n_held_out: how many samples; 0 where the mask has too few outside its centre.
        centre_noise: of the centre, of which nothing is held out, see `consistency.centre_noise`.
    """

    error: float
    classical: float
    n_held_out: int
    centre_noise: float = 0.0

    @property
    def trustworthy(self) -> bool:
        """Whether the network predicts the samples about as well as l1-SPIRiT, or better."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it is not trustworthy; empty if it is."""
        if not self.n_held_out:
            return "too few samples lie outside the centre to hold any out"
        if not self.error <= WORSE * self.classical:
            return "the network predicts samples that were held out worse than l1-SPIRiT does"
        if not self.error <= HOPELESS:
            return "neither the network nor l1-SPIRiT predicts samples that were held out"
        if not self.centre_noise <= CORRUPTED:
            return "the centre holds more noise than the rest of k-space: it was disturbed"
        return ""

    @property
    def replaceable(self) -> bool:
        """Whether l1-SPIRiT is the better choice."""
        return self.classical <= HOPELESS and not self.error <= WORSE * self.classical

    def as_json(self) -> dict[str, Any]:
        """The numbers and the verdict; not a number is None."""
        errors = {"held_out_error": self.error, "l1_spirit_error": self.classical}
        return {
            **{name: one if math.isfinite(one) else None for name, one in errors.items()},
            "held_out_samples": self.n_held_out,
            "trustworthy": self.trustworthy,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        """The verdict in words."""
        verdict = f"not trustworthy: {self.reason}" if self.reason else "trustworthy"
        return (
            f"held-out error {self.error:.3f}, of l1-SPIRiT {self.classical:.3f}, "
            f"{self.n_held_out} samples; {verdict}"
        )
