"""The final state, or the cost, as a differentiable function, its backward a multiplier sweep."""

from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checks import check_scalar
from bilevel.control.adjoint import multiplier_sweep
from bilevel.control.kept_sweep import Reversal
from bilevel.control.tangent import paired, tangent_of, tangent_plan, tangent_sweep, unpaired
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.dynamics import Dynamics
from bilevel.dynamics.per_step import GradientSum, check_control
from bilevel.dynamics.problem import ControlProblem, RunningCost, precise
from bilevel.dynamics.steps import walk
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.memory import planned
from bilevel.sweeps.randomness import Surroundings
from bilevel.sweeps.trajectory import Trajectory
from bilevel.tree import Tree


def rollout(
    dynamics: Dynamics,
    observation: Tree,
    control: Tree,
    horizon: int,
    *,
    checkpointing: Checkpointing | Budget | None = None,
) -> Tree:
    """u(T), differentiable in the observation and the control.

    The backward of a cotangent v is the multiplier sweep of the terminal cost Re<v, u(T)>,
    that is lambda_T = -v; with `Checkpointing(block=None)` it is plain autograd. A gradient that
    is differentiated again, with `create_graph=True`, costs one sweep of the tangent system with
    the same checkpointing. A backward uses up what was kept, unless every state was kept in memory:
    another one through a retained graph then sweeps forward again.

    Args:
        dynamics: g and g0.
        observation: f.
        control: Theta, shared or `PerStep`.
        horizon: number of steps, T >= 0.
        checkpointing: what is kept between forward and backward, or a `Budget`; None is
            `Checkpointing()`.

    Returns:
        The final state, the structure that `dynamics.init` returns.

    Raises:
        ArgumentError: if `horizon` is negative.
        StructureError: if the control does not fit the horizon, or a step changes the structure.
        UnsupportedError: under a `torch.func` transform, or when its second derivative is
            differentiated again, with states kept.

    Example:
        >>> import torch, bilevel as bl
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> halve = bl.Map(lambda state, control, t: control * state)
        >>> bl.rollout(halve, torch.tensor(8.0), rate, horizon=3).backward()
        >>> rate.grad
        tensor(6.)
    """
    check_control(control, horizon)
    problem = ControlProblem(dynamics, _no_cost, horizon)
    if not autodiff.is_on():
        return _last(dynamics, observation, control, horizon)
    with autodiff.no_transforms():
        chosen = planned(checkpointing, problem, observation, control)
    if chosen.keeps_graphs:
        return _last(dynamics, observation, control, horizon)
    leaves, structure = tree.flatten((observation, control))
    rolled = _Rollout(problem, checkpointing, chosen, structure)
    return rolled.state_of(autodiff.reversible(rolled, leaves))


def _last(dynamics: Dynamics, observation: Tree, control: Tree, horizon: int) -> Tree:
    """u(T) by a plain loop, of which nothing is kept but the graph, if there is one."""
    final = deque(walk(dynamics, observation, control, horizon), maxlen=1).pop()
    return tree.copied(final, only=control)


class _Rollout(autodiff.Reversible):
    """One rollout: its forward sweep, and the sweeps that its backward passes ask for."""

    def __init__(
        self,
        problem: ControlProblem,
        given: Checkpointing | Budget | None,
        chosen: Checkpointing,
        structure: optree.PyTreeSpec,
    ) -> None:
        # `given` is as the user has it, for the tangent system; `chosen` for the first derivative.
        self._problem, self._given, self._chosen = problem, given, chosen
        self._inputs = structure  # of observation and control
        # Left by `forward`, which is called first and once. The tensors are with the graph.
        self._surroundings = Surroundings()
        self._trajectory: Trajectory
        self._state: optree.PyTreeSpec
        self._kept: optree.PyTreeSpec

    def state_of(self, leaves: tuple[Any, ...]) -> Tree:
        """Leaves put back in the structure of the final state."""
        return tree.unflatten(self._state, list(leaves))

    def forward(self, inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        """The forward sweep (6a), (6b)."""
        f, theta = tree.unflatten(self._inputs, inputs)
        problem, chosen = self._problem, self._chosen
        self._trajectory = Trajectory(problem.dynamics, f, theta, problem.horizon, chosen)
        self._trajectory.forward(tape_last=False)
        outputs, self._state = tree.flatten(self._trajectory.final)
        kept, self._kept = tree.flatten(self._trajectory.park())
        return outputs, kept

    def reverse(self, inputs: list[Any], kept: list[Any], cotangents: list[Any]) -> list[Any]:
        """The multiplier sweep (7), (8) of the terminal cost Re<cotangents, u(T)>."""
        f, theta = tree.unflatten(self._inputs, inputs)
        with self._surroundings.restored(), self._trajectory.replaying():
            again = self._trajectory.resumed(f, theta, tree.unflatten(self._kept, kept))
            gradient = GradientSum(again.control)
            cotangent = tree.unflatten(self._state, cotangents)
            with closing(again):
                ended = Reversal(tree.negative(cotangent))  # (7a)
                found = multiplier_sweep(again, ended, gradient)
        return tree.leaves_of((found.observation_gradient, gradient.sums()))

    def again(
        self, inputs: list[Any], cotangents: list[Any], directions: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """One sweep of the tangent system along `directions`, of the cost Re<cotangents, v(T)>."""
        (f, theta), (e, d) = (tree.unflatten(self._inputs, x) for x in (inputs, directions))
        problem, tangent = self._problem, tangent_of(self._problem.dynamics, theta)
        start, pair = tree.detach(((f, e), paired(theta, d)))
        with self._surroundings.restored(), self._trajectory.replaying():
            chosen = tangent_plan(self._given, tangent, problem, start, pair)
            if self._trajectory.draws:
                self._trajectory.random_start.restore()
            swept = Trajectory(tangent, start, pair, problem.horizon, chosen)
            swept.forward(tape_last=False)
            state, moved = swept.final
            multiplier = tree.negative(tree.unflatten(self._state, cotangents))
            nothing = tree.map_leaves(lambda _: None, state)
            point, _ = unpaired(swept.control)
            gradient, product = GradientSum(point), GradientSum(point)
            with closing(swept):
                found = tangent_sweep(swept, tangent, (multiplier, nothing), gradient, product)
        parts = found.observation_product, product.sums()
        return tree.leaves_of(parts), tree.leaves_of(moved)


def total_cost(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
) -> Tensor:
    """J of (1), differentiable twice in the observation and the control.

    What `rollout` is for the final state, this is for the cost: the training loss of an unrolled
    network as a term of an objective that is differentiated further. The running cost is a part of
    the state, so that one sweep finds it. Where there is one, a compiled step runs uncompiled.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        checkpointing: as in `rollout`.

    Returns:
        Real scalar, attached to the graph of the arguments.

    Raises:
        StructureError: as in `rollout`, or if a cost is no real scalar.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.Map(lambda state, control, t: state + control)
        >>> problem = bl.ControlProblem(
        ...     walk,
        ...     lambda state, control: state**2,
        ...     3,
        ...     lambda state, control, t: control**2,
        ... )
        >>> total_cost(problem, torch.tensor(1.0), torch.tensor(2.0))  # 7^2 + 3 2^2
        tensor(61.)
    """
    if problem.running is None or not problem.horizon:
        given = problem.dynamics, observation, control, problem.horizon
        return problem.final_cost(rollout(*given, checkpointing=checkpointing), control)
    carrying = _Carrying(plain(problem.dynamics), problem.running)
    given = carrying, observation, control, problem.horizon
    state, spent = rollout(*given, checkpointing=checkpointing)
    cost = problem.final_cost(state, control)
    return cost + spent.to(reduce(torch.promote_types, carrying.dtypes))


@dataclass(frozen=True)
class _Carrying(Dynamics):
    """A dynamics whose state is a pair: that of another, and the running cost so far."""

    dynamics: Dynamics
    running: RunningCost
    dtypes: set[torch.dtype] = field(default_factory=set)  # of the costs seen, at least float32

    @property
    def origin(self) -> object:
        return self.dynamics.origin

    def init(self, observation: Tree, control: Tree) -> Tree:
        state = self.dynamics.init(observation, control)
        like = next(x for x in tree.leaves_of(state) if tree.is_variable(x))
        # The dtype of the costs is not known yet: no sum loses their digits in this one.
        return state, torch.zeros((), dtype=torch.float64, device=like.device)

    def step(self, state: Tree, control: Tree, t: int) -> Tree:
        inner, spent = state
        cost = self.running(self.dynamics.readout(inner), control, t)
        cost = check_scalar(cost, f"the running cost at t = {t}")
        self.dtypes.add(precise(cost).dtype)
        return self.dynamics.step(inner, control, t), spent + cost.to(spent)


def _no_cost(state: Tree, control: Tree) -> Tensor:  # noqa: ARG001
    return torch.zeros((), device="cpu")
