r"""The Method of Lagrangian Multipliers: equations (6), (7) and (8).

The forward sweep (6) is `bilevel.sweeps.trajectory`; the multiplier sweep is here:

.. math::
    \lambda_T &= -\nabla_u\, l(u(T), \Theta) \qquad (7a) \\
    \lambda_{t-1} &= \Big(\frac{\partial g}{\partial u}(u(t-1), \theta_t)\Big)^* \lambda_t
        - \nabla_u\, r(u(t-1), \theta_t, t) \qquad (7b, 7c) \\
    \nabla_{\theta_t} L &= -\Big(\frac{\partial g}{\partial\theta}\Big)^* \lambda_t
        + \nabla_\theta\, r + \nabla_{\theta_t} l \qquad (8)
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.per_step import GradientSum, PerStep
from bilevel.dynamics.problem import ControlProblem, precise
from bilevel.sweeps.block import Block, Costs, no_costs
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.memory import planned
from bilevel.sweeps.trajectory import Trajectory
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Adjoint:
    """Cost, gradients and multipliers of one swept point; everything detached.

    Attributes:
        cost: J, real scalar.
        gradient: grad_Theta J, the structure of the control, None for leaves without gradient.
        observation_gradient: grad_f J, the structure of the observation.
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


@dataclass(frozen=True, eq=False)
class Swept:
    """Where a multiplier sweep has come to, after steps a+1, ..., b were reversed.

    Attributes:
        steps: `range(a, b)`.
        multiplier: lambda_a, None in it standing for zero.
        gradient: of (8) gathered so far, None where nothing was.
    """

    steps: range
    multiplier: Tree
    gradient: Tree


def adjoint(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
    keep_states: bool = False,
    keep_multipliers: bool = False,
    stop: Callable[[Swept], bool] | None = None,
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
    autodiff.refuse_inside("adjoint", observation, control)
    chosen = planned(checkpointing, problem, observation, control)
    trajectory = Trajectory(
        problem.dynamics, observation, control, problem.horizon, chosen, costs_of(problem)
    )
    trajectory.forward(tape_last=True)  # (6a), (6b)
    with closing(trajectory):
        gradient, ended = GradientSum(trajectory.control), list[Tree]()
        cost = _end(problem, trajectory, control, gradient, ended)
        swept = multiplier_sweep(
            trajectory,
            ended.pop(),  # which no name here holds, so that it ends where it is pulled back
            gradient,
            keep_states=keep_states,
            keep_multipliers=keep_multipliers,
            stop=stop,
        )
    return Adjoint(
        cost=cost + swept.running,
        # Of a control per step, the steps that were left out have no part in it.
        gradient=gradient.total(zeros=swept.stopped and isinstance(control, PerStep)),
        observation_gradient=swept.observation_gradient,
        final_state=tree.copied(trajectory.final, only=control),
        states=tree.copied(swept.states, only=control),
        multipliers=swept.multipliers,
        forward_steps=trajectory.forward_steps,
    )


def _end(
    problem: ControlProblem,
    trajectory: Trajectory,
    control: Tree,
    gradient: GradientSum,
    ended: list[Tree],
) -> Tensor:
    """The terminal cost; its part of (8) is gathered, and lambda_T of (7a) put into `ended`."""
    # In its place: what it draws comes after what the steps drew, and is not drawn again.
    cost, (state_gradient, control_gradient) = autodiff.value_and_gradient(
        problem.final_cost, trajectory.final, control, name="the terminal cost"
    )
    gradient.add(trajectory.control, control_gradient)
    ended.append(tree.negative(state_gradient))
    return cost


@dataclass(frozen=True, eq=False)
class MultiplierSweep:
    """What the multiplier sweep found, apart from the gradient it gathered.

    Attributes:
        running: sum of the running costs, real scalar.
        observation_gradient: vector of the space of the observation; None if it was stopped.
        states: u(0), ..., u(T) or None.
        multipliers: lambda_0, ..., lambda_T or None.
        stopped: whether `stop` left out earlier steps.
    """

    running: Tensor | float
    observation_gradient: Tree
    states: list[Tree] | None
    multipliers: list[Tree] | None
    stopped: bool


def multiplier_sweep(
    trajectory: Trajectory,
    multiplier: Tree,
    gradient: GradientSum,
    *,
    keep_states: bool = False,
    keep_multipliers: bool = False,
    stop: Callable[[Swept], bool] | None = None,
) -> MultiplierSweep:
    """Equations (7b), (7c) and (8), from the last block of the trajectory to g0.

    Args:
        trajectory: swept forward.
        multiplier: lambda_T; None in it stands for zero.
        gradient: gathers (8) over the steps and g0.
        keep_states: return the states.
        keep_multipliers: return the multipliers.
        stop: as in `adjoint`.

    Returns:
        Running cost, observation gradient, and what was asked for.
    """
    # Gathered last step first, turned round at the end.
    running: Tensor | float = 0.0
    states = [trajectory.final]
    multipliers = [tree.filled(multiplier, trajectory.final)] if keep_multipliers else []
    observation_gradient, stopped = None, False
    with autodiff.recording(), trajectory.replaying():
        for _ in range(trajectory.n_blocks):
            # The block is an argument and nothing else, so that its graph ends with the call.
            found = _reverse(
                trajectory.tape_previous(),
                multiplier,
                gradient,
                keep_states=keep_states,
                keep_multipliers=keep_multipliers,
            )
            multiplier = found.multiplier
            running = sum(map(precise, found.costs), running)
            states += found.states
            multipliers += found.multipliers
            stopped = stop is not None and stop(Swept(found.steps, multiplier, gradient.sums()))
            if stopped:
                break
        if not stopped:
            observation_gradient = _reverse_initial(trajectory, multiplier, gradient)
    return MultiplierSweep(
        running,
        observation_gradient,
        states[::-1] if keep_states else None,
        multipliers[::-1] if keep_multipliers else None,
        stopped,
    )


def costs_of(problem: ControlProblem) -> Costs:
    """The running costs of a problem, as a trajectory evaluates them."""
    return no_costs if problem.running is None else problem.step_costs


@dataclass(frozen=True, eq=False)
class _Reversed:
    """What the reversal of steps a+1, ..., b leaves; nothing of it holds a graph.

    Attributes:
        steps: `range(a, b)`.
        multiplier: lambda_a, None in it standing for zero.
        costs: r of each step.
        states: u(b-1), ..., u(a) if asked for.
        multipliers: lambda_{b-1}, ..., lambda_a if asked for.
    """

    steps: range
    multiplier: Tree
    costs: list[Tensor]
    states: list[Tree]
    multipliers: list[Tree]


def _reverse(
    block: Block,
    multiplier: Tree,
    gradient: GradientSum,
    *,
    keep_states: bool,
    keep_multipliers: bool,
) -> _Reversed:
    """Equations (7b), (7c) and (8) of the steps of one block, from lambda_b to lambda_a."""
    before = block.states[:-1]  # u(a), ..., u(b-1)
    costs = block.costs
    autodiff.refuse_hidden(costs, (before, block.controls), "the running cost")
    # One pull of lambda_b through the connected graph of the block passes every u(t) on its way.
    # With the cotangent -1 of each r, what arrives at a state is its multiplier:
    #   at u(t-1)    (dg/du)^* lambda_t - grad_u r         = lambda_{t-1}           (7b), (7c)
    #   at theta_t   (dg/dtheta)^* lambda_t - grad_theta r = -(8), but for grad l
    wanted = before if keep_multipliers else before[:1]
    thetas = tree.distinct_leaves(block.controls)
    arrived, minus_gradient = autodiff.pull(
        (block.states[-1], costs),
        (multiplier, [-torch.ones_like(cost) for cost in costs]),
        (wanted, thetas),
    )
    gradient.subtract(thetas, minus_gradient)
    return _Reversed(
        block.steps,
        arrived[0],
        [cost.detach() for cost in costs],
        [tree.detach(u) for u in reversed(before)] if keep_states else [],
        [tree.filled(arrived[i], u) for i, u in reversed([*enumerate(before)])]
        if keep_multipliers
        else [],
    )


def _reverse_initial(trajectory: Trajectory, multiplier: Tree, gradient: GradientSum) -> Tree:
    """Equation (8) at t = 0, and the gradient in the observation, -(dg0/df)^* lambda_0."""
    inputs = trajectory.observation, trajectory.control
    start = trajectory.tape_initial()
    # grad_{theta_0} L = -(dg0/dtheta_0)^* lambda_0, but for grad l
    observation_part, control_part = autodiff.pull(start, multiplier, inputs)
    gradient.subtract(trajectory.control, control_part)
    return tree.filled(tree.negative(observation_part), trajectory.observation)
