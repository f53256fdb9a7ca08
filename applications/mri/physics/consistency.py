r"""Self-consistency of coils (SPIRiT): a k-space value is a sum over its neighbours in all coils.

The weights, one small kernel per pair of coils, are fitted to the fully sampled centre of a scan.
In the image domain they are one c x c matrix a pixel, :math:`K`, and consistent coil images satisfy
:math:`K u = u`. No sensitivity map is formed, none has to be unique, so that an object larger than
the field of view does no harm.

Lustig & Pauly 2010, SPIRiT: iterative self-consistent parallel imaging reconstruction from
arbitrary k-space, DOI 10.1002/mrm.22428.
"""

import math

import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.mri.physics.operators import ifft2c, sample, sample_adjoint
from applications.mri.physics.products import times

_COARSE = 63  # positions an axis where inverses are taken, odd
_FAR, _COILS = 0.7, 6  # of half a side; fewer coils leave of the object in what is taken for noise
_KERNEL = 5  # side of the kernels [positions], where the centre is large enough to fit them


def calibrate(
    kspace: Tensor, mask: Tensor, kernel: int | None = None, regularisation: float = 0.02
) -> Tensor:
    r"""Fits the kernels to the fully sampled centre of k-space, by regularised least squares.

    Args:
        kspace: measured, complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.
        kernel: side of the kernels [positions], odd; None: 5, or 3 where the centre has fewer
            windows of 5 x 5 than such kernels have weights. A fit of too many weights is no better
            than noise: 4 to 6 dB on matrices of 128 x 128 with 5 fully sampled columns.
        regularisation: weight of the squared kernel relative to the mean energy of its inputs.

    Returns:
        K, complex64, shape ``(rows, columns, coils, coils)``: ``(K u)_o = sum_i K_oi u_i`` a pixel.

    Raises:
        InputError: if the centre is too small for the kernel.
    """
    kernels = fitted_kernels(kspace, mask, kernel, regularisation)
    return _image_domain(kernels, (kspace.shape[1], kspace.shape[2])).to(torch.complex64)


def fitted_kernels(
    kspace: Tensor, mask: Tensor, kernel: int | None = None, regularisation: float = 0.02
) -> Tensor:
    """The kernels themselves, of which `calibrate` is the Fourier transform.

    Args:
        kspace: as for `calibrate`, like the rest.
        mask: boolean.
        kernel: side.
        regularisation: weight.

    Returns:
        Weights in k-space, complex128, shape ``(coils, coils, kernel, kernel)``.

    Raises:
        InputError: if the centre is too small for the kernel.
    """
    top, bottom, left, right = _large_centre(mask, kernel or _KERNEL)
    n_coils = kspace.shape[0]
    windows = (bottom - top - _KERNEL + 1) * (right - left - _KERNEL + 1)
    kernel = kernel or (_KERNEL if windows >= n_coils * _KERNEL**2 else 3)
    rows = _patches(kspace[:, top:bottom, left:right], kernel)
    gram = rows.mH @ rows
    gram.diagonal().add_(regularisation * gram.diagonal().real.mean())
    # The regression of each input on all others is a column of the inverse over its diagonal.
    inverse = torch.linalg.inv(gram)
    own = torch.arange(n_coils, device=gram.device) * kernel**2 + kernel**2 // 2
    weights = -(inverse[:, own] / inverse[own, own]).mT
    weights[torch.arange(n_coils, device=gram.device), own] = 0  # a value must not explain itself
    return weights.reshape(n_coils, n_coils, kernel, kernel)


def noise_level(kspace: Tensor, mask: Tensor, kernel: int = _KERNEL) -> float:
    """Standard deviation of the noise of real and imaginary part, from the fully sampled centre.

    Windows of k-space in all coils span few dimensions, since coils see the same object: half of
    the eigenvalues of their covariance are those of noise (Uecker et al. 2014, ESPIRiT, DOI
    10.1002/mrm.24751). With few coils or a small centre something of the object remains in them.

    Args:
        kspace: measured, complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.
        kernel: side of the windows [positions].

    Returns:
        The level, in units of ``kspace``.

    Raises:
        InputError: if the centre is smaller than a window.
    """
    top, bottom, left, right = _large_centre(mask, kernel)
    rows = _patches(kspace[:, top:bottom, left:right], kernel)
    energies = torch.linalg.eigvalsh(rows.mH @ rows / len(rows))[-len(rows) :]
    return float(energies[len(energies) // 2].clamp_min(0) / 2) ** 0.5


def centre_noise(kspace: Tensor, mask: Tensor) -> float:
    """The noise of the fully sampled centre over what was measured far from it, noise and signal.

    Noise is as strong everywhere, so that much more than 1 is no noise of a receiver.

    Args:
        kspace: measured, complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.

    Returns:
        The ratio; 0 where coils or centre are too small to tell noise from the object, or nothing
        was measured far away.
    """
    top, bottom, left, right = fully_sampled_centre(mask)
    windows = (bottom - top - _KERNEL + 1) * (right - left - _KERNEL + 1)
    axes = [(torch.arange(n, device=mask.device) - n // 2) * (2 / n) for n in mask.shape]
    far = mask & (axes[0][:, None] ** 2 + axes[1] ** 2 > _FAR**2)
    far[:, left:right] = False
    if len(kspace) < _COILS or windows < len(kspace) * _KERNEL**2 or not bool(far.any()):
        return 0.0
    strength = float(kspace[:, far].abs().square().mean()) ** 0.5
    level = 2**0.5 * noise_level(kspace, mask)
    return level / strength if strength else 0.0


def _patches(centre: Tensor, kernel: int) -> Tensor:
    """All windows of k-space, one a row, complex128."""
    patches = centre.to(torch.complex128).unfold(1, kernel, 1).unfold(2, kernel, 1)
    return patches.permute(1, 2, 0, 3, 4).reshape(-1, len(centre) * kernel**2)


def _large_centre(mask: Tensor, kernel: int) -> tuple[int, int, int, int]:
    """`fully_sampled_centre`, if it holds a kernel."""
    top, bottom, left, right = fully_sampled_centre(mask)
    if min(bottom - top, right - left) < kernel:
        raise InputError(
            f"a fully sampled centre of {kernel} x {kernel} positions was needed to calibrate the "
            f"coils, the mask has {bottom - top} x {right - left}; sample more of the centre, or "
            "train a network of the preset paper, which needs none."
        )
    return top, bottom, left, right


def fully_sampled_centre(mask: Tensor) -> tuple[int, int, int, int]:
    """A fully sampled rectangle around the zero frequency that no side can be moved out of.

    It grows from the centre by one position a side in turn, so that it stays square while it can.

    Args:
        mask: boolean, shape ``(rows, columns)``.

    Returns:
        ``top, bottom, left, right``, as slices take them; an empty rectangle if the zero frequency
        is missing.
    """
    rows, columns = mask.shape
    top, left = rows // 2, columns // 2
    if not bool(mask[top, left]):
        return top, top, left, left
    box = [top, top + 1, left, left + 1]
    limits, outwards = (0, rows, 0, columns), (-1, 1, -1, 1)
    growing = True
    while growing:
        growing = False
        for side in (0, 2, 1, 3):  # top, left, bottom, right
            if box[side] == limits[side]:
                continue
            wider = box.copy()
            wider[side] += outwards[side]
            if bool(mask[wider[0] : wider[1], wider[2] : wider[3]].all()):
                box, growing = wider, True
    return box[0], box[1], box[2], box[3]


def low_resolution_phase(kspace: Tensor, mask: Tensor) -> Tensor:
    r"""Phase of each coil image at the resolution of the fully sampled centre, :math:`e^{i\phi}`.

    Args:
        kspace: complex, shape ``(coils, rows, columns)``.
        mask: boolean, shape ``(rows, columns)``.

    Returns:
        Complex of magnitude 1, 1 where the image is 0; shape of ``kspace``.
    """
    top, bottom, left, right = fully_sampled_centre(mask)
    centre = torch.zeros_like(kspace)
    # A window that falls to 0 at the edge of the centre keeps its sharp edge out of the image.
    window = torch.outer(*(_hann(n, kspace.real) for n in (bottom - top, right - left)))
    centre[:, top:bottom, left:right] = kspace[:, top:bottom, left:right] * window
    image = ifft2c(centre)
    magnitude = image.abs()
    return torch.where(magnitude > 0, image / magnitude.clamp_min(1e-30), 1.0 + 0j)


def inconsistency_normal(matrices: Tensor) -> Tensor:
    """``N = (K - I)^H (K - I)`` a pixel: N u is half the gradient of ``|K u - u|^2``.

    Args:
        matrices: K, shape ``(rows, columns, coils, coils)``.

    Returns:
        N, Hermitian and positive semidefinite, the same shape.
    """
    defect = matrices - torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return defect.mH @ defect


def bounded(normal: Tensor, largest: float = 2.0) -> Tensor:
    """N, scaled down where a gradient step of size 1 would not contract.

    Kernels that were fitted to a centre with little but noise can have eigenvalues of 10 and more,
    on which steps of a size that other scans are reconstructed by diverge.

    Args:
        normal: N of `inconsistency_normal`.
        largest: eigenvalue that is allowed. Eigenvalues are taken at 64 to 127 positions an axis;
            N is a polynomial of few waves, so that they miss the largest by some thousandths.

    Returns:
        N itself, or N over the same number everywhere.
    """
    rows, columns = (max(1, n // 64) for n in normal.shape[:2])
    found = float(torch.linalg.eigvalsh(normal[::rows, ::columns])[..., -1].max())
    return normal if found <= largest else normal * (largest / found)


def towards_consistency(kernels: Tensor, shape: tuple[int, int], weight: float = 0.5) -> Tensor:
    r"""The map to the images between u and its nearest consistent ones, pixel by pixel.

    .. math:: (I + w N)^{-1} b = \operatorname{argmin}_u \|u - b\|^2 + w \|(K - I) u\|^2

    The inverse varies as slowly as K. It is taken at 63 positions an axis at most, and interpolated
    by its Fourier series, which is a twentieth of the work of an inverse a pixel.

    Args:
        kernels: from `fitted_kernels`.
        shape: rows and columns.
        weight: w; much larger ones amplify what the kernels get wrong.

    Returns:
        Matrices, complex64, shape ``(rows, columns, coils, coils)``, Hermitian, with eigenvalues in
        (0, 1] but for the error of interpolation.
    """
    coarse = (min(shape[0], _COARSE), min(shape[1], _COARSE))
    normal = inconsistency_normal(_image_domain(kernels, coarse))
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    return _finer(torch.linalg.inv(eye + weight * normal), shape)


def normal_of(kernels: Tensor, shape: tuple[int, int]) -> Tensor:
    """`inconsistency_normal` of the K of kernels, without K.

    Products of two kernels of side k are sums of 2k - 1 waves an axis: as many positions hold them.

    Args:
        kernels: from `fitted_kernels`.
        shape: rows and columns.

    Returns:
        N, complex64, shape ``(rows, columns, coils, coils)``.
    """
    side = 2 * kernels.shape[-1] - 1
    coarse = (min(shape[0], side), min(shape[1], side))
    return _finer(inconsistency_normal(_image_domain(kernels, coarse)), shape)


def _finer(matrices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Hermitian matrices on more positions, by their Fourier series; complex64."""
    (rows, columns), coils, device = shape, matrices.shape[-1], matrices.device
    down, across = (
        _interpolation(old, new, device) for old, new in zip(matrices.shape[:2], shape, strict=True)
    )
    # Along rows first, of real and imaginary part; along columns then, of both in one product that
    # writes them where they stay. Products with coil images are quicker where pixels lie together.
    planes = torch.view_as_real(matrices.to(torch.complex64)).movedim(1, -1)  # (y, o, i, 2, x)
    wider = (planes @ across.mT).permute(1, 2, 0, 4, 3).reshape(coils, coils, -1, 2 * columns)
    found = _room((coils, coils, rows, columns, 2), device)
    for o in range(coils):  # from the diagonal on, and the column below it follows
        right = found[o, o:]
        torch.bmm(
            down.expand(coils - o, -1, -1), wider[o, o:], out=right.view(-1, rows, 2 * columns)
        )
        found[o, o, ..., 1] = 0
        found[o + 1 :, o] = right[1:]
        found[o + 1 :, o, ..., 1].neg_()
    return torch.view_as_complex(found).movedim((0, 1), (2, 3))


def _room(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Empty float32; in large pages, which numpy asks for: a fifth less time for what reads it."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device, dtype=torch.float32)


def _interpolation(old: int, new: int, device: torch.device) -> Tensor:
    """Real matrix of trigonometric interpolation between centred grids, ``(new, old)``."""
    if old == new:
        return torch.eye(new, device=device, dtype=torch.float32)
    # Both grids have their zero at n // 2. The sum of waves up to (old - 1) / 2, old being odd.
    here, there = (
        (torch.arange(n, dtype=torch.float64, device=device) - n // 2) / n for n in (new, old)
    )
    waves = torch.arange(1, (old - 1) // 2 + 1, device=device)
    angle = 2 * math.pi * (here[:, None] - there)
    series = 1 + 2 * (waves * angle[..., None]).cos().sum(-1)
    return (series / old).float()


def consistent_image(kspace: Tensor, mask: Tensor, normal: Tensor, iterations: int) -> Tensor:
    r"""Coil images by conjugate gradients on the measured data and the self-consistency.

    .. math:: \min_u \|P F u - f\|^2 + \|(K - I) u\|^2

    from the zero-filled images; few iterations regularise.

    Args:
        kspace: f, complex, shape ``(coils, rows, columns)``, zeros where nothing was measured.
        mask: boolean, shape ``(rows, columns)``.
        normal: N of `inconsistency_normal`.
        iterations: of conjugate gradients.

    Returns:
        u, shape of ``kspace``.
    """

    def apply(u: Tensor) -> Tensor:
        return sample_adjoint(sample(u, mask), mask) + times(normal, u)

    u = ifft2c(kspace)
    floor = torch.finfo(kspace.real.dtype).eps ** 2 * _energy(u)
    residual = u - apply(u)
    direction, energy = residual, _energy(residual)
    for _ in range(iterations):
        if energy <= floor:
            break
        product = apply(direction)
        length = energy / torch.vdot(direction.flatten(), product.flatten()).real
        u, residual = u + length * direction, residual - length * product
        before, energy = energy, _energy(residual)
        direction = residual + (energy / before) * direction
    return u


def _energy(u: Tensor) -> Tensor:
    return torch.vdot(u.flatten(), u.flatten()).real


def _image_domain(kernels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Fourier transform of correlation kernels ``(o, i, k, k)`` on the pixels of the image."""
    offsets = torch.arange(kernels.shape[-1], device=kernels.device) - kernels.shape[-1] // 2
    waves = []
    for n in shape:
        position = (torch.arange(n, device=kernels.device, dtype=torch.float64) - n // 2) / n
        # The correlation sum_d w_d f(k + d) multiplies the image by sum_d w_d exp(-2 pi i d r / n).
        angle = -2 * math.pi * offsets[:, None] * position
        waves.append(torch.polar(torch.ones_like(angle), angle))
    return torch.einsum("oiab,ay,bx->yxoi", kernels, *waves)


def _hann(n: int, like: Tensor) -> Tensor:
    """Hann window of n positions without its zeros."""
    return torch.hann_window(n + 2, periodic=False, dtype=like.dtype, device=like.device)[1:-1]
