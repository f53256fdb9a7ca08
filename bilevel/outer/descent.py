"""The outer loop: a control moved along its gradient by a torch optimiser."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel import autodiff, tree
from bilevel.checks import is_whole
from bilevel.errors import ArgumentError, ConvergenceError, ConvergenceWarning, DivergenceError
from bilevel.outer.progress import progress_bar
from bilevel.tree import Tree

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
OnFailure = Literal["warn", "raise", "ignore"]


class Evaluation(Protocol):
    """What a descent needs to know of a control: an `Adjoint`, a `Hypergradient`."""

    @property
    def gradient(self) -> Tree:
        """In the control."""
        ...


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback sees after each iteration.

    Attributes:
        step: iterations done, from 1.
        cost: J, or the outer objective F, before this iteration's update.
        gradient_norm: before the update.
        control: the present control, detached; it shares memory with the iteration.
        optimizer: as made by the solver, for its state and learning rates.
        found: the `Adjoint` or `Hypergradient` before the update.
    """

    step: int
    cost: float
    gradient_norm: float
    control: Tree
    optimizer: Optimizer
    found: Any


@dataclass(frozen=True, eq=False)
class Descent:
    """Where a descent ended.

    Attributes:
        control: the last one, detached.
        costs: before each update.
        gradient_norms: likewise.
        converged: whether the norm of the gradient came down to the tolerance.
        standstill: whether the optimiser found no way down.
        last: cost, norm and evaluation as last seen; None if never.
    """

    control: Tree
    costs: list[float]
    gradient_norms: list[float]
    converged: bool
    standstill: bool
    last: "tuple[float, float, Any] | None"


def adam(parameters: list[Tensor]) -> Optimizer:
    """The optimiser used if none is given: Adam at 0.01."""
    return torch.optim.Adam(parameters, lr=1e-2)


def descend(
    evaluate: Callable[[Tree, Any, int], tuple[float, Evaluation]],
    control: Tree,
    *,
    optimizer: MakeOptimizer,
    steps: int,
    batches: Iterable[Any] | None,
    scheduler: Callable[[Optimizer], LRScheduler] | None,
    project: Callable[[Tree], Tree] | None,
    tolerance: float,
    callback: Callable[[Progress], bool | None] | None,
    progress: bool,
    accept: Callable[[Any], None] = lambda _found: None,
) -> Descent:
    """Move a copy of `control` against its gradient.

    Args:
        evaluate: `(control, batch, step) -> (cost, record with the gradient)`; raises where
            something is not finite. An update may ask several times (LBFGS).
        control: to begin with; it is copied, not changed.
        optimizer: makes a `torch.optim` optimiser; `step(closure)` is used always.
        steps: updates at most.
        batches: one an update, begun again when they end; None gives `evaluate` None.
        scheduler: makes a learning-rate scheduler, stepped once an update.
        project: maps the control into its feasible set after each update.
        tolerance: stop when the norm of the gradient is at most this; 0 does not look.
        callback: called after each update; True stops the iteration.
        progress: show a bar.
        accept: called with the first record of each update, once it is made.

    Returns:
        The last control and the history.

    Raises:
        ArgumentError: if batches are empty, or `steps` or `tolerance` is negative.
    """
    if not is_whole(steps) or not tolerance >= 0:
        raise ArgumentError(
            f"steps must be a whole number >= 0 and tolerance >= 0, got {steps} and {tolerance}."
        )
    current = tree.map_leaves(
        lambda x: x.detach().clone().requires_grad_() if tree.is_variable(x) else x, control
    )
    torch_optimizer = optimizer([x for x in tree.leaves_of(current) if tree.is_variable(x)])
    schedule = None if scheduler is None else scheduler(torch_optimizer)
    stream = None if batches is None else cycled(batches)
    costs: list[float] = []
    norms: list[float] = []
    closure, converged, standstill = None, False, False
    with progress_bar(steps, show=progress) as advance:
        for step in range(1, steps + 1):
            batch = None if stream is None else next(stream)
            closure = _Closure(evaluate, current, batch, step, tolerance)
            try:
                torch_optimizer.step(closure)
            except _ReachedError:
                converged = True
                break
            except StandstillError:
                if stream is None:  # another batch may be another matter
                    standstill = True
                    break
            if schedule is not None:
                schedule.step()
            if project is not None:
                _assign(current, project(tree.detach(current)))
            cost, norm, found = closure.seen()
            costs.append(cost)
            norms.append(norm)
            accept(found)
            advance(f"cost {cost:.4g}, gradient {norm:.2g}")
            seen = Progress(step, cost, norm, tree.detach(current), torch_optimizer, found)
            if callback is not None and callback(seen):
                break
    last = closure.seen() if closure is not None else None
    return Descent(tree.detach(current), costs, norms, converged, standstill, last)


class StandstillError(Exception):
    """Raised by an optimiser that finds no step down, and left the control as it was."""


class _ReachedError(Exception):
    """The gradient is within the tolerance: no further update."""


class _Closure:
    """Sets `.grad` of our own copy of the control; keeps the first evaluation of an update."""

    def __init__(
        self, evaluate: Callable, control: Tree, batch: Any, step: int, tolerance: float
    ) -> None:
        self._evaluate, self._control = evaluate, control
        self._batch, self._step, self._tolerance = batch, step, tolerance
        self._seen: tuple[float, float, Any] | None = None

    def __call__(self) -> float:
        cost, found = self._evaluate(self._control, self._batch, self._step)
        for leaf, gradient in zip(
            tree.leaves_of(self._control), tree.leaves_of(found.gradient), strict=True
        ):
            if tree.is_variable(leaf):
                leaf.grad = gradient
        if self._seen is None:
            self._seen = cost, tree.norm(found.gradient), found
            if self._tolerance > 0 and self._seen[1] <= self._tolerance:
                raise _ReachedError
        return cost

    def seen(self) -> tuple[float, float, Any]:
        """Cost, norm and record of the first evaluation."""
        if self._seen is None:
            raise ArgumentError(
                "the optimiser made a step without asking for the gradient: step(closure) must "
                "call the closure, as every optimiser of torch.optim does."
            )
        return self._seen


def check_finite(cost: float, norm: float, step: int, where: Callable[[], str]) -> None:
    """Refuse a cost or gradient that is not finite.

    Args:
        cost: of the iteration.
        norm: of its gradient.
        step: the iteration.
        where: finds out what was not finite first.

    Raises:
        DivergenceError: naming the iteration.
    """
    if not (math.isfinite(cost) and math.isfinite(norm)):
        raise DivergenceError(
            f"iteration {step}: the cost is {cost:g}, the norm of its gradient {norm:g}; "
            f"{where()}. Try a smaller learning rate, or look for a square root or a division at "
            "zero."
        )


def check_on_failure(value: Any) -> None:
    """Refuse anything but the three ways to fail."""
    if value not in ("warn", "raise", "ignore"):
        raise ArgumentError(f"on_failure must be 'warn', 'raise' or 'ignore', got {value!r}.")


def report(message: str, on_failure: OnFailure, *, level: int = 3) -> None:
    """Warn, raise, or be silent, as asked.

    Args:
        message: what was not reached.
        on_failure: as the solver has it.
        level: whose line the warning names, counted from here.

    Raises:
        ConvergenceError: if asked to.
    """
    if on_failure == "raise":
        raise ConvergenceError(message)
    if on_failure == "warn":
        warnings.warn(message, ConvergenceWarning, stacklevel=level)


def above_tolerance(norm: float, tolerance: float, steps: int, *, standstill: bool = False) -> str:
    """What to say of a descent that did not converge."""
    remedy = (
        "no step along the direction lowers the cost any further: take a larger tolerance, float64,"
        " or costs that are smooth."
        if standstill
        else "take more steps, another optimiser, or a larger tolerance."
    )
    return (
        f"the gradient norm is {norm:.3g} after {steps} steps, above the tolerance "
        f"{tolerance:.3g}: {remedy}"
    )


def _assign(target: Tree, values: Tree) -> None:
    with autodiff.paused():
        for old, new in zip(tree.leaves_of(target), tree.leaves_of(values), strict=True):
            if tree.is_variable(old):
                old.copy_(new)


def cycled(batches: Iterable[Any]) -> Iterator[Any]:
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
