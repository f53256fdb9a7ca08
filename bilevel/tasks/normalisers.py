"""Weights that are not negative and sum to one, from unconstrained numbers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.checks import check_range


class Normaliser(ABC):
    """A map of R^N to the simplex, along the first axis.

    Example:
        A map of one's own, here squares over their sum:

        >>> class Squares(Normaliser):
        ...     def __call__(self, alpha):
        ...         return alpha**2 / (alpha**2).sum(0)
        >>> Squares()(torch.tensor([1.0, 2.0]))
        tensor([0.2000, 0.8000])
    """

    @abstractmethod
    def __call__(self, alpha: Tensor) -> Tensor:
        """The weights.

        Args:
            alpha: shape ``(N,)`` or ``(N, M)``, real.

        Returns:
            Like `alpha`, >= 0, with sum 1 along the first axis.
        """


@final
@dataclass(frozen=True)
class Softmax(Normaliser):
    """exp(alpha / temperature) / sum: every weight positive.

    Attributes:
        temperature: > 0; the lower, the nearer to one task alone.

    Raises:
        ArgumentError: if it is out of range.

    Example:
        >>> Softmax()(torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.5000])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.temperature, "temperature", above=0)

    def __call__(self, alpha: Tensor) -> Tensor:  # noqa: D102
        return torch.softmax(alpha if self.temperature == 1 else alpha / self.temperature, 0)


@final
@dataclass(frozen=True)
class Sparsemax(Normaliser):
    """The nearest point of the simplex to alpha / temperature; weights may be exactly zero.

    Martins & Astudillo 2016, From softmax to sparsemax, arXiv 1602.02068, algorithm 1. A task whose
    weight is zero has no gradient, and stays out until the others let it in.

    Attributes:
        temperature: > 0; the lower, the fewer tasks.

    Raises:
        ArgumentError: if it is out of range.

    Example:
        >>> Sparsemax()(torch.tensor([1.0, 0.5, -3.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.temperature, "temperature", above=0)

    def __call__(self, alpha: Tensor) -> Tensor:  # noqa: D102
        # A shift changes nothing; without it large alpha would swallow the 1, and sums be inexact.
        z = (alpha - alpha.detach().amax(0, keepdim=True)) / self.temperature
        falling = z.sort(dim=0, descending=True).values
        excess = falling.cumsum(0) - 1
        rank = torch.arange(1, z.shape[0] + 1, dtype=z.dtype, device=z.device)
        rank = rank.reshape(-1, *[1] * (z.ndim - 1))
        n_support = (rank * falling > excess).sum(0, keepdim=True).clamp_min(1)  # 0 if alpha is NaN
        return torch.relu(z - excess.gather(0, n_support - 1) / n_support)


@final
@dataclass(frozen=True)
class NormalisedSigmoid(Normaliser):
    """sigmoid(alpha / temperature) / sum: weights saturate instead of running away from each other.

    Attributes:
        temperature: > 0.

    Raises:
        ArgumentError: if it is out of range.

    Example:
        >>> NormalisedSigmoid()(torch.tensor([50.0, 90.0]))
        tensor([0.5000, 0.5000])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.temperature, "temperature", above=0)

    def __call__(self, alpha: Tensor) -> Tensor:  # noqa: D102
        # By logarithms: the sigmoids may all underflow, their ratios do not.
        return torch.softmax(torch.nn.functional.logsigmoid(alpha / self.temperature), 0)
