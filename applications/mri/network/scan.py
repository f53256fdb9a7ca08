"""Measured data made ready for the network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.network.architecture import Architecture
from applications.mri.network.wavelet_phases import EVERY
from applications.mri.physics.consistency import (
    bounded,
    calibrate,
    consistent_image,
    fitted_kernels,
    inconsistency_normal,
    low_resolution_phase,
    towards_consistency,
)
from applications.mri.physics.l1_spirit import CONSISTENCY, quick_steps, threshold_of_noise
from applications.mri.physics.masks import check_mask, samples_columns
from applications.mri.physics.operators import fft2c, ifft2c, in_units_of, rss, unit_of


@dataclass(frozen=True, eq=False)
class Scan:
    """Measured data made ready for the network; what is constant for a sample.

    Attributes:
        kspace: f over `scale`, zeros where nothing was measured, ``(batch, coils, rows, columns)``.
        mask: boolean, ``(batch, 1, rows, columns)``.
        start: the k-space that g0 receives: `kspace`, or filled by self-consistency.
        normal: N of the self-consistency, ``(batch, rows, columns, coils, coils)``, or None.
        phases: of the low-resolution coil images, complex of magnitude 1, the shape of `kspace`, or
            None.
        scale: what the measured k-space was divided by, ``(batch, 1, 1, 1)``.
        before: k-space of the coil images of the step before `start`, or None.
        consistent: matrices of `consistency.towards_consistency`, the shape of `normal`, or None.
        threshold: of `l1_spirit.threshold_of_noise`, ``(batch, 1, 1, 1)``, or None.
    """

    kspace: Tensor
    mask: Tensor
    start: Tensor
    normal: Tensor | None
    phases: Tensor | None
    scale: Tensor
    before: Tensor | None = None
    consistent: Tensor | None = None
    threshold: Tensor | None = None

    def crop_rows(self, top: int, n_rows: int) -> "Scan":
        """The scan of some image rows alone.

        Args:
            top: first row.
            n_rows: number of rows.

        Returns:
            The smaller scan; exact, since a mask of whole columns treats all image rows alike.

        Raises:
            InputError: if the mask does not sample whole columns.
        """
        if not samples_columns(self.mask):
            raise InputError("a crop of rows needs masks that sample whole columns.")
        rows = slice(top, top + n_rows)

        def crop(kspace: Tensor) -> Tensor:
            return fft2c(ifft2c(kspace)[..., rows, :])

        return Scan(
            crop(self.kspace),
            self.mask[..., rows, :],
            crop(self.start),
            None if self.normal is None else self.normal[:, rows],
            None if self.phases is None else self.phases[..., rows, :],
            self.scale,
            None if self.before is None else crop(self.before),
            None if self.consistent is None else self.consistent[:, rows],
            self.threshold,
        )


def prepared(
    kspace: Tensor,
    mask: Tensor,
    architecture: Architecture,
    calibration: Tensor | None = None,
    consistent: Tensor | None = None,
) -> Scan:
    """Makes measured data ready.

    Args:
        kspace: complex, shape ``(batch, coils, rows, columns)``; values outside the mask are
            ignored.
        mask: boolean, shape ``(rows, columns)`` or ``(batch, rows, columns)``.
        architecture: coil count and options of the network.
        calibration: shape of ``kspace``, zeros where nothing was measured: what the coils are
            calibrated by where that is no part of the image; None: the centre of ``kspace``.
        consistent: `Scan.consistent` of the same slices with the same centre, which need not be
            found again; None: to be found.

    Returns:
        The scan, complex64.

    Raises:
        InputError: if the coil count is not the network's, the mask does not fit or keeps nothing,
            or k-space is not finite.
    """
    a = architecture
    masks = _checked(kspace, mask, a.coils_of(kspace.shape[1]) if kspace.ndim == 4 else 0)
    f = kspace.to(torch.complex64) * masks[:, None]
    scale = torch.ones(len(f), 1, 1, 1, device=f.device, dtype=f.real.dtype)
    if a.scale_input:
        unit = unit_of(f)
        scale = unit * rss(ifft2c(f / unit)).amax((-2, -1))[:, None, None, None]
        if not bool((scale > 0).all()):
            raise InputError("kspace is zero wherever the mask samples; check the mask.")
    f = f / scale
    centre, measured = f, masks
    if calibration is not None:
        each = zip(f, calibration, strict=True)
        centre = torch.stack([in_units_of(*pair).to(f) for pair in each])
        measured = (centre != 0).any(dim=1)
    pairs = zip(centre, measured, strict=True)
    if a.gains:
        pairs = list(pairs)
        if consistent is None:
            consistent = _consistent(pairs)
        return _warmed_up(f, masks, consistent, _thresholds(pairs), a.warm_up, scale)
    start, normal = f, None
    if a.self_consistency:
        normal = torch.stack([inconsistency_normal(calibrate(x, m)) for x, m in pairs])
        start, normal = _filled(f, masks, normal, a.self_consistency)
    phases = None
    if a.demodulate:
        found = [low_resolution_phase(x, m) for x, m in zip(centre, measured, strict=True)]
        phases = torch.stack(found)
    return Scan(f, masks[:, None], start, normal, phases, scale)


def _consistent(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Matrices of `consistency.towards_consistency` by the centres of k-space."""
    each = [
        towards_consistency(fitted_kernels(x, m), (x.shape[1], x.shape[2]), CONSISTENCY)
        for x, m in pairs
    ]
    if len(each) == 1:
        return each[0][None]
    # As they lie in memory, see `products.times`.
    return torch.stack([one.movedim((-2, -1), (-4, -3)) for one in each]).movedim(
        (-4, -3), (-2, -1)
    )


def _thresholds(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    found = [threshold_of_noise(x, m) for x, m in pairs]
    first = pairs[0][0]
    return torch.tensor(found, device=first.device, dtype=first.real.dtype)[:, None, None, None]


def _warmed_up(
    f: Tensor, masks: Tensor, consistent: Tensor, thresholds: Tensor, steps: int, scale: Tensor
) -> Scan:
    """Steps of l1-SPIRiT for phases that go on with them."""
    last, before = [], []
    for x, m, matrices, threshold in zip(f, masks, consistent, thresholds, strict=True):
        u, previous = quick_steps(x, m, matrices, float(threshold), steps, EVERY)
        last.append(u)
        before.append(previous)
    return Scan(
        f,
        masks[:, None],
        fft2c(torch.stack(last)),
        None,
        None,
        scale,
        fft2c(torch.stack(before)),
        consistent,
        thresholds,
    )


def _checked(kspace: Tensor, mask: Tensor, n_coils: int) -> Tensor:
    """One mask a sample, if everything fits."""
    if kspace.ndim != 4 or not kspace.is_complex():
        raise InputError(
            "kspace must be complex of shape (batch, coils, rows, columns), got "
            f"{kspace.dtype} {tuple(kspace.shape)}."
        )
    if kspace.shape[1] != n_coils:
        raise InputError(
            f"the network was built for {n_coils} coils, kspace has {kspace.shape[1]}; "
            "use weights trained for that count."
        )
    batch, _, rows, columns = kspace.shape
    masks = mask if mask.ndim == 3 else mask[None].expand(batch, *mask.shape)
    if len(masks) != batch:
        raise InputError(
            f"mask must have shape {(rows, columns)}, or one mask for each of the {batch} "
            f"samples, got {tuple(mask.shape)}; draw it anew."
        )
    for one in masks:
        check_mask(one, (rows, columns))
    if not bool(torch.isfinite(kspace).all()):
        raise InputError("kspace must be finite; leave out the slice, or export it again.")
    return masks


def _filled(f: Tensor, masks: Tensor, normal: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """k-space filled by self-consistency, and N of each phase's step towards it."""
    filled = [
        consistent_image(x, m, k, iterations) for x, m, k in zip(f, masks, normal, strict=True)
    ]
    return fft2c(torch.stack(filled)), torch.stack([bounded(one) for one in normal])
