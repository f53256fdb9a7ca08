"""What every sampling of k-space is and keeps to.

A mask is a boolean tensor ``(rows, columns)`` with the zero frequency at ``(rows // 2, columns //
2)``. It is a function of the settings, the shape and the state of the generator, and of nothing
else.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from applications.errors import InputError


class Sampling(ABC):
    """A way to choose the measured positions of k-space."""

    @abstractmethod
    def mask(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draws one mask.

        Args:
            shape: matrix size ``(rows, columns)``.
            generator: the only source of chance; it advances.

        Returns:
            Boolean mask, shape ``(rows, columns)``.

        Raises:
            InputError: if the settings cannot be met for this matrix size.
        """


def check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Refuses what is no matrix size.

    Args:
        shape: ``(rows, columns)``.

    Returns:
        The same.

    Raises:
        InputError: if it has not two positive numbers.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"the matrix size must be (rows, columns), both >= 1, got {tuple(shape)}.")
    return shape


def check_acceleration(acceleration: float) -> None:
    """Refuses what is no acceleration.

    Args:
        acceleration: all positions over kept ones.

    Raises:
        InputError: if it is not above 1, or not finite.
    """
    if not 1 < acceleration < math.inf:
        raise InputError(
            f"acceleration must be > 1, got {acceleration}; full sampling is a mask of ones."
        )
