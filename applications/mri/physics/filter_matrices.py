"""Wavelets as products of matrices: on any device, in any precision, differentiated by torch.

A level of the transform along an axis is one orthogonal matrix. The first also shifts the image and
appends zeros: of its columns those of the image are left. The matrices are banded: they are cut
into blocks, and only blocks with values are multiplied. Such products are quicker here than dense
ones and than strided convolutions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError

_SIDE = 32  # outputs of a block; larger ones multiply more zeros, smaller ones take more calls
_WHOLE = 2**20  # the same where a call takes longer than its work, as on a GPU: one block


# Arrays, not tensors: one made under `inference_mode` or while a program is exported would be of no
# use to anything else.
@dataclass(frozen=True, eq=False)
class Piece:
    """What a block of outputs takes of neighbouring inputs.

    Attributes:
        high: whether the inputs are high-pass coefficients; False where there is one kind of them.
        start: first input.
        stop: behind the last.
        matrix: ``(outputs, inputs)``.
    """

    high: bool
    start: int
    stop: int
    matrix: NDArray[np.float64]


Block = tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class Level:
    """One level along an axis, and its adjoint, block by block of what they give.

    Attributes:
        analysis: blocks of low-pass coefficients, and as many high-pass ones behind them.
        synthesis: blocks of images.
    """

    analysis: tuple[Block, ...]
    synthesis: tuple[Block, ...]

    def forward(self, images: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Low-pass and high-pass coefficients along an axis."""
        found = [_product(block, (images,), axis).chunk(2, axis) for block in self.analysis]
        low, high = (_joined(parts, axis) for parts in zip(*found, strict=True))
        return low, high

    def adjoint(self, low: Tensor, high: Tensor, axis: int) -> Tensor:
        """The images of both."""
        return _joined([_product(block, (low, high), axis) for block in self.synthesis], axis)


def _product(block: Block, given: tuple[Tensor, ...], axis: int) -> Tensor:
    """The outputs of a block."""
    total = None
    for piece in block:
        part = given[piece.high].narrow(axis, piece.start, piece.stop - piece.start)
        matrix = torch.from_numpy(piece.matrix).to(part)
        found = matrix @ part if axis == -2 else part @ matrix.mT
        total = found if total is None else total + found
    assert total is not None  # every output has inputs
    return total


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def levels_along(
    n: int, padded: int, shift: int, depth: int, name: str, device: torch.device
) -> tuple[Level, ...]:
    """All levels along an axis.

    Args:
        n: pixels.
        padded: n and the zeros behind them, a multiple of 2^depth.
        shift: by which the first is moved, less than ``padded``.
        depth: how many levels.
        name: of the wavelet.
        device: where they will be used.

    Returns:
        From fine to coarse.
    """
    return _axis(n, padded, shift, depth, name, _SIDE if device.type == "cpu" else _WHOLE)


@lru_cache(maxsize=256)
def _axis(n: int, padded: int, shift: int, depth: int, name: str, side: int) -> tuple[Level, ...]:
    first = np.roll(_level(padded, name), shift, axis=1)[:, :n]
    rest = [_level(padded >> level, name) for level in range(1, depth)]
    return tuple(_in_blocks(matrix, side) for matrix in (first, *rest))


def _in_blocks(matrix: NDArray[np.float64], side: int) -> Level:
    """A level, cut."""
    half, n = len(matrix) // 2, matrix.shape[1]
    step = side // 2
    low = [np.arange(at, min(at + step, half)) for at in range(0, half, step)]
    analysis = tuple(_cut(matrix[np.concatenate([one, half + one])], n) for one in low)
    places = [slice(at, min(at + side, n)) for at in range(0, n, side)]
    return Level(analysis, tuple(_cut(matrix[:, at].T, half) for at in places))


def _cut(matrix: NDArray[np.float64], half: int) -> Block:
    """The pieces of a block: runs of inputs that count, of one kind each, ``half`` of a kind."""
    used = np.flatnonzero((matrix != 0).any(axis=0))
    used = used if len(used) else np.arange(1)
    breaks = np.flatnonzero((np.diff(used) > 1) | np.diff(used // half).astype(bool)) + 1
    pieces = []
    for run in np.split(used, breaks):
        high, start = divmod(int(run[0]), half)
        values = np.ascontiguousarray(matrix[:, run[0] : run[-1] + 1])
        pieces.append(Piece(bool(high), start, start + len(run), values))
    return tuple(pieces)


def _level(n: int, name: str) -> NDArray[np.float64]:
    """The orthogonal matrix of one periodic level: low pass above, high pass below."""
    matrix = np.zeros((n, n))
    start = 2 * np.arange(n // 2)
    for half, taps in enumerate(filters(name)):
        rows = half * (n // 2) + np.arange(n // 2)
        for k, tap in enumerate(taps):
            matrix[rows, (start + k) % n] += tap
    return matrix


@lru_cache(maxsize=8)
def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low and high pass of an orthogonal wavelet.

    Args:
        name: as PyWavelets names it.

    Returns:
        As many taps of both, an even number.

    Raises:
        InputError: if there is no such wavelet, or it is not orthogonal.
    """
    import pywt  # optional

    try:
        wavelet = pywt.Wavelet(name)  # pyright: ignore[reportAttributeAccessIssue] - compiled
    except ValueError as error:
        raise InputError(f"wavelet {name!r}: a name of PyWavelets was needed ({error}).") from error
    if not wavelet.orthogonal:
        raise InputError(f"wavelet {name!r} must be orthogonal, such as db4 or sym4.")
    return tuple(wavelet.dec_lo), tuple(wavelet.dec_hi)
