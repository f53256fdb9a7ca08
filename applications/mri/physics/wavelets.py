r"""Orthonormal wavelets of images of any size, shifted at will, as products of matrices.

A level of the transform along an axis is one matrix, the periodic filter bank of Daubechies'
wavelet; level after level goes on with the corner that both low passes leave (Mallat). The first
matrix also shifts the image and, where its side is not a multiple of :math:`2^{levels}`, appends
zeros: its columns stay orthonormal, so that :math:`W^T W = I` and inner products are kept for every
size. Dense products are quicker here than strided convolutions, run on any device, and are
differentiated by torch.

Daubechies 1992, Ten Lectures on Wavelets; Coifman & Donoho 1995 for the shifts, which move the
block artefacts of a single grid about.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError


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
        >>> bool(torch.allclose(wavelets.adjoint(wavelets.forward(image)), image, atol=1e-4))
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
        for down, across in self._matrices(images):
            both = down @ images @ across.mT
            m, n = both.shape[-2] // 2, both.shape[-1] // 2
            parts = both[..., :m, n:], both[..., m:, :n], both[..., m:, n:]
            details.append(torch.stack(parts, dim=-3))
            images = both[..., :m, :n]
        return [images, *reversed(details)]

    def adjoint(self, bands: list[Tensor]) -> Tensor:
        """The images of coefficients, the adjoint of `forward`, and its inverse on its range.

        Args:
            bands: as `forward` returns them.

        Returns:
            Real, shape ``(..., rows, columns)``.
        """
        images, *details = bands
        for (down, across), detail in zip(reversed(self._matrices(images)), details, strict=True):
            columns, rows, diagonal = detail.unbind(-3)
            upper, lower = torch.cat([images, columns], -1), torch.cat([rows, diagonal], -1)
            images = down.mT @ torch.cat([upper, lower], -2) @ across
        return images

    def _matrices(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each level, along rows and along columns, from fine to coarse."""
        depth = self.depth
        sides = zip(self.shape, self.shift, strict=True)
        multiple = 2**depth
        axes = [
            _axis(n, depth, shift % (-(-n // multiple) * multiple), self.name) for n, shift in sides
        ]
        return [
            (torch.from_numpy(down).to(like), torch.from_numpy(across).to(like))
            for down, across in zip(*axes, strict=True)
        ]


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
@lru_cache(maxsize=256)
def _axis(n: int, depth: int, shift: int, name: str) -> tuple[NDArray[np.float64], ...]:
    """The matrices of all levels along an axis of n pixels, the first shifted and cut to n."""
    padded = -(-n // 2**depth) * 2**depth
    first = np.roll(_level(padded, name), shift, axis=1)[:, :n]
    rest = [_level(padded >> level, name) for level in range(1, depth)]
    return tuple(np.ascontiguousarray(matrix) for matrix in (first, *rest))


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
