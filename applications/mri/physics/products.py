"""Products of Hermitian matrices with coil images, one a pixel: half of a reconstruction's time.

Nothing but additions of products, yet torch has no quick way to them: of many small products its
batched one takes as long as the sum coil by coil. Large slices on a CPU go through one loop that
numba compiles. It reads each value once, takes from it both products that a Hermitian matrix has it
in, and is about twice as fast.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.mri.physics.loops import LoopFunction, are_readable, compiled, in_parts

_BLOCK = 1 << 16  # complex values
_LARGE = 1 << 21  # values of the matrices of a slice that are worth a compiled loop


def times(matrices: Tensor, state: Tensor) -> Tensor:
    """One matrix-vector product a pixel.

    Args:
        matrices: Hermitian, shape ``(..., rows, columns, coils, coils)``; quickest where pixels lie
            together in memory.
        state: shape ``(..., coils, rows, columns)``.

    Returns:
        ``sum_i matrices_oi state_i``, the shape of ``state``.
    """
    return _product(matrices.movedim((-2, -1), (-4, -3)), state)


def _product(planes: Tensor, state: Tensor) -> Tensor:
    """The same of matrices ``(..., coils out, coils in, rows, columns)``."""
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
    return (
        planes.shape[-4:].numel() >= _LARGE
        and planes.shape[:-4] == state.shape[:-3]
        and not planes.requires_grad
        and are_readable(planes, state)
        and planes.dtype == state.dtype == torch.complex64
        and planes.is_contiguous()
        and not planes.is_conj()
    )


class _Looped(LoopFunction):
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
        for one in slices:
            in_parts(compiled(_rows), one, rows)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004 - of torch
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (planes,) = ctx.saved_tensors
        return None, _product(planes, grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        planes, state = ctx.saved_tensors
        pairs = zip((tangents[0], planes), (state, tangents[1]), strict=True)
        parts = [_product(a, b) for a, b in pairs if a is not None and b is not None]
        return sum(parts[1:], start=parts[0]) if parts else None


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
