"""The final state, or the cost, as a differentiable function, its backward a multiplier sweep."""

from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.lagrangian import multiplier_sweep
from bilevel.control.tangent import paired, tangent_of, tangent_plan, tangent_sweep, unpaired
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.dynamics import (
    Dynamics,
    GradientSum,
    check_control,
    initial_control,
    step_control,
)
from bilevel.dynamics.problem import ControlProblem, RunningCost
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import RandomState, preserved
from bilevel.sweeps.storage import MemorySnapshots
from bilevel.sweeps.sweep import forward_sweep, planned
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
    with autodiff.no_transforms():
        chosen = planned(checkpointing, problem, observation, control)
    if chosen.keeps_graphs:
        state = dynamics.init(observation, initial_control(control))
        for t in range(1, horizon + 1):
            following = dynamics.step(state, step_control(control, t), t)
            source = f"step {t} must return a state like its own"
            tree.check_like(following, state, f"u({t})", source)
            state = following
        return state

    leaves, structure = tree.flatten((observation, control))
    shape: list[Any] = []
    beginning: list[tuple[frozenset[torch.device], RandomState | None]] = []

    def run(inputs: list[Any]) -> tuple[list[Any], list[Any], autodiff.Reverse]:
        f, theta = tree.unflatten(structure, inputs)
        swept = forward_sweep(dynamics, f, theta, horizon, chosen, tape_last=False)
        outputs, output_structure = tree.flatten(swept.final)
        shape.append(output_structure)
        # Snapshots that no other will replace are saved with the graph, and serve every backward.
        # Others are used up by the first; another one has to sweep forward again.
        lasting = _lasting(swept)
        kept, kept_structure = tree.flatten((lasting, swept.final))
        random, random_start = dict(swept.random), swept.random_start
        beginning.append((swept.devices, random_start))
        unused = [] if lasting else [swept.snapshots]
        bare = replace(
            swept, observation=None, control=None, final=None, snapshots=MemorySnapshots()
        )

        def reverse(inputs: list[Any], kept: list[Any], cotangent: list[Any]) -> list[Any]:
            f, theta = tree.unflatten(structure, inputs)
            lasting, final = tree.unflatten(kept_structure, kept)
            with preserved(bare.devices):
                if lasting or unused:
                    again = replace(
                        bare,
                        observation=autodiff.variables(f),
                        control=autodiff.variables(theta),
                        snapshots=MemorySnapshots(tree.detach(lasting))
                        if lasting
                        else unused.pop(),
                        random=dict(random),
                        final=tree.detach(final),
                    )
                else:
                    if random_start is not None:
                        random_start.restore()
                    again = forward_sweep(dynamics, f, theta, horizon, chosen, tape_last=True)
                gradient = GradientSum(again.control)
                multiplier = tree.negative(tree.unflatten(output_structure, cotangent))
                with closing(again):
                    found = multiplier_sweep(again, multiplier, gradient)
            return tree.leaves_of((found.observation_gradient, gradient.sums()))

        return outputs, kept, reverse

    def again(
        inputs: list[Any], cotangents: list[Any], directions: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """One sweep of the tangent system along `directions`, of the cost Re<cotangents, v(T)>."""
        (f, theta), (e, d) = (tree.unflatten(structure, x) for x in (inputs, directions))
        tangent, pair = tangent_of(dynamics, theta), paired(theta, d)
        start, pair = tree.detach(((f, e), pair))
        devices, random_start = beginning[0]
        with preserved(devices):
            chosen = tangent_plan(checkpointing, tangent, problem, start, pair)
            if random_start is not None:
                random_start.restore()
            swept = forward_sweep(tangent, start, pair, horizon, chosen, tape_last=True)
            state, moved = swept.final
            multiplier = tree.negative(tree.unflatten(shape[0], cotangents))
            nothing = tree.map_leaves(lambda _: None, state)
            point, _ = unpaired(swept.control)
            gradient, product = GradientSum(point), GradientSum(point)
            with closing(swept):
                found = tangent_sweep(swept, (multiplier, nothing), gradient, product)
        parts = found.observation_product, product.sums()
        return tree.leaves_of(parts), tree.leaves_of(moved)

    outputs = autodiff.reversible(run, again, leaves)
    return tree.unflatten(shape[0], list(outputs))


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
        ...     walk, lambda state, control: state**2, 3, lambda state, control, t: control**2
        ... )
        >>> total_cost(problem, torch.tensor(1.0), torch.tensor(2.0))  # 7^2 + 3 2^2
        tensor(61.)
    """
    dynamics, running = problem.dynamics, problem.running
    if running is not None:
        dynamics = _Carrying(plain(dynamics), running)
    final = rollout(dynamics, observation, control, problem.horizon, checkpointing=checkpointing)
    state, spent = (final, None) if running is None else final
    name = "the terminal cost"
    cost = autodiff.check_scalar(problem.terminal(problem.dynamics.readout(state), control), name)
    return cost if spent is None else cost + spent


@dataclass(frozen=True)
class _Carrying(Dynamics):
    """A dynamics whose state is a pair: that of another, and the running cost so far."""

    dynamics: Dynamics
    running: RunningCost

    def init(self, observation: Tree, control: Tree) -> Tree:
        state = self.dynamics.init(observation, control)
        like = next(x for x in tree.leaves_of(state) if tree.is_variable(x))
        return state, torch.zeros((), dtype=like.real.dtype, device=like.device)

    def step(self, state: Tree, control: Tree, t: int) -> Tree:
        inner, spent = state
        cost = self.running(self.dynamics.readout(inner), control, t)
        cost = autodiff.check_scalar(cost, f"the running cost at t = {t}")
        return self.dynamics.step(inner, control, t), spent + cost.to(spent)


def _no_cost(state: Tree, control: Tree) -> Tensor:  # noqa: ARG001
    return torch.zeros(())


def _lasting(swept: Trajectory) -> dict[int, Tree]:
    """The snapshots, if no other will take the place of one."""
    schedule = swept.schedule
    every = schedule.snapshots >= schedule.n_blocks - 1
    return swept.snapshots.states if every and isinstance(swept.snapshots, MemorySnapshots) else {}
