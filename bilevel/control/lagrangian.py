r"""The Lagrangian of a control problem and its multipliers: equations (4) to (8).

.. math::
    L(U, \Theta; \Lambda) = J
        + \sum_{t=1}^{T} \mathrm{Re}\langle \lambda_t, u(t) - g(u(t-1), \theta_t) \rangle
        + \mathrm{Re}\langle \lambda_0, u(0) - g_0(f; \theta_0) \rangle    \qquad (4)

Every sign below follows from the plus signs in (4). Source: "Solve Bi-Level Optimization Model for
Meta-Learning Using Method of Lagrangian Multipliers" (2025), cited as "MLM preprint (7a)"; the
running cost, the control in l and the gradient in theta_0 generalise it.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.dynamics import (
    Dynamics,
    GradientSum,
    check_control,
    initial_control,
    step_control,
)
from bilevel.dynamics.problem import ControlProblem, RunningCost
from bilevel.errors import StructureError
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import preserved
from bilevel.sweeps.sweep import forward_sweep, planned
from bilevel.sweeps.trajectory import Block, Trajectory
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Adjoint:
    """Cost, gradients and multipliers of one swept point; everything detached.

    Attributes:
        cost: J, real scalar.
        gradient: grad_Theta J, the structure of the control, None for leaves without gradient.
        observation_gradient: grad_f J, likewise for the observation.
        final_state: u(T).
        states: u(0), ..., u(T) if asked for.
        multipliers: lambda_0, ..., lambda_T if asked for; lambda_t = -dJ/du(t).
        forward_steps: steps evaluated, the recomputed ones included.
    """

    cost: Tensor
    gradient: Tree
    observation_gradient: Tree
    final_state: Tree
    states: list[Tree] | None
    multipliers: list[Tree] | None
    forward_steps: int


def lagrangian(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    states: Sequence[Tree],
    multipliers: Sequence[Tree],
) -> Tensor:
    """L(U, Theta; Lambda) of equation (4), at any point; differentiable in every argument.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        states: u(0), ..., u(T), which need not satisfy the dynamics.
        multipliers: lambda_0, ..., lambda_T.

    Returns:
        Real scalar.

    Raises:
        StructureError: if there are not T + 1 states and multipliers, or the control does not fit.
    """
    check_point(problem, control, states, multipliers)
    value = terminal_cost(problem, states[-1], control)
    start = problem.dynamics.init(observation, initial_control(control))
    value = value + tree.inner(multipliers[0], tree.subtract(states[0], start))
    for t in range(1, problem.horizon + 1):
        theta = step_control(control, t)
        step = problem.dynamics.step(states[t - 1], theta, t)
        value = value + tree.inner(multipliers[t], tree.subtract(states[t], step))
        if problem.running is not None:
            value = value + problem.running(problem.dynamics.readout(states[t - 1]), theta, t)
    return value


def adjoint(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
    keep_states: bool = False,
    keep_multipliers: bool = False,
    stop: Callable[["Swept"], bool] | None = None,
) -> Adjoint:
    """Cost and gradient by the forward sweep (6), the multiplier sweep (7) and equation (8).

    Theorem 1: the gradient is that of J in Theta, as if autograd had stored the whole trajectory.

    Args:
        problem: dynamics, horizon and costs.
        observation: f; its integer and boolean leaves have no gradient.
        control: Theta, shared by all steps or a `PerStep`.
        checkpointing: what is kept of the trajectory, or a `Budget`; None is `Checkpointing()`.
        keep_states: return u(0), ..., u(T).
        keep_multipliers: return lambda_0, ..., lambda_T.
        stop: asked after each block of the multiplier sweep; True leaves out the earlier steps and
            g0, so that the gradient is a part of the whole, and the observation gradient is None.

    Returns:
        The cost, the gradients, and what was asked for.

    Raises:
        StructureError: if control, state or cost have the wrong structure, shape or dtype.
        LostGradientError: if nothing reads a part of the control, or a function closes over a
            tensor that requires grad.
        ArgumentError: if a step writes in place, or is not deterministic.

    Example:
        >>> import bilevel as bl
        >>> walk = bl.Map(lambda state, control, t: state + control)
        >>> problem = bl.ControlProblem(walk, lambda state, control: state**2 / 2, horizon=3)
        >>> found = bl.adjoint(
        ...     problem, torch.tensor(1.0), torch.tensor(2.0), keep_multipliers=True
        ... )
        >>> found.cost, found.gradient, found.multipliers[0]
        (tensor(24.5000), tensor(21.), tensor(-7.))
    """
    trajectory = forward_sweep(  # (6a), (6b)
        problem.dynamics,
        observation,
        control,
        problem.horizon,
        planned(checkpointing, problem, observation, control),
        tape_last=True,
    )
    gradient = GradientSum(trajectory.control)
    with closing(trajectory), preserved(trajectory.devices):
        cost, (state_gradient, control_gradient) = autodiff.value_and_gradient(
            lambda state, theta: terminal_cost(problem, state, theta),
            trajectory.final,
            control,
            name="the terminal cost",
        )
        gradient.add(trajectory.control, control_gradient)
        swept = multiplier_sweep(
            trajectory,
            tree.negative(state_gradient),  # (7a)
            gradient,
            problem.running,
            keep_states=keep_states,
            keep_multipliers=keep_multipliers,
            stop=stop,
        )
    return Adjoint(
        cost=cost + swept.running,
        gradient=gradient.total(),
        observation_gradient=swept.observation_gradient,
        final_state=trajectory.final,
        states=swept.states,
        multipliers=swept.multipliers,
        forward_steps=trajectory.forward_steps,
    )


@dataclass(frozen=True, eq=False)
class Swept:
    """Where a multiplier sweep has come to, after steps a+1, ..., b were reversed.

    Attributes:
        steps: `range(a, b)`.
        multiplier: lambda_a, None in it standing for zero.
        following: lambda_b, likewise.
        part: what the steps add to grad_Theta L, with the opposite sign: of the leaves of their
            controls, each once.
        gradient: of (8) gathered so far, None where nothing was.
    """

    steps: range
    multiplier: Tree
    following: Tree
    part: list[Tensor | None]
    gradient: Tree


@dataclass(frozen=True, eq=False)
class MultiplierSweep:
    """What the multiplier sweep found, apart from the gradient it gathered.

    Attributes:
        running: sum of the running costs, real scalar.
        observation_gradient: vector of the space of the observation.
        states: u(0), ..., u(T) or None.
        multipliers: lambda_0, ..., lambda_T or None.
    """

    running: Tensor | float
    observation_gradient: Tree
    states: list[Tree] | None
    multipliers: list[Tree] | None


def multiplier_sweep(
    trajectory: Trajectory,
    multiplier: Tree,
    gradient: GradientSum,
    running: RunningCost | None = None,
    *,
    keep_states: bool = False,
    keep_multipliers: bool = False,
    stop: Callable[[Swept], bool] | None = None,
) -> MultiplierSweep:
    """Equations (7b), (7c) and (8), from the last block of the trajectory to g0.

    Args:
        trajectory: of the forward sweep.
        multiplier: lambda_T; None in it stands for zero.
        gradient: gathers (8) over the steps and g0.
        running: r.
        keep_states: return the states.
        keep_multipliers: return the multipliers.
        stop: as in `adjoint`.

    Returns:
        Running cost, observation gradient, and what was asked for.
    """
    dynamics = trajectory.dynamics
    total: Tensor | float = 0.0
    states, multipliers = [trajectory.final], [tree.filled(multiplier, trajectory.final)]
    observation_gradient = None
    with autodiff.recording():
        for block in trajectory.taped_in_reverse():
            costs = block_costs(dynamics, running, block)
            known = (block.states[:-1], block.controls)
            autodiff.refuse_hidden(costs, known, "the running cost")
            inner_states = block.states[:-1] if keep_multipliers else block.states[:1]
            if keep_states:
                states += [tree.detach(state) for state in reversed(block.states[:-1])]
            earlier, control_part = autodiff.pull(
                (block.states[-1], costs),
                (multiplier, [-torch.ones_like(cost) for cost in costs]),
                (inner_states, parts := tree.distinct_leaves(block.controls)),
            )
            # (7b), (7c): lambda_{t-1} = (dg/du)^* lambda_t - grad_u r, for every t of the block
            following, multiplier = multiplier, earlier[0]
            if keep_multipliers:
                likes = reversed(list(zip(earlier, inner_states, strict=True)))
                multipliers += [tree.filled(found, state) for found, state in likes]
            # (8): grad_{theta_t} L = -(dg/dtheta)^* lambda_t + grad_theta r
            gradient.subtract(parts, control_part)
            total = sum((cost.detach() for cost in costs), total)
            stopped = stop is not None and stop(
                Swept(block.steps, multiplier, following, control_part, gradient.sums())
            )
            del block, known, costs, inner_states, earlier, control_part  # before the next tape
            del following
            if stopped:
                break
        else:
            # (8) at t = 0: grad_{theta_0} L = -(dg0/dtheta_0)^* lambda_0
            inputs = (trajectory.observation, trajectory.control)
            start = trajectory.taped_initial()
            observation_part, control_part = autodiff.pull(start, multiplier, inputs)
            gradient.subtract(trajectory.control, control_part)
            observation_gradient = tree.filled(tree.negative(observation_part), inputs[0])
    return MultiplierSweep(
        running=total,
        observation_gradient=observation_gradient,
        states=states[::-1] if keep_states else None,
        multipliers=multipliers[::-1] if keep_multipliers else None,
    )


def terminal_cost(problem: ControlProblem, state: Tree, control: Tree) -> Tensor:
    """l(u(T), Theta), checked to be a real scalar."""
    cost = problem.terminal(problem.dynamics.readout(state), control)
    return autodiff.check_scalar(cost, "the terminal cost")


def block_costs(dynamics: Dynamics, running: RunningCost | None, block: Block) -> list[Tensor]:
    """r(u(t-1), theta_t, t) for every step t of a block."""
    if running is None:
        return []
    times = range(block.steps.start + 1, block.steps.stop + 1)
    costs = [
        running(dynamics.readout(state), theta, t)
        for state, theta, t in zip(block.states[:-1], block.controls, times, strict=True)
    ]
    return [autodiff.check_scalar(cost, "the running cost") for cost in costs]


def check_point(
    problem: ControlProblem, control: Tree, states: Sequence[Tree], multipliers: Sequence[Tree]
) -> None:
    """Refuse a point that does not have T + 1 states and multipliers.

    Args:
        problem: whose horizon counts.
        control: Theta.
        states: u(0), ..., u(T).
        multipliers: lambda_0, ..., lambda_T.

    Raises:
        StructureError: naming what does not fit.
    """
    check_control(control, problem.horizon)
    needed = problem.horizon + 1
    for name, given in (("states", states), ("multipliers", multipliers)):
        if len(given) != needed:
            raise StructureError(
                f"{name} must have one entry for t = 0..T, {needed} in all, got {len(given)}."
            )
