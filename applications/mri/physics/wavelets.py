r"""Orthonormal wavelets of images of any size, shifted at will, as products of matrices.

A level of the transform along an axis is one matrix, the periodic filter bank of Daubechies'
wavelet; level after level goes on with the corner that both low passes leave (Mallat). The first
matrix also shifts the image and, where its side is not a multiple of :math:`2^{levels}`, appends
zeros: its columns stay orthonormal, so that :math:`W^T W = I` and inner products are kept for every
size. The matrices are banded: they are cut into blocks, and only blocks with values are multiplied.
Such products are quicker here than dense ones and than strided convolutions, run on any device, and
are differentiated by torch.

Daubechies 1992, Ten Lectures on Wavelets; Coifman & Donoho 1995 for the shifts, which move the
block artefacts of a single grid about.
"""

import math
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


@dataclass(frozen=True)
class Wavelets:
    """A transform W of images of one size.

    Attributes:
        shape: rows and columns of the images.
        levels: of the transform; fewer where a side is too short for the filter.
        shift: rows and columns by which the grid is moved.
        name: of an orthogonal wavelet, as PyWavelets names it.

    Raises:
        InputError: if there is no pixel, or no level.

    Example:
        >>> image = torch.arange(30.0).reshape(1, 5, 6)
        >>> wavelets = Wavelets((5, 6), shift=(1, 3))
        >>> bool(
        ...     torch.allclose(wavelets.adjoint(wavelets.forward(image)), image, atol=1e-4)
        ... )
        True
    """

    shape: tuple[int, int]
    levels: int = 4
    shift: tuple[int, int] = (0, 0)
    name: str = "db4"

    def __post_init__(self) -> None:
        """Check the fields."""
        if min(self.shape) < 1 or self.levels < 1:
            raise InputError(
                f"wavelets need at least one pixel and one level, got {self.shape} and "
                f"{self.levels}."
            )

    @property
    def depth(self) -> int:
        """Levels that the sides allow: the filter must not meet itself at the coarsest."""
        taps = len(_filters(self.name)[0])
        longest = int(math.log2(max(min(self.shape) / (taps / 2), 2)))
        return min(self.levels, longest)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The coefficients W u.

        Args:
            images: real, shape ``(..., rows, columns)``.

        Returns:
            The bands: the low pass ``(..., m, n)`` first, then the details of each level from
            coarse to fine, ``(..., 3, m, n)``: details along columns, along rows, along both.
        """
        details: list[Tensor] = []
        for down, across in self._levels(images.device):
            low, high = down.forward(images, -2)
            images, columns = across.forward(low, -1)
            details.append(torch.stack([columns, *across.forward(high, -1)], dim=-3))
        return [images, *reversed(details)]

    def adjoint(self, bands: list[Tensor]) -> Tensor:
        """The images of coefficients, the adjoint of `forward`, and its inverse on its range.

        Args:
            bands: as `forward` returns them.

        Returns:
            Real, shape ``(..., rows, columns)``.
        """
        images, *details = bands
        for (down, across), detail in zip(
            reversed(self._levels(images.device)), details, strict=True
        ):
            columns, rows, diagonal = detail.unbind(-3)
            low, high = across.adjoint(images, columns, -1), across.adjoint(rows, diagonal, -1)
            images = down.adjoint(low, high, -2)
        return images

    def _levels(self, device: torch.device) -> list[tuple["_Level", "_Level"]]:
        """Of each level, what is done along rows and along columns, from fine to coarse."""
        depth = self.depth
        multiple = 2**depth
        side = _SIDE if device.type == "cpu" else _WHOLE
        axes = [
            _axis(n, depth, shift % (-(-n // multiple) * multiple), self.name, side)
            for n, shift in zip(self.shape, self.shift, strict=True)
        ]
        return list(zip(*axes, strict=True))


def spread(shape: tuple[int, int], number: int, levels: int = 4) -> tuple[int, int]:
    """A shift of the grid that is the same in every run, and another for every number.

    Args:
        shape: rows and columns.
        number: counts the shifts.
        levels: of the transform, which a shift by 2^levels leaves alone but for its ends.

    Returns:
        Rows and columns.
    """
    period = 2**levels
    # Multiples of powers of the plastic number fill the square evenly (Roberts 2018, R2 sequence).
    down, across = (
        int(period * ((number * share) % 1.0)) for share in (0.7548776662, 0.5698402910)
    )
    return down % shape[0], across % shape[1]


# Arrays, not tensors: one made under `inference_mode` or while a program is exported would be of no
# use to anything else.
@dataclass(frozen=True, eq=False)
class _Piece:
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


_Block = tuple[_Piece, ...]


@dataclass(frozen=True, eq=False)
class _Level:
    """One level along an axis, and its adjoint, block by block of what they give.

    Attributes:
        analysis: blocks of low-pass coefficients, and as many high-pass ones behind them.
        synthesis: blocks of images.
    """

    analysis: tuple[_Block, ...]
    synthesis: tuple[_Block, ...]

    def forward(self, images: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Low-pass and high-pass coefficients along an axis."""
        found = [_product(block, (images,), axis).chunk(2, axis) for block in self.analysis]
        low, high = (_joined(parts, axis) for parts in zip(*found, strict=True))
        return low, high

    def adjoint(self, low: Tensor, high: Tensor, axis: int) -> Tensor:
        """The images of both."""
        return _joined([_product(block, (low, high), axis) for block in self.synthesis], axis)


def _product(block: _Block, given: tuple[Tensor, ...], axis: int) -> Tensor:
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


@lru_cache(maxsize=256)
def _axis(n: int, depth: int, shift: int, name: str, side: int) -> tuple[_Level, ...]:
    """All levels along an axis of n pixels, the first shifted and cut to n."""
    padded = -(-n // 2**depth) * 2**depth
    first = np.roll(_level(padded, name), shift, axis=1)[:, :n]
    rest = [_level(padded >> level, name) for level in range(1, depth)]
    return tuple(_in_blocks(matrix, side) for matrix in (first, *rest))


def _in_blocks(matrix: NDArray[np.float64], side: int) -> _Level:
    """A level, cut."""
    half, n = len(matrix) // 2, matrix.shape[1]
    step = side // 2
    low = [np.arange(at, min(at + step, half)) for at in range(0, half, step)]
    analysis = tuple(_cut(matrix[np.concatenate([one, half + one])], n) for one in low)
    places = [slice(at, min(at + side, n)) for at in range(0, n, side)]
    return _Level(analysis, tuple(_cut(matrix[:, at].T, half) for at in places))


def _cut(matrix: NDArray[np.float64], half: int) -> _Block:
    """The pieces of a block: runs of inputs that count, of one kind each, ``half`` of a kind."""
    used = np.flatnonzero((matrix != 0).any(axis=0))
    used = used if len(used) else np.arange(1)
    breaks = np.flatnonzero((np.diff(used) > 1) | np.diff(used // half).astype(bool)) + 1
    pieces = []
    for run in np.split(used, breaks):
        high, start = divmod(int(run[0]), half)
        values = np.ascontiguousarray(matrix[:, run[0] : run[-1] + 1])
        pieces.append(_Piece(bool(high), start, start + len(run), values))
    return tuple(pieces)


def _level(n: int, name: str) -> NDArray[np.float64]:
    """The orthogonal matrix of one periodic level: low pass above, high pass below."""
    matrix = np.zeros((n, n))
    start = 2 * np.arange(n // 2)
    for half, taps in enumerate(_filters(name)):
        rows = half * (n // 2) + np.arange(n // 2)
        for k, tap in enumerate(taps):
            matrix[rows, (start + k) % n] += tap
    return matrix


@lru_cache(maxsize=8)
def _filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low and high pass of an orthogonal wavelet."""
    import pywt  # optional

    try:
        wavelet = pywt.Wavelet(name)  # pyright: ignore[reportAttributeAccessIssue] - compiled
    except ValueError as error:
        raise InputError(f"wavelet {name!r}: a name of PyWavelets was needed ({error}).") from error
    if not wavelet.orthogonal:
        raise InputError(f"wavelet {name!r} must be orthogonal, such as db4 or sym4.")
    return tuple(wavelet.dec_lo), tuple(wavelet.dec_hi)
