"""Algorithm 3 as a bilevel problem, and the objective of the penalty method to compare with."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import bilevel as bl
from applications.mri.meta.losses import TaskLosses
from applications.mri.meta.settings import MetaSettings
from applications.mri.network.weights import named
from applications.mri.training.draws import Batch
from applications.processes import present


def meta_solver(
    losses: TaskLosses,
    weights: bl.TaskWeights,
    settings: MetaSettings,
    rate: float | bl.ByStep,
    n_judges: int | None = None,
) -> bl.BilevelSolver:
    """Algorithm 3: the weights of a network as params, those of the tasks as control.

    Args:
        losses: of both levels.
        weights: sigma.
        settings: number of inner steps, their rule, and how hypergradients are found.
        rate: of the inner steps.
        n_judges: validation tasks, for several processes to share them.

    Returns:
        The solver; with a matrix of weights the params are stacked.
    """
    method = settings.method.chosen
    if isinstance(method, bl.MLM):
        method = replace(method, checkpointing=settings.checkpointing)
    m = weights.n_validations
    # The model of a column is judged on its own task alone, and evaluated on no other.
    judges = losses if m is None else [partial(_own, losses, j) for j in range(m)]
    trained, evaluate, replicas = losses, bl.Looped(), present(split=False)
    if replicas is not None:  # of a vector the tasks are shared, of a matrix its columns
        evaluate = bl.tasks.OverRanks(replicas, evaluate)
        if m is None and n_judges is not None:
            judges = [partial(_own, losses, j) for j in range(n_judges)]
            trained = [partial(_own, losses, i) for i in range(weights.n_tasks)]
    return bl.BilevelSolver(
        bl.weighted_problem(trained, judges, weights, evaluate),
        settings.optimizer.at(rate),
        settings.inner_steps,
        method,
        certificate=None,
        on_failure="ignore",
        replicas=replicas,
    )


def _own(losses: TaskLosses, j: int, control: bl.PerStep, batch: Batch) -> Tensor:
    return losses.of_task(control, batch[j])


def penalty_objective(
    losses: TaskLosses, weights: bl.TaskWeights, penalty: float
) -> Callable[[bl.PerStep, Tensor, Batch, Batch], Tensor]:
    r"""What network and task weights descend on together, in the place of the bilevel problem.

    .. math::
        \sum_j l_{v_j}(\theta) + \frac{\lambda}{2}
        \Big|\nabla_\theta \sum_i \sigma(\alpha)_i\, l_{\tau_i}(\theta)\Big|^2

    Bian, Chen, Ye & Zhang 2021, An optimization-based meta-learning model for MRI reconstruction
    with diverse dataset, Journal of Imaging 7(11) 231, DOI 10.3390/jimaging7110231.

    Args:
        losses: of both levels.
        weights: sigma.
        penalty: lambda.

    Returns:
        `(theta, alpha, batch to train on, batch to validate on) -> real scalar`, where theta, whose
        leaves require grad, is differentiated twice.
    """
    weighted = bl.weighted_problem(losses, losses, weights)

    def objective(theta: bl.PerStep, alpha: Tensor, train: Batch, validation: Batch) -> Tensor:
        inner = weighted.inner(theta, alpha, train)
        leaves = list(named(theta).values())
        gradient = torch.autograd.grad(inner, leaves, create_graph=True, materialize_grads=True)
        squares = torch.stack([part.abs().square().sum() for part in gradient])
        return weighted.outer(theta, alpha, validation) + penalty / 2 * squares.sum()

    return objective
