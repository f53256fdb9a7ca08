"""Prewhitening: coils whose noise is of one strength and not correlated, by a scan of noise alone.

Pruessmann et al. 2001, DOI 10.1002/mrm.1241, appendix A.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    covariance = samples @ samples.conj().T / samples.shape[1]
    values = np.linalg.eigvalsh(covariance)
    if not values[0] * _LARGEST_CONDITION > values[-1]:
        return None
    sigma = np.sqrt(np.trace(covariance).real / n_coils)
    return (sigma * np.linalg.inv(np.linalg.cholesky(covariance))).astype(np.complex64)
