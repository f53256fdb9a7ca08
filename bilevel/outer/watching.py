"""What is shown of an outer loop while it runs, and said where it did not reach what it should."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from torch.optim import Optimizer

from bilevel.errors import ConvergenceError, ConvergenceWarning, UnsupportedError
from bilevel.records import Record
from bilevel.tree import Tree

OnFailure = Literal["warn", "raise", "ignore"]
ON_FAILURE = ("warn", "raise", "ignore")


@dataclass(frozen=True, eq=False, repr=False)
class Progress(Record):
    """What a callback sees after each iteration.

    Attributes:
        step: iterations done, from 1.
        cost: J, or the outer objective F, before this iteration's update.
        gradient_norm: before the update.
        control: the present control, detached; it shares memory with the iteration.
        optimizer: as made by the solver, for its state and learning rates.
        found: the `Adjoint` or `Hypergradient` before the update.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u), lambda x, control: (x - 1) ** 2, horizon=1
        ... )
        >>> def enough(progress):
        ...     return progress.cost < 0.1
        >>> zero = torch.tensor(0.0)
        >>> solver = bl.ControlSolver(problem, lambda leaves: torch.optim.SGD(leaves, 0.25))
        >>> found = solver.solve(zero, zero, steps=100, callback=enough)
        >>> found.costs
        [1.0, 0.25, 0.0625]
    """

    step: int
    cost: float
    gradient_norm: float
    control: Tree
    optimizer: Optimizer
    found: Any


@contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[Callable[[str], None]]:
    """A bar of `total` steps on standard error, by rich or tqdm, whichever is installed."""
    if not show:
        yield lambda _text: None
    elif find_spec("rich"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn as Remaining,
        )

        columns = BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}")
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
    elif find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total) as bar:

            def advance(text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()

            yield advance
    else:
        raise UnsupportedError(
            "progress=True needs rich or tqdm, and neither is installed: pip install rich, or "
            "pass a callback."
        )


@contextmanager
def carrying(so_far: Callable[[BaseException], Any]) -> Iterator[None]:
    """Whatever is raised inside takes with it, as `.progress`, what was reached until then."""
    try:
        yield
    except BaseException as error:  # an interruption too: hours of work would be lost
        if getattr(error, "progress", None) is None:
            with suppress(AttributeError):  # an exception that has room for no attribute
                error.progress = so_far(error)  # pyright: ignore[reportAttributeAccessIssue]
                error.add_note("error.progress holds the control and the history of this solve.")
        raise


def told(error: BaseException) -> str:
    """What ended a solve, in words."""
    return str(error) or type(error).__name__


def report(message: str, on_failure: OnFailure, *, level: int = 4) -> None:
    """Warn, raise, or be silent, as asked."""
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
