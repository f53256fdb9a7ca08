"""Dynamics whose step is compiled by `torch.compile`."""

import warnings
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_kind
from bilevel.dynamics.dynamics import Dynamics, Map
from bilevel.dynamics.steps import Step
from bilevel.errors import CompileWarning, UnsupportedError
from bilevel.tree import Tree


@final
@dataclass(frozen=True, eq=False)
class Compiled(Dynamics):
    """The same dynamics, its step compiled; results agree to rounding, random numbers exactly.

    It pays where a step is a chain of pointwise operations, on few numbers or many, because the
    chain becomes one kernel: `adjoint` took 0.3 to 0.6 of the time in `benchmarks/compiled.py`. A
    matrix product gains nothing; a step that is little else took 1.2 of the time. The first sweep
    waits for the compiler, up to a minute.

    Second derivatives (`hvp`, `NewtonCG`, a gradient of a gradient of `rollout`) use the plain
    step, because torch differentiates a compiled function once; with `Checkpointing(block=None)`
    such a gradient is torch's error. A `Budget` is measured on the plain step. Where a step cannot
    be compiled as a whole (no C++ compiler, complex tensors, code that torch cannot trace or would
    compile again for each t) the plain step takes over, with a `CompileWarning`.

    Attributes:
        dynamics: what is compiled.

    Raises:
        ArgumentError: if it is no dynamics.

    Example:
        >>> import bilevel as bl
        >>> step = bl.Map(lambda x, u, t: x + u)
        >>> problem = bl.ControlProblem(
        ...     bl.Compiled(step), lambda x, control: x**2, horizon=2
        ... )
    """

    dynamics: Dynamics
    _chosen: dict[str, Step] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        wanted = "a Dynamics (wrap a plain function g(state, control, t) with bilevel.Map)"
        check_kind(self.dynamics, Dynamics, "dynamics", wanted)
        object.__setattr__(self, "dynamics", plain(self.dynamics))

    def __reduce__(self) -> tuple[Any, ...]:
        """What was compiled is compiled anew where it is unpickled."""
        return Compiled, (self.dynamics,)

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: D102
        return self.dynamics.init(observation, control)

    def readout(self, state: Tree) -> Tree:  # noqa: D102
        return self.dynamics.readout(state)

    @property
    def origin(self) -> object:  # noqa: D102
        return self.dynamics.origin

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        step = self._chosen.get("step")
        if step is not None and step == self.dynamics.step:
            return step(state, control, t)
        try:
            if step is None:
                step = self._chosen["step"] = self._compiled(state, control)
            return step(state, control, t)
        except Exception as error:
            found = self.dynamics.step(state, control, t)  # raises what is the step's own fault
            self._fall_back(_reason(error))
            return found

    def _compiled(self, state: Tree, control: Tree) -> Step:
        if any(isinstance(x, Tensor) and x.is_complex() for x in tree.leaves_of((state, control))):
            raise UnsupportedError("torch makes no kernels for complex tensors")
        # Torch allows a function so many compilations, and every Map has the same `step`.
        step = self.dynamics.g if isinstance(self.dynamics, Map) else self.dynamics.step
        return torch.compile(step, fullgraph=True, options={"fallback_random": True})

    def _fall_back(self, reason: str) -> None:
        self._chosen["step"] = self.dynamics.step
        warnings.warn(
            f"the step could not be compiled and runs as it is ({reason}); leave out compilation "
            "to silence this.",
            CompileWarning,
            stacklevel=3,
        )


def plain(dynamics: Dynamics) -> Dynamics:
    """What `dynamics` was compiled from, or itself."""
    return dynamics.dynamics if isinstance(dynamics, Compiled) else dynamics


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name == "FailOnRecompileLimitHit":
        return "torch would compile it again and again, as where t picks an item of a list"
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith("raised:")), name)
