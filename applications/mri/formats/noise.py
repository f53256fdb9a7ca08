"""Prewhitening: coils whose noise is of one strength and not correlated, by a scan of noise alone.

Pruessmann et al. 2001, DOI 10.1002/mrm.1241, appendix A.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from applications.mri.formats.base import Acquisitions

_SAMPLES_PER_COIL = 4  # below, the covariance is little but chance
_LARGEST_CONDITION = 1e8


def whitening(noise: Sequence[NDArray[np.complex64]], n_coils: int) -> NDArray[np.complex64] | None:
    r"""The matrix :math:`W` that makes noise white: :math:`W \Psi W^H = \sigma^2 1`.

    It is the inverse of the Cholesky factor of the covariance :math:`\Psi`, times the mean
    strength :math:`\sigma`, so that images keep the units of the scanner.

    Args:
        noise: samples without signal, each ``(coils, samples)``.
        n_coils: of the image.

    Returns:
        Shape ``(coils, coils)``; None where the noise does not tell: scans of other coils, too few
        samples, or coils without noise.
    """
    fitting = [one for one in noise if one.shape[0] == n_coils]
    if not fitting:
        return None
    samples = np.concatenate(fitting, axis=1).astype(np.complex128)
    if samples.shape[1] < _SAMPLES_PER_COIL * n_coils or not np.isfinite(samples).all():
        return None
    samples -= samples.mean(axis=1, keepdims=True)  # an offset of a receiver is no noise
    covariance = samples @ samples.conj().T / samples.shape[1]
    values = np.linalg.eigvalsh(covariance)
    if not values[0] * _LARGEST_CONDITION > values[-1]:
        return None
    sigma = np.sqrt(np.trace(covariance).real / n_coils)
    return (sigma * np.linalg.inv(np.linalg.cholesky(covariance))).astype(np.complex64)


def measured_whitening(
    acquisitions: Acquisitions,
    numbers: NDArray[np.int64],
    channels: NDArray[np.int64],
    n_coils: int,
) -> tuple[NDArray[np.complex64] | None, tuple[str, ...]]:
    """The matrix by the scans of noise in a file, and what to say of it.

    Args:
        acquisitions: of the file.
        numbers: of the scans of noise.
        channels: of each.
        n_coils: of the image.

    Returns:
        `whitening`, and remarks for users.
    """
    if not len(numbers):
        return None, ()
    noise = [
        value.view(np.complex64).reshape(int(count), -1)
        for count, value in zip(channels, acquisitions.values(numbers), strict=True)
        if count and value.size and value.size % (2 * int(count)) == 0
    ]
    white = whitening(noise, n_coils)
    if white is None:
        return None, ("the scans of noise are too few, or of other coils: noise is not whitened",)
    return white, ("noise is whitened by the scans of noise",)
