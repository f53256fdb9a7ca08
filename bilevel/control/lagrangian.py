r"""The Lagrangian of a control problem, equation (4), and how far its gradient is from zero.

.. math::
    L(U, \Theta; \Lambda) = J
        + \sum_{t=1}^{T} \mathrm{Re}\langle \lambda_t, u(t) - g(u(t-1), \theta_t) \rangle
        + \mathrm{Re}\langle \lambda_0, u(0) - g_0(f; \theta_0) \rangle    \qquad (4)

Every sign of this room follows from the plus signs in (4). Source: "Solve Bi-Level Optimization
Model for Meta-Learning Using Method of Lagrangian Multipliers" (2025), cited as "MLM preprint
(7a)"; the running cost, the control in l and the gradient in theta_0 generalise it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.per_step import GradientSum, check_control, initial_control, step_control
from bilevel.dynamics.problem import ControlProblem, precise
from bilevel.errors import StructureError
from bilevel.tree import Tree


def lagrangian(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    states: Sequence[Tree],
    multipliers: Sequence[Tree],
) -> Tensor:
    """L(U, Theta; Lambda) of equation (4), at any point; differentiable in every argument.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        states: u(0), ..., u(T), which need not satisfy the dynamics.
        multipliers: lambda_0, ..., lambda_T.

    Returns:
        Real scalar.

    Raises:
        StructureError: if there are not T + 1 states and multipliers, or the control does not fit.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> start, control = torch.tensor(1.0), torch.tensor(0.5)
        >>> swept = bl.adjoint(
        ...     walk, start, control, keep_states=True, keep_multipliers=True
        ... )
        >>> bl.lagrangian(walk, start, control, swept.states, swept.multipliers)  # J
        tensor(4.5000)
    """
    _check_point(problem, control, states, multipliers)
    # In the order of a forward sweep, for costs and steps that draw.
    start = problem.dynamics.init(observation, initial_control(control))
    value = precise(tree.inner(multipliers[0], tree.subtract(states[0], start)))
    for t in range(1, problem.horizon + 1):
        theta = step_control(control, t)
        for cost in problem.step_costs(states[t - 1], theta, t):
            value = value + precise(cost)
        step = problem.dynamics.step(states[t - 1], theta, t)
        value = value + tree.inner(multipliers[t], tree.subtract(states[t], step))
    return value + problem.final_cost(states[-1], control)


@dataclass(frozen=True)
class KKT:
    """Norms of the three parts of the gradient of the Lagrangian; all zero at a solution.

    Attributes:
        feasibility: of (5c), grad_Lambda L: how far the states are from the dynamics.
        costate: of (5a), grad_U L: how far the multipliers are from the sweep (7).
        stationarity: of (5b), grad_Theta L: at a swept point, the gradient of J.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u + c), lambda u, c: (u - 3) ** 2 / 2, horizon=3
        ... )
        >>> start, control = torch.tensor(0.0), torch.tensor(1.0)  # u(3) = 3
        >>> swept = bl.adjoint(
        ...     problem, start, control, keep_states=True, keep_multipliers=True
        ... )
        >>> bl.kkt(problem, start, control, swept.states, swept.multipliers)
        KKT(feasibility=0.0, costate=0.0, stationarity=0.0)
    """

    feasibility: float
    costate: float
    stationarity: float


def kkt(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    states: Sequence[Tree],
    multipliers: Sequence[Tree],
) -> KKT:
    """Residuals of the optimality conditions (5a), (5b), (5c), at any point.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        states: u(0), ..., u(T).
        multipliers: lambda_0, ..., lambda_T.

    Returns:
        The three norms.

    Raises:
        StructureError: if there are not T + 1 states and multipliers, or the control does not fit.
        LostGradientError: if nothing reads a part of the control, or a function closes over a
            tensor that requires grad.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> start, control = torch.tensor(1.0), torch.tensor(0.5)
        >>> swept = bl.adjoint(
        ...     walk, start, control, keep_states=True, keep_multipliers=True
        ... )
        >>> bl.kkt(walk, start, control, swept.states, swept.multipliers).feasibility
        0.0
    """
    autodiff.refuse_inside("kkt", observation, control, states, multipliers)
    _check_point(problem, control, states, multipliers)
    states, multipliers = tree.detach((list(states), list(multipliers)))
    theta = autodiff.variables(control)
    gradient = GradientSum(theta)
    costate = 0.0
    # Forward, so that what the steps draw at random can be what they drew when the states were
    # found, if the caller restores the generators.
    with autodiff.recording():
        start = problem.dynamics.init(tree.detach(observation), initial_control(theta))
        autodiff.refuse_hidden(start, theta, "dynamics.init")
        gradient.subtract(theta, autodiff.pull(start, multipliers[0], theta))
        # (5c) at 0: u(0) - g0(f; theta_0)
        feasibility = tree.norm(tree.subtract(states[0], tree.detach(start)))
        for t in range(1, problem.horizon + 1):
            u, theta_t = autodiff.variables(states[t - 1]), step_control(theta, t)
            costs = problem.step_costs(u, theta_t, t)
            step = problem.dynamics.step(u, theta_t, t)
            autodiff.refuse_hidden((step, costs), (u, theta), f"step {t} or its running cost")
            swept, control_part = autodiff.pull(
                (step, costs), (multipliers[t], [-torch.ones_like(r) for r in costs]), (u, theta_t)
            )
            gradient.subtract(theta_t, control_part)
            # (5c): u(t) - g(u(t-1), theta_t)
            defect = tree.subtract(states[t], tree.detach(step))
            feasibility = math.hypot(feasibility, tree.norm(defect))
            # (5a): grad_{u(t-1)} L = lambda_{t-1} + grad_u r - (dg/du)^* lambda_t
            costate = math.hypot(costate, _sum_norm(multipliers[t - 1], tree.negative(swept)))
    _, (state_part, control_part) = autodiff.value_and_gradient(
        problem.final_cost, states[-1], control, name="the terminal cost"
    )
    gradient.add(theta, control_part)
    # (5a) at T: grad_{u(T)} L = lambda_T + grad_u l
    costate = math.hypot(costate, _sum_norm(multipliers[-1], state_part))
    return KKT(feasibility, costate, tree.norm(gradient.total()))


def _sum_norm(a: Tree, b: Tree) -> float:
    """Norm of a + b, None standing for zero."""
    return tree.norm(
        tree.map_leaves(lambda x, y: y if x is None else x if y is None else x + y, a, b)
    )


def _check_point(
    problem: ControlProblem, control: Tree, states: Sequence[Tree], multipliers: Sequence[Tree]
) -> None:
    """Refuse a point that does not have T + 1 states and multipliers."""
    check_control(control, problem.horizon)
    needed = problem.horizon + 1
    for name, given in (("states", states), ("multipliers", multipliers)):
        if len(given) != needed:
            raise StructureError(
                f"{name} must have one entry for t = 0..T, {needed} in all, got {len(given)}."
            )
