r"""Second derivatives: the tangent system of a control problem, and what one sweep of it gives.

Along a direction d of the control (and e of the observation) states move by

.. math::
    v(0) = g_0'(f; \theta_0)[e, d_0], \qquad v(t) = g'(u(t-1), \theta_t)[v(t-1), d_t].

That is a dynamics of the pair (u, v), swept forward with any checkpointing. Walking backwards, the
multipliers and the gradient (8) are found together with their derivatives along the direction.
"""

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import cast

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.lagrangian import block_costs
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.dynamics import Dynamics, GradientSum, PerStep, check_control
from bilevel.dynamics.problem import ControlProblem, RunningCost
from bilevel.errors import StructureError
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import preserved
from bilevel.sweeps.sweep import forward_sweep, planned
from bilevel.sweeps.trajectory import Block, Trajectory
from bilevel.tree import Tree


@dataclass(frozen=True)
class Tangent(Dynamics):
    """The dynamics of (u, v). Observation, control and state are pairs of a point and a direction.

    Attributes:
        dynamics: g and g0.
        shared: whether the control has a part per step and one that every step shares.
        retaping: whether the forward sweep is done; a taped step then gives u alone, with v as it
            came, because only v at the start of a block is needed.
    """

    dynamics: Dynamics
    shared: bool
    retaping: bool = False

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: D102
        (f, e), (theta, d) = observation, control
        return autodiff.pushforward(self.dynamics.init, (f, theta), (e, d))

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        theta, d = self.apart(control)
        u, v = state
        if self.retaping and autodiff.is_taped((u, theta)):
            return self.dynamics.step(u, theta, t), v
        return autodiff.pushforward(
            lambda u, theta: self.dynamics.step(u, theta, t), (u, theta), (v, d)
        )

    def apart(self, received: Tree) -> tuple[Tree, Tree]:
        """theta_t and d_t, of what a step receives."""
        if not self.shared:
            return received
        (own, d_own), (common, d_common) = received
        return (own, common), (d_own, d_common)


def tangent_of(dynamics: Dynamics, control: Tree) -> Tangent:
    """The tangent system for controls like `control`; of a compiled dynamics, the plain one's."""
    dynamics = plain(dynamics)  # torch differentiates a compiled function once
    return Tangent(dynamics, isinstance(control, PerStep) and control.shared is not None)


def paired(control: Tree, direction: Tree) -> Tree:
    """The control of the tangent system."""
    if not isinstance(control, PerStep):
        return control, direction
    return PerStep(
        list(zip(control.steps, direction.steps, strict=True)),
        (control.initial, direction.initial),
        None if control.shared is None else (control.shared, direction.shared),
    )


def unpaired(pairs: Tree) -> tuple[Tree, Tree]:
    """What `paired` put together."""
    if not isinstance(pairs, PerStep):
        return pairs
    first, second = (
        PerStep(
            [pair[i] for pair in pairs.steps],
            pairs.initial[i],
            None if pairs.shared is None else pairs.shared[i],
        )
        for i in (0, 1)
    )
    return first, second


@dataclass(frozen=True, eq=False)
class HessianProduct:
    """What one sweep of the tangent system finds; everything detached.

    Attributes:
        product: the Hessian of J in Theta, times the direction; None for leaves without gradient.
        gradient: grad_Theta J, likewise.
        cost: J, real scalar.
    """

    product: Tree
    gradient: Tree
    cost: Tensor


def hvp(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    direction: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
) -> HessianProduct:
    """Hessian-vector product and gradient of J in the control, from one sweep.

    The Hessian is that of J as a function on a real vector space with Re<., .>; for complex
    controls it is only real-linear.

    Args:
        problem: dynamics, horizon and costs; they must be differentiable twice.
        observation: f.
        control: Theta.
        direction: a vector of the space of the control; None stands for zero.
        checkpointing: as in `adjoint`; a state of the tangent system is twice as large.

    Returns:
        The product, the gradient and the cost.

    Raises:
        StructureError: if control, direction, state or cost have the wrong structure or shape.
        LostGradientError: if nothing reads a part of the control, or a function closes over a
            tensor that requires grad.

    Example:
        >>> import torch, bilevel as bl
        >>> power = bl.Map(lambda state, control, t: state * control)
        >>> problem = bl.ControlProblem(power, lambda state, control: state, horizon=3)
        >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
        >>> found = bl.hvp(problem, one, two, one)
        >>> found.product, found.gradient, found.cost  # 6 c, 3 c^2, c^3
        (tensor(12.), tensor(12.), tensor(8.))
    """
    check_control(control, problem.horizon)
    start = observation, tree.zeros_like(observation)
    pair = paired(*tree.detach((control, _checked(direction, control))))
    tangent = tangent_of(problem.dynamics, control)
    trajectory = forward_sweep(
        tangent,
        start,
        pair,
        problem.horizon,
        tangent_plan(checkpointing, tangent, problem, start, pair),
        tape_last=True,
    )
    theta, d = unpaired(trajectory.control)
    gradient, product = GradientSum(theta), GradientSum(theta)
    with closing(trajectory), preserved(trajectory.devices), autodiff.recording():
        final, moved = trajectory.final
        final = autodiff.variables(final)
        cost = autodiff.check_scalar(
            problem.terminal(problem.dynamics.readout(final), theta), "the terminal cost"
        )
        autodiff.refuse_hidden(cost, (final, theta), "the terminal cost")
        first, second = _twice(
            cost, torch.ones_like(cost), None, (final, theta), (moved, tree.detach(d))
        )
        gradient.add(theta, first[1])
        product.add(theta, second[1])
        multipliers = tree.negative((first[0], second[0]))
        found = tangent_sweep(trajectory, multipliers, gradient, product, problem.running)
    along = tree.filled(product.sums(), control)
    return HessianProduct(along, gradient.total(), cost.detach() + found.running)


@dataclass(frozen=True, eq=False)
class TangentSweep:
    """What `tangent_sweep` found, apart from what it gathered.

    Attributes:
        running: sum of the running costs, real scalar.
        observation_product: second derivative in the observation, along the direction.
    """

    running: Tensor | float
    observation_product: Tree


def tangent_sweep(
    trajectory: Trajectory,
    multipliers: tuple[Tree, Tree],
    gradient: GradientSum,
    product: GradientSum,
    running: RunningCost | None = None,
) -> TangentSweep:
    """Equations (7) and (8), and their derivatives along the direction, in one walk backwards.

    A block is the pullback p(u, theta; lambda) of its multiplier. Its derivative along
    (v, d; mu) is the gradient of Re<p, (v, d)> in (u, theta), because second derivatives are
    symmetric, and p(u, theta; mu): no derivative beyond the second is taken, and v is needed at
    the start of the block only.

    Args:
        trajectory: of the forward sweep of a `Tangent`.
        multipliers: lambda_T and its derivative mu_T; None in them stands for zero.
        gradient: gathers (8).
        product: gathers the derivative of (8).
        running: r.

    Returns:
        The running cost and the second derivative in the observation.
    """
    tangent = cast("Tangent", trajectory.dynamics)
    trajectory.dynamics, trajectory.compared = replace(tangent, retaping=True), itemgetter(0)
    multiplier, moved = multipliers
    total: Tensor | float = 0.0
    with autodiff.recording():
        for block in trajectory.taped_in_reverse():
            u, v = block.states[0]
            parts = [tangent.apart(received) for received in block.controls]
            costs = []
            if running is not None:
                plain = [state for state, _ in block.states[:-1]]
                thetas = [theta for theta, _ in parts]
                simple = Block(block.steps, [*plain, block.states[-1][0]], thetas)
                costs = block_costs(tangent.dynamics, running, simple)
                known = (block.states[:-1], block.controls)
                autodiff.refuse_hidden(costs, known, "the running cost")
            own = {}
            for theta, d in parts:
                for x, dx in zip(tree.leaves_of(theta), tree.leaves_of(d), strict=True):
                    own[id(x)] = (x, dx)
            xs, ds = [x for x, _ in own.values()], [dx for _, dx in own.values()]
            ones = [-torch.ones_like(cost) for cost in costs]
            first, second = _twice(
                (block.states[-1][0], costs),
                (multiplier, ones),
                (moved, [None] * len(costs)),
                (u, xs),
                tree.detach((v, ds)),
            )
            (multiplier, own_first), (moved, own_second) = first, second
            gradient.subtract(xs, own_first)
            product.subtract(xs, own_second)
            total = sum((cost.detach() for cost in costs), total)
            del block, u, v, parts, costs, own, xs, ds, first, second, own_first, own_second
            simple = known = plain = None
        start, _ = trajectory.taped_initial()
        theta, d = unpaired(trajectory.control)
        f, e = trajectory.observation
        first, second = _twice(start, multiplier, moved, (f, theta), tree.detach((e, d)))
        gradient.subtract(theta, first[1])
        product.subtract(theta, second[1])
    return TangentSweep(total, tree.negative(second[0]))


def _twice(
    outputs: Tree, cotangent: Tree, moved: Tree, inputs: Tree, directions: Tree
) -> tuple[Tree, Tree]:
    """A pullback p of `cotangent`, and its derivative along `directions` and `moved`, detached."""
    first = autodiff.pull(outputs, cotangent, inputs, keep=True)
    slope = tree.inner(first, directions)
    if moved is None:
        moved = tree.map_leaves(lambda _: None, outputs)
    one = torch.ones_like(slope)
    second = autodiff.pull((slope, outputs), (one, moved), inputs)
    return tree.detach(first), second


def tangent_plan(
    checkpointing: Checkpointing | Budget | None,
    tangent: Tangent,
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
) -> Checkpointing:
    """What was asked for; a budget is planned for pairs of states and graphs pulled back twice.

    Args:
        checkpointing: as the user gave it.
        tangent: the tangent system.
        problem: whose costs are differentiated.
        observation: pair of f and its direction.
        control: control of the tangent system.

    Returns:
        A checkpointing.
    """
    readout, running = problem.dynamics.readout, problem.running

    def terminal(state: Tree, pair: Tree) -> Tensor:
        return problem.terminal(readout(state[0]), unpaired(pair)[0])

    def cost(state: Tree, received: Tree, t: int, running: RunningCost) -> Tensor:
        return running(readout(state[0]), tangent.apart(received)[0], t)

    costs = None if running is None else partial(cost, running=running)
    pairs = ControlProblem(tangent, terminal, problem.horizon, costs)
    # The graph of a pullback reads about twice what the graph it pulls back keeps.
    return planned(checkpointing, pairs, observation, control, graphs=3)


def _checked(direction: Tree, control: Tree) -> Tree:
    zero = tree.zeros_like(control)
    expected, structure = tree.flatten(zero)
    leaves, found = tree.flatten(direction)
    if found != structure:
        raise StructureError(f"direction must be like the control, {structure}, got {found}.")
    filled = [z if d is None or z is None else d for z, d in zip(expected, leaves, strict=True)]
    direction = tree.unflatten(structure, filled)
    tree.check_like(direction, zero, "direction", "a direction must be like the control")
    return direction
