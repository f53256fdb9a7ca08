"""Several terminal costs of one trajectory: one forward sweep, one multiplier sweep for all."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.adjoint import Adjoint, costs_of
from bilevel.dynamics.per_step import GradientSum
from bilevel.dynamics.problem import ControlProblem, TerminalCost, precise
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.memory import planned
from bilevel.sweeps.trajectory import Trajectory
from bilevel.tree import Tree


def adjoints(
    problem: ControlProblem,
    terminals: Sequence[TerminalCost],
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
) -> tuple[Adjoint, ...]:
    """Cost and gradient of each of several terminal costs, the trajectory swept once.

    Each block is taped once and pulled back with the multipliers of all of them together; those are
    held at once, so that memory grows by one state and one gradient a cost.

    Args:
        problem: dynamics, horizon and running cost; its own terminal cost is not looked at.
        terminals: l_1, ..., l_M.
        observation: f.
        control: Theta, shared by all steps or a `PerStep`.
        checkpointing: as in `adjoint`.

    Returns:
        One record a terminal cost, as `adjoint` gives it; gradients are None where nothing reads
        the leaf.

    Example:
        >>> import bilevel as bl
        >>> walk = bl.Map(lambda state, control, t: state + control)
        >>> problem = bl.ControlProblem(walk, lambda state, control: state, horizon=3)
        >>> costs = [lambda state, control: state**2 / 2, lambda state, control: -state]
        >>> each = adjoints(problem, costs, torch.tensor(1.0), torch.tensor(2.0))
        >>> [float(found.gradient) for found in each]
        [21.0, -3.0]
    """
    autodiff.refuse_inside("adjoints", observation, control)
    chosen = planned(checkpointing, problem, observation, control)
    given = problem.dynamics, observation, control, problem.horizon, chosen
    trajectory = Trajectory(*given, costs_of(problem), running=problem.running)
    trajectory.forward(tape_last=True)
    with closing(trajectory):
        final = trajectory.final
        ends = [
            autodiff.value_and_gradient(
                _final(problem, cost), final, control, name="the outer cost"
            )
            for cost in terminals
        ]
        slopes = [tree.filled(in_state, final) for _, (in_state, _) in ends]
        gradient = GradientSum(trajectory.control)
        multiplier = tree.map_leaves(lambda *x: None if x[0] is None else -torch.stack(x), *slopes)
        running, initial = _sweep(trajectory, multiplier, gradient, len(ends))
    swept = gradient.sums()
    return tuple(
        Adjoint(
            cost=cost + running,
            gradient=_sum(in_control, _row(swept, m)),
            observation_gradient=tree.filled(_row(initial, m), trajectory.observation),
            final_state=tree.copied(final, only=control),
            states=None,
            multipliers=None,
            forward_steps=trajectory.forward_steps,
        )
        for m, (cost, (_, in_control)) in enumerate(ends)
    )


def _final(problem: ControlProblem, terminal: TerminalCost) -> Any:
    return lambda state, control: terminal(problem.dynamics.readout(state), control)


def _sweep(
    trajectory: Trajectory, multiplier: Tree, gradient: GradientSum, n: int
) -> tuple[Tensor | float, Tree]:
    """Equations (7b), (7c) and (8) with stacked multipliers; the gradient in the observation."""
    running: Tensor | float = 0.0
    with autodiff.recording(), trajectory.replaying():
        for _ in range(trajectory.n_blocks):
            block = trajectory.tape_previous()
            autodiff.refuse_hidden(
                block.costs, (block.states[:-1], block.controls), "the running cost"
            )
            thetas = tree.distinct_leaves(block.controls)
            multiplier, minus_gradient = autodiff.pull_each(
                (block.states[-1], block.costs),
                (multiplier, [-torch.ones(n, dtype=c.dtype, device=c.device) for c in block.costs]),
                (block.states[0], thetas),
            )
            gradient.subtract(thetas, minus_gradient)
            running = sum((precise(cost.detach()) for cost in block.costs), running)
            del block  # the graph of one lives at a time
        start = trajectory.tape_initial()
        inputs = trajectory.observation, trajectory.control
        observation_part, control_part = autodiff.pull_each(start, multiplier, inputs)
        gradient.subtract(trajectory.control, control_part)
    return running, tree.negative(observation_part)


def _row(stacked: Tree, m: int) -> Tree:
    return tree.map_leaves(lambda x: None if x is None else x[m], stacked)


def _sum(a: Tree, b: Tree) -> Tree:
    """The sum, where None is zero."""
    return tree.map_leaves(lambda x, y: y if x is None else x if y is None else x + y, a, b)
