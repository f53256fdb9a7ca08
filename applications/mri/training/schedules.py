"""Learning-rate schedules: what share of its peak the learning rate has as training goes on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from applications.errors import InputError


class Schedule(ABC):
    """How the learning rate falls; the warm-up at the beginning is apart from it."""

    @abstractmethod
    def factor(self, share: float) -> float:
        """Of the peak, once `share` of the training, in [0, 1], is spent."""


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Falls from 1 to 0 as :math:`(1 + \cos \pi s) / 2`.

    Loshchilov & Hutter 2017, SGDR: Stochastic gradient descent with warm restarts,
    arXiv:1608.03983, eq. 5, without restarts.
    """

    def factor(self, share: float) -> float:  # noqa: D102
        return 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Constant(Schedule):
    """Stays at 1."""

    def factor(self, share: float) -> float:  # noqa: ARG002, D102
        return 1.0


@dataclass(frozen=True)
class Step(Schedule):
    """Falls by a factor once each of some shares is spent.

    Attributes:
        at: shares of the training, in (0, 1), in increasing order.
        by: the factor, in (0, 1].

    Raises:
        InputError: if a field is out of range.

    Example:
        >>> [Step((0.5, 0.75), 0.5).factor(share) for share in (0.0, 0.5, 0.9)]
        [1.0, 0.5, 0.25]
    """

    at: tuple[float, ...] = (0.5, 0.75)
    by: float = 0.1

    def __post_init__(self) -> None:
        """Check the fields."""
        increasing = all(a < b for a, b in zip((0.0, *self.at), (*self.at, 1.0), strict=True))
        if not self.at or not increasing:
            raise InputError(
                f"at must hold increasing shares between 0 and 1, got {self.at}; (0.5, 0.75) "
                "lowers the rate at half and at three quarters of the training."
            )
        if not 0 < self.by <= 1:
            raise InputError(f"by must lie in (0, 1], got {self.by}; the rate is multiplied by it.")

    def factor(self, share: float) -> float:  # noqa: D102
        return self.by ** sum(share >= one for one in self.at)


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "cosine": Cosine,
    "constant": Constant,
    "step": Step,
}
