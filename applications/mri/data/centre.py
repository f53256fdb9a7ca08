"""Whether k-space has its peak where its zero frequency is said to be, and no values beyond it."""

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.formats import UnusableSliceError

_NEAR = 16  # of a side, the share of it that a peak may lie off by phase or by chance
_SMALLEST_SIDE = 16
_HIGHER = 4.0  # times the energy around the declared centre, and of most of k-space
_BEYOND = 100.0  # times the largest value near the centre, which no sample elsewhere comes to
_BRIGHT = 0.995  # share of positions that are not clipped, so that one spike is no peak


def check_centre(kspace: Tensor, mask: Tensor | None, where: str) -> None:
    """Refuses k-space whose peak lies elsewhere than at `n // 2`.

    The energy, in a window of a sixteenth of each side, is compared with that around the centre. A
    linear phase of the image moves the peak by a few positions, and noise has none.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``, not all zero; squares must be finite.
        mask: of what was measured, ``(rows, columns)``; None: all.
        where: the file and the slice, for the message.

    Raises:
        InputError: naming where the peak is.
    """
    rows, columns = kspace.shape[-2:]
    if min(rows, columns) < _SMALLEST_SIDE:
        return
    energy = (kspace.real.square() + kspace.imag.square()).sum(dim=0).double()
    counted = torch.ones_like(energy) if mask is None else mask.to(energy.dtype)
    measured = energy[counted > 0]
    bright = measured.kthvalue(max(1, int(_BRIGHT * len(measured)))).values
    energy = energy.clamp(max=bright) * counted
    near = [max(n // _NEAR, 2) for n in (rows, columns)]
    means = _windowed(energy, near) / _windowed(counted, near).clamp_min(0.5)
    peak = divmod(int(means.argmax()), columns)
    centre = (rows // 2, columns // 2)
    if all(abs(p - c) <= n for p, c, n in zip(peak, centre, near, strict=True)):
        return
    around = tuple(slice(c - n, c + n + 1) for c, n in zip(centre, near, strict=True))
    usual = max(float(means[around].max()), float(means[counted > 0].median()))
    if bool(counted[around].any()) and float(means[peak]) > _HIGHER * usual:
        raise InputError(
            f"{where}: k-space has its peak near row {peak[0]} and column {peak[1]}, its zero "
            f"frequency was to be at {centre[0]} and {centre[1]}; correct the encoding centre in "
            "the header, or shift k-space."
        )


def check_beyond(kspace: Tensor, where: str) -> None:
    """Refuses single values that no scan has, such as altered bytes leave.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``, finite.
        where: the file and the slice, for the message.

    Raises:
        UnusableSliceError: naming the place and the size of the largest.
    """
    rows, columns = kspace.shape[-2:]
    if min(rows, columns) < _SMALLEST_SIDE:
        return
    largest = torch.maximum(kspace.real.abs(), kspace.imag.abs()).amax(0).double()
    near = torch.zeros_like(largest, dtype=torch.bool)
    near[tuple(slice(n // 2 - n // 8, n // 2 + n // 8 + 1) for n in (rows, columns))] = True
    inside = float(largest[near].max())
    row, column = divmod(int(largest.masked_fill(near, 0).argmax()), columns)
    value = float(largest[row, column])
    if 0 < _BEYOND * inside < value:
        raise UnusableSliceError(
            f"{where} holds a value of {value:.3g} at row {row} and column {column}, k-space near "
            f"its centre comes to {inside:.3g}: it is damaged; copy or export it again, or leave "
            "the slice out."
        )


def _windowed(values: Tensor, half: list[int]) -> Tensor:
    """Sums over windows around each position, what lies outside being 0."""
    for axis, n in enumerate(half):
        length, reach = values.shape[axis], n // 2
        sums = values.cumsum(axis)
        place = torch.arange(length, device=values.device)
        until = sums.index_select(axis, (place + reach).clamp(max=length - 1))
        before = sums.index_select(axis, (place - reach - 1).clamp(min=0))
        first = (place > reach).to(values.dtype)
        values = until - before * (first[:, None] if axis == 0 else first)
    return values
