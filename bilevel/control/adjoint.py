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
from bilevel.control.kept_sweep import KeptSweep, Reversal, kept_sweep
from bilevel.dynamics.per_step import GradientSum, PerStep
from bilevel.dynamics.problem import ControlProblem, precise
from bilevel.outer.keep import Keep
from bilevel.sweeps.block import Block, Costs, no_costs
from bilevel.sweeps.checkpointing import Budget, Checkpointing
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

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u * c), lambda u, c: u, horizon=3
        ... )
        >>> swept = bl.adjoint(problem, torch.tensor(1.0), torch.tensor(2.0))
        >>> swept.cost, swept.gradient, swept.observation_gradient  # c^3, 3 c^2, c^3
        (tensor(8.), tensor(12.), tensor(8.))
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

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u * c), lambda u, c: u, horizon=4
        ... )
        >>> seen = []
        >>> def stop(swept):
        ...     seen.append((swept.steps, float(swept.multiplier)))
        ...     return False  # go on
        >>> swept = bl.adjoint(
        ...     problem,
        ...     torch.tensor(1.0),
        ...     torch.tensor(2.0),
        ...     checkpointing=bl.Checkpointing(block=2),
        ...     stop=stop,
        ... )
        >>> seen  # lambda_2 = -c^2, lambda_0 = -c^4
        [(range(2, 4), -4.0), (range(0, 2), -16.0)]
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
    keep: Keep | None = None,
    resume: bool | int = False,
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
        keep: keeps the sweep in a folder while it goes on, forward and back, between its blocks;
            its `every` counts steps, those that are evaluated again too. A budget is planned with
            blocks of at most so many steps.
        resume: go on from the newest checkpoint of `keep`, or from that after a given number of
            steps; begin where its folder is empty. A sweep that had come to its end is not made
            again.

    Returns:
        The cost, the gradients, and what was asked for.

    Raises:
        StructureError: if control, state or cost have the wrong structure, shape or dtype.
        LostGradientError: if nothing reads a part of the control, or a function closes over a
            tensor that requires grad.
        ArgumentError: if a step writes in place, or is not deterministic; or the sweep cannot go on
            as it was kept, where what differs is listed.
        StorageError: if a checkpoint cannot be written or read.
        DivergenceError: if what would be kept is not finite.

    Example:
        >>> import bilevel as bl
        >>> walk = bl.Map(lambda state, control, t: state + control)
        >>> problem = bl.ControlProblem(
        ...     walk, lambda state, control: state**2 / 2, horizon=3
        ... )
        >>> found = bl.adjoint(
        ...     problem, torch.tensor(1.0), torch.tensor(2.0), keep_multipliers=True
        ... )
        >>> found.cost, found.gradient, found.multipliers[0]
        (tensor(24.5000), tensor(21.), tensor(-7.))
    """
    autodiff.refuse_inside("adjoint", observation, control)
    settings = {"states": keep_states, "multipliers": keep_multipliers, "stop": stop}
    given = observation, control
    with kept_sweep(keep, resume, problem, given, checkpointing, settings) as kept:
        trajectory = Trajectory(
            *(problem.dynamics, observation, control, problem.horizon),
            *(kept.planned(checkpointing), costs_of(problem), kept.watched),
            running=problem.running,
        )
        with closing(trajectory):
            gradient = GradientSum(trajectory.control)
            reversal = kept.begin(trajectory, gradient)
            if reversal is None:
                trajectory.forward(tape_last=True)  # (6a), (6b)
                reversal = _end(problem, trajectory, control, gradient)
                kept.reverse(reversal)
            swept = multiplier_sweep(
                trajectory,
                reversal,
                gradient,
                keep_states=keep_states,
                keep_multipliers=keep_multipliers,
                stop=stop,
                kept=kept,
            )
    return Adjoint(
        cost=reversal.cost + swept.running,
        # Of a control per step, the steps that were left out have no part in it.
        gradient=gradient.total(zeros=swept.stopped and isinstance(control, PerStep)),
        observation_gradient=swept.observation_gradient,
        final_state=tree.copied(trajectory.final, only=control),
        states=tree.copied(swept.states, only=control),
        multipliers=swept.multipliers,
        forward_steps=trajectory.forward_steps,
    )


def _end(
    problem: ControlProblem, trajectory: Trajectory, control: Tree, gradient: GradientSum
) -> Reversal:
    """The terminal cost, and lambda_T of (7a); its part of (8) is gathered."""
    # In its place: what it draws comes after what the steps drew, and is not drawn again.
    cost, (state_gradient, control_gradient) = autodiff.value_and_gradient(
        problem.final_cost, trajectory.final, control, name="the terminal cost"
    )
    gradient.add(trajectory.control, control_gradient)
    return Reversal(tree.negative(state_gradient), cost)


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
    reversal: Reversal,
    gradient: GradientSum,
    *,
    keep_states: bool = False,
    keep_multipliers: bool = False,
    stop: Callable[[Swept], bool] | None = None,
    kept: KeptSweep | None = None,
) -> MultiplierSweep:
    """Equations (7b), (7c) and (8), from the last block of the trajectory to g0.

    Args:
        trajectory: swept forward.
        reversal: begins with lambda_T, and goes along.
        gradient: gathers (8) over the steps and g0.
        keep_states: return the states.
        keep_multipliers: return the multipliers.
        stop: as in `adjoint`.
        kept: is told of blocks, where the sweep is kept.

    Returns:
        Running cost, observation gradient, and what was asked for.
    """
    carried = reversal  # states and multipliers last step first, turned round at the end
    if keep_states and not carried.states:
        carried.states = [trajectory.final]
    if keep_multipliers and not carried.multipliers:
        carried.multipliers = [tree.filled(carried.multiplier, trajectory.final)]
    with autodiff.recording(), trajectory.replaying():
        if kept is not None:
            kept.replay()
        steps = trajectory.last
        while True:
            # A sweep that goes on asks again: it might have been told to stop.
            stopped = (
                stop is not None
                and bool(steps)
                and stop(Swept(steps, carried.multiplier, gradient.sums()))
            )
            if stopped or not steps.start:
                break
            # The block is an argument and nothing else, so that its graph ends with the call.
            found = _reverse(
                trajectory.tape_previous(),
                carried.multiplier,
                gradient,
                keep_states=keep_states,
                keep_multipliers=keep_multipliers,
            )
            carried.multiplier, steps = found.multiplier, found.steps
            carried.running = sum(map(precise, found.costs), carried.running)
            carried.states += found.states
            carried.multipliers += found.multipliers
            if kept is not None:
                kept.after()
        if kept is not None:
            kept.end()
        observation_gradient = None
        if not stopped:
            observation_gradient = _reverse_initial(trajectory, carried.multiplier, gradient)
    return MultiplierSweep(
        carried.running,
        observation_gradient,
        carried.states[::-1] if keep_states else None,
        carried.multipliers[::-1] if keep_multipliers else None,
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
