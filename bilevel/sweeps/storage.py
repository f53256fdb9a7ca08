"""Where snapshots are kept, and the place where nothing is copied."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bilevel.tree import Tree


class Snapshots(ABC):
    """States put away under the number of their block; opened by a `Storage`, used by one sweep.

    Example:
        >>> import torch, bilevel as bl
        >>> snapshots = bl.InMemory().open()
        >>> snapshots.put(3, torch.tensor(1.0))
        >>> snapshots.get(3)
        tensor(1.)
        >>> snapshots.close()
    """

    @abstractmethod
    def put(self, block: int, state: Tree) -> None:
        """Put away the detached `state` at the start of `block`."""

    @abstractmethod
    def get(self, block: int) -> Tree:
        """The state at the start of `block`; it stays."""

    @abstractmethod
    def drop(self, block: int) -> None:
        """Forget the state at the start of `block`."""

    @abstractmethod
    def close(self) -> None:
        """Forget every state and leave nothing behind; may be called twice."""


class Storage(ABC):
    """Where snapshots wait.

    Example:
        A place of one's own, here one that counts:

        >>> import dataclasses, torch, bilevel as bl
        >>> class Counted(Storage):
        ...     opened = 0
        ...
        ...     def open(self):
        ...         self.opened += 1
        ...         return bl.InMemory().open()
        ...
        ...     def resident(self, snapshots):
        ...         return snapshots
        >>> storage = Counted()
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x * u), lambda x, control: x, horizon=3
        ... )
        >>> kept = bl.Checkpointing(storage=storage)
        >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
        >>> bl.adjoint(walk, one, two, checkpointing=kept).gradient, storage.opened
        (tensor(12.), 1)
    """

    @abstractmethod
    def open(self) -> Snapshots:
        """An empty place for the snapshots of one sweep."""

    @abstractmethod
    def resident(self, snapshots: int) -> int:
        """How many states, of so many snapshots, lie in the memory that a budget bounds."""

    def bounded(self, devices: Iterable[torch.device]) -> "Storage":  # noqa: ARG002
        """What a budget for states on some devices sees of this storage; by default itself."""
        return self


@dataclass(frozen=True)
class InMemory(Storage):
    """Snapshots stay where the states are; nothing is copied.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> kept = bl.Checkpointing(storage=bl.InMemory())
        >>> bl.adjoint(
        ...     walk, torch.tensor(1.0), torch.tensor(0.5), checkpointing=kept
        ... ).gradient
        tensor(10.)
    """

    def open(self) -> Snapshots:  # noqa: D102
        return MemorySnapshots()

    def resident(self, snapshots: int) -> int:  # noqa: D102
        return snapshots


IN_MEMORY = InMemory()  # the default wherever something is stored


class MemorySnapshots(Snapshots):
    """Snapshots in a dict."""

    def __init__(self, states: dict[int, Tree] | None = None) -> None:
        self.states = dict(states or {})

    def put(self, block: int, state: Tree) -> None:  # noqa: D102
        self.states[block] = state

    def get(self, block: int) -> Tree:  # noqa: D102
        return self.states[block]

    def drop(self, block: int) -> None:  # noqa: D102
        del self.states[block]

    def close(self) -> None:  # noqa: D102
        self.states.clear()
