"""Step (4) of Algorithm 1: params adapted to one task."""

from collections.abc import Callable

from torch import Tensor

from bilevel import tree
from bilevel.checks import is_whole
from bilevel.errors import ArgumentError
from bilevel.inner.problem import BilevelProblem
from bilevel.methods.base import Instance
from bilevel.solver import BilevelSolver
from bilevel.tree import Tree


def adapt(
    solver: BilevelSolver,
    params: Tree,
    task: Callable[[Tree], Tensor],
    steps: int,
    *,
    weight: float = 1.0,
    control: Tree = None,
) -> Tree:
    """Params adapted to one task: step (4) of Algorithm 1.

    A few steps of the solver's inner optimiser on the loss of the task, its step size scaled by
    the learned weight of the task (the preprint writes the raw alpha).

    Args:
        solver: whose optimiser makes the steps.
        params: to start from, such as those of a solution.
        task: loss of the task, a real scalar of the params.
        steps: how many.
        weight: sigma(alpha)_i, which the step size is multiplied by.
        control: what learned step sizes are read from, if the optimiser has any.

    Returns:
        The adapted params, detached; those given are left as they are.

    Raises:
        ArgumentError: if `steps` is negative or `weight` not positive.
        DivergenceError: if the iteration is not finite.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(lambda w, a, batch: w**2 * a, lambda w, a, batch: w)
        >>> solver = bl.BilevelSolver(problem, bl.GradientDescent(0.1))
        >>> adapt(solver, torch.tensor(1.0), lambda w: (w - 3) ** 2 / 2, steps=1, weight=0.5)
        tensor(1.1000)
    """
    if not is_whole(steps) or not weight > 0:
        raise ArgumentError(
            f"steps must be a whole number >= 0 and weight > 0, got {steps} and {weight}."
        )
    alone = BilevelProblem(lambda p, c, batch: task(p), lambda p, c, batch: task(p))  # noqa: ARG005
    instance = Instance(
        alone, solver.optimizer.scaled(weight), steps, tree.detach(params), tree.detach(control)
    )
    return solver.optimizer.params(instance.iterated.state)
