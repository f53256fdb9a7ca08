"""The outer loop: a control moved along its gradient by a torch optimiser."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel import autodiff, tree
from bilevel.checks import check_range, check_whole
from bilevel.errors import ArgumentError, DivergenceError
from bilevel.outer.watching import Progress, progress_bar
from bilevel.tree import Tree

MakeOptimizer = Callable[[list[Tensor]], Optimizer]


class Evaluation(Protocol):
    """What a descent needs to know of a control: an `Adjoint`, a `Hypergradient`."""

    @property
    def gradient(self) -> Tree:
        """In the control."""
        ...


@dataclass(frozen=True)
class Loop:
    """What both solvers' `solve` is told of its loop; `BilevelSolver.solve` says what each means.

    Raises:
        ArgumentError: if a number is out of range.
    """

    steps: int
    batches: Iterable[Any] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    project: Callable[[Tree], Tree] | None = None
    tolerance: float = 0.0
    callback: Callable[[Progress], bool | None] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        check_whole(self.steps, "steps")
        check_range(self.tolerance, "tolerance", least=0)


@dataclass(frozen=True, eq=False)
class Descent:
    """Where a descent ended.

    Attributes:
        control: the last one, detached.
        costs: before each update.
        gradient_norms: of the gradient before each update.
        converged: whether the norm of the gradient came down to the tolerance.
        standstill: whether the optimiser found no way down.
        last: cost, norm and evaluation as last seen; None if never.
        tolerance: that of the loop; 0 if none was asked for.
    """

    control: Tree
    costs: list[float]
    gradient_norms: list[float]
    converged: bool
    standstill: bool
    last: "tuple[float, float, Any] | None"
    tolerance: float


def adam(parameters: list[Tensor]) -> Optimizer:
    """The optimiser used if none is given: Adam at 0.01."""
    return torch.optim.Adam(parameters, lr=1e-2)


def descend(
    evaluate: Callable[[Tree, Any, int], tuple[float, Evaluation]],
    control: Tree,
    optimizer: MakeOptimizer,
    loop: Loop,
    accept: Callable[[Any], None] = lambda _found: None,
) -> Descent:
    """Move a copy of `control` against its gradient.

    Args:
        evaluate: `(control, batch, step) -> (cost, record with the gradient)`; raises where
            something is not finite. An update may ask several times (LBFGS).
        control: to begin with; it is copied, not changed.
        optimizer: makes a `torch.optim` optimiser; `step(closure)` is used always.
        loop: how long, on what, and who watches. Without batches `evaluate` gets None.
        accept: called with the first record of each update, once it is made.

    Returns:
        The last control and the history.

    Raises:
        ArgumentError: if batches are empty.
    """
    current = tree.map_leaves(
        lambda x: x.detach().clone().requires_grad_() if tree.is_variable(x) else x, control
    )
    torch_optimizer = optimizer([x for x in tree.leaves_of(current) if tree.is_variable(x)])
    schedule = None if loop.scheduler is None else loop.scheduler(torch_optimizer)
    stream = None if loop.batches is None else cycled(loop.batches)
    costs: list[float] = []
    norms: list[float] = []
    closure, converged, standstill = None, False, False
    with progress_bar(loop.steps, show=loop.progress) as advance:
        for step in range(1, loop.steps + 1):
            batch = None if stream is None else next(stream)
            closure = _Closure(evaluate, current, batch, step, loop.tolerance)
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
            if loop.project is not None:
                _assign(current, loop.project(tree.detach(current)))
            cost, norm, found = closure.seen()
            costs.append(cost)
            norms.append(norm)
            accept(found)
            advance(f"cost {cost:.4g}, gradient {norm:.2g}")
            seen = Progress(step, cost, norm, tree.detach(current), torch_optimizer, found)
            if loop.callback is not None and loop.callback(seen):
                break
    last = closure.seen() if closure is not None else None
    return Descent(tree.detach(current), costs, norms, converged, standstill, last, loop.tolerance)


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
    """Refuse a cost or gradient that is not finite."""
    if not (math.isfinite(cost) and math.isfinite(norm)):
        raise DivergenceError(
            f"iteration {step}: the cost is {cost:g}, the norm of its gradient {norm:g}; "
            f"{where()}. Try a smaller learning rate, or look for a square root or a division at "
            "zero."
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
