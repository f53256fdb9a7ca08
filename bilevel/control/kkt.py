"""How far a point is from the optimality conditions (5a), (5b), (5c)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bilevel import autodiff, tree
from bilevel.control.lagrangian import block_costs, check_point, terminal_cost
from bilevel.dynamics.dynamics import GradientSum, initial_control, step_control
from bilevel.dynamics.problem import ControlProblem
from bilevel.sweeps.trajectory import Block
from bilevel.tree import Tree


@dataclass(frozen=True)
class KKT:
    """Norms of the three parts of the gradient of the Lagrangian; all zero at a solution.

    Attributes:
        feasibility: of (5c), grad_Lambda L: how far the states are from the dynamics.
        costate: of (5a), grad_U L: how far the multipliers are from the sweep (7).
        stationarity: of (5b), grad_Theta L: at a swept point, the gradient of J.
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
    """
    check_point(problem, control, states, multipliers)
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
        feasibility = tree.norm(tree.subtract(states[0], tree.detach(start)))
        for t in range(1, problem.horizon + 1):
            u, theta_t = autodiff.variables(states[t - 1]), step_control(theta, t)
            step = problem.dynamics.step(u, theta_t, t)
            block = Block(range(t - 1, t), [u, step], [theta_t])
            costs = block_costs(problem.dynamics, problem.running, block)
            autodiff.refuse_hidden((step, costs), (u, theta), f"step {t} or its running cost")
            swept, control_part = autodiff.pull(
                (step, costs), (multipliers[t], [-torch.ones_like(r) for r in costs]), (u, theta_t)
            )
            gradient.subtract(theta_t, control_part)
            defect = tree.subtract(states[t], tree.detach(step))
            feasibility = math.hypot(feasibility, tree.norm(defect))
            # grad_{u(t-1)} L = lambda_{t-1} + grad_u r - (dg/du)^* lambda_t
            costate = math.hypot(costate, _sum_norm(multipliers[t - 1], tree.negative(swept)))
    _, (state_part, control_part) = autodiff.value_and_gradient(
        lambda state, whole: terminal_cost(problem, state, whole),
        states[-1],
        control,
        name="the terminal cost",
    )
    gradient.add(theta, control_part)
    # grad_{u(T)} L = lambda_T + grad_u l
    costate = math.hypot(costate, _sum_norm(multipliers[-1], state_part))
    return KKT(feasibility, costate, tree.norm(gradient.total()))


def _sum_norm(a: Tree, b: Tree) -> float:
    """Norm of a + b, None standing for zero."""
    return tree.norm(
        tree.map_leaves(lambda x, y: y if x is None else x if y is None else x + y, a, b)
    )
