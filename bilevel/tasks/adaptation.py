"""Step (4) of Algorithm 1: params adapted to one task."""

from collections.abc import Callable

from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checks import check_arguments, check_kind, check_range, check_whole
from bilevel.inner.problem import BilevelProblem
from bilevel.methods.instance import Instance
from bilevel.optim.rules import InnerOptimizer
from bilevel.tree import Tree


def adapt(
    optimizer: InnerOptimizer,
    params: Tree,
    task: Callable[[Tree], Tensor],
    steps: int,
    *,
    weight: float = 1.0,
    control: Tree = None,
) -> Tree:
    """Params adapted to one task: step (4) of Algorithm 1.

    A few steps on the loss of the task, their learning rate scaled by the learned weight of the
    task (the preprint writes the raw alpha).

    Args:
        optimizer: the rule of the steps.
        params: to start from, such as those of a solution.
        task: loss of the task, a real scalar of the params.
        steps: how many.
        weight: sigma(alpha)_i, which the learning rate is multiplied by.
        control: what learned settings are read from, if the rule has any.

    Returns:
        The adapted params, detached; those given are left as they are.

    Raises:
        ArgumentError: if `steps` is negative or `weight` not positive.
        LostGradientError: if it is called inside a step or an objective that is differentiated.
        DivergenceError: if the iteration is not finite.

    Example:
        >>> import torch, bilevel as bl
        >>> task = lambda w: (w - 3) ** 2 / 2
        >>> bl.adapt(bl.optim.SGD(0.1), torch.tensor(1.0), task, steps=1, weight=0.5)
        tensor(1.1000)
    """
    check_kind(optimizer, InnerOptimizer, "optimizer", "a rule such as bilevel.optim.SGD(0.1)")
    check_arguments(task, "task", "params")
    check_whole(steps, "steps")
    check_range(weight, "weight", above=0)
    autodiff.refuse_inside("adapt", params, control, instead="bilevel.rollout")
    alone = BilevelProblem(lambda p, c, batch: task(p), lambda p, c, batch: task(p))  # noqa: ARG005
    scaled = optimizer.scaled(weight)
    instance = Instance(alone, scaled, steps, tree.detach(params), tree.detach(control))
    return optimizer.params(instance.iterated.state)
