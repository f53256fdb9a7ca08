"""The multiplier at the end, handed to the start unchanged."""

from dataclasses import dataclass
from typing import final

from bilevel import autodiff
from bilevel.dynamics.per_step import GradientSum
from bilevel.dynamics.steps import begun
from bilevel.errors import ArgumentError, LostGradientError
from bilevel.methods.base import Found, HypergradientMethod, Truncation
from bilevel.methods.instance import Instance


@final
@dataclass(frozen=True)
class FirstOrder(HypergradientMethod):
    r"""First-order MAML (Finn, Abbeel & Levine 2017, arXiv 1703.03400): no second derivatives.

    The multiplier :math:`\lambda_T = -\nabla F` goes to the learned start as it is, as if each
    inner step were the identity, so that

    .. math:: h = \nabla_\alpha F - \Big(\frac{\partial g_0}{\partial\alpha}\Big)^* \lambda_T .

    Exact without inner steps. With some it is no gradient, and nothing is known of its error: a
    certificate says so, and `certificate=None` is how to go on all the same. It sees a control in
    `start` and in the outer objective; what the inner steps read of it has no part in it.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - 1) ** 2 / 2,
        ...     outer=lambda w, a, batch: w**2,
        ...     start=lambda w, a: a,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.5), 1, FirstOrder(), certificate=None
        ... )
        >>> found = solver.hypergradient(torch.tensor(0.0), torch.tensor(1.0))
        >>> found.gradient  # MLM: half of it
        tensor(2.)
    """

    def find(self, instance: Instance) -> Found:  # noqa: D102
        if instance.problem.start is None:
            raise ArgumentError(
                "FirstOrder hands the multiplier to a learned start, and this problem has none: "
                "give BilevelProblem(start=...), or take MLM() or Implicit()."
            )
        reached, dynamics = instance.iterated, instance.dynamics
        outer = instance.outer_gradient(dynamics.readout(reached.state))
        gradient = GradientSum(instance.control)
        gradient.add(instance.control, outer.in_control)
        observation, control = autodiff.variables((instance.observation, instance.control))
        with autodiff.recording():
            first = dynamics.readout(begun(dynamics, observation, control))
            autodiff.refuse_hidden(first, (observation, control), "start")
            gradient.add(instance.control, autodiff.pull(first, outer.in_params, control))
        try:
            total = gradient.total()
        except LostGradientError as error:
            raise LostGradientError(
                f"{error} FirstOrder takes every inner step for the identity, and sees a control "
                "in the start and in the outer objective alone: MLM() or Unrolled() see the steps."
            ) from error
        made = reached.steps
        truncation = Truncation(made, None) if made else None
        return Found(outer.value, total, reached, outer, truncation=truncation)
