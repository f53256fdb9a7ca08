r"""A check of every slice that needs no reference: measured samples held out, and predicted.

A tenth of the samples outside the centre is held out, the slice is reconstructed without them, and
its Fourier transform there is compared with what was measured; the same for l1-SPIRiT, which was
not trained and has nothing to be wrong about:

.. math:: e = \|P_h F u - f_h\| \, / \, \|f_h\|

What the two are worth against each other is what the samples say. That of the network alone says
little: noise cannot be predicted, and most of a sample far from the centre is noise.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from applications.mri.network.certificate import SliceCertificate
from applications.mri.network.reconstruction import Reconstruction
from applications.mri.network.scan import Scan
from applications.mri.network.weights import Trained
from applications.mri.physics.consistency import centre_noise, fully_sampled_centre
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.operators import fft2c, ifft2c

SHARE = 0.1  # of the samples outside the centre
_WHOLE = 0.9  # of the positions of columns
_CENTRE = 24  # positions that suffice to calibrate
_FEWEST, _OF_SO_MANY = 2, 5  # one place alone is chance


def held_out(mask: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits what was measured into what a slice is reconstructed from, and what it must predict.

    Args:
        mask: boolean, shape ``(rows, columns)``.
        seed: of the choice.

    Returns:
        Two masks. In the second is nothing of the fully sampled centre, of a large one nothing of
        its 24 x 24 positions in the middle; whole columns where the mask samples columns;
        and as many near the centre, for their number there, as far from it.
    """
    top, bottom, left, right = calibration_kept(mask)
    outside = mask.clone()
    rows, columns = (torch.arange(n, device=mask.device) - n // 2 for n in mask.shape)
    if _in_columns(mask):
        outside[:, left:right] = False
        chosen = _drawn(outside.any(0), columns.abs(), seed)
        held = chosen & outside
    else:
        outside[top:bottom, left:right] = False
        distance = (rows[:, None] / len(rows)) ** 2 + (columns / len(columns)) ** 2
        held = _drawn(outside.flatten(), distance.flatten(), seed).reshape(mask.shape)
    return mask & ~held, held


def calibration_kept(mask: Tensor) -> tuple[int, int, int, int]:
    """What is never held out, since coils are calibrated by it.

    Args:
        mask: boolean, shape ``(rows, columns)``.

    Returns:
        Top, bottom, left and right: the fully sampled centre, or the middle of a large one.
    """
    top, bottom, left, right = fully_sampled_centre(mask)
    rows, columns = (n // 2 for n in mask.shape)
    half = _CENTRE // 2
    # Whole columns are held out whole, so that all rows of those in the middle stay.
    if not _in_columns(mask):
        top, bottom = max(top, rows - half), min(bottom, rows + half)
    return top, bottom, max(left, columns - half), min(right, columns + half)


def _in_columns(mask: Tensor) -> bool:
    """Whether columns were measured whole, but for some zeros and what echoes leave out."""
    # Of a column that was measured around it a sample is no hard guess.
    rows, columns = mask.any(1), mask.any(0)
    return float(mask[rows][:, columns].float().mean()) >= _WHOLE


def _drawn(places: Tensor, distance: Tensor, seed: int) -> Tensor:
    """One of each ten places or so, from the nearest to the centre to the farthest."""
    found = places.nonzero()[:, 0]
    found = found[distance[found].argsort(stable=True)]
    generator = torch.Generator().manual_seed(seed)
    n = max(math.ceil(SHARE * len(found)), min(_FEWEST, len(found) // _OF_SO_MANY))
    bounds = [len(found) * k // n for k in range(n + 1)] if n else [0]
    chosen = [
        int(torch.randint(a, b, (), generator=generator, device="cpu")) for a, b in pairwise(bounds)
    ]
    drawn = torch.zeros_like(places)
    drawn[found[chosen]] = True
    return drawn


def certified(
    trained: Trained,
    kspace: Tensor,
    mask: Tensor,
    calibration: Tensor | None = None,
    scan: Scan | None = None,
) -> SliceCertificate:
    """Holds samples of a slice out and predicts them, by a network and by l1-SPIRiT.

    Args:
        trained: network and weights.
        kspace: of as many coils as the network needs, ``(coils, rows, columns)``, zeros where
            nothing was measured.
        mask: boolean, shape ``(rows, columns)``.
        calibration: see `scan.prepared`.
        scan: the slice with all its samples, whose calibration serves again where nothing of the
            centre is held out; None: it was not prepared yet.

    Returns:
        The certificate.
    """
    kept, held = held_out(mask)
    if not bool(held.any()):
        return SliceCertificate(float("nan"), float("nan"), 0)
    measured = kspace[:, held]
    same = calibration is not None or fully_sampled_centre(kept) == fully_sampled_centre(mask)
    consistent = scan.consistent if scan is not None and same else None
    found, classical = _both(trained, kspace * kept, kept, calibration, consistent)
    errors = [
        float(torch.linalg.vector_norm(fft2c(images)[:, held] - measured))
        / max(float(torch.linalg.vector_norm(measured)), 1e-30)
        for images in (found.coil_images[0], classical)
    ]
    noise = centre_noise(kspace, mask) if calibration is None else 0.0
    return SliceCertificate(errors[0], errors[1], int(held.sum()), noise)


def _both(
    trained: Trained,
    kspace: Tensor,
    mask: Tensor,
    calibration: Tensor | None,
    consistent: Tensor | None,
) -> tuple[Reconstruction, Tensor]:
    """The reconstruction of a network, and coil images of l1-SPIRiT."""
    network = trained.network
    extra = None if calibration is None else calibration[None]
    with torch.no_grad():
        scan = network.prepare(kspace[None], mask, extra, consistent)
        found = network.reconstruct(scan, trained.control)
        if network.architecture.gains:  # begins with steps of l1-SPIRiT: they are there already
            return found, ifft2c(scan.start[0]) * scan.scale[0]
        return found, l1_spirit(kspace, mask, calibration=calibration)
