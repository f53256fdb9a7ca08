"""The optimal control as a differentiable function of the parameters of its problem."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.conditions import Optimal, conditions
from bilevel.control.factors import factors_of
from bilevel.control.riccati.controls import Point
from bilevel.control.riccati.settings import Riccati
from bilevel.control.riccati.solving import Laid, Solved, laid_out, stages_of
from bilevel.control.second_order import shortcoming
from bilevel.control.sensitivity import Factors, Vector
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import ArgumentError
from bilevel.implicit_function.function import answered
from bilevel.implicit_function.question import Form, Question
from bilevel.outer.watching import OnFailure, report
from bilevel.records import Record
from bilevel.tree import Tree

Solve = Callable[[Laid, Tree], tuple[Solved, Any]]  # -> what was found, and its record
Build = Callable[[Any], ControlProblem]


@dataclass(frozen=True, eq=False, repr=False)
class Optimum(Record):
    """An optimal control, attached to the graph of the problem's parameters and observation.

    With `Riccati(batched=True)` everything has a leading axis, one entry a problem.

    Attributes:
        control: the structure of the control.
        states: u(0), ..., u(T).
        cost: J; its derivative is that of the Lagrangian, by the envelope theorem.
        solution: how it was found, detached; under `torch.func.vmap` a list of them.

    Example:
        >>> import torch, bilevel as bl
        >>> def build(target):
        ...     return bl.ControlProblem(
        ...         bl.Map(lambda u, c, t: u + c),
        ...         lambda u, c: ((u - target) ** 2).sum(),
        ...         horizon=2,
        ...         running=lambda u, c, t: 0.5 * (c**2).sum(),
        ...     )
        >>> target = torch.tensor(1.0, requires_grad=True)
        >>> solver = bl.ControlSolver(build, bl.Riccati())
        >>> start = bl.PerStep([torch.zeros(1)] * 2)
        >>> found = solver.optimum(target, torch.zeros(1), start)
        >>> found.states[-1].sum().backward()
        >>> target.grad  # u(2) = 0.8 target
        tensor(0.8000)
    """

    control: Tree
    states: list[Tree]
    cost: Tensor
    solution: Any


@dataclass(eq=False)
class Optima:
    """Optima of problems that `build` makes, each with the factors of its derivatives.

    Attributes:
        build: makes a problem of parameters.
        settings: of the solver.
        solve: finds an optimum.
        on_failure: what to do where derivatives are in doubt.
        seen: of each evaluation the layout, the record and the factors.
        complaints: what is to be said of them.
    """

    build: Build
    settings: Riccati
    solve: Solve
    on_failure: OnFailure
    seen: list[tuple[Laid, Any, Factors]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def found(self, parameters: Tree, observation: Tree, control: Tree) -> Optimal:
        """The optimum of one problem, or of one batch, from a control to begin with."""
        problem = problem_of(self.build, parameters)
        laid = laid_out(self.settings, problem, observation, control)
        found, record = self.solve(laid, observation)
        constraints = self.settings.constraints
        weight = 1.0 if constraints is None else constraints.weight
        self.complaints += filter(None, [shortcoming(found, record)])
        point, factors, said = factors_of(found, weight, len(self.seen))
        self.complaints += said
        self.seen.append((laid, record, factors))
        return point

    @property
    def conditions(self) -> Callable[[Optimal, Tree, Tree, Tree], Optimal]:
        """What vanishes at the optimum, as a function of the parameters too."""
        # Not a method: it reads nothing of the solver, where a derivative could be lost.
        build, constraints, seen = self.build, self.settings.constraints, self.seen

        def residual(y: Optimal, parameters: Tree, observation: Tree, _control: Tree) -> Optimal:
            problem = problem_of(build, parameters)
            stages = stages_of(problem, observation, seen[int(y.which)][0], constraints)
            return conditions(stages, observation, y)

        return residual

    def solved(self, point: list[Tensor], rhs: list[Tensor], axes: int) -> list[Tensor]:
        """The linear systems of derivatives: with their first axes, those of batches."""
        which = point[-1].reshape(-1)
        columns = [x.reshape(len(which), *x.shape[axes:]) for x in rhs]
        found = [torch.zeros_like(x) for x in columns]
        found[-1] = columns[-1].clone()  # the cost is its own equation: L is stationary
        for k in which.unique().tolist():
            i = (which == k).nonzero().squeeze(1)
            part = [x[i].movedim(0, -1) for x in columns[:-1]]
            # Of a cost alone, the multipliers that are known already are enough.
            if not any(bool(x.any()) for x in part):
                continue
            vector, mu = Vector(*part[:4]), part[4:]
            steps, end = torch.cat(mu[:2], 2), torch.cat(mu[2:], 1)
            y, (steps, end) = self.seen[k][2].solved(vector, (steps, end))
            sizes = mu[0].shape[2], mu[2].shape[1]
            parts = [
                *y,
                steps[:, :, : sizes[0]],
                steps[:, :, sizes[0] :],
                end[:, : sizes[1]],
                end[:, sizes[1] :],
            ]
            for into, x in zip(found, parts, strict=False):
                into[i] = x.movedim(-1, 0)
        return [x.reshape(y.shape) for x, y in zip(found, rhs, strict=True)]


def problem_of(build: Callable[[Any], Any], parameters: Tree) -> ControlProblem:
    """What `build` makes, refused where it is no problem."""
    problem = build(parameters)
    if not isinstance(problem, ControlProblem):
        raise ArgumentError(
            "for optimum, build(parameters) must return a ControlProblem, got "
            f"{type(problem).__name__}; the observation is an argument of optimum."
        )
    return problem


def optimum_of(optima: Optima, parameters: Tree, observation: Tree, control: Tree) -> Optimum:
    """Solve, and put the numbers into their trees again."""
    arguments = parameters, observation, tree.detach(control)
    question = Question(
        optima.found,
        optima.conditions,
        objective=False,
        linear=None,
        has_aux=False,
        vectorized=False,
        tolerance=0.0,
        on_failure=optima.on_failure,
        given=Form((arguments, {})),
        mapped=autodiff.transformed(),
        kept=optima.solved,
    )
    y: Optimal = answered(question)
    if optima.complaints:
        many = len(optima.complaints) - 1
        further = f" ({many} more of that kind)" if many else ""
        report(optima.complaints[0] + further, optima.on_failure, level=4)
    laid, solution, _ = optima.seen[-1]
    if len(optima.seen) > 1:
        solution = [record for _, record, _ in optima.seen]
    control = laid.controls.control(Point(y.own, y.shared))
    layout, fixed = laid.stages.state, laid.stages.state.fixed
    if laid.controls.batch is not None:
        trees, cost = [layout.trees(x, fixed) for x in y.states.unbind(1)], y.cost
    else:
        trees, cost = [layout.tree(x, fixed) for x in y.states[0].unbind(0)], y.cost[0]
    return Optimum(control, trees, cost, solution)
