r"""The inner iteration as a dynamics: :math:`\theta^{(t)} = \Phi(\theta^{(t-1)}, \alpha)`."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bilevel import autodiff, tree
from bilevel.dynamics.dynamics import Dynamics
from bilevel.errors import DivergenceError
from bilevel.inner.problem import BilevelProblem
from bilevel.inner.residuals import values
from bilevel.optim.rules import InnerOptimizer
from bilevel.settings import at_step
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class InnerIteration(Dynamics):
    """The inner steps of a bilevel problem as a dynamics; its control is the outer variable.

    Attributes:
        problem: the objectives.
        optimizer: the rule.
        batch: constant, or `Stepwise`.
        offset: inner steps made before, where the iteration goes on from a state.
        goes_on: whether the observation is a state of the optimiser instead of params to start at.
    """

    problem: BilevelProblem
    optimizer: InnerOptimizer
    batch: Any = None
    offset: int = 0
    goes_on: bool = False

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: D102
        state = self._first(observation, control)
        params, settings = self.optimizer.params(state), tree.detach(control)
        self.optimizer.check(params, settings, self.offset + 1)
        return state

    def _first(self, observation: Tree, control: Tree) -> Tree:
        if self.goes_on:
            return observation
        if self.problem.start is None:
            return self.optimizer.begin(observation)
        start = self.problem.start(observation, control)
        tree.check_like(start, observation, "params", "start must return params like those given")
        return self.optimizer.begin(start)

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        if self._meets:  # pulled back piece by piece
            state = autodiff.seam(state)
        try:
            if not self.optimizer.reversible:  # it makes its step by itself
                return self.optimizer.step(
                    state,
                    lambda params: self.gradient(params, control, t, check=t == 1),
                    control,
                    at_step(self.batch, self.offset + t),
                    self.offset + t,
                )
            gradient = self.gradient(self.optimizer.point(state), control, t, check=t == 1)
            if self.optimizer.searches:
                state = self._searched(state, gradient, control, t)
        except DivergenceError as error:
            raise DivergenceError(f"inner step {t}: {error}") from error
        return self.optimizer.update(state, gradient, control, self.offset + t)

    @cached_property
    def _meets(self) -> bool:
        """Whether processes meet in the inner objective."""
        return hasattr(self.problem.inner, "origin")

    def _searched(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        inner, batch = self.problem.inner, at_step(self.batch, self.offset + t)
        fixed = tree.detach(control)
        return self.optimizer.searched(
            state, gradient, control, self.offset + t, lambda params: inner(params, fixed, batch)
        )

    def readout(self, state: Tree) -> Tree:  # noqa: D102
        return self.optimizer.params(state)

    @property
    def origin(self) -> object:  # noqa: D102
        return getattr(self.problem.equation, "origin", self.problem.equation)

    def gradient(self, params: Tree, control: Tree, t: int, *, check: bool = False) -> Tree:
        """Gradient of the inner objective in the params, or the residual in its place, at `t`."""
        inner, batch = self.problem.inner, at_step(self.batch, self.offset + t)
        if self.problem.residual is not None:
            return values(self.problem.residual(params, control, batch), params, control)
        return autodiff.gradient(
            lambda p, c: inner(p, c, batch), params, control, name="inner objective", check=check
        )

    def residual(self, params: Tree, control: Tree, t: int) -> Tree:
        """What vanishes at the inner solution, with the batch of step `t`."""
        # Who tapes it differentiates the inner objective twice.
        taped = autodiff.is_taped((params, control))
        found = self.gradient(params, control, t, check=taped)
        return self.optimizer.residual(params, found, control, self.offset + t)
