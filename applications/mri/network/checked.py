"""One slice reconstructed, checked by samples held out, and replaced where the check fails."""

from dataclasses import replace

import torch
from torch import Tensor

from applications.mri.network.held_out import certified
from applications.mri.network.reconstruction import Reconstruction, classical_reconstruction
from applications.mri.network.weights import Trained, pretrained
from applications.mri.physics.coil_counts import coil_matrix, with_coils
from applications.mri.physics.l1_spirit import check_slice
from applications.mri.physics.masks import over_columns


def reconstruct(
    kspace: Tensor,
    mask: Tensor | None = None,
    trained: Trained | None = None,
    *,
    check: bool = True,
    fallback: bool = True,
    calibration: Tensor | None = None,
) -> Reconstruction:
    """The image of one slice, of any number of coils.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``; values outside the mask are ignored.
        mask: boolean, shape ``(rows, columns)``, or ``(columns,)`` where whole columns were
            measured; None: where any coil has a value.
        trained: network and weights, on the device of ``kspace``; None: the bundled ones.
        check: hold samples out and predict them; a second reconstruction is its price.
        fallback: where the check says that l1-SPIRiT is the better choice, give its images.
        calibration: shape of ``kspace``, zeros where nothing was measured: what the coils are
            calibrated by where that is no part of the image; None: the centre of ``kspace``.

    Returns:
        A batch of one, in the units of ``kspace``; `certificate` is what the check found, and
        `method` says whose images they are.

    Raises:
        InputError: if the slice does not fit, is not finite, or nothing was measured.

    Example:
        >>> import torch
        >>> from applications.mri.physics.operators import fft2c
        >>> places = torch.arange(64.0) - 32
        >>> disc = ((places[:, None] ** 2 + places**2) < 400).float()
        >>> coils = torch.stack([torch.linspace(0, 1, 64), torch.linspace(1, 0, 64)])[:, None]
        >>> kspace = fft2c((coils * disc).to(torch.complex64))
        >>> mask = torch.zeros(64, 64, dtype=torch.bool)
        >>> mask[:, ::2] = mask[:, 24:40] = True
        >>> found = reconstruct(kspace, mask)
        >>> found.image.shape, found.method, found.certificate.trustworthy
        (torch.Size([1, 64, 64]), 'network', True)
    """
    check_slice(kspace)
    if mask is None:
        mask = (kspace != 0).any(0)
    mask = over_columns(mask, tuple(kspace.shape[1:]))
    trained = trained or pretrained()
    kspace = torch.where(mask, kspace, 0).to(torch.complex64)
    matrix = coil_matrix(kspace, trained.network.architecture.coils_of(len(kspace)))
    given = with_coils(matrix, kspace)
    extra = None if calibration is None else with_coils(matrix, calibration)
    scan = trained.network.prepare(given[None], mask, None if extra is None else extra[None])
    found = trained.network.reconstruct(scan, trained.control)
    if not check:
        return found
    certificate = certified(trained, given, mask, extra, scan)
    if fallback and certificate.replaceable:
        found = classical_reconstruction(kspace, mask, calibration=calibration)
    return replace(found, certificate=certificate)
