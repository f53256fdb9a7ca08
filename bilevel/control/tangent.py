r"""Second derivatives: the tangent system of a control problem, and what one sweep of it gives.

Along a direction d of the control (and e of the observation) states move by

.. math::
    v(0) = g_0'(f; \theta_0)[e, d_0], \qquad v(t) = g'(u(t-1), \theta_t)[v(t-1), d_t].

That is a dynamics of the pair (u, v), swept forward with any checkpointing. Walking backwards, the
multipliers and the gradient (8) are found together with their derivatives along the direction.
"""

from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.dynamics import Dynamics
from bilevel.dynamics.per_step import GradientSum, PerStep, check_control
from bilevel.dynamics.problem import ControlProblem, precise
from bilevel.errors import StructureError
from bilevel.sweeps.block import Block, Costs, no_costs
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.memory import Rehearsed, begun_sum, planned
from bilevel.sweeps.trajectory import Trajectory
from bilevel.tree import Tree


@dataclass(frozen=True)
class Tangent(Dynamics):
    """The dynamics of (u, v). Observation, control and state are pairs of a point and a direction.

    Attributes:
        dynamics: g and g0.
        shared: whether the control has a part per step and one that every step shares.
    """

    dynamics: Dynamics
    shared: bool

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: D102
        (f, e), (theta, d) = observation, control  # v(0) = g0'(f; theta_0)[e, d_0]
        return autodiff.pushforward(self.dynamics.init, (f, theta), (e, d))

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        # v(t) = g'(u(t-1), theta_t)[v(t-1), d_t]
        (u, v), (theta, d) = state, self.apart(control)
        return autodiff.pushforward(
            lambda u, theta: self.dynamics.step(u, theta, t), (u, theta), (v, d)
        )

    @property
    def origin(self) -> object:  # noqa: D102
        return self.dynamics.origin

    def step_of_point(self, state: Tree, control: Tree, t: int) -> Tree:
        """The same u(t), with v(t-1) beside it: v is needed at the start of a block alone."""
        (u, v), (theta, _) = state, self.apart(control)
        return self.dynamics.step(u, theta, t), v

    def costs_of(self, problem: ControlProblem) -> Costs:
        """The running costs of a problem, of u(t-1) and theta_t."""
        if problem.running is None:
            return no_costs
        return lambda state, received, t: problem.step_costs(state[0], self.apart(received)[0], t)

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
        gradient: grad_Theta J; None for leaves without gradient.
        cost: J, real scalar.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u * c), lambda u, c: u, horizon=3
        ... )
        >>> one = torch.tensor(1.0)
        >>> found = bl.hvp(problem, one, torch.tensor(2.0), one)
        >>> found.cost, found.gradient, found.product  # c^3, 3 c^2, 6 c
        (tensor(8.), tensor(12.), tensor(12.))
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
    autodiff.refuse_inside("hvp", observation, control)
    check_control(control, problem.horizon)
    start = observation, _nothing_like(observation)
    pair = paired(*tree.detach((control, _checked(direction, control))))
    tangent = tangent_of(problem.dynamics, control)
    chosen = tangent_plan(checkpointing, tangent, problem, start, pair)
    trajectory = Trajectory(
        *(tangent, start, pair, problem.horizon, chosen, tangent.costs_of(problem)),
        running=problem.running,
    ).forward(tape_last=False)
    theta, d = unpaired(trajectory.control)
    gradient, product = GradientSum(theta), GradientSum(theta)
    with closing(trajectory), autodiff.recording():
        cost, first, second = ended(problem, trajectory.final, theta, d)
        gradient.add(theta, first[1])
        product.add(theta, second[1])
        multipliers = tree.negative((first[0], second[0]))  # (7a) and its derivative
        found = tangent_sweep(trajectory, tangent, multipliers, gradient, product)
    along = tree.filled(product.sums(), control)
    return HessianProduct(along, gradient.total(), cost + found.running)


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
    tangent: Tangent,
    multipliers: tuple[Tree, Tree],
    gradient: GradientSum,
    product: GradientSum,
) -> TangentSweep:
    """Equations (7) and (8), and their derivatives along the direction, backwards.

    Args:
        trajectory: of `tangent`, swept forward.
        tangent: the tangent system.
        multipliers: lambda_T and its derivative mu_T; None in them stands for zero.
        gradient: gathers (8).
        product: gathers the derivative of (8).

    Returns:
        The running cost and the second derivative in the observation.
    """
    running: Tensor | float = 0.0
    with autodiff.recording(), trajectory.replaying():
        for _ in range(trajectory.n_blocks):
            # The block is an argument and nothing else, so that its graph ends with the call.
            multipliers, costs = _reverse(
                trajectory.tape_previous(tangent.step_of_point, compared=itemgetter(0)),
                tangent,
                multipliers,
                gradient,
                product,
            )
            running = sum(map(precise, costs), running)
        start, _ = trajectory.tape_initial()
        theta, d = unpaired(trajectory.control)
        f, e = trajectory.observation
        first, second = _twice(start, *multipliers, (f, theta), tree.detach((e, d)))
        gradient.subtract(theta, first[1])
        product.subtract(theta, second[1])
    return TangentSweep(running, tree.negative(second[0]))


def _reverse(
    block: Block,
    tangent: Tangent,
    multipliers: tuple[Tree, Tree],
    gradient: GradientSum,
    product: GradientSum,
) -> tuple[tuple[Tree, Tree], list[Tensor]]:
    """lambda_a and mu_a of a block from lambda_b and mu_b, and its running costs."""
    # A block is the pullback p(u, theta; lambda) of its multiplier. Its derivative along (v, d; mu)
    # is the gradient of Re<p, (v, d)> in (u, theta), because second derivatives are symmetric, and
    # p(u, theta; mu): no derivative beyond the second is taken, and v is needed at the start of the
    # block only.
    parts = [tangent.apart(received) for received in block.controls]
    costs = block.costs
    given = block.states[:-1], block.controls
    autodiff.refuse_hidden(costs, given, "the running cost", twice=True)
    # A leaf that several steps share is one variable: it is pulled back to once.
    own = {
        id(x): (x, dx)
        for theta, d in parts
        for x, dx in zip(tree.leaves_of(theta), tree.leaves_of(d), strict=True)
    }
    thetas, along = [x for x, _ in own.values()], [dx for _, dx in own.values()]
    (u, v), (final, _) = block.states[0], block.states[-1]
    multiplier, moved = multipliers
    first, second = _twice(
        (final, costs),
        (multiplier, [-torch.ones_like(cost) for cost in costs]),  # as in `adjoint`
        (moved, [None] * len(costs)),
        (u, thetas),
        tree.detach((v, along)),
    )
    gradient.subtract(thetas, first[1])
    product.subtract(thetas, second[1])
    return (first[0], second[0]), [cost.detach() for cost in costs]


def _twice(
    outputs: Tree, cotangent: Tree, moved: Tree, inputs: Tree, directions: Tree
) -> tuple[Tree, Tree]:
    """A pullback p of `cotangent`, and its derivative along `directions` and `moved`, detached."""
    # p is linear in the cotangent, so that its derivative along `moved` is p(moved): the second
    # pull takes Re<p, directions> and the outputs at once.
    first = autodiff.pull(outputs, cotangent, inputs, keep=True)
    slope = tree.inner(first, directions)
    if moved is None:
        moved = tree.map_leaves(lambda _: None, outputs)
    second = autodiff.pull((slope, outputs), (torch.ones_like(slope), moved), inputs)
    return tree.detach(first), second


def tangent_plan(
    checkpointing: Checkpointing | Budget | None,
    tangent: Tangent,
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
) -> Checkpointing:
    """What was asked for, or what a budget allows; no graph of the forward sweep is kept."""

    def end(state: Tree, pair: Tree) -> Any:
        with autodiff.recording():
            return ended(problem, (state[0], state[1]), *unpaired(pair))

    def reverse(trajectory: Trajectory, block: Block) -> Tree:
        point, _ = unpaired(trajectory.control)
        sums = begun_sum(point), begun_sum(point)
        multiplier = tree.zeros_like(block.states[-1][0])
        _reverse(block, tangent, (multiplier, multiplier), *sums)
        return [one.sums() for one in sums]

    costs = tangent.costs_of(problem)
    running = None if problem.running is None else lambda *given: costs(*given)[0]
    pairs = ControlProblem(tangent, problem.terminal, problem.horizon, running)
    sweep = Rehearsed(tangent.step_of_point, reverse, end)
    chosen = planned(checkpointing, pairs, observation, control, sweep)
    # One block, taped when it is reversed: no graph of the tangent system is pulled back.
    return Checkpointing(1, max(problem.horizon, 1)) if chosen.keeps_graphs else chosen


def ended(
    problem: ControlProblem, final: tuple[Tree, Tree], theta: Tree, d: Tree
) -> tuple[Tensor, Tree, Tree]:
    """The terminal cost at (u(T), v(T)), its gradient, and the derivative of that along (v, d)."""
    state, moved = final
    inputs = autodiff.variables((state, theta))
    cost = problem.final_cost(*inputs)
    autodiff.refuse_hidden(cost, inputs, "the terminal cost", twice=True)
    first, second = _twice(cost, torch.ones_like(cost), None, inputs, (moved, tree.detach(d)))
    return cost.detach(), first, second


def _nothing_like(values: Tree) -> Tree:
    """The zero vector of a space, in the memory of one number a leaf."""
    return tree.map_leaves(
        lambda x: x.new_zeros(()).expand_as(x) if tree.is_variable(x) else None, values
    )


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
