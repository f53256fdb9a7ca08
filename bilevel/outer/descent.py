"""The outer loop: a control moved along its gradient by a torch optimiser."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel import tree
from bilevel.checks import check_arguments, check_kind, check_range, check_whole
from bilevel.errors import ArgumentError, DivergenceError
from bilevel.outer.batches import cycled
from bilevel.outer.leaves import Leaves
from bilevel.outer.watching import Progress, above_tolerance, progress_bar
from bilevel.tree import Tree

MakeOptimizer = Callable[[Leaves], Optimizer]


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
        ArgumentError: if a number is out of range, or a function is none.
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
        if not isinstance(self.batches, Iterable | None):
            came = type(self.batches).__name__
            raise ArgumentError(f"batches must be an iterable of batches, got {came}.")
        scheduler = "a function that makes one, such as lambda optimizer: StepLR(optimizer, 30)"
        check_function(self.scheduler, "scheduler", scheduler, "optimizer")
        check_function(self.project, "project", "a function control -> control", "control")
        check_function(self.callback, "callback", "a function of the progress", "progress")


def check_function(function: Any, name: str, wanted: str, argument: str) -> None:
    """Refuse what is neither None nor a function of one argument."""
    check_kind(function, Callable | None, name, wanted)
    if function is not None:
        check_arguments(function, name, argument)


def check_factory(optimizer: Any) -> None:
    """Refuse what makes no optimiser, an optimiser among them."""
    wanted = (
        "a function that makes a torch optimiser of the tensors it is given, such as "
        "lambda leaves: torch.optim.SGD(leaves, 0.1)"
    )
    check_kind(optimizer, Callable, "optimizer", wanted)
    check_arguments(optimizer, "optimizer", "leaves")


def adam(parameters: Leaves) -> Optimizer:
    """The optimiser used if none is given: Adam at 0.01."""
    return Adam(parameters, lr=1e-2)


class Descent:
    """A control on its way down, and how it came to where it is.

    Attributes:
        leaves: the variables that the optimiser moves; other leaves are carried.
        loop: how long, on what, and who watches.
        costs: before each update that was made.
        gradient_norms: of the gradient before each of them.
        converged: whether the norm of a gradient that may be trusted came down to the tolerance.
        standstill: whether the optimiser found no way down.
        last: cost, norm and evaluation as last seen; None if never.
    """

    def __init__(self, control: Tree, loop: Loop) -> None:
        """Begin with a copy of a control."""
        self.leaves, self.loop = Leaves(control), loop
        self.costs: list[float] = []
        self.gradient_norms: list[float] = []
        self.converged = self.standstill = False
        self.last: tuple[float, float, Any] | None = None
        # Where the last whole update led. The leaves themselves may stand at a trial of a line
        # search, or where an update made them infinite, when an error ends the loop.
        self._reached = [x.detach().clone() for x in self.leaves]

    @property
    def control(self) -> Tree:
        """The control after the last update, detached and finite."""
        return self.leaves.tree_of(self._reached)

    def run(
        self,
        evaluate: Callable[[Tree, Any, int], tuple[float, Evaluation]],
        make: MakeOptimizer,
        accept: Callable[[Any], None] = lambda _found: None,
        trusted: Callable[[Any], bool] = lambda _found: True,
    ) -> None:
        """Move the control against its gradient.

        Args:
            evaluate: `(control, batch, step) -> (cost, record with the gradient)`; raises where
                something is not finite. An update may ask several times (LBFGS). Without batches
                it gets None.
            make: makes a `torch.optim` optimiser; `step(closure)` is used always.
            accept: called with the first record of each update, once it is made.
            trusted: whether a record is good enough to end by its small gradient.

        Raises:
            ArgumentError: if batches are empty, or the optimiser is none or moves other tensors.
            DivergenceError: if an update leaves a control that is not finite.
        """
        loop, leaves = self.loop, self.leaves
        optimizer = _optimizer(make, leaves)
        schedule = _schedule(loop.scheduler, optimizer)
        stream = None if loop.batches is None else cycled(loop.batches)
        with progress_bar(loop.steps, show=loop.progress) as advance:
            for step in range(1, loop.steps + 1):
                batch = None if stream is None else next(stream)
                closure = _Closure(self, evaluate, trusted, batch, step)
                try:
                    optimizer.step(closure)
                except _ReachedError:
                    self.converged = True
                    break
                except StandstillError:
                    if stream is None:  # another batch may be another matter
                        self.standstill = True
                        break
                cost, norm, found = closure.seen()
                schedule(cost)
                if loop.project is not None:
                    leaves.assign(loop.project(leaves.now()))
                leaves.check_finite(step)
                self._made(cost, norm)
                accept(found)
                advance(f"cost {cost:.4g}, gradient {norm:.2g}")
                seen = Progress(step, cost, norm, leaves.now(), optimizer, found)
                if loop.callback is not None and loop.callback(seen):
                    break

    def ending(self, norm: float, *, converged: bool, judged: str) -> str:
        """Why it ended, in words; `judged` says whether the last gradient may be trusted."""
        tolerance, steps = self.loop.tolerance, len(self.costs)
        if tolerance > 0:
            within = f"the gradient norm {norm:.3g} is within the tolerance {tolerance:.3g}"
            if converged:
                return f"{within}; {judged}."
            if norm <= tolerance:
                return f"{within}, but that gradient is not to be trusted: {judged}"
            return above_tolerance(norm, tolerance, steps, standstill=self.standstill)
        if self.standstill:
            return "no step along the direction lowers the cost any further."
        early = "the callback ended it" if steps < self.loop.steps else "all that was asked for"
        return f"{steps} updates, {early}; no tolerance was given."

    def _made(self, cost: float, norm: float) -> None:
        """Note an update that is whole."""
        for kept, x in zip(self._reached, self.leaves, strict=True):
            kept.copy_(x.detach())
        self.costs.append(cost)
        self.gradient_norms.append(norm)


class StandstillError(Exception):
    """Raised by an optimiser that finds no step down, and left the control as it was."""


class _ReachedError(Exception):
    """The gradient is within the tolerance: no further update."""


class _Closure:
    """Sets `.grad` of our own copy of the control; keeps the first evaluation of an update."""

    def __init__(
        self,
        descent: Descent,
        evaluate: Callable[[Tree, Any, int], tuple[float, Evaluation]],
        trusted: Callable[[Any], bool],
        batch: Any,
        step: int,
    ) -> None:
        self._descent, self._evaluate, self._trusted = descent, evaluate, trusted
        self._batch, self._step = batch, step
        self._seen: tuple[float, float, Any] | None = None

    def __call__(self) -> float:
        leaves, tolerance = self._descent.leaves, self._descent.loop.tolerance
        cost, found = self._evaluate(leaves.control, self._batch, self._step)
        gradient = leaves.gathered(found.gradient)
        for leaf, slope in zip(leaves, gradient, strict=True):
            leaf.grad = slope
        if self._seen is None:
            self._seen = self._descent.last = cost, tree.norm(gradient), found
            if tolerance > 0 and self._seen[1] <= tolerance and self._trusted(found):
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


def _optimizer(make: MakeOptimizer, leaves: Leaves) -> Optimizer:
    """The optimiser, refused where it is none, or moves anything but the leaves."""
    optimizer = make(leaves)
    check_kind(optimizer, Optimizer, "what optimizer returns", "a torch.optim.Optimizer")
    ours = {id(x) for x in leaves}
    theirs = [x for group in optimizer.param_groups for x in group["params"]]
    if not all(id(x) in ours for x in theirs):
        raise ArgumentError(
            "the optimiser moves tensors that are not those of the control, of which solve makes "
            "a copy: build it from the list that the function is given, as in lambda leaves: "
            "torch.optim.SGD(leaves, 0.1)."
        )
    return optimizer


def _schedule(make: Any, optimizer: Optimizer) -> Callable[[float], None]:
    """What is called with the cost after each update."""
    if make is None:
        return lambda _cost: None
    schedule = make(optimizer)
    if not callable(getattr(schedule, "step", None)):
        raise ArgumentError(
            "scheduler must be a function that returns a learning-rate scheduler, got "
            f"{type(schedule).__name__} from it; return the one that it makes."
        )
    if isinstance(schedule, ReduceLROnPlateau):
        return schedule.step
    return lambda _cost: schedule.step()


def check_finite(cost: float, norm: float, step: int, where: Callable[[], str]) -> None:
    """Refuse a cost or gradient that is not finite."""
    if not (math.isfinite(cost) and math.isfinite(norm)):
        raise DivergenceError(
            f"iteration {step}: the cost is {cost:g}, the norm of its gradient {norm:g}; "
            f"{where()}. Try a smaller learning rate, or look for a square root or a division at "
            "zero."
        )
