"""The bilevel problems of meta-training: Algorithm 3, and the penalty method to compare with."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import bilevel as bl
from applications.mri.meta.losses import TaskLosses
from applications.mri.meta.settings import MetaSettings
from applications.mri.network.weights import named
from applications.mri.training.draws import Batch

_REACH = 1e3  # of the step that measures a gradient: the farther, the less rounding matters


def meta_solver(
    losses: TaskLosses, weights: bl.TaskWeights, settings: MetaSettings, rate: float | bl.ByStep
) -> bl.BilevelSolver:
    """Algorithm 3: the weights of a network as params, those of the tasks as control.

    Args:
        losses: of both levels.
        weights: sigma.
        settings: number of inner steps, their rule, and how hypergradients are found.
        rate: of the inner steps.

    Returns:
        The solver; with a matrix of weights the params are stacked.
    """
    method = settings.method.chosen
    if isinstance(method, bl.MLM):
        method = replace(method, checkpointing=settings.checkpointing)
    m = weights.n_validations
    # The model of a column is judged on its own task alone, and evaluated on no other.
    judges = losses if m is None else [partial(_own, losses, j) for j in range(m)]
    return bl.BilevelSolver(
        bl.weighted_problem(losses, judges, weights, bl.Looped()),
        settings.optimizer.at(rate),
        settings.inner_steps,
        method,
        certificate=None,
        on_failure="ignore",
    )


def _own(losses: TaskLosses, j: int, control: bl.PerStep, batch: Batch) -> Tensor:
    return losses.of_task(control, batch[j])


def penalty_solver(losses: TaskLosses, weights: bl.TaskWeights, penalty: float) -> bl.BilevelSolver:
    r"""Joint descent on theta and alpha, with a penalty in the place of the inner problem.

    .. math::
        \min_{\theta, \alpha} \sum_j l_{v_j}(\theta) + \frac{\lambda}{2}
        \Big|\nabla_\theta \sum_i \sigma(\alpha)_i\, l_{\tau_i}(\theta)\Big|^2

    One gradient step from theta measures the gradient; the multipliers of that step give the
    Hessian of the training loss, times its gradient.

    Bian, Chen, Ye & Zhang 2021, An optimization-based meta-learning model for MRI reconstruction
    with diverse dataset, Journal of Imaging 7(11) 231, DOI 10.3390/jimaging7110231.

    Args:
        losses: of both levels.
        weights: sigma.
        penalty: lambda.

    Returns:
        A solver whose control is a mapping of `alpha` and `theta`, and whose params are like theta.
    """
    weighted = bl.weighted_problem(losses, losses, weights)

    def outer(moved: bl.PerStep, control: dict, batch: Batch) -> Tensor:
        pairs = zip(named(moved).values(), named(control["theta"]).values(), strict=True)
        squares = [((x - y) / _REACH).abs().square().sum() for x, y in pairs]
        value = weighted.outer(control["theta"], control["alpha"], batch)
        return value + penalty / 2 * torch.stack(squares).sum()

    problem = bl.BilevelProblem(
        inner=lambda params, control, batch: weighted.inner(params, control["alpha"], batch),
        outer=outer,
        start=lambda _params, control: control["theta"],
    )
    return bl.BilevelSolver(problem, bl.GradientDescent(_REACH), 1, bl.MLM(), certificate=None)
