"""Masks: boolean tensors that say which positions of k-space were measured."""

import torch
from torch import Tensor

from applications.errors import InputError


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


def over_columns(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of rows and columns, made of one of columns where it is that.

    Args:
        mask: boolean, shape ``(rows, columns)`` or ``(columns,)``.
        shape: ``(rows, columns)``.

    Returns:
        The mask, checked.

    Raises:
        InputError: if it does not fit, see `check_mask`.
    """
    if not isinstance(mask, Tensor):
        raise InputError(
            f"mask must be a tensor, got {type(mask).__name__}; torch.as_tensor makes one of an "
            "array."
        )
    whole = mask.expand(shape).contiguous() if tuple(mask.shape) == tuple(shape[1:]) else mask
    check_mask(whole, shape)
    return whole


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
