"""The final state as a differentiable function, its backward a multiplier sweep."""

from dataclasses import replace
from typing import Any

from bilevel import autodiff, tree
from bilevel.checkpointing import Checkpointing
from bilevel.dynamics import Dynamics, check_control, initial_control, step_control
from bilevel.errors import ArgumentError
from bilevel.lagrangian import multiplier_sweep
from bilevel.randomness import preserved
from bilevel.sweep import GradientSum, forward_sweep
from bilevel.tree import Tree


def rollout(
    dynamics: Dynamics,
    observation: Tree,
    control: Tree,
    horizon: int,
    *,
    checkpointing: Checkpointing | None = None,
) -> Tree:
    """u(T), differentiable in the observation and the control.

    The backward of a cotangent v is the multiplier sweep of the terminal cost Re<v, u(T)>,
    that is lambda_T = -v; with `Checkpointing(block=None)` it is plain autograd.

    Args:
        dynamics: g and g0.
        observation: f.
        control: Theta, shared or `PerStep`.
        horizon: number of steps, T >= 0.
        checkpointing: what is kept between forward and backward; None is `Checkpointing()`.

    Returns:
        The final state, the structure that `dynamics.init` returns.

    Raises:
        ArgumentError: if `horizon` is negative.
        StructureError: if the control does not fit the horizon, or a step changes the structure.
        UnsupportedError: under a `torch.func` transform, or when its gradient is differentiated
            again, with states kept.

    Example:
        >>> import torch, bilevel as bl
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> halve = bl.Map(lambda state, control, t: control * state)
        >>> bl.rollout(halve, torch.tensor(8.0), rate, horizon=3).backward()
        >>> rate.grad
        tensor(6.)
    """
    if horizon < 0:
        raise ArgumentError(f"horizon must be an integer >= 0, got {horizon}.")
    checkpointing = checkpointing or Checkpointing()
    check_control(control, horizon)
    if checkpointing.keeps_graphs:
        state = dynamics.init(observation, initial_control(control))
        for t in range(1, horizon + 1):
            following = dynamics.step(state, step_control(control, t), t)
            source = f"step {t} must return a state like its own"
            tree.check_like(following, state, f"u({t})", source)
            state = following
        return state

    leaves, structure = tree.flatten((observation, control))
    shape: list[Any] = []

    def run(inputs: list[Any]) -> tuple[list[Any], list[Any], autodiff.Reverse]:
        f, theta = tree.unflatten(structure, inputs)
        swept = forward_sweep(dynamics, f, theta, horizon, checkpointing, tape_last=False)
        outputs, output_structure = tree.flatten(swept.final)
        shape.append(output_structure)
        kept, kept_structure = tree.flatten((swept.starts, swept.final))
        bare = replace(swept, observation=None, control=None, starts=[], final=None)

        def reverse(inputs: list[Any], kept: list[Any], cotangent: list[Any]) -> list[Any]:
            f, theta = tree.unflatten(structure, inputs)
            starts, final = tree.unflatten(kept_structure, kept)
            again = replace(
                bare,
                observation=autodiff.variables(f),
                control=autodiff.variables(theta),
                starts=tree.detach(starts),
                final=tree.detach(final),
            )
            gradient = GradientSum(again.control)
            multiplier = tree.negative(tree.unflatten(output_structure, cotangent))
            with preserved(again.devices):
                found = multiplier_sweep(again, multiplier, gradient)
            return tree.leaves_of((found.observation_gradient, gradient.sums()))

        return outputs, kept, reverse

    outputs = autodiff.reversible(run, leaves)
    return tree.unflatten(shape[0], list(outputs))
