"""Dynamics whose step is compiled by `torch.compile`."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch

from bilevel.dynamics import Dynamics
from bilevel.errors import ArgumentError, CompileWarning
from bilevel.tree import Tree


@final
@dataclass(frozen=True, eq=False)
class Compiled(Dynamics):
    """The same dynamics, its step compiled.

    It pays where a step is many small operations on tensors too large for the overhead to count
    and too small for one operation to fill the machine: pointwise chains are fused, which saves
    memory traffic and, in a taped step, kept intermediates. The first steps wait for the compiler,
    seconds to a minute; matrix products and convolutions gain nothing. Results agree to rounding.
    Second derivatives (`hvp`, `NewtonCG`, inner objectives that a step differentiates) use the
    plain step, since torch differentiates a compiled function once.

    Where compilation is not possible (no C++ compiler, code that torch cannot trace) the plain step
    is used, with a `CompileWarning`.

    Attributes:
        dynamics: what is compiled.

    Raises:
        ArgumentError: if it is no dynamics.
    """

    dynamics: Dynamics
    _chosen: dict[str, Callable[[Tree, Tree, int], Tree]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the field."""
        if not isinstance(self.dynamics, Dynamics):
            raise ArgumentError(
                f"Compiled takes a Dynamics, got {type(self.dynamics).__name__}; wrap a function "
                "with Map first."
            )

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: D102
        return self.dynamics.init(observation, control)

    def readout(self, state: Tree) -> Tree:  # noqa: D102
        return self.dynamics.readout(state)

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        step = self._chosen.get("step")
        if step is None:
            step = self._chosen["step"] = torch.compile(self.dynamics.step)
        if step == self.dynamics.step:
            return step(state, control, t)
        try:
            return step(state, control, t)
        except Exception as error:
            found = self.dynamics.step(state, control, t)  # raises what is the step's own fault
            self._fall_back(error)
            return found

    def _fall_back(self, error: Any) -> None:
        self._chosen["step"] = self.dynamics.step
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"the step could not be compiled and runs as it is ({reason[0]}); leave out "
            "compilation to silence this, or install a C++ compiler.",
            CompileWarning,
            stacklevel=3,
        )


def plain(dynamics: Dynamics) -> Dynamics:
    """What `dynamics` was compiled from, or itself."""
    return dynamics.dynamics if isinstance(dynamics, Compiled) else dynamics
