"""The optimal control as a differentiable function of the parameters of its problem."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.riccati.controls import Point
from bilevel.control.riccati.sensitivity import Sensitivity
from bilevel.control.riccati.settings import Riccati
from bilevel.control.riccati.solving import Laid, Solved, laid_out, stages_of
from bilevel.control.riccati.sweep import Gains, Model, backward, model_of
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import ArgumentError, ConvergenceError
from bilevel.records import Record
from bilevel.tree import Tree

Solve = Callable[[Laid, Tree], tuple[Solved, Any]]  # -> what was found, and its record


@dataclass(frozen=True, eq=False, repr=False)
class Optimum(Record):
    """An optimal control, attached to the graph of the problem's parameters and observation.

    With `Riccati(batched=True)` everything has a leading axis, one entry a problem.

    Attributes:
        control: the structure of the control.
        states: u(0), ..., u(T).
        cost: J; its derivative is that of the Lagrangian, by the envelope theorem.
        solution: how it was found, detached; under `torch.func.vmap` a list of them.
    """

    control: Tree
    states: list[Tree]
    cost: Tensor
    solution: Any


class Optimal(autodiff.ByHand):
    """Optimal controls, states and costs as numbers, of leaves of parameters and observation."""

    def __init__(
        self,
        build: Callable[[Any], ControlProblem],
        settings: Riccati,
        given: tuple[Tree, Tree],
        control: Tree,
        solve: Solve,
        seen: list[tuple[Laid, Any]] | None = None,
    ) -> None:
        """Of problems that `build` makes; `given` are parameters and observation."""
        # What each evaluation saw: under vmap, each member's.
        self.seen: list[tuple[Laid, Any]] = [] if seen is None else seen
        self._build, self._settings, self._control = build, settings, control
        self._solve, self._given = solve, given
        leaves, self._structure = tree.flatten(given)
        self._places = [i for i, x in enumerate(leaves) if tree.is_variable(x)]
        self._leaves = leaves
        self._arguments: tuple[Tree, Tree]
        self._sensitivity: Sensitivity

    @property
    def variables(self) -> list[Tensor]:
        """The leaves that it is a function of."""
        return [self._leaves[i] for i in self._places]

    def again(self) -> "Optimal":  # noqa: D102
        return Optimal(
            self._build, self._settings, self._given, self._control, self._solve, self.seen
        )

    def _spread(self, values: list[Tensor]) -> tuple[Tree, Tree]:
        leaves = list(self._leaves)
        for i, x in zip(self._places, values, strict=True):
            leaves[i] = x
        return tree.unflatten(self._structure, leaves)

    def evaluate(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:  # noqa: D102
        self._arguments = parameters, observation = self._spread(inputs)
        problem = problem_of(self._build, parameters)
        laid = laid_out(self._settings, problem, observation, tree.detach(self._control))
        found, record = self._solve(laid, observation)
        self.seen.append((laid, record))
        final = found.final
        second = final.hessians(gauss_newton=False)
        limits = laid.limits and laid.limits.around(final.where)
        with autodiff.paused():
            model = model_of(final, second, limits)
            gains = backward(model, torch.zeros_like(final.cost))
        _check_strict(model, gains)

        def stages(parameters: Tree, observation: Tree) -> Any:
            problem = problem_of(self._build, parameters)
            return stages_of(problem, observation, laid)

        self._sensitivity = Sensitivity(stages, final.where, final.costates, model, gains)
        point = final.where.point
        return (
            point.own.clone(),
            point.shared.clone(),
            final.where.states.clone(),
            final.cost.clone(),
        )

    def pull(self, cotangents: list[Tensor]) -> tuple[Tensor, ...]:  # noqa: D102
        own, shared, states, cost = cotangents
        point = Point(own, shared)
        found = self._sensitivity.pull(self._arguments, point, states, cost)
        leaves = tree.leaves_of(found)
        return tuple(leaves[i] for i in self._places)

    def push(self, tangents: list[Tensor]) -> tuple[Tensor, ...]:  # noqa: D102
        nothing = tree.map_leaves(lambda _: None, self._arguments)
        leaves = tree.leaves_of(nothing)
        for i, x in zip(self._places, tangents, strict=True):
            leaves[i] = x
        directions = tree.unflatten(self._structure, leaves)
        moves, cost = self._sensitivity.push(self._arguments, directions)
        return moves.point.own, moves.point.shared, moves.states, cost

    def twice(self) -> str:  # noqa: D102
        return (
            "an optimum has first derivatives here, forward or reverse; a second one, as with "
            "create_graph=True, is not computed: differentiate it with bilevel.implicit, or take "
            "differences of gradients."
        )


def _check_strict(model: Model, gains: Gains) -> None:
    """Refuse optima that are no strict minima: their derivative would be rounding, or nothing."""
    flat = 100 * torch.finfo(model.terminal.dtype).eps * model.scale()
    pivots = [
        factor.diagonal(dim1=-2, dim2=-1).square().flatten(1)
        for factor in (gains.factors, gains.shared_factor)
    ]
    least = torch.cat([flat.unsqueeze(1) * 2, *pivots], 1).amin(1)
    bad = ((gains.failed >= 0) | (least <= flat)).nonzero().flatten().tolist()
    if bad:
        which = f" of problem {bad[0]}" if len(flat) > 1 else ""
        raise ConvergenceError(
            f"the optimum{which} has no derivative: its Hessian is not positive definite, so that "
            "it is no minimum, or not the only one near; give the control a cost of its own, or "
            "begin elsewhere."
        )


def problem_of(build: Callable[[Any], Any], parameters: Tree) -> ControlProblem:
    """What `build` makes, refused where it is no problem."""
    problem = build(parameters)
    if not isinstance(problem, ControlProblem):
        raise ArgumentError(
            "for optimum, build(parameters) must return a ControlProblem, got "
            f"{type(problem).__name__}; the observation is an argument of optimum."
        )
    return problem


def optimum_of(optimal: Optimal) -> Optimum:
    """Evaluate, and put the numbers into their trees again."""
    own, shared, states, cost = optimal(optimal.variables)
    laid, solution = optimal.seen[-1]
    if len(optimal.seen) > 1:
        solution = [record for _, record in optimal.seen]
    control = laid.controls.control(Point(own, shared))
    layout, fixed = laid.stages.state, laid.stages.state.fixed
    if laid.controls.batch is not None:
        trees = [layout.trees(x, fixed) for x in states.unbind(1)]
    else:
        trees, cost = [layout.tree(x, fixed) for x in states[0].unbind(0)], cost[0]
    return Optimum(control, trees, cost, solution)
