"""What a step finds when it is evaluated again: the draws, autocast and device of the first time.

Torch's default generators are rewound where the forward sweep drew from them, and there alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.tree import Tree

_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)


@contextmanager
def looking() -> Iterator[None]:
    """Inside, steps are evaluated beside those of a sweep, to see what they are like."""
    token = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(token)


def is_look() -> bool:
    """Whether a step is evaluated for a look, which each process makes once, and not by a sweep.

    Returns:
        True inside of a look.

    Example:
        >>> is_look()  # who counts evaluations counts where this is False
        False
    """
    return _LOOKING.get()


def devices_of(values: Tree) -> frozenset[torch.device]:
    """The devices of the tensors of a tree: what works on them may use their generators."""
    return frozenset(x.device for x in tree.leaves_of(values) if isinstance(x, Tensor))


@dataclass(frozen=True)
class RandomState:
    """Where the default generators stand.

    Attributes:
        cpu: state of the CPU generator.
        cuda: state of the generator of each CUDA device in use.
    """

    cpu: Tensor
    cuda: dict[torch.device, Tensor]

    @classmethod
    def capture(
        cls, devices: Iterable[torch.device], previous: "RandomState | None" = None
    ) -> "RandomState":
        """The present state; `previous` itself if nothing was drawn since, to save its memory."""
        gpus = [d for d in devices if d.type == "cuda"]
        if previous is not None and previous.cuda.keys() == set(gpus) and previous.stands():
            return previous
        return cls(torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in gpus})

    def stands(self) -> bool:
        """Whether nothing was drawn since."""
        if not torch.equal(torch.get_rng_state(), self.cpu):
            return False
        return not self.cuda or all(
            torch.equal(torch.cuda.get_rng_state(d), state) for d, state in self.cuda.items()
        )

    def with_devices(self, devices: Iterable[torch.device]) -> "RandomState":
        """With the present state of the generators of further devices."""
        new = [d for d in devices if d.type == "cuda" and d not in self.cuda]
        return replace(self, cuda=self.cuda | RandomState.capture(new).cuda) if new else self

    def tensors(self) -> tuple[Tensor, ...]:
        """The states one after the other, as a snapshot keeps them."""
        return self.cpu, *self.cuda.values()

    def like(self, tensors: tuple[Tensor, ...]) -> "RandomState":
        """What `tensors` were taken from, on the same devices."""
        cpu, *gpus = tensors
        return RandomState(cpu, dict(zip(self.cuda, gpus, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The states by their devices, as a file keeps them."""
        return {"cpu": self.cpu, "cuda": {str(device): x for device, x in self.cuda.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "RandomState":
        """What `state_dict` gave."""
        cuda = {torch.device(name): x.cpu() for name, x in state["cuda"].items()}
        return cls(state["cpu"], cuda)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)


def default_device() -> torch.device:
    """Where tensors are made that say nothing of a device."""
    # `torch.get_default_device` does not see a device as a context in torch 2.6.
    return torch.empty(0).device


@dataclass(frozen=True)
class Surroundings:
    """Autocast and the default device.

    Attributes:
        casts: where autocast is on.
        device: of the tensors made without one.
    """

    casts: list[autodiff.Cast] = field(default_factory=autodiff.autocasts)
    device: torch.device = field(default_factory=default_device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, both are as they were."""
        # A device as a context sees every call of torch, which costs as much as a small kernel.
        same = default_device() == self.device
        with nullcontext() if same else self.device, autodiff.autocast_as(self.casts):
            yield


@contextmanager
def preserved(devices: Iterable[torch.device]) -> Iterator[RandomState]:
    """The generators leave the block as they entered it; yields where they stood."""
    state = RandomState.capture(devices)
    try:
        yield state
    finally:
        state.restore()
