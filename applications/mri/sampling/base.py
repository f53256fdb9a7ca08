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


def acceleration_of(mask: Tensor) -> float:
    """The acceleration that a boolean mask achieves: all positions over kept ones.

    Args:
        mask: boolean, any shape, not all false.

    Returns:
        A number >= 1.
    """
    check_mask(mask, tuple(mask.shape))
    return mask.numel() / int(mask.sum())


def samples_columns(mask: Tensor) -> bool:
    """Whether a mask, shape ``(..., rows, columns)``, keeps whole columns or nothing of them."""
    return bool((mask == mask[..., :1, :]).all())


def check_mask(mask: Tensor, shape: tuple[int, ...], name: str = "mask") -> None:
    """Refuses a mask that does not fit.

    Args:
        mask: the mask to check.
        shape: the shape it must have, ``(rows, columns)``.
        name: what the message calls it, for example ``"scan.h5: mask"``.

    Raises:
        InputError: if the mask is not boolean, has another shape, or keeps nothing.
    """
    if mask.dtype != torch.bool:
        raise InputError(f"{name} must be boolean, got {mask.dtype}; convert it with mask != 0.")
    if tuple(mask.shape) != tuple(shape):
        raise InputError(
            f"{name} must have shape {tuple(shape)}, got {tuple(mask.shape)}; draw it anew."
        )
    if not bool(mask.any()):
        raise InputError(
            f"{name} must keep at least one position, it keeps none; lower the acceleration."
        )


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
