"""Wavelets of large images on a CPU, by loops that numba compiles: less than half of the time.

An image stays in the cache while all its levels are taken.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.mri.physics.loops import are_readable, compiled, in_parts

_LARGE = 1 << 20  # values of all images that are worth it


def are_worth_loops(*bands: Tensor) -> bool:
    """Whether images, or all bands of them, are many and lie where a loop finds them."""
    return (
        sum(one.numel() for one in bands) >= _LARGE
        and are_readable(*bands)
        and all(one.dtype == torch.float32 for one in bands)
    )


@dataclass(frozen=True)
class Grid:
    """What the loops are told of a transform.

    Attributes:
        rows: of the image, of the image with zeros behind it, and the shift.
        columns: the same.
        depth: levels.
        taps: of low and high pass, an even number.
    """

    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    depth: int
    taps: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the bands of one image."""
        sides = [
            (self.rows[1] >> level, self.columns[1] >> level) for level in range(1, self.depth + 1)
        ]
        return [sides[-1], *((3, *side) for side in reversed(sides))]


def analysed(images: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """The bands of images whose parts lie last.

    Args:
        images: `are_worth_loops`, ``(..., rows, columns, parts)``, such as real and imaginary ones.
        grid: of the transform.

    Returns:
        ``(..., parts, m, n)``, and ``(..., parts, 3, m, n)`` from coarse to fine.
    """
    *leading, rows, columns, parts = images.shape
    flat = images.detach().resolve_neg().reshape(-1, rows, columns, parts).contiguous()
    found = [flat.new_empty(len(flat), parts, *shape) for shape in grid.shapes]
    in_parts(_analysed, (flat.numpy(), [one.numpy() for one in found], grid), len(flat))
    return tuple(one.view(*leading, *one.shape[1:]) for one in found)


def synthesised(bands: tuple[Tensor, ...], grid: Grid) -> Tensor:
    """The images of bands, both as of `analysed`."""
    *leading, parts, _, _ = bands[0].shape
    flat = [
        band.detach().resolve_neg().reshape(-1, parts, *shape).contiguous()
        for band, shape in zip(bands, grid.shapes, strict=True)
    ]
    images = flat[0].new_empty(len(flat[0]), grid.rows[0], grid.columns[0], parts)
    in_parts(_synthesised, (images.numpy(), [one.numpy() for one in flat], grid), len(images))
    return images.view(*leading, *images.shape[1:])


def _analysed(images: Any, bands: list[Any], grid: Grid, first: int, end: int) -> None:
    """Bands of images from ``first`` to ``end``, one part of one image after another."""
    (_, rows, down), (_, columns, across) = grid.rows, grid.columns
    low, *details = bands
    taps = np.array(grid.taps, np.float32)
    here = np.empty((rows, columns), np.float32)
    smaller = np.empty((rows // 2, columns // 2), np.float32)
    for image in range(first, end):
        for part in range(images.shape[3]):
            compiled(_padded)(images[image], part, down, across, here)
            for detail in reversed(details):
                compiled(_level)(here, smaller, detail[image, part], taps)
            low[image, part] = here[: low.shape[2], : low.shape[3]]


def _synthesised(images: Any, bands: list[Any], grid: Grid, first: int, end: int) -> None:
    """Images of bands, from ``first`` to ``end``."""
    (_, rows, down), (_, columns, across) = grid.rows, grid.columns
    low, *details = bands
    taps = np.array(grid.taps, np.float32)
    here = np.empty((rows, columns), np.float32)
    lines = np.empty((2, rows // 2, columns), np.float32)
    for image in range(first, end):
        for part in range(images.shape[3]):
            here[: low.shape[2], : low.shape[3]] = low[image, part]
            for detail in details:
                compiled(_adjoint_along_rows)(here, detail[image, part], taps, lines)
                compiled(_adjoint_along_columns)(lines, detail[image, part], taps, here)
            compiled(_cut)(here, down, across, images[image], part)


def _padded(image: Any, part: int, down: int, across: int, here: Any) -> None:
    """A part of an image with zeros behind it, moved."""
    rows, columns = image.shape[0], image.shape[1]
    for y in range(here.shape[0]):
        source = (y + down) % here.shape[0]
        here[y] = 0
        if source < rows:
            for x in range(columns - across):
                here[y, x] = image[source, x + across, part]
            for x in range(min(columns, across)):
                here[y, x + here.shape[1] - across] = image[source, x, part]


def _cut(here: Any, down: int, across: int, image: Any, part: int) -> None:
    """The adjoint of `_padded`."""
    rows, columns = image.shape[0], image.shape[1]
    for y in range(rows):
        source = (y - down) % here.shape[0]
        for x in range(min(columns, across)):
            image[y, x, part] = here[source, x + here.shape[1] - across]
        for x in range(across, columns):
            image[y, x, part] = here[source, x - across]


def _level(here: Any, smaller: Any, detail: Any, taps: Any) -> None:
    """One level of the corner of ``here`` that is twice as large as its details; low pass there."""
    n, m, pairs = detail.shape[1], detail.shape[2], taps.shape[1] // 2
    passed = np.empty((2, 2 * m), np.float32)  # low and high, along columns
    even, odd = np.empty(m + pairs, np.float32), np.empty(m + pairs, np.float32)
    found = np.empty((2, m), np.float32)
    for j in range(n):
        passed[:] = 0
        for k in range(pairs):
            a, b = 2 * ((j + k) % n), 2 * ((j + k) % n) + 1
            low_a, low_b = taps[0, 2 * k], taps[0, 2 * k + 1]
            high_a, high_b = taps[1, 2 * k], taps[1, 2 * k + 1]
            for x in range(2 * m):
                passed[0, x] += low_a * here[a, x] + low_b * here[b, x]
                passed[1, x] += high_a * here[a, x] + high_b * here[b, x]
        for high in range(2):
            for x in range(m):
                even[x], odd[x] = passed[high, 2 * x], passed[high, 2 * x + 1]
            for x in range(pairs):
                even[m + x], odd[m + x] = even[x % m], odd[x % m]
            found[:] = 0
            for k in range(pairs):
                low_a, low_b = taps[0, 2 * k], taps[0, 2 * k + 1]
                high_a, high_b = taps[1, 2 * k], taps[1, 2 * k + 1]
                for x in range(m):
                    found[0, x] += low_a * even[x + k] + low_b * odd[x + k]
                    found[1, x] += high_a * even[x + k] + high_b * odd[x + k]
            for x in range(m):
                detail[2 * high, j, x] = found[1, x]
                if high:
                    detail[1, j, x] = found[0, x]
                else:
                    smaller[j, x] = found[0, x]
    here[:n, :m] = smaller[:n, :m]


def _adjoint_along_rows(here: Any, detail: Any, taps: Any, lines: Any) -> None:
    """Low and high passes along columns, from the low pass in ``here`` and the details."""
    n, m, pairs = detail.shape[1], detail.shape[2], taps.shape[1] // 2
    given = np.empty((2, m + pairs), np.float32)
    even, odd = np.empty(m, np.float32), np.empty(m, np.float32)
    for j in range(n):
        for high in range(2):
            for x in range(m):
                given[0, pairs + x] = detail[1, j, x] if high else here[j, x]
                given[1, pairs + x] = detail[2 * high, j, x]
            for x in range(pairs):
                wrapped = pairs + (x - pairs) % m
                given[0, x], given[1, x] = given[0, wrapped], given[1, wrapped]
            even[:] = 0
            odd[:] = 0
            for k in range(pairs):
                low_a, low_b = taps[0, 2 * k], taps[0, 2 * k + 1]
                high_a, high_b = taps[1, 2 * k], taps[1, 2 * k + 1]
                start = pairs - k
                for x in range(m):
                    a, b = given[0, start + x], given[1, start + x]
                    even[x] += low_a * a + high_a * b
                    odd[x] += low_b * a + high_b * b
            for x in range(m):
                lines[high, j, 2 * x], lines[high, j, 2 * x + 1] = even[x], odd[x]


def _adjoint_along_columns(lines: Any, detail: Any, taps: Any, here: Any) -> None:
    """The corner of ``here`` from its low and high passes along columns."""
    n, m, pairs = detail.shape[1], detail.shape[2], taps.shape[1] // 2
    for j in range(n):
        for x in range(2 * m):
            here[2 * j, x], here[2 * j + 1, x] = 0, 0
        for k in range(pairs):
            source = (j - k) % n
            low_a, low_b = taps[0, 2 * k], taps[0, 2 * k + 1]
            high_a, high_b = taps[1, 2 * k], taps[1, 2 * k + 1]
            for x in range(2 * m):
                a, b = lines[0, source, x], lines[1, source, x]
                here[2 * j, x] += low_a * a + high_a * b
                here[2 * j + 1, x] += low_b * a + high_b * b
