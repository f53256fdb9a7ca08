"""Products of Hermitian matrices with coil images, one a pixel: half of a reconstruction's time.

Nothing but additions of products, yet torch has no quick way to them: of many small products its
batched one takes as long as the sum coil by coil. Large slices on a CPU go through one loop that
numba compiles. It reads each value once, takes from it both products that a Hermitian matrix has it
in, and is about twice as fast.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 16  # complex values
_LARGE = 1 << 21  # values of the matrices of a slice that are worth a compiled loop

Loop = Callable[[Any, Any, Any, int, int], None]


def times(matrices: Tensor, state: Tensor) -> Tensor:
    """One matrix-vector product a pixel.

    Args:
        matrices: Hermitian, shape ``(..., rows, columns, coils, coils)``; quickest where pixels lie
            together in memory.
        state: shape ``(..., coils, rows, columns)``.

    Returns:
        ``sum_i matrices_oi state_i``, the shape of ``state``.
    """
    planes = matrices.movedim((-2, -1), (-4, -3))  # (..., coils out, coils in, rows, columns)
    if _suits_the_loop(planes, state):
        found = _Looped.apply(planes, state)
        assert isinstance(found, Tensor)
        return found
    return _summed(planes, state)


def _summed(planes: Tensor, state: Tensor) -> Tensor:
    """Coil by coil, rows in blocks that stay in the cache while the coils are added up."""
    coils, rows, columns = state.shape[-3:]
    height = max(1, _BLOCK // (coils * columns))
    tops = range(0, rows, height)
    blocks = [
        _block(*(one.narrow(-2, top, min(height, rows - top)) for one in (planes, state)))
        for top in tops
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)


def _block(planes: Tensor, state: Tensor) -> Tensor:
    columns = planes.unbind(-3)  # one a coil that is multiplied
    total = columns[0] * state.narrow(-3, 0, 1)
    for i, column in enumerate(columns[1:], start=1):
        total.addcmul_(column, state.narrow(-3, i, 1))
    return total


def _suits_the_loop(planes: Tensor, state: Tensor) -> bool:
    """Whether a slice is worth it, and its values lie where a compiled loop finds them."""
    pair = (planes, state)
    return (
        planes.shape[-4:].numel() >= _LARGE
        and planes.shape[:-4] == state.shape[:-3]
        and not planes.requires_grad
        and all(type(one) is Tensor for one in pair)  # others watch what is done with them
        and all(one.device.type == "cpu" and one.dtype == torch.complex64 for one in pair)
        and planes.is_contiguous()
        and not planes.is_conj()
    )


class _Looped(torch.autograd.Function):
    """The loop for torch: linear in the state, and its own adjoint."""

    @staticmethod
    def forward(planes: Tensor, state: Tensor) -> Tensor:
        coils, rows, columns = state.shape[-3:]
        given = state.resolve_conj().resolve_neg().contiguous()
        found = torch.empty_like(given)
        slices = zip(
            planes.detach().view(-1, coils, coils, rows, columns).numpy(),
            given.detach().view(-1, coils, rows, columns).numpy(),
            found.view(-1, coils, rows, columns).numpy(),
            strict=True,
        )
        threads = torch.get_num_threads()
        bounds = [rows * k // threads for k in range(threads + 1)]
        parts = [(*one, top, end) for one in slices for top, end in pairwise(bounds)]
        if threads == 1:
            for part in parts:
                _loop()(*part)
            return found
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(_loop(), *part) for part in parts]:
                done.result()
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004 - of torch
        planes, state = inputs
        ctx.save_for_backward(planes, state if ctx.needs_input_grad[0] else None)
        ctx.save_for_forward(planes, state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        planes, state = ctx.saved_tensors
        (grad,) = grads
        outer = None if state is None else grad.unsqueeze(-3) * state.conj().unsqueeze(-4)
        return outer, _summed(planes, grad)  # which may be a batch in disguise

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        planes, state = ctx.saved_tensors
        pairs = zip((tangents[0], planes), (state, tangents[1]), strict=True)
        parts = [_summed(a, b) for a, b in pairs if a is not None and b is not None]
        return sum(parts[1:], start=parts[0]) if parts else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:  # noqa: ARG004
        first = [
            one if dim is None else one.movedim(dim, 0)
            for one, dim in zip(args, in_dims, strict=True)
        ]
        return _summed(*first), 0


@cache
def _loop() -> Loop:
    """The loop, compiled at its first call; kept beside this file where that can be written."""
    from numba import njit  # takes its time, and small slices go without

    # Sums may be reordered and fused; what is not finite stays so.
    options = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        return njit(cache=True, **options)(_rows)
    except RuntimeError:  # no place to write to
        return njit(**options)(_rows)


def _rows(matrices: Any, state: Any, found: Any, top: int, end: int) -> None:
    """``found = matrices state`` for rows from ``top`` to ``end``, by real and imaginary parts."""
    coils, columns = state.shape[0], state.shape[2]
    real, imaginary = np.empty((coils, columns), np.float32), np.empty((coils, columns), np.float32)
    total, total_i = np.empty((coils, columns), np.float32), np.empty((coils, columns), np.float32)
    for y in range(top, end):
        for o in range(coils):
            for x in range(columns):
                real[o, x], imaginary[o, x] = state[o, y, x].real, state[o, y, x].imag
                total[o, x] = matrices[o, o, y, x].real * real[o, x]
                total_i[o, x] = matrices[o, o, y, x].real * imaginary[o, x]
        for o in range(coils):
            for i in range(o + 1, coils):
                for x in range(columns):
                    a, b = matrices[o, i, y, x].real, matrices[o, i, y, x].imag
                    total[o, x] += a * real[i, x] - b * imaginary[i, x]
                    total_i[o, x] += a * imaginary[i, x] + b * real[i, x]
                    total[i, x] += a * real[o, x] + b * imaginary[o, x]
                    total_i[i, x] += a * imaginary[o, x] - b * real[o, x]
        for o in range(coils):
            for x in range(columns):
                found[o, y, x] = complex(total[o, x], total_i[o, x])
