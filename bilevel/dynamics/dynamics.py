"""The dynamics u(t) = g(u(t-1), theta_t), u(0) = g0(f; theta_0): equation (1)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from bilevel.checks import check_arguments
from bilevel.tree import Tree


class Dynamics(ABC):
    """One inner iteration as a map of states; equation (1).

    What is constant for a sample (k-space, mask, target) is a field of the subclass; the state
    holds only what evolves. `step` is a function of its arguments alone: the sweeps evaluate it
    again, under the same state of the default random generators.

    Example:
        >>> import torch, bilevel as bl
        >>> class Pull(bl.Dynamics):
        ...     def step(self, state, control, t):
        ...         return state - control * state
        >>> bl.rollout(Pull(), torch.tensor(8.0), torch.tensor(0.5), horizon=3)
        tensor(1.)
    """

    @abstractmethod
    def step(self, state: Tree, control: Tree, t: int) -> Tree:
        """u(t) = g(u(t-1), theta_t), t = 1..T; the structure and shapes of `state`."""

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: ARG002
        """u(0) = g0(f; theta_0); by default the observation itself."""
        return observation

    def readout(self, state: Tree) -> Tree:
        """The part of the state that costs see; by default all of it."""
        return state

    @property
    def origin(self) -> object:
        """What its steps come from, and is still there where the dynamics is made anew."""
        return self


@dataclass(frozen=True)
class Map(Dynamics):
    """Dynamics from a plain function.

    Attributes:
        g: `g(state, control, t) -> state`.

    Raises:
        ArgumentError: if it does not take these arguments.

    Example:
        >>> Map(lambda state, control, t: state + control).step(1.0, 2.0, 1)
        3.0
    """

    g: Callable[[Tree, Tree, int], Tree]

    def __post_init__(self) -> None:
        check_arguments(self.g, "g", "state", "control", "t")

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        return self.g(state, control, t)

    @property
    def origin(self) -> object:  # noqa: D102
        return self.g
