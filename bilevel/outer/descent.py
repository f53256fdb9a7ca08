"""The outer loop: a control moved along its gradient by a torch optimiser."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel import autodiff, tree
from bilevel.checks import check_arguments, check_kind, check_range, check_whole
from bilevel.errors import ArgumentError, DivergenceError
from bilevel.outer.batches import feed
from bilevel.outer.keep import Keep, OnDivergence, restoring
from bilevel.outer.keeping import opened
from bilevel.outer.leaves import Leaves
from bilevel.outer.running import Around, Running, Schedule
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
    keep: Keep | None = None
    resume: bool | int = False
    on_divergence: OnDivergence = "raise"

    def __post_init__(self) -> None:
        check_whole(self.steps, "steps")
        restoring(self.on_divergence)
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
        self._ended, self._returns = False, 0
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
        around: Around | None = None,
    ) -> None:
        """Move the control against its gradient.

        Args:
            evaluate: `(control, batch, step) -> (cost, record with the gradient)`; raises where
                something is not finite. An update may ask several times (LBFGS). Without batches
                it gets None.
            make: makes a `torch.optim` optimiser; `step(closure)` is used always.
            accept: called with the first record of each update, once it is made.
            trusted: whether a record is good enough to end by its small gradient.
            around: what the solver keeps of its own, where the run is kept.

        Raises:
            ArgumentError: if batches are empty, the optimiser is none or moves other tensors, or
                the run cannot go on as it was kept.
            StorageError: if it cannot be kept.
            DivergenceError: if an update leaves a control that is not finite.
        """
        loop = self.loop
        optimizer = _optimizer(make, self.leaves)
        schedule = Schedule(loop.scheduler, optimizer)
        stream = None if loop.batches is None else feed(loop.batches)
        around, restore = around or Around(), restoring(loop.on_divergence)
        run = Running(self, optimizer, schedule, stream, around, restore)
        conditions = {"control": self._kinds, "project": loop.project, **run.conditions}
        with (
            opened(loop.keep, loop.resume, conditions, around.records) as kept,
            progress_bar(loop.steps, show=loop.progress) as advance,
        ):
            run.begin(kept)
            self._check_begun()
            while len(self.costs) < loop.steps and not self._ended:
                step = len(self.costs) + 1
                batch = None if stream is None else next(stream)
                closure = _Closure(self, evaluate, trusted, batch, step)
                try:
                    found = self._update(closure, optimizer, schedule, step)
                    if found is None:
                        break
                    accept(found)
                    advance(f"cost {self.costs[-1]:.4g}, gradient {self.gradient_norms[-1]:.2g}")
                    self._tell(optimizer, found)
                    kept.after(step, run.state)
                except DivergenceError as error:
                    run.go_back(kept, error, step)
            self._returns = run.returns
            kept.end(len(self.costs), run.state)

    def _update(
        self, closure: "_Closure", optimizer: Optimizer, schedule: Schedule, step: int
    ) -> Any:
        """Move the control once; its record, or None where no update is to be made."""
        try:
            optimizer.step(closure)
        except _ReachedError:
            self.converged = True
            return None
        except StandstillError:
            if self.loop.batches is None:  # another batch may be another matter
                self.standstill = True
                return None
        cost, norm, found = closure.seen()
        schedule.step(cost)
        if self.loop.project is not None:
            self.leaves.assign(self.loop.project(self.leaves.now()))
        self.leaves.check_finite(step)
        self._made(cost, norm)
        return found

    def _tell(self, optimizer: Optimizer, found: Any) -> None:
        """Tell the callback, which may end it."""
        if self.loop.callback is not None:
            last = len(self.costs), self.costs[-1], self.gradient_norms[-1]
            seen = Progress(*last, self.leaves.now(), optimizer, found)
            self._ended = bool(self.loop.callback(seen))

    def ending(self, norm: float, *, converged: bool, judged: str) -> str:
        """Why it ended, in words; `judged` says whether the last gradient may be trusted."""
        text = self._ending(norm, converged=converged, judged=judged)
        back = f" It went back {self._returns} times after a divergence."
        return text + back if self._returns else text

    def _ending(self, norm: float, *, converged: bool, judged: str) -> str:
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

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, after a whole update."""
        return {
            "control": self._reached,
            "costs": self.costs,
            "gradient_norms": self.gradient_norms,
            "last": None if self.last is None else self.last[:2],
            "ended": self._ended,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand there again."""
        with autodiff.paused():
            for reached, x, value in zip(self._reached, self.leaves, state["control"], strict=True):
                reached.copy_(value)
                x.copy_(value)
        self.costs, self.gradient_norms = [*state["costs"]], [*state["gradient_norms"]]
        self.last = None if state["last"] is None else (*state["last"], None)
        self._ended = state["ended"]

    @property
    def _kinds(self) -> dict[str, str]:
        return {name: tree.kind(x) for name, x in self.leaves.named}

    def _check_begun(self) -> None:
        """Refuse to go on from beyond the end."""
        done, steps = len(self.costs), self.loop.steps
        if done > steps:
            raise ArgumentError(
                f"the run was kept after {done} updates, steps is {steps}: ask for at least as "
                f"many, or pass resume={steps} if there is such a checkpoint."
            )

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


def check_finite(cost: float, norm: float, step: int, where: Callable[[], str]) -> None:
    """Refuse a cost or gradient that is not finite."""
    if not (math.isfinite(cost) and math.isfinite(norm)):
        raise DivergenceError(
            f"iteration {step}: the cost is {cost:g}, the norm of its gradient {norm:g}; "
            f"{where()}. Try a smaller learning rate, or look for a square root or a division at "
            "zero."
        )
