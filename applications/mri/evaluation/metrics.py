"""PSNR, SSIM and NMSE of a reconstructed volume, by a named convention.

Conventions differ by decibels on the same images, so that a score is worth nothing without its
convention: every record carries it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from applications.errors import InputError

_WINDOW = 7
_OBJECT = 0.05  # of the maximum


class Convention(StrEnum):
    """What range and mean error are taken over.

    `fastmri`: the volume. The range of PSNR and SSIM is the maximum of the volume, the errors of
    PSNR and NMSE are over the volume, SSIM is averaged over its slices.

    `slice`: each slice. Range and errors are those of a slice, scores are averaged over slices.
    """

    FASTMRI = "fastmri"
    SLICE = "slice"


@dataclass(frozen=True)
class Scores:
    """Quality of one volume, or a mean over volumes.

    Attributes:
        psnr: peak signal-to-noise ratio [dB], inf for a perfect image.
        ssim: structural similarity, at most 1.
        nmse: normalised mean squared error, 0 for a perfect image.
        convention: by which they were taken.
        object_psnr: PSNR [dB] whose error is over the object alone, pixels of the reference above
            5 % of its maximum. Over the image, methods gain or lose by what they make of air, of
            which a measured reference knows nothing but noise. None where it was not taken.
    """

    psnr: float
    ssim: float
    nmse: float
    convention: Convention = Convention.FASTMRI
    object_psnr: float | None = None

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, NMSE {self.nmse:.4f} "
            f"({self.convention})"
        )


def score(
    reference: Tensor | NDArray[np.floating],
    reconstruction: Tensor | NDArray[np.floating],
    convention: Convention = Convention.FASTMRI,
) -> Scores:
    r"""Compares a reconstructed volume with its reference.

    With `u` the reference, `v` the reconstruction and the maximum and all norms taken over the
    volume (`fastmri`), or over a slice (`slice`, the scores then being averaged over slices),

    .. math:: \mathrm{PSNR} = 10 \log_{10} \frac{(\max u)^2}{\mathrm{mean} (u - v)^2},
        \quad \mathrm{NMSE} = \frac{\|u - v\|^2}{\|u\|^2}.

    SSIM is taken slice by slice and averaged: uniform 7 x 7 window, k1 = 0.01, k2 = 0.03, data
    range max u.

    Args:
        reference: magnitudes, shape ``(slices, rows, columns)``, rows and columns >= 7.
        reconstruction: of the same shape; its scale counts.
        convention: over what range and errors are taken.

    Returns:
        The scores, computed in float64.

    Raises:
        InputError: if shapes differ, values are complex or not finite, or the reference (with
            `slice`, one of its slices) has no positive value.

    Zbontar et al. 2018, arXiv:1811.08839, section 5. Wang et al. 2004, DOI 10.1109/TIP.2003.819861,
    for SSIM.
    """
    u, v = _volume("reference", reference), _volume("reconstruction", reconstruction)
    if u.shape != v.shape:
        raise InputError(
            f"reconstruction must have the shape {u.shape} of the reference, got {v.shape}; crop "
            "it with centre_crop."
        )
    if convention is Convention.FASTMRI:
        return _scores(u, v, convention)
    return mean_scores(
        _scores(u[k : k + 1], v[k : k + 1], convention, f", slice {k}") for k in range(len(u))
    )


def mean_scores(scores: Iterable[Scores]) -> Scores:
    """The mean of each score over volumes.

    Args:
        scores: one or more, of one convention.

    Returns:
        The means; PSNR is averaged in dB.

    Raises:
        InputError: if there are none, or their conventions differ.
    """
    scores = tuple(scores)
    if not scores:
        raise InputError("scores must hold at least one volume, got none.")
    conventions = {s.convention for s in scores}
    if len(conventions) > 1:
        raise InputError(
            f"scores must be of one convention, got {', '.join(sorted(conventions))}; score again."
        )
    inside = [s.object_psnr for s in scores]
    return Scores(
        fmean(s.psnr for s in scores),
        fmean(s.ssim for s in scores),
        fmean(s.nmse for s in scores),
        scores[0].convention,
        None if None in inside else fmean(one for one in inside if one is not None),
    )


def _scores(
    u: NDArray[np.float64], v: NDArray[np.float64], convention: Convention, where: str = ""
) -> Scores:
    """Scores whose range and errors are over all that is given."""
    from skimage.metrics import structural_similarity  # slow to import, and needed only here

    peak = float(u.max())
    if peak <= 0:
        raise InputError(
            f"reference must have a positive maximum, got {peak:g}{where}; leave it out."
        )
    squared_error = float(np.square(u - v).sum())
    similarities: list[Any] = [
        structural_similarity(
            a, b, win_size=_WINDOW, data_range=peak, gaussian_weights=False, K1=0.01, K2=0.03
        )
        for a, b in zip(u, v, strict=True)
    ]
    inside = u > _OBJECT * peak
    error_inside = np.square(u - v)[inside].sum()
    with np.errstate(divide="ignore"):  # a perfect image has infinite PSNR
        psnr = float(10 * np.log10(np.float64(peak**2 * u.size) / squared_error))
        object_psnr = float(10 * np.log10(peak**2 * inside.sum() / np.float64(error_inside)))
    nmse = squared_error / float(np.square(u).sum())
    return Scores(psnr, float(np.mean(similarities)), nmse, convention, object_psnr)


def _volume(name: str, values: Tensor | NDArray[np.floating]) -> NDArray[np.float64]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if np.iscomplexobj(array):
        raise InputError(f"{name} must be real, got {array.dtype}; take magnitudes first.")
    if array.ndim != 3 or array.size == 0 or min(array.shape[1:]) < _WINDOW:
        raise InputError(
            f"{name} must have shape (slices, rows, columns), rows and columns at least {_WINDOW}, "
            f"got {array.shape}; add the slice axis to a single image."
        )
    if not np.isfinite(array).all():
        raise InputError(
            f"{name} must be finite, it holds {np.count_nonzero(~np.isfinite(array))} values that "
            "are not."
        )
    return array.astype(np.float64)
