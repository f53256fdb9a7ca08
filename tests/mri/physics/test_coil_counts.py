import pytest
import torch

from applications.errors import InputError
from applications.mri.physics.coil_counts import coil_matrix, energy_kept, with_coils
from applications.mri.physics.operators import rss


def kspace(n_coils=5, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n_coils if rank is None else rank, 6, 7)
    values = torch.randn(shape, dtype=torch.complex128, generator=generator)
    if rank is None:
        return values * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])[:n_coils, None, None]
    mixing = torch.randn(n_coils, rank, dtype=torch.complex128, generator=generator)
    return torch.einsum("cr,ryx->cyx", mixing, values)


def test_compression_is_that_of_the_singular_value_decomposition():
    values = kspace()
    singular = torch.linalg.svdvals(values.flatten(1))
    for n in (1, 2, 4):
        matrix = coil_matrix(values, n)
        torch.testing.assert_close(matrix @ matrix.mH, torch.eye(n, dtype=matrix.dtype))
        compressed = with_coils(matrix, values)
        norms = torch.linalg.vector_norm(compressed.flatten(1), dim=1)
        torch.testing.assert_close(norms, singular[:n])
        kept = float(singular[:n].square().sum() / singular.square().sum())
        assert energy_kept(values, n) == pytest.approx(kept, rel=1e-12)


def test_coils_that_depend_on_fewer_are_compressed_without_loss():
    values = kspace(6, rank=2)
    compressed = with_coils(coil_matrix(values, 2), values)
    torch.testing.assert_close(rss(compressed), rss(values), rtol=1e-10, atol=1e-12)
    assert energy_kept(values, 2) == pytest.approx(1, abs=1e-12)


def test_compression_does_not_depend_on_a_phase_common_to_all_coils():
    values = kspace()
    turned = values * torch.polar(*torch.tensor([1.0, 0.7], dtype=torch.float64))
    torch.testing.assert_close(coil_matrix(turned, 3), coil_matrix(values, 3))
    largest = coil_matrix(values, 3)
    places = largest.abs().argmax(1, keepdim=True)
    found = largest.gather(1, places)
    torch.testing.assert_close(found, found.abs() + 0j)


def test_missing_coils_are_zeros_and_the_others_as_they_were():
    values = kspace(3)
    found = with_coils(coil_matrix(values, 5), values)
    assert torch.equal(found[:3], values)
    assert not found[3:].any()
    assert torch.equal(with_coils(coil_matrix(values, 3), values), values)
    assert energy_kept(values, 5) == energy_kept(values, 3) == 1


def test_compression_needs_kspace_of_coils():
    with pytest.raises(InputError, match="kspace must be complex of shape"):
        coil_matrix(kspace()[0], 2)
    with pytest.raises(InputError, match="n_coils at least 1"):
        coil_matrix(kspace(), 0)
