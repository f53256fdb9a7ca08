"""Fields of view smaller than the object: along the columns, the phase encoding, it folds over."""

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.physics.operators import fft2c, rss
from applications.mri.simulation.simulate import Simulation

_FEWEST = 8  # columns


def columns_in_view(n_columns: int, wrap: float) -> int:
    """How many columns a scan has that sees a share of them, an even number.

    Args:
        n_columns: of the object.
        wrap: share of the columns, in (0, 1].

    Returns:
        The number.

    Raises:
        InputError: if the share is out of range, or leaves too few.
    """
    if not 0 < wrap <= 1:
        raise InputError(f"wrap, a share of the columns, must lie in (0, 1], got {wrap:g}.")
    n = n_columns if wrap == 1 else 2 * round(wrap * n_columns / 2)
    if n < min(_FEWEST, n_columns):
        raise InputError(
            f"a field of view of at least {_FEWEST} columns was needed, wrap = {wrap:g} leaves {n} "
            f"of {n_columns}; choose a larger share, or larger images."
        )
    return n


def folded(images: Tensor, n: int) -> Tensor:
    """Images in a field of view of fewer columns: what lies outside comes in from the other side.

    Args:
        images: shape ``(..., rows, columns)``.
        n: columns of the field of view, around the centre.

    Returns:
        Sums over the columns that fall onto each other, shape ``(..., rows, n)``.
    """
    columns = images.shape[-1]
    places = (torch.arange(columns, device=images.device) - columns // 2 + n // 2) % n
    view = torch.zeros(*images.shape[:-1], n, dtype=images.dtype, device=images.device)
    return view.index_add(-1, places, images)


def in_view(one: Simulation, n: int) -> tuple[Tensor, Tensor]:
    """k-space and reference of a simulated slice in a field of view of `n` columns.

    Every coil image folds with its own sensitivity, before the noise is added: white noise in
    k-space stays what it is.

    Args:
        one: the slice, of the whole object.
        n: columns of the field of view.

    Returns:
        k-space ``(coils, rows, n)``, and the root sum of squares of the folded coil images.
    """
    if n == one.kspace.shape[-1]:
        return one.kspace, one.reference
    noise = one.kspace - fft2c(one.clean)
    clean = folded(one.clean, n)
    return fft2c(clean) + noise[..., :n], rss(clean)
