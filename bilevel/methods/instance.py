"""A hypergradient to be found, and what every method does with it: iterate, and look at the end."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from bilevel import autodiff, tree
from bilevel.autodiff import Linearisation
from bilevel.checks import check_scalar
from bilevel.dynamics.problem import ControlProblem, precise
from bilevel.dynamics.steps import first_infinite, walk
from bilevel.errors import DivergenceError
from bilevel.inner.iteration import InnerIteration
from bilevel.inner.problem import BilevelProblem, Objective
from bilevel.optim.rules import InnerOptimizer
from bilevel.outer.keep import Keep
from bilevel.settings import Stepwise, at_step
from bilevel.sweeps.randomness import RandomState, devices_of, preserved
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Warm:
    """Where an inner iteration has come to, and may go on; everything detached.

    Attributes:
        state: of the inner optimiser: params, and momentum or moments.
        steps: inner steps made so far, those before a warm start included.
        linear: solution of the linear system, None if none was solved.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=40)
        >>> zero, three = torch.tensor(0.0), torch.tensor(3.0)
        >>> found = solver.hypergradient(zero, three)
        >>> again = solver.hypergradient(zero, three, warm=found.warm)  # goes on
        >>> found.warm.steps, again.warm.steps
        (40, 80)
    """

    state: Tree
    steps: int
    linear: Tree = None


@dataclass(eq=False)
class Draws:
    """What the outer objective drew, a dropout mask or a minibatch: a certificate sees the same.

    Attributes:
        state: where the generators stood before; None if it drew nothing.
    """

    state: RandomState | None = None

    def state_dict(self) -> Any:
        """Where they stood."""
        return None if self.state is None else self.state.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """What was kept of a sweep whose end had been evaluated."""
        self.state = None if state is None else RandomState.of(state)

    @contextmanager
    def noted(self, values: Tree) -> Iterator[None]:
        """Inside, the outer objective of these values is evaluated for the first time."""
        before = RandomState.capture(devices_of(values))
        yield
        self.state = None if before.stands() else before

    @contextmanager
    def repeated(self, values: Tree) -> Iterator[None]:
        """Inside, it draws what it drew; outside, the generators stand as if it had not been."""
        if self.state is None:
            with self.noted(values):
                yield
            return
        with preserved(devices_of(values)):
            self.state.restore()
            yield


@dataclass(frozen=True, eq=False)
class Instance:
    """One hypergradient to be found: a bilevel problem at a control, with its batches.

    Attributes:
        problem: the objectives.
        optimizer: of the inner one.
        inner_steps: number of inner steps; the largest number if there is a tolerance.
        params: where the inner iteration starts, detached.
        control: the outer variable, detached.
        inner_batch: what the inner objective gets; constant, or `Stepwise`.
        outer_batch: what the outer objective gets.
        linear_batch: what the inner objective gets where its solution is judged and linearised;
            None is the inner batch, of steps by the batch that of the last step.
        warm: go on from there instead of `params`. A problem with `start` always begins there, and
            takes the linear solution alone.
        inner_tolerance: stop the inner iteration where the norm of its residual is at most this.
        draws: of the outer objective.
        known: the end of the inner iteration, where it has been made.
        keep: keeps the sweep of a method that has one; its `conditions` tell the batches.
        resume: whether it goes on from there.

    Raises:
        StructureError: if the warm start does not fit the params.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> zero, three = torch.tensor(0.0), torch.tensor(3.0)
        >>> instance = Instance(problem, bl.optim.SGD(0.5), 40, params=zero, control=three)
        >>> bl.MLM().find(instance).gradient  # 2 (a - 1)
        tensor(4.)
    """

    problem: BilevelProblem
    optimizer: InnerOptimizer
    inner_steps: int
    params: Tree
    control: Tree
    inner_batch: Any = None
    outer_batch: Any = None
    linear_batch: Any = None
    warm: Warm | None = None
    inner_tolerance: float | None = None
    draws: Draws = field(default_factory=Draws)
    known: Warm | None = None
    keep: Keep | None = None
    resume: bool | int = False

    def __post_init__(self) -> None:
        if self._begun is not None:
            like = self.optimizer.begin(self.params)
            source = "a warm start must fit the params"
            tree.check_like(self._begun.state, like, "warm.state", source)

    @property
    def _begun(self) -> Warm | None:
        """What the inner iteration goes on from; None where it begins at the start or params."""
        return self.warm if self.problem.start is None else None

    @property
    def observation(self) -> Tree:
        """What the dynamics begins with: params, or a state to go on from."""
        return self.params if self._begun is None else self._begun.state

    @property
    def linear_start(self) -> Tree:
        """First iterate of the linear system; None is zero."""
        return None if self.warm is None else self.warm.linear

    @cached_property
    def dynamics(self) -> InnerIteration:
        """The inner iteration."""
        begun = self._begun
        return InnerIteration(
            self.problem,
            self.optimizer,
            self.inner_batch,
            offset=0 if begun is None else begun.steps,
            goes_on=begun is not None,
        )

    @cached_property
    def horizon(self) -> int:
        """Inner steps to be made; with a tolerance, an iteration of its own finds out."""
        if self.inner_tolerance is None:
            return self.inner_steps
        return self.iterated.steps - self.dynamics.offset

    @property
    def last_step(self) -> int:
        """The last inner step, counted over a warm start's history."""
        return self.dynamics.offset + max(self.horizon, 1)

    @property
    def symmetric(self) -> bool:
        """Whether the derivative of the inner residual in the params is known to be."""
        return self.optimizer.symmetric and self.problem.residual is None

    @property
    def residual_is_gradient(self) -> bool:
        """Whether the control enters the residual through the inner objective alone."""
        return self.optimizer.residual_is_gradient and self.problem.residual is None

    @property
    def by_batches(self) -> bool:
        """Whether the steps saw batches, and nothing else is given to judge their end by."""
        return isinstance(self.inner_batch, Stepwise) and self.linear_batch is None

    @cached_property
    def judging_batch(self) -> Any:
        """The batch by which the inner solution is judged and linearised."""
        if self.linear_batch is not None:
            return self.linear_batch
        return at_step(self.inner_batch, self.last_step)

    @cached_property
    def iterated(self) -> Warm:
        """The end of the inner iteration, without its graph."""
        if self.known is not None:
            return self.known
        return self.iterate(self.inner_steps, self.inner_tolerance)

    def iterate(self, steps: int, tolerance: float | None = None) -> Warm:
        """Make inner steps without recording them."""
        made, state = 0, None
        for made, state in enumerate(walk(self.dynamics, self.observation, self.control, steps)):
            if not made:
                autodiff.refuse_hidden(state, (), "start")
            if tolerance is not None and made % 10 == 0 and made < steps:
                params = self.dynamics.readout(state)
                residual = self.dynamics.residual(params, self.control, made + 1)
                if tree.norm(residual) <= tolerance:
                    break
        self.check_finite(state)
        return self.reached(state, made)

    def reached(self, state: Tree, made: int, linear: Tree = None) -> Warm:
        """The record of a state after so many steps from where the iteration began."""
        return Warm(tree.detach(state), self.dynamics.offset + made, linear)

    def check_finite(self, state: Tree) -> None:
        """Refuse a last state that is not finite."""
        if math.isfinite(tree.norm(state)):
            return
        given = tree.detach(self.observation), self.control, self.inner_steps
        made = first_infinite(self.dynamics, *given)
        where = f"after step {made} of {self.inner_steps}" if made else "where it starts"
        raise DivergenceError(
            f"the inner iteration is not finite {where}: try a smaller step size, or look for a "
            "square root or a division at zero in the inner objective."
        )

    def after(self, warm: Warm) -> "Instance":
        """The rest of the inner iteration, from a state on its way."""
        return replace(
            self,
            problem=replace(self.problem, start=None),
            inner_steps=self.last_step - warm.steps,
            warm=warm,
            inner_tolerance=None,
            known=None,
        )

    def beside(self, outer: Objective) -> "Instance":
        """The same inner iteration with another outer objective."""
        problem = replace(self.problem, outer=outer)
        return replace(self, problem=problem, draws=Draws())

    def on_kink(self, params: Tree) -> bool:
        """Whether the rule is not differentiable at some params, as near as they are known."""
        judging = replace(self.dynamics, batch=self.judging_batch)
        gradient = judging.gradient(params, self.control, max(self.horizon, 1))
        return self.optimizer.on_kink(params, gradient, self.control, self.last_step)

    def control_problem(self) -> ControlProblem:
        """The inner iteration and the outer objective as a control problem (1)."""
        running = None if self.problem.outer_each is None else self.running
        return ControlProblem(self.dynamics, self.outer, self.horizon, running)

    def running(self, params: Tree, control: Tree, t: int) -> Tensor:
        """What the outer objective is increased by at inner step t."""
        value = self.problem.running(params, control, self.outer_batch, t)
        return check_scalar(value, "outer_each")

    def value(self) -> Tensor:
        """The outer objective at the end of the inner iteration, with what comes on the way."""
        if self.problem.outer_each is None:
            return self.outer(self.dynamics.readout(self.iterated.state), self.control)
        total, state = 0.0, None
        states = walk(self.dynamics, self.observation, self.control, self.horizon)
        for made, state in enumerate(states):
            if made < self.horizon:
                params = self.dynamics.readout(state)
                total = total + precise(self.running(params, self.control, made + 1).detach())
        self.check_finite(state)
        return total + self.outer(self.dynamics.readout(state), self.control)

    def outer(self, params: Tree, control: Tree) -> Tensor:
        """The outer objective with its batch, checked."""
        name = "the outer objective"
        with self.draws.noted((params, control)):
            value = check_scalar(self.problem.outer(params, control, self.outer_batch), name)
        autodiff.refuse_hidden(value, (params, control), name)
        return value

    def outer_gradient(self, params: Tree) -> "OuterGradient":
        """Value and gradients of the outer objective at some params, with the draws it had."""
        with self.draws.repeated((params, self.control)):
            value, (in_params, in_control) = autodiff.value_and_gradient(  # which checks it
                lambda p, c: self.problem.outer(p, c, self.outer_batch),
                params,
                self.control,
                name="the outer objective",
            )
        return OuterGradient(value, in_params, in_control)

    def draws_inside(self, evaluate: Callable[[], Any]) -> tuple[Any, bool]:
        """What `evaluate` returns, and whether the inner objective in it drew at random."""
        before = RandomState.capture(devices_of((self.params, self.control)))
        found = evaluate()
        return found, not before.stands()

    def linearised(self, params: Tree) -> Linearisation:
        """The inner residual at some params, in params and control, with the judging batch."""
        name = "objective" if self.problem.residual is None else "residual"
        return Linearisation(self.residual, params, self.control, name=f"the inner {name}")

    def residual(self, params: Tree, control: Tree) -> Tree:
        """What vanishes at the inner solution, with the judging batch."""
        t = max(self.horizon, 1)  # counted by the dynamics from where it began
        return replace(self.dynamics, batch=self.judging_batch).residual(params, control, t)


@dataclass(frozen=True, eq=False)
class OuterGradient:
    """The outer objective at a point.

    Attributes:
        value: F.
        in_params: grad_theta F, None where F does not read the leaf.
        in_control: grad_alpha F, None where F does not read the leaf.
    """

    value: Tensor
    in_params: Tree
    in_control: Tree
