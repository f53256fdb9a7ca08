r"""The conditions of an optimum as one equation R(y; a) = 0, in the parameters a of its problem.

With p = -lambda an optimum is where the derivatives of

.. math::
    L(y, p, \mu; a) = l(u(T), w) + \sum_t \big[ r + p_t \cdot (g - u(t)) + \mu_t \cdot c_t \big]
        + p_0 \cdot (g_0 - u(0)) + \mu_T \cdot c_T

in y = (U, w, Theta), in p and in the multipliers of active constraints vanish. Numbers that a bound
holds stay, and multipliers of other constraints are zero. The derivative of R is symmetric.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.riccati.stages import Stages
from bilevel.tree import Tree


class Multipliers(NamedTuple):
    """Of the constraints, or whether each is active; shapes as in `Values`."""

    inequality: Tensor
    equality: Tensor
    end_inequality: Tensor
    end_equality: Tensor


class Optimal(NamedTuple):
    """The solution of R = 0; the last three parts are what is carried along.

    Attributes:
        own: the steps' own controls, ``(b, T, m)``.
        shared: w, ``(b, q)``.
        states: ``(b, T + 1, n)``.
        costates: p, ``(b, T + 1, n)``.
        multipliers: of the constraints.
        cost: J, ``(b,)``.
        free: which of `own` and `shared` no bound holds, boolean.
        active: which constraints are active, boolean.
        which: the number of the evaluation that found it.
    """

    own: Tensor
    shared: Tensor
    states: Tensor
    costates: Tensor
    multipliers: Multipliers
    cost: Tensor
    free: tuple[Tensor, Tensor]
    active: Multipliers
    which: Tensor


def conditions(stages: Stages, observation: Tree, y: Optimal) -> Optimal:
    """R, in the places of what is solved for.

    Args:
        stages: of the parameters.
        observation: f.
        y: where.

    Returns:
        The derivatives of L, and the cost less L.
    """

    def lagrangian(*parts: Tensor) -> list[Tensor]:
        own, shared, *rest = parts
        # What is held has derivative zero in all that follows, and one in its own equation.
        own = torch.where(y.free[0], own, own.detach())
        shared = torch.where(y.free[1], shared, shared.detach())
        return [_lagrangian(stages, observation, y.active, own, shared, *rest)]

    point = [y.own, y.shared, y.states, y.costates, *y.multipliers]
    (value,), slopes = autodiff.value_and_pull_at(lagrangian, point, [torch.ones_like(y.cost)])
    own, shared, states, costates, *values = slopes
    met = [
        torch.where(is_active, c, mu)
        for is_active, c, mu in zip(y.active, values, y.multipliers, strict=True)
    ]
    return Optimal(
        torch.where(y.free[0], own, y.own - y.own.detach()),
        torch.where(y.free[1], shared, y.shared - y.shared.detach()),
        states,
        costates,
        Multipliers(*met),
        y.cost - value,
        y.free,
        y.active,
        y.which,
    )


def _lagrangian(
    stages: Stages,
    observation: Tree,
    active: Multipliers,
    own: Tensor,
    shared: Tensor,
    states: Tensor,
    p: Tensor,
    *multipliers: Tensor,
) -> Tensor:
    """L of each problem, ``(b,)``."""
    b, horizon = own.shape[:2]
    problems = torch.arange(b, device=own.device)
    parts = states[:, :-1], shared.unsqueeze(1).expand(b, horizon, shared.shape[1]), own
    g, r = stages.steps(parts, problems)
    last, start = states[:, -1], stages.start(shared, problems, tree.leaves_of(observation))
    total = r.sum(1) + stages.terminal(last, shared, own, problems)
    total = total + (p[:, 1:] * (g - states[:, 1:])).sum((1, 2))
    total = total + (p[:, 0] * (start - states[:, 0])).sum(1)
    if stages.constraints is None:
        return total
    values = stages.constrained(parts, torch.cat([last, shared], 1), own, problems)
    for name, mu, is_active in zip(Multipliers._fields, multipliers, active, strict=True):
        total = total + (mu * is_active * getattr(values, name)).flatten(1).sum(1)
    return total
