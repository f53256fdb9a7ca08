"""Validation while a network is trained: which weights were the best, and when to stop."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel as bl
from applications.errors import InputError
from applications.mri.training.examples import Example
from applications.settings import Written, setting

Build = Callable[[Example], tuple[bl.ControlProblem, Tensor]]


@dataclass(frozen=True)
class Validation:
    """How a training looks at its validation slices.

    Attributes:
        every: updates between two looks; the last update is followed by one, too.
        patience: the training stops after so many looks without a cost below the least; None goes
            on to the end.

    Raises:
        InputError: if a field is less than 1.
    """

    every: int = setting(
        100,
        "Updates between looks at validation scans; 100.",
        name="validate_every",
        least=1,
        written=Written(int, None, int),
    )
    patience: int | None = setting(None, "Stop after so many looks without gain.", least=1)

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.every < 1:
            raise InputError(f"every must be at least 1 update, got {self.every}.")
        if self.patience is not None and self.patience < 1:
            raise InputError(
                f"patience must be at least 1 look, or None to train to the end, got "
                f"{self.patience}."
            )


@dataclass(frozen=True)
class Look:
    """One look.

    Attributes:
        step: updates done.
        cost: mean loss of the validation slices.
    """

    step: int
    cost: float


@dataclass(frozen=True, eq=False)
class Looks:
    """All looks so far; a new one makes a new record.

    Attributes:
        all: in order.
        best: the weights at the least cost, the earliest of them; None before the first look.
    """

    all: tuple[Look, ...] = ()
    best: bl.PerStep | None = None

    def after(self, look: Look, control: bl.PerStep) -> "Looks":
        """The record with one more look.

        Args:
            look: the newest.
            control: the weights that it saw, which are kept if they are the best.

        Returns:
            The new record.
        """
        better = not self.all or look.cost < min(one.cost for one in self.all)
        return Looks((*self.all, look), control if better else self.best)

    def exhausted(self, patience: int | None) -> bool:
        """Whether so many looks in a row were no better than what came before them.

        Args:
            patience: that number; None is never reached.

        Returns:
            Whether to stop.
        """
        if patience is None or not self.all:
            return False
        costs = [one.cost for one in self.all]
        return len(costs) - 1 - costs.index(min(costs)) >= patience


def mean_cost(build: Build, examples: Iterable[Example], control: bl.PerStep) -> float:
    """Mean loss of examples; one is held at a time, and nothing is differentiated.

    Args:
        build: the control problem of an example, and its observation.
        examples: at least one.
        control: weights.

    Returns:
        The mean.
    """
    costs = []
    with torch.no_grad():
        for example in examples:
            costs.append(float(bl.total_cost(*build(example), control)))
    return sum(costs) / len(costs)
