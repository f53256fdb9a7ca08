"""The control problem (1): a dynamics, a horizon, a terminal cost and a running cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.checks import check_arguments, check_kind, check_scalar, check_whole
from bilevel.dynamics.closures import refuse_wrapped_in
from bilevel.dynamics.dynamics import Dynamics
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

    Raises:
        ArgumentError: if the horizon is no whole number, or the dynamics none.
        UnsupportedError: if one of them uses a module that is wrapped to train over several
            processes.

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

    def __post_init__(self) -> None:
        check_whole(self.horizon, "horizon")
        wanted = "a Dynamics (wrap a plain function g(state, control, t) with bilevel.Map)"
        check_kind(self.dynamics, Dynamics, "dynamics", wanted)
        check_arguments(self.terminal, "terminal", "state", "control")
        if self.running is not None:
            check_arguments(self.running, "running", "state", "control", "t")
        refuse_wrapped_in(self.dynamics, self.terminal, self.running)

    def final_cost(self, state: Tree, control: Tree) -> Tensor:
        """l(u(T), Theta), checked to be a real scalar."""
        return check_scalar(
            self.terminal(self.dynamics.readout(state), control), "the terminal cost"
        )

    def step_costs(self, state: Tree, theta: Tree, t: int) -> list[Tensor]:
        """r(u(t-1), theta_t, t), checked to be a real scalar; nothing where there is no r."""
        if self.running is None:
            return []
        cost = self.running(self.dynamics.readout(state), theta, t)
        return [check_scalar(cost, f"the running cost at t = {t}")]


def precise(cost: Tensor) -> Tensor:
    """A cost as a term of a sum, which the digits of a short dtype would not hold."""
    return cost.to(torch.promote_types(cost.dtype, torch.float32))
