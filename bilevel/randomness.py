"""The state of torch's default random generators, saved and restored around recomputed steps."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Snapshot of the default generators that a step may draw from.

    Attributes:
        cpu: state of the CPU generator.
        cuda: state of the generator of each CUDA device in use.
    """

    cpu: Tensor
    cuda: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> "RandomState":
        """The present state of the CPU generator and of those of `devices`."""
        return cls(
            torch.get_rng_state(),
            {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"},
        )

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def same(self, other: "RandomState") -> bool:
        """Whether nothing was drawn between the two snapshots."""
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(state, other.cuda[device]) for device, state in self.cuda.items()
        )
