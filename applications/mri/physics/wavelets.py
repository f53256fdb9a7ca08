r"""Orthonormal wavelets of images of any size, shifted at will.

A level of the transform is the periodic filter bank of Daubechies' wavelet along both axes; level
after level goes on with the corner that both low passes leave (Mallat). The first also shifts the
image and, where its side is not a multiple of :math:`2^{levels}`, appends zeros: it stays
orthonormal, so that :math:`W^T W = I` and inner products are kept for every size.

Daubechies 1992, Ten Lectures on Wavelets; Coifman & Donoho 1995 for the shifts, which move the
block artefacts of a single grid about.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.physics.filter_loops import Grid, analysed, are_worth_loops, synthesised
from applications.mri.physics.filter_matrices import Level, filters, levels_along
from applications.mri.physics.loops import LoopFunction


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
        taps = len(filters(self.name)[0])
        longest = int(math.log2(max(min(self.shape) / (taps / 2), 2)))
        return min(self.levels, longest)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The coefficients W u.

        Args:
            images: real or complex, shape ``(..., rows, columns)``.

        Returns:
            The bands, real: the low pass ``(..., m, n)`` first, then the details of each level from
            coarse to fine, ``(..., 3, m, n)``: details along columns, along rows, along both. Those
            of complex images are of their real and imaginary parts: ``(..., 2, m, n)`` and
            ``(..., 2, 3, m, n)``.
        """
        if images.is_complex():
            return self.bands_of_parts(torch.view_as_real(images.resolve_conj()))
        low, *details = self.bands_of_parts(images[..., None])
        return [low.squeeze(-3), *(band.squeeze(-4) for band in details)]

    def adjoint(self, bands: list[Tensor], *, of_complex: bool = False) -> Tensor:
        """The images of coefficients, the adjoint of `forward`, and its inverse on its range.

        Args:
            bands: as `forward` returns them.
            of_complex: whether they are of complex images.

        Returns:
            Shape ``(..., rows, columns)``.
        """
        if of_complex:
            return torch.view_as_complex(self.parts_of_bands(bands).contiguous())
        low, *details = bands
        parts = [low.unsqueeze(-3), *(band.unsqueeze(-4) for band in details)]
        return self.parts_of_bands(parts).squeeze(-1)

    def bands_of_parts(self, parts: Tensor) -> list[Tensor]:
        """As `forward`, of real images ``(..., rows, columns, n)``, the n of them an axis apart.

        Args:
            parts: the images.

        Returns:
            The bands, ``(..., n, rows, columns)`` and ``(..., n, 3, rows, columns)``.
        """
        if are_worth_loops(parts):
            found = _Analysis.apply(parts, self)
            assert isinstance(found, tuple)
            return list(found)
        images = parts.movedim(-1, -3).contiguous()
        details: list[Tensor] = []
        for down, across in self._levels(images.device):
            low, high = down.forward(images, -2)
            images, columns = across.forward(low, -1)
            details.append(torch.stack([columns, *across.forward(high, -1)], dim=-3))
        return [images, *reversed(details)]

    def parts_of_bands(self, bands: list[Tensor]) -> Tensor:
        """The adjoint of `bands_of_parts`.

        Args:
            bands: as it returns them.

        Returns:
            Images as it takes them.
        """
        if are_worth_loops(*bands):
            found = _Synthesis.apply(self, *bands)
            assert isinstance(found, Tensor)
            return found
        images, *details = bands
        for (down, across), detail in zip(
            reversed(self._levels(images.device)), details, strict=True
        ):
            columns, rows, diagonal = detail.unbind(-3)
            low, high = across.adjoint(images, columns, -1), across.adjoint(rows, diagonal, -1)
            images = down.adjoint(low, high, -2)
        return images.movedim(-3, -1)

    @property
    def grid(self) -> Grid:
        """What the loops are told."""
        depth = self.depth
        padded = [-(-n // 2**depth) * 2**depth for n in self.shape]
        rows, columns = (
            (n, behind, shift % behind)
            for n, behind, shift in zip(self.shape, padded, self.shift, strict=True)
        )
        return Grid(rows, columns, depth, filters(self.name))

    def _levels(self, device: torch.device) -> list[tuple[Level, Level]]:
        """Of each level, what is done along rows and along columns, from fine to coarse."""
        grid = self.grid
        axes = [
            levels_along(*axis, grid.depth, self.name, device) for axis in (grid.rows, grid.columns)
        ]
        return list(zip(*axes, strict=True))


class _Analysis(LoopFunction):
    """W by loops; the derivatives of a linear map are itself and its adjoint."""

    @staticmethod
    def forward(parts: Tensor, wavelets: Wavelets) -> tuple[Tensor, ...]:
        return analysed(parts, wavelets.grid)

    @staticmethod
    def setup_context(  # of torch
        ctx: Any,
        inputs: tuple[Tensor, Wavelets],
        output: tuple[Tensor, ...],  # noqa: ARG004
    ) -> None:
        ctx.wavelets = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.wavelets.parts_of_bands(list(grads)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(ctx.wavelets.bands_of_parts(tangents[0]))


class _Synthesis(LoopFunction):
    """W^T by loops."""

    @staticmethod
    def forward(wavelets: Wavelets, *bands: Tensor) -> Tensor:
        return synthesised(bands, wavelets.grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - of torch
        ctx.wavelets = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.wavelets.bands_of_parts(grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return ctx.wavelets.parts_of_bands(list(tangents[1:]))


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
