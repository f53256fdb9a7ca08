"""Multipliers by autograd through the stored trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.per_step import GradientSum
from bilevel.dynamics.problem import precise
from bilevel.dynamics.steps import walk
from bilevel.methods.base import Found, HypergradientMethod
from bilevel.methods.instance import Instance
from bilevel.tree import Tree


@final
@dataclass(frozen=True)
class Unrolled(HypergradientMethod):
    """Exact for the k-step inner solution; the graph of all k steps is in memory at once.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 60, bl.Unrolled())
        >>> zero = torch.tensor(0.0)
        >>> hyper = solver.hypergradient(zero, zero)
        >>> round(hyper.gradient.item(), 4)
        -0.6667
    """

    def find(self, instance: Instance) -> Found:  # noqa: D102
        return self.find_each([instance])[0]

    def find_each(self, instances: Sequence[Instance]) -> list[Found]:
        """See `HypergradientMethod`; one graph, pulled back from all of them."""
        first, dynamics = instances[0], instances[0].dynamics
        control, start = autodiff.variables((first.control, first.observation))
        with autodiff.recording():
            state: Tree = None
            costs: list[Tensor] = []
            for made, state in enumerate(walk(dynamics, start, control, first.horizon)):
                if not made:
                    autodiff.refuse_hidden(state, (start, control), "start")
                if first.problem.outer_each is not None and made < first.horizon:
                    costs.append(first.running(dynamics.readout(state), control, made + 1))
            autodiff.refuse_hidden(costs, (start, control), "outer_each")
            first.check_finite(tree.detach(state))
            reached = dynamics.readout(state)
            outers = [instance.outer_gradient(reached) for instance in instances]
            through = _pulled((reached, costs), [outer.in_params for outer in outers], control)
        warm = first.reached(state, first.horizon)
        running = sum((precise(cost.detach()) for cost in costs), 0.0)
        answers = []
        for outer, part in zip(outers, through, strict=True):
            gradient = GradientSum(control)
            gradient.add(control, outer.in_control)
            gradient.add(control, part)
            value = outer.value + running if costs else outer.value
            answers.append(Found(value, gradient.total(), warm, outer))
        return answers

    @property
    def sees_steps(self) -> bool:  # noqa: D102
        return True


def _pulled(
    outputs: tuple[Tree, list[Tensor]], cotangents: list[Tree], control: Tree
) -> list[Tree]:
    """Gradients in the control through the graph, one for each cotangent of the last params."""
    reached, costs = outputs
    if len(cotangents) == 1:
        ones = [torch.ones_like(cost) for cost in costs]
        return [autodiff.pull(outputs, (cotangents[0], ones), control)]
    n = len(cotangents)
    filled = [tree.filled(v, reached) for v in cotangents]
    stacked = tree.map_leaves(lambda *x: None if x[0] is None else torch.stack(x), *filled)
    ones = [torch.ones(n, dtype=cost.dtype, device=cost.device) for cost in costs]
    found = autodiff.pull_each(outputs, (stacked, ones), control)
    return [tree.map_leaves(lambda x, m=m: None if x is None else x[m], found) for m in range(n)]
