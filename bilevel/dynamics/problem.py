"""The control problem (1): a dynamics, a horizon, a terminal cost and a running cost."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bilevel.checks import is_whole
from bilevel.dynamics.compiled import Compiled
from bilevel.dynamics.dynamics import Dynamics
from bilevel.errors import ArgumentError
from bilevel.tree import Tree

TerminalCost = Callable[[Tree, Tree], Tensor]  # (readout(u(T)), control) -> real scalar
RunningCost = Callable[[Tree, Tree, int], Tensor]  # (readout(u(t-1)), theta_t, t) -> real scalar


@dataclass(frozen=True)
class ControlProblem:
    r"""Minimise :math:`J = l(u(T), \Theta) + \sum_{t=1}^{T} r(u(t-1), \theta_t, t)` over Theta.

    Attributes:
        dynamics: g and g0.
        terminal: l, a real scalar of the final state and the whole control.
        horizon: number of steps, T >= 0.
        running: r, a real scalar of u(t-1), of what `step` receives at t, and of t = 1..T.
        compile: compile the step; the dynamics is then a `Compiled`, unless it is one already.

    Raises:
        ArgumentError: if the horizon is not an integer >= 0.

    Example:
        >>> import torch
        >>> from bilevel.dynamics.dynamics import Map
        >>> walk = Map(lambda state, control, t: state + control)
        >>> ControlProblem(walk, lambda state, control: state**2, horizon=3).horizon
        3
    """

    dynamics: Dynamics
    terminal: TerminalCost
    horizon: int
    running: RunningCost | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if not is_whole(self.horizon):
            raise ArgumentError(f"horizon must be an integer >= 0, got {self.horizon!r}.")
        if not isinstance(self.dynamics, Dynamics):
            raise ArgumentError(
                f"dynamics must be a bilevel.Dynamics, got {type(self.dynamics).__name__}; "
                "wrap a plain function g(state, control, t) with bilevel.Map."
            )
        if self.compile and not isinstance(self.dynamics, Compiled):
            object.__setattr__(self, "dynamics", Compiled(self.dynamics))
