"""A control problem as functions of flat real vectors, of many problems and steps at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checks import check_scalar
from bilevel.control.riccati.constraints import Constraints, Duals, Values, penalty
from bilevel.control.riccati.controls import Controls
from bilevel.control.riccati.layout import Layout
from bilevel.control.riccati.mapping import Fixed, Mapped, Time
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import UnsupportedError
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Plan:
    """The controls of a roll-out: base + gains (u - around), cut off at low and high.

    Attributes:
        base: of each step, shape ``(b, T, m)``.
        shared: what is shared, ``(b, q)``.
        gains: ``(b, T, m, n)``; None for none.
        around: the states that the gains go by, ``(b, T, n)``.
        low: ``(b, T, m)``; None for no bounds.
        high: ``(b, T, m)``.
    """

    base: Tensor
    shared: Tensor
    gains: Tensor | None = None
    around: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


class Stages:
    """g0, g, r and l of B problems as functions of flat vectors.

    Attributes:
        problem: whose functions they are.
        controls: how its controls are laid out.
        n: numbers of a state.
        size: B.
        dtype: of the vectors.
        device: of the vectors.
        duals: multipliers of constraints; with them the costs are those of the augmented
            Lagrangian.
    """

    def __init__(
        self,
        problem: ControlProblem,
        observation: Tree,
        controls: Controls,
        example: Tree,
        constraints: Constraints | None = None,
    ) -> None:
        """`example` is u(0) of one problem."""
        self.constraints = constraints
        self.duals: Duals | None = None
        self.problem, self.controls = problem, controls
        self._dynamics = plain(problem.dynamics)
        self.size, batched = controls.batch or 1, controls.batch is not None
        self.dtype = controls.dtype
        for x in tree.leaves_of(example):
            if tree.is_variable(x):
                self.dtype = torch.promote_types(self.dtype, x.dtype.to_real())
        self.state = Layout(example, batched=False, dtype=self.dtype, device=controls.device)
        self.n, self.device = self.state.width, controls.device
        if batched and any(isinstance(x, Tensor) for x in self.state.fixed):
            raise UnsupportedError(
                "Riccati with batched=True needs a state of floating-point or complex tensors, got "
                f"{[*map(tree.kind, self.state.fixed)]} in u(0) beside: keep constants in the "
                "dynamics, or solve the problems one by one."
            )
        self._steps, self._problems = Mapped(), Mapped()
        self._looked = set[str]()  # functions whose graphs were searched
        observed, self._observed = tree.flatten(observation)
        self._observation = Fixed(observed, batched=batched)
        self._rest = Fixed(controls.rest_constants, batched=batched)
        self._each = [Fixed(x, batched=batched) for x in controls.step_constants]
        self._no_columns: list[list[Tensor]] = [[]] * (1 + len(self._each))
        self._same_constants = not any(x.columns for x in (self._rest, *self._each))
        # Whether steps differ in nothing but the number t.
        constants = any(controls.step_constants)
        self._alike = not constants or all(map(self._each[0].same, self._each))

    @property
    def at_once(self) -> bool:
        """Whether the user's functions have been mapped so far, not called one by one."""
        return self._steps.together and self._problems.together

    def refuse_hidden(self, outputs: Tree, inputs: Tree, name: str) -> None:
        """Refuse a function that closes over what requires grad, when it is first called."""
        if name not in self._looked:
            self._looked.add(name)
            autodiff.refuse_hidden(outputs, inputs, name)

    def one_by_one(self) -> None:
        """Call the user's steps one after another from now on."""
        self._steps.together = False

    def _columns(self, problems: Tensor) -> list[list[Tensor]]:
        """Constants of the control that differ from problem to problem."""
        if self._same_constants:
            return self._no_columns
        return [[x[problems] for x in fixed.columns] for fixed in (self._rest, *self._each)]

    def start(
        self, shared: Tensor, problems: Tensor, observation: list[Tensor] | None = None
    ) -> Tensor:
        """u(0) = g0(f; theta_0) of each problem, shape ``(b, n)``.

        Args:
            shared: w, shape ``(b, q)``.
            problems: which they are, shape ``(b,)``.
            observation: other leaves than those of the problem.

        Returns:
            The first states.
        """
        given = self._observation
        if observation is not None:
            given = Fixed(observation, batched=self.controls.batch is not None)

        def one(w: Tensor, observed: list[Tensor], rest: list[Tensor]) -> Tensor:
            f = tree.unflatten(self._observed, given.of(observed))
            theta = self.controls.initial(self.controls.pieces(w), self._rest.of(rest))
            return self.state.vector(self._dynamics.init(f, theta))

        observed = [x[problems] for x in given.columns]
        rest = [x[problems] for x in self._rest.columns]
        return self._problems.over(one, [shared, observed, rest], len(problems))

    def steps(self, parts: Sequence[Tensor], problems: Tensor) -> tuple[Tensor, Tensor]:
        """u(t) = g and r of every step.

        Args:
            parts: z = (u(t-1), shared, own), shapes ``(b, T, n)``, ``(b, T, q)``, ``(b, T, m)``.
            problems: which they are, shape ``(b,)``.

        Returns:
            Shapes ``(b, T, n)`` and ``(b, T)``.
        """
        b, horizon = parts[0].shape[:2]
        g, r = self.steps_in_turn([x.transpose(0, 1).flatten(0, 1) for x in parts], problems)
        return (
            g.unflatten(0, (horizon, b)).transpose(0, 1),
            r.unflatten(0, (horizon, b)).transpose(0, 1),
        )

    def steps_in_turn(self, parts: Sequence[Tensor], problems: Tensor) -> tuple[Tensor, Tensor]:
        """`steps` of rows that come step by step, those of all problems beside each other.

        Args:
            parts: as in `steps`, shapes ``(T b, n)``, ``(T b, q)``, ``(T b, m)``.
            problems: which they are, shape ``(b,)``.

        Returns:
            Shapes ``(T b, n)`` and ``(T b,)``.
        """
        if not len(parts[0]):
            return parts[0].new_zeros(0, self.n), parts[0].new_zeros(0)
        duals: list[Tensor] = []
        if self.duals is not None:
            some = self.duals.at(problems)
            b = len(problems)
            weight = some.weight.unsqueeze(1).expand(b, len(parts[0]) // b)
            each = some.inequality, some.equality, weight
            duals = [x.transpose(0, 1).flatten(0, 1) for x in each]
        return self._over_steps(self._step, parts, problems, duals)

    def constrained(
        self, where: Sequence[Tensor], end: Tensor, own: Tensor, problems: Tensor
    ) -> Values:
        """What the constraints are at a point.

        Args:
            where: as `parts` of `steps`.
            end: (u(T), w), shape ``(b, n + q)``.
            own: the steps' own controls, ``(b, T, m)``.
            problems: which they are, shape ``(b,)``.

        Returns:
            The values.
        """
        b, horizon = where[0].shape[:2]

        def at_step(z: list[Tensor], t: Any, rest: Any, constants: Any, duals: Any) -> Any:
            del duals
            state, theta = self._received(z, t, rest, constants)
            return self._both(self._constraints.at_step(self._dynamics.readout(state), theta, t))

        def at_end(u: Tensor, w: Tensor, own: Tensor, columns: Any) -> Any:
            state, control = self._ended(u, w, own, columns)
            return self._both(self._constraints.at_end(self._dynamics.readout(state), control))

        given = [end[:, : self.n], end[:, self.n :], own, self._columns(problems)]
        last = self._problems.over(at_end, given, b)
        none = end.new_zeros(b, 0, 0)
        if not horizon:
            return Values(none, none, *last)
        flat = [x.transpose(0, 1).flatten(0, 1) for x in where]
        found = self._over_steps(at_step, flat, problems, [])
        first = (x.unflatten(0, (horizon, b)).transpose(0, 1) for x in found)
        return Values(*first, *last)

    @property
    def _constraints(self) -> Constraints:
        assert self.constraints is not None
        return self.constraints

    def _both(self, found: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(0, dtype=self.dtype, device=self.device)
        first, second = (nothing if x is None else x.to(self.dtype) for x in found)
        return first, second

    def _over_steps(
        self, function: Any, parts: Sequence[Tensor], problems: Tensor, duals: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A function of one step, of every step of every problem."""
        b = len(problems)
        horizon = len(parts[0]) // b
        columns = self._columns(problems)
        if self._steps.together and self._alike:

            def one(z: list[Tensor], t: Tensor, rest: list[Tensor], duals: list[Tensor]) -> Any:
                return function(z, Time(t), rest, [], duals)

            times = torch.arange(1, horizon + 1, dtype=torch.float64, device=self.device)
            rest = [x.repeat(horizon, *[1] * (x.ndim - 1)) for x in columns[0]]
            given = [[*parts], times.repeat_interleave(b), rest, duals]
            found = self._steps.attempt(one, given)
            if found is not None:
                return found
        each = []
        for t in range(1, horizon + 1):

            def at(z: list[Tensor], rest: Any, own: Any, duals: Any, t: int = t) -> Any:
                return function(z, t, rest, own, duals)

            own = columns[t] if self._each else []
            here, there = ([x[(t - 1) * b : t * b] for x in xs] for xs in (parts, duals))
            each.append(self._problems.over(at, [here, columns[0], own, there], b))
        return torch.cat([g for g, _ in each]), torch.cat([r for _, r in each])

    def _received(self, z: list[Tensor], t: Any, rest: Any, constants: Any) -> tuple[Tree, Tree]:
        """u(t-1) and theta_t of one step's numbers."""
        u, w, own = z
        state = self.state.tree(u, self.state.fixed)
        each = self._each[(t if isinstance(t, int) else 1) - 1].of(constants) if self._each else []
        return state, self.controls.received(
            own, self.controls.pieces(w), each, self._rest.of(rest)
        )

    def _step(self, z: list[Tensor], t: Any, rest: Any, constants: Any, duals: Any) -> Any:
        state, theta = self._received(z, t, rest, constants)
        following = self.state.vector(self._dynamics.step(state, theta, t))
        cost = self._running(state, theta, t)
        if duals:
            found = self._constraints.at_step(self._dynamics.readout(state), theta, t)
            cost = cost + penalty(*found, *duals).to(self.dtype)
        return following, cost

    def _running(self, state: Tree, theta: Tree, t: Any) -> Tensor:
        if self.problem.running is None:
            return torch.zeros((), dtype=self.dtype, device=self.device)
        name = f"the running cost at t = {t}" if isinstance(t, int) else "the running cost"
        cost = self.problem.running(self._dynamics.readout(state), theta, t)
        return check_scalar(cost, name).to(self.dtype)

    def terminal(self, u: Tensor, w: Tensor, own: Tensor, problems: Tensor) -> Tensor:
        """l(u(T), Theta) of each problem, shape ``(b,)``."""
        duals: list[Tensor] = []
        if self.duals is not None:
            some = self.duals.at(problems)
            duals = [some.end_inequality, some.end_equality, some.weight]

        def one(u: Tensor, w: Tensor, own: Tensor, columns: Any, duals: Any) -> Tensor:
            state, control = self._ended(u, w, own, columns)
            cost = self.problem.final_cost(state, control).to(self.dtype)
            if duals:
                found = self._constraints.at_end(self._dynamics.readout(state), control)
                cost = cost + penalty(*found, *duals).to(self.dtype)
            return cost

        given = [u, w, own, self._columns(problems), duals]
        return self._problems.over(one, given, len(problems))

    def _ended(self, u: Tensor, w: Tensor, own: Tensor, columns: Any) -> tuple[Tree, Tree]:
        """u(T) and the whole control of one problem's numbers."""
        each = [fixed.of(x) for fixed, x in zip(self._each, columns[1:], strict=True)]
        pieces, rest = self.controls.pieces(w), self._rest.of(columns[0])
        return self.state.tree(u, self.state.fixed), self.controls.all_of(own, pieces, each, rest)

    def rollout(self, start: Tensor, plan: Plan, problems: Tensor) -> tuple[Tensor, Tensor]:
        """States u(0), ..., u(T) and the steps' own controls, under a feedback.

        Args:
            start: u(0), shape ``(b, n)``.
            plan: what the control of each step is.
            problems: which they are, shape ``(b,)``.

        Returns:
            Shapes ``(b, T + 1, n)`` and ``(b, T, m)``.
        """
        horizon = self.problem.horizon

        def one(u: Tensor, w: Tensor, parts: list[Any], columns: list[list[Tensor]]) -> Any:
            rest, pieces = self._rest.of(columns[0]), self.controls.pieces(w)
            (base,), feedback, limits = [[x.unbind(0) for x in part] for part in parts]
            fixed = self.state.fixed
            states, thetas = [u], []
            for t in range(horizon):
                theta = base[t]
                if feedback:
                    theta = torch.addmv(theta, feedback[0][t], u - feedback[1][t])
                if limits:
                    theta = torch.minimum(torch.maximum(theta, limits[0][t]), limits[1][t])
                each = self._each[t].of(columns[t + 1]) if self._each else []
                received = self.controls.received(theta, pieces, each, rest)
                state = self._dynamics.step(self.state.tree(u, fixed), received, t + 1)
                u = self.state.vector(state)
                states.append(u)
                thetas.append(theta)
            return torch.stack(states), torch.stack(thetas) if thetas else parts[0][0]

        feedback = [] if plan.gains is None else [plan.gains, plan.around]
        limits = [] if plan.low is None else [plan.low, plan.high]
        given = [start, plan.shared, [[plan.base], feedback, limits], self._columns(problems)]
        return self._problems.over(one, given, len(problems))
