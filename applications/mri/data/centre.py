"""Whether k-space has its peak where its zero frequency is said to be."""

import torch
from torch import Tensor

from applications.errors import InputError

_NEAR = 16  # of a side, the share of it that a peak may lie off by phase or by chance
_SMALLEST_SIDE = 16
_HIGHER = 4.0  # times the energy around the declared centre, and of most of k-space
_BRIGHT = 0.995  # share of positions that are not clipped, so that one spike is no peak


def check_centre(kspace: Tensor, mask: Tensor | None, where: str) -> None:
    """Refuses k-space whose peak lies elsewhere than at `n // 2`.

    The energy, in a window of a sixteenth of each side, is compared with that around the centre. A
    linear phase of the image moves the peak by a few positions, and noise has none.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``, finite and not all zero.
        mask: of what was measured, ``(rows, columns)``; None: all.
        where: the file and the slice, for the message.

    Raises:
        InputError: naming where the peak is.
    """
    rows, columns = kspace.shape[-2:]
    if min(rows, columns) < _SMALLEST_SIDE:
        return
    parts = torch.view_as_real(kspace)
    energy = (parts / parts.abs().max()).square().sum(dim=(0, -1))
    counted = torch.ones_like(energy) if mask is None else mask.to(energy.dtype)
    energy = energy.clamp(max=energy[counted > 0].quantile(_BRIGHT)) * counted
    near = [max(n // _NEAR, 2) for n in (rows, columns)]
    means = _windowed(energy, near) / _windowed(counted, near).clamp_min(1e-6)
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


def _windowed(values: Tensor, half: list[int]) -> Tensor:
    """Means over windows, what lies outside being 0."""
    size = [2 * (n // 2) + 1 for n in half]
    pooled = torch.nn.functional.avg_pool2d(
        values[None, None], size, stride=1, padding=[n // 2 for n in size]
    )
    return pooled[0, 0]
