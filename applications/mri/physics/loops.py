"""Loops that numba compiles, for what torch has no quick way to: which tensors they can read."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def are_readable(*tensors: Tensor) -> bool:
    """Whether values lie in this computer's memory, and nobody watches what is done with them."""
    return all(
        type(one) is Tensor and one.device.type == "cpu" and _has_storage(one) for one in tensors
    )


def _has_storage(tensor: Tensor) -> bool:
    """False for what the transforms of `torch.func` hand in: many tensors, or a tensor and more."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return False
    return True


class LoopFunction(torch.autograd.Function):
    """A loop for torch, to be called with readable tensors alone."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:  # noqa: ARG004
        """A rule that torch wants where `vmap` is about, though nothing batched is readable."""
        raise AssertionError("a loop was given a batch that it cannot read")


def in_parts(loop: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Runs a loop over as many numbers, shared by the threads that torch may use.

    Args:
        loop: of this module's `compiled`, called with the arguments, the first number of a part,
            and that behind its last.
        arguments: arrays; the parts write to different places.
        count: of all numbers.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        loop(*arguments, 0, count)
        return
    bounds = [count * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(loop, *arguments, *part) for part in pairwise(bounds)]
        for part in parts:
            part.result()


@cache
def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """A loop, compiled at its first call; kept beside its file where that can be written."""
    from numba import njit  # takes its time, and small slices go without

    # Sums may be reordered and fused; what is not finite stays so.
    options = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no place to write to
        return njit(**options)(function)
