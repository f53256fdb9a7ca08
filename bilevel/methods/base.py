"""What a method of finding hypergradients is asked, and what it answers."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from bilevel import autodiff, tree
from bilevel.autodiff import Linearisation
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import DivergenceError
from bilevel.inner.problem import BilevelProblem
from bilevel.linear.operator import LinearResult
from bilevel.optim.rules import InnerIteration, InnerOptimizer
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Warm:
    """What a warm start carries from one hypergradient to the next; everything detached.

    Attributes:
        state: of the inner optimiser: params, and momentum or moments.
        steps: inner steps made so far.
        linear: solution of the linear system, None if none was solved.
    """

    state: Tree
    steps: int
    linear: Tree = None


@dataclass(frozen=True, eq=False)
class Instance:
    """One hypergradient to be found: a bilevel problem at a control, with its batches.

    Attributes:
        problem: the objectives.
        optimizer: of the inner one.
        inner_steps: number of inner steps; the largest number if there is a tolerance.
        params: where the inner iteration starts, detached.
        control: the outer variable, detached.
        inner_batch: what the inner objective gets; constant or a `ByStep`.
        outer_batch: what the outer objective gets.
        warm: go on from there instead of `params`. A problem with `start` always begins there, and
            takes the linear solution alone.
        inner_tolerance: stop the inner iteration where the norm of its residual is at most this.
    """

    problem: BilevelProblem
    optimizer: InnerOptimizer
    inner_steps: int
    params: Tree
    control: Tree
    inner_batch: Any = None
    outer_batch: Any = None
    warm: Warm | None = None
    inner_tolerance: float | None = None

    @cached_property
    def dynamics(self) -> InnerIteration:
        """The inner iteration."""
        begun = self.warm if self.problem.start is None else None
        return InnerIteration(
            self.problem,
            self.optimizer,
            self.inner_batch,
            offset=begun.steps if begun else 0,
            goes_on=begun is not None,
        )

    @property
    def observation(self) -> Tree:
        """What the dynamics begins with: params, or a state to go on from."""
        return self.warm.state if self.warm and self.dynamics.goes_on else self.params

    @cached_property
    def horizon(self) -> int:
        """Inner steps to be made; with a tolerance, an iteration of its own finds out."""
        return self.inner_steps if self.inner_tolerance is None else self.iterated.steps

    @cached_property
    def iterated(self) -> "Iterated":
        """The end of the inner iteration, without its graph."""
        return self.iterate(self.inner_steps, self.inner_tolerance)

    def iterate(self, steps: int, tolerance: float | None = None) -> "Iterated":
        """Make inner steps without recording them.

        Args:
            steps: how many at most.
            tolerance: stop where the norm of the residual is at most this; looked at before the
                first step and then every tenth.

        Returns:
            The state reached and the number of steps made.
        """
        dynamics, control = self.dynamics, self.control
        state = first = dynamics.init(self.observation, control)
        autodiff.refuse_hidden(state, (), "start")
        for t in range(1, steps + 1):
            if tolerance is not None and t % 10 == 1:
                residual = dynamics.residual(dynamics.readout(state), control, t)
                if tree.norm(residual) <= tolerance:
                    return Iterated(state, t - 1)
            state = dynamics.step(state, control, t)
        self.check_end(state, first)
        return Iterated(state, steps)

    def check_end(self, state: Tree, first: Tree) -> None:
        """Refuse a last state that is not like the first, or not finite.

        Args:
            state: of the inner optimiser after the last step.
            first: before the first.

        Raises:
            StructureError: naming the leaf that differs.
            DivergenceError: naming the step where it began.
        """
        rule = type(self.optimizer).__name__
        tree.check_like(state, first, "state", f"{rule} must return a state like its own")
        self.check_finite(state)

    def check_finite(self, state: Tree) -> None:
        """Refuse a last state that is not finite.

        Args:
            state: of the inner optimiser after the last step.

        Raises:
            DivergenceError: naming the step where it began; it makes the steps once more.
        """
        if math.isfinite(tree.norm(state)):
            return
        state, made = self.dynamics.init(self.observation, self.control), 0
        while made < self.inner_steps and math.isfinite(tree.norm(state)):
            made += 1
            state = self.dynamics.step(state, self.control, made)
        where = f"after step {made} of {self.inner_steps}" if made else "where it starts"
        raise DivergenceError(
            f"the inner iteration is not finite {where}: try a smaller step size, or look for a "
            "square root or a division at zero in the inner objective."
        )

    def after(self, iterated: "Iterated") -> "Instance":
        """The rest of the inner iteration, from a state on its way."""
        return replace(
            self,
            problem=replace(self.problem, start=None),
            inner_steps=self.horizon - iterated.steps,
            warm=Warm(iterated.state, self.dynamics.offset + iterated.steps),
            inner_tolerance=None,
        )

    def control_problem(self) -> ControlProblem:
        """The inner iteration and the outer objective as a control problem (1)."""
        return ControlProblem(self.dynamics, self.outer, self.horizon)

    def outer(self, params: Tree, control: Tree) -> Tensor:
        """The outer objective with its batch, checked."""
        name = "the outer objective"
        value = autodiff.check_scalar(self.problem.outer(params, control, self.outer_batch), name)
        autodiff.refuse_hidden(value, (params, control), name)
        return value

    def outer_gradient(self, params: Tree) -> "OuterGradient":
        """Value and gradients of the outer objective at some params."""
        value, (in_params, in_control) = autodiff.value_and_gradient(  # which checks it
            lambda p, c: self.problem.outer(p, c, self.outer_batch),
            params,
            self.control,
            name="the outer objective",
        )
        return OuterGradient(value, in_params, in_control)

    def linearised(self, params: Tree) -> Linearisation:
        """The inner residual at some params, in params and control; batch of the last step."""
        t = max(self.horizon, 1)
        return Linearisation(
            lambda p, c: self.dynamics.residual(p, c, t),
            params,
            self.control,
            name="the inner objective",
        )


@dataclass(frozen=True, eq=False)
class Iterated:
    """Where inner steps led.

    Attributes:
        state: of the inner optimiser, detached.
        steps: made.
    """

    state: Tree
    steps: int


@dataclass(frozen=True, eq=False)
class OuterGradient:
    """The outer objective at a point.

    Attributes:
        value: F.
        in_params: grad_theta F, None where F does not read the leaf.
        in_control: grad_alpha F, likewise.
    """

    value: Tensor
    in_params: Tree
    in_control: Tree


@dataclass(frozen=True, eq=False)
class Truncation:
    """What a method left out of the sum (8) over the inner steps.

    Attributes:
        steps: inner steps whose terms were left out.
        error: norm of what they add up to, relative to that of the whole hypergradient; None if
            nothing is known about it.
        rigorous: whether `error` is a bound, given the constants; else it is an estimate.
    """

    steps: int
    error: float | None
    rigorous: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """What a method answers; everything detached.

    Attributes:
        value: F at the inner solution that was reached.
        gradient: the hypergradient, the structure of the control.
        state: last state of the inner optimiser.
        steps: inner steps made.
        outer: F and its gradients at the last params, where they were taken.
        linear: how the linear system was solved, where there was one.
        linearisation: of the residual at the last params, where it was built.
        truncation: what was left out; None if nothing was.
    """

    value: Tensor
    gradient: Tree
    state: Tree
    steps: int
    outer: OuterGradient | None = None
    linear: LinearResult | None = None
    linearisation: Linearisation | None = None
    truncation: Truncation | None = None


class HypergradientMethod(ABC):
    """How the multipliers of the inner iteration are found; a frozen dataclass."""

    @abstractmethod
    def find(self, instance: Instance) -> Found:
        """The hypergradient.

        Args:
            instance: problem, point and batches.

        Returns:
            It, and what was reached on the way.

        Raises:
            LostGradientError: if nothing reads a part of the control.
            ArgumentError: if the method does not apply to the instance.
        """
