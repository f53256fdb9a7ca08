"""Scans of any coil count for a network that was built for one: compression and zero padding.

Buehrer et al. 2007, Array compression for MRI with large coil arrays, DOI 10.1002/mrm.21237;
Huang et al. 2008, A software channel compression technique for faster reconstruction with many
channels, DOI 10.1016/j.mri.2007.04.010.
"""

import torch
from torch import Tensor

from applications.errors import InputError


def coil_matrix(kspace: Tensor, n_coils: int) -> Tensor:
    r"""The matrix that takes the coils of a scan to another number of coils.

    Fewer coils: the first left singular vectors of the k-space as a matrix of coils by positions,
    :math:`U_n^H`, which keep as much of its energy as any n combinations can. The entry of
    largest magnitude of each is real and positive, so that they do not depend on the machine.
    More coils: zeros follow. As many: the identity.

    Args:
        kspace: measured, complex, shape ``(coils, rows, columns)``.
        n_coils: wanted.

    Returns:
        Complex, shape ``(n_coils, coils)``, with orthonormal rows or columns; for `with_coils`.

    Raises:
        InputError: if k-space has another shape, or no coil is wanted.

    Example:
        >>> measured = torch.zeros(3, 2, 2, dtype=torch.complex64)
        >>> measured[1] = 5
        >>> coil_matrix(measured, 1).real
        tensor([[0., 1., 0.]])
    """
    if kspace.ndim != 3 or not kspace.is_complex() or n_coils < 1:
        raise InputError(
            "kspace must be complex of shape (coils, rows, columns), and n_coils at least 1, got "
            f"{kspace.dtype} {tuple(kspace.shape)} and {n_coils}."
        )
    count = kspace.shape[0]
    if n_coils >= count:
        return torch.eye(n_coils, count, dtype=kspace.dtype, device=kspace.device)
    values = kspace.reshape(count, -1).to(torch.complex128)
    # Eigenvectors of the small matrix K K^H, in ascending order; k-space has few rows.
    vectors = torch.linalg.eigh(values @ values.mH).eigenvectors.flip(1)[:, :n_coils]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sgn().conj()).mH.to(kspace.dtype)


def with_coils(matrix: Tensor, values: Tensor) -> Tensor:
    """Images or k-space with the coils of `coil_matrix`.

    Args:
        matrix: shape ``(n_coils, coils)``.
        values: complex, shape ``(coils, rows, columns)``.

    Returns:
        Shape ``(n_coils, rows, columns)``.
    """
    return torch.einsum("nc,cyx->nyx", matrix.to(values.dtype), values)


def fitted(
    kspace: Tensor, calibration: Tensor | None, n_coils: int
) -> tuple[Tensor, Tensor | None]:
    """A slice, and what calibrates its coils, with the coils of one `coil_matrix`.

    Args:
        kspace: measured, complex, shape ``(coils, rows, columns)``.
        calibration: the same shape, or None where the slice calibrates itself.
        n_coils: wanted.

    Returns:
        Both, of so many coils.
    """
    matrix = coil_matrix(kspace, n_coils)
    extra = None if calibration is None else with_coils(matrix, calibration)
    return with_coils(matrix, kspace), extra


def energy_kept(kspace: Tensor, n_coils: int) -> float:
    """The share of the energy of k-space that `coil_matrix` keeps, 1 unless it compresses."""
    whole = torch.linalg.vector_norm(kspace)
    if kspace.shape[0] <= n_coils or not whole:
        return 1.0
    kept = torch.linalg.vector_norm(with_coils(coil_matrix(kspace, n_coils), kspace))
    return float((kept / whole).square())
