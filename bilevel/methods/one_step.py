"""Multipliers by the last inner step alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from bilevel.methods.base import Found, HypergradientMethod
from bilevel.methods.instance import Instance
from bilevel.methods.mlm import MLM


@final
@dataclass(frozen=True)
class OneStep(HypergradientMethod):
    """The last step of the sweep (7): T1-T2 (Luketina et al. 2016, arXiv 1511.06727).

    Exact for nothing: a descent direction under further conditions (Shaban et al. 2019), and
    scaled by the step size. It costs one step beyond the inner iteration, and keeps one state.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 60, bl.OneStep(), None)
        >>> zero = torch.tensor(0.0)
        >>> round(solver.hypergradient(zero, zero).gradient.item(), 4)  # scaled by the step
        -0.4
    """

    def find(self, instance: Instance) -> Found:  # noqa: D102
        return MLM(last=1).find(instance)

    def find_each(self, instances: Sequence[Instance]) -> list[Found]:  # noqa: D102
        return MLM(last=1).find_each(instances)
