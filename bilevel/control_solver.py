"""Algorithm 2: forward sweep, multiplier sweep, one step of a torch optimiser with equation (8)."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel import autodiff, tree
from bilevel.checkpointing import Budget, Checkpointing
from bilevel.control import ControlProblem
from bilevel.dynamics import initial_control, step_control
from bilevel.errors import ArgumentError, ConvergenceError, ConvergenceWarning, DivergenceError
from bilevel.lagrangian import Adjoint, adjoint
from bilevel.tree import Tree

Build = Callable[[Any], tuple[ControlProblem, Tree]]  # batch -> (problem, observation)


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback sees after each iteration.

    Attributes:
        step: iterations done, from 1.
        cost: J before this iteration's update.
        gradient_norm: of (8), before the update.
        control: the present control, detached; it shares memory with the iteration.
        optimizer: as made by the solver, for its state and learning rates.
    """

    step: int
    cost: float
    gradient_norm: float
    control: Tree
    optimizer: Optimizer


@dataclass(frozen=True, eq=False)
class ControlSolution:
    """The control found, and how.

    Attributes:
        control: the last control, detached.
        cost: J at the last control; with batches, as last evaluated, NaN if never.
        gradient_norm: of (8), likewise.
        costs: J before each update.
        gradient_norms: of (8), before each update.
        steps: updates made.
        converged: whether the gradient norm came down to the tolerance.
        adjoint: states, multipliers and gradient at the last control; None with batches.
    """

    control: Tree
    cost: float
    gradient_norm: float
    costs: list[float]
    gradient_norms: list[float]
    steps: int
    converged: bool
    adjoint: Adjoint | None


def _adam(parameters: list[Tensor]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


@dataclass(frozen=True)
class ControlSolver:
    """First-order solver of control problems.

    Attributes:
        problem: a `ControlProblem`, or `build(batch) -> (ControlProblem, observation)` for data
            that comes in batches.
        optimizer: makes a `torch.optim` optimiser from a list of tensors; called once a solve.
            `step(closure)` is used always, so that LBFGS works.
        checkpointing: of the sweeps; None is `Checkpointing()`.
        on_failure: what to do when a tolerance was asked for and not reached.

    Raises:
        ArgumentError: if a field is not what it should be.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda state, control, t: state + control),
        ...     terminal=lambda state, control: state**2 / 2,
        ...     running=lambda state, control, t: control**2 / 2,
        ...     horizon=3,
        ... )
        >>> solver = ControlSolver(problem, lambda p: torch.optim.SGD(p, 0.1))
        >>> found = solver.solve(torch.tensor(0.0), torch.tensor(4.0), steps=100)
        >>> round(float(found.control), 5)  # theta* = -x0 / (T + 1)
        -1.0
    """

    problem: ControlProblem | Build
    optimizer: Callable[[list[Tensor]], Optimizer] = _adam
    checkpointing: Checkpointing | Budget | None = None
    on_failure: Literal["warn", "raise", "ignore"] = "warn"

    def __post_init__(self) -> None:
        """Check the fields."""
        if not (isinstance(self.problem, ControlProblem) or callable(self.problem)):
            raise ArgumentError(
                "problem must be a ControlProblem or a function build(batch) -> (ControlProblem, "
                f"observation), got {type(self.problem).__name__}."
            )
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise ArgumentError(
                f"on_failure must be 'warn', 'raise' or 'ignore', got {self.on_failure!r}."
            )

    def solve(
        self,
        control: Tree,
        observation: Tree = None,
        *,
        steps: int = 100,
        batches: Iterable[Any] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        project: Callable[[Tree], Tree] | None = None,
        tolerance: float = 0.0,
        callback: Callable[[Progress], bool | None] | None = None,
    ) -> ControlSolution:
        """Minimise J over the control, from `control`.

        Args:
            control: Theta to begin with; it is copied, not changed.
            observation: f, if the solver holds one problem.
            steps: updates at most.
            batches: what `build` gets, one batch an update; begun again when it ends.
            scheduler: makes a learning-rate scheduler, stepped once an update.
            project: maps the control into its feasible set after each update.
            tolerance: stop when the norm of (8) is at most this.
            callback: called after each update; True stops the iteration.

        Returns:
            The last control and the history.

        Raises:
            ArgumentError: if batches are missing, empty, or given without `build`, or `steps` or
                `tolerance` is negative.
            ConvergenceError: if the tolerance was not reached and `on_failure` is "raise".
            DivergenceError: if cost or gradient are not finite; it names where that began.
        """
        if isinstance(self.problem, ControlProblem) == (batches is not None):
            raise ArgumentError(
                "batches go with a solver that holds build(batch); a solver that holds one "
                "ControlProblem takes an observation instead."
            )
        if steps < 0 or not tolerance >= 0:
            raise ArgumentError(f"steps and tolerance must be >= 0, got {steps} and {tolerance}.")
        current = tree.map_leaves(
            lambda x: x.detach().clone().requires_grad_() if tree.is_variable(x) else x, control
        )
        optimizer = self.optimizer([x for x in tree.leaves_of(current) if tree.is_variable(x)])
        schedule = None if scheduler is None else scheduler(optimizer)
        stream = None if batches is None else _cycle(batches)
        costs: list[float] = []
        norms: list[float] = []
        cost, norm = math.nan, math.nan
        converged = False
        for step in range(1, steps + 1):
            problem, given = self._next(observation, stream)
            evaluate = _Closure(self, problem, given, current, step, tolerance)
            try:
                optimizer.step(evaluate)
            except _ReachedError:
                cost, norm, converged = evaluate.cost, evaluate.gradient_norm, True
                break
            if schedule is not None:
                schedule.step()
            if project is not None:
                _assign(current, project(tree.detach(current)))
            cost, norm = evaluate.cost, evaluate.gradient_norm
            costs.append(cost)
            norms.append(norm)
            seen = Progress(step, cost, norm, tree.detach(current), optimizer)
            if callback is not None and callback(seen):
                break
        final = None
        if isinstance(self.problem, ControlProblem):
            final = self._adjoint(self.problem, observation, current, len(costs), keep=True)
            cost, norm = float(final.cost), tree.norm(final.gradient)
            converged = norm <= tolerance if tolerance > 0 else converged
        if tolerance > 0 and not converged:
            self._report(norm, tolerance, len(costs))
        return ControlSolution(
            tree.detach(current), cost, norm, costs, norms, len(costs), converged, final
        )

    def _next(self, observation: Tree, stream: Iterator[Any] | None) -> tuple[ControlProblem, Tree]:
        if isinstance(self.problem, ControlProblem):
            return self.problem, observation
        return self.problem(next(stream))  # pyright: ignore[reportArgumentType]

    def _adjoint(
        self,
        problem: ControlProblem,
        observation: Tree,
        control: Tree,
        step: int,
        keep: bool = False,
    ) -> Adjoint:
        found = adjoint(
            problem,
            observation,
            control,
            checkpointing=self.checkpointing,
            keep_states=keep,
            keep_multipliers=keep,
        )
        norm = tree.norm(found.gradient)
        if not (math.isfinite(float(found.cost)) and math.isfinite(norm)):
            raise DivergenceError(
                f"iteration {step}: the cost is {float(found.cost):g}, the norm of its gradient "
                f"{norm:g}; {_where(problem, observation, control)}. Try a smaller learning rate, "
                "or look for a square root or a division at zero."
            )
        return found

    def _report(self, norm: float, tolerance: float, steps: int) -> None:
        message = (
            f"the gradient norm is {norm:.3g} after {steps} steps, above the tolerance "
            f"{tolerance:.3g}: take more steps, another optimiser, or a larger tolerance."
        )
        if self.on_failure == "raise":
            raise ConvergenceError(message)
        if self.on_failure == "warn":
            warnings.warn(message, ConvergenceWarning, stacklevel=3)


class _ReachedError(Exception):
    """The gradient is within the tolerance: no further update."""


class _Closure:
    """Sets `.grad` of our own copy of the control; keeps the first evaluation of an update."""

    def __init__(
        self,
        solver: ControlSolver,
        problem: ControlProblem,
        observation: Tree,
        control: Tree,
        step: int,
        tolerance: float,
    ) -> None:
        self._solver, self._problem, self._observation = solver, problem, observation
        self._control, self._step, self._tolerance = control, step, tolerance
        self.cost, self.gradient_norm = math.nan, math.nan

    def __call__(self) -> float:
        found = self._solver._adjoint(self._problem, self._observation, self._control, self._step)
        for leaf, gradient in zip(
            tree.leaves_of(self._control), tree.leaves_of(found.gradient), strict=True
        ):
            if tree.is_variable(leaf):
                leaf.grad = gradient
        if math.isnan(self.cost):
            self.cost, self.gradient_norm = float(found.cost), tree.norm(found.gradient)
            if self._tolerance > 0 and self.gradient_norm <= self._tolerance:
                raise _ReachedError
        return float(found.cost)


def _where(problem: ControlProblem, observation: Tree, control: Tree) -> str:
    """Which state is the first that is not finite."""
    observation, control = tree.detach((observation, control))
    state = problem.dynamics.init(observation, initial_control(control))
    for t in range(problem.horizon + 1):
        if t:
            state = problem.dynamics.step(state, step_control(control, t), t)
        if not math.isfinite(tree.norm(state)):
            return f"u({t}) is the first state that is not finite"
    return "every state is finite, so a cost or a derivative is not"


def _assign(target: Tree, values: Tree) -> None:
    with autodiff.paused():
        for old, new in zip(tree.leaves_of(target), tree.leaves_of(values), strict=True):
            if tree.is_variable(old):
                old.copy_(new)


def _cycle(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches again and again; an error if a round is empty."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ArgumentError(
                "batches gave nothing: pass a list or a DataLoader with at least one batch; an "
                "iterator can be read only once."
            )
