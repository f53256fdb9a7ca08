import pytest
import torch

from applications.errors import InputError
from applications.mri.physics import filter_matrices
from applications.mri.physics.wavelets import Wavelets, spread

SIZES = [(32, 48), (33, 47), (5, 6), (1, 16), (100, 90)]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def inner(one, other):
    return sum((a * b).sum() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shift", [(0, 0), (3, 7), (31, 200)])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_adjoint_is_the_inverse_for_every_size_and_shift(shape, shift):
    images = random(2, *shape)
    wavelets = Wavelets(shape, shift=shift)
    found = wavelets.adjoint(wavelets.forward(images))
    torch.testing.assert_close(found, images, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_inner_products_are_kept(shape):
    one, other = random(*shape), random(*shape, seed=1)
    wavelets = Wavelets(shape, shift=(2, 5))
    found = inner(wavelets.forward(one), wavelets.forward(other))
    torch.testing.assert_close(found, (one * other).sum(), rtol=1e-12, atol=1e-12)


def test_adjoint_is_the_adjoint_where_zeros_are_appended():
    wavelets = Wavelets((33, 47), shift=(2, 5))
    images = random(33, 47)
    bands = [random(*band.shape, seed=i) for i, band in enumerate(wavelets.forward(images))]
    found = (wavelets.adjoint(bands) * images).sum()
    torch.testing.assert_close(found, inner(bands, wavelets.forward(images)), rtol=1e-12, atol=0)


def test_a_level_is_the_periodic_filter_bank_of_pywavelets():
    pywt = pytest.importorskip("pywt")
    images = random(32, 32)
    low, detail = Wavelets((32, 32), levels=1).forward(images)
    # PyWavelets counts positions from another place of its filters.
    expected, _ = pywt.dwt2(images.roll((-3, -3), (0, 1)).flip(0, 1), "db4", mode="periodization")
    sorted_ = torch.from_numpy(expected).flatten().sort().values
    torch.testing.assert_close(low.flatten().sort().values, sorted_, rtol=0, atol=1e-12)
    assert detail.shape == (3, 16, 16)


def test_details_of_cubic_polynomials_vanish_inside():
    y = torch.linspace(-1, 1, 64, dtype=torch.float64)
    cubic = (y**3)[:, None] + (y**2)[None] * y[:, None]
    _, detail = Wavelets((64, 64), levels=1).forward(cubic)
    assert float(detail[:, 4:-4, 4:-4].abs().max()) < 1e-10
    assert float(detail.abs().max()) > 0.1  # at the ends, since the image is not periodic


def test_a_shift_moves_the_grid():
    images = random(32, 32)
    moved = Wavelets((32, 32)).forward(images.roll((-3, -5), (0, 1)))
    shifted = Wavelets((32, 32), shift=(3, 5)).forward(images)
    torch.testing.assert_close(shifted, moved, rtol=0, atol=1e-12)
    still = Wavelets((32, 32)).forward(images)
    assert not torch.allclose(shifted[-1], still[-1])


def test_shifts_are_spread_over_the_grid():
    shifts = {spread((64, 64), number) for number in range(64)}
    assert len(shifts) > 48
    assert max(a for a, _ in shifts) == max(b for _, b in shifts) == 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (0, 4)}, "at least one pixel"),
        ({"shape": (4, 4), "levels": 0}, "one level"),
    ],
)
def test_impossible_wavelets_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Wavelets(**settings)


@pytest.mark.parametrize(("name", "message"), [("db99", "PyWavelets"), ("bior2.2", "orthogonal")])
def test_other_wavelets_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        Wavelets((16, 16), name=name).forward(torch.zeros(16, 16))


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_what_is_cached_serves_gradients_whoever_asked_first(around):
    shape = (37, 41)  # of no other test
    with around():
        Wavelets(shape).forward(torch.ones(2, *shape))
    image = torch.ones(2, *shape, requires_grad=True)
    bands = Wavelets(shape).forward(image)
    torch.stack([band.square().sum() for band in bands]).sum().backward()
    torch.testing.assert_close(image.grad, 2 * image.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(96, 130), (33, 47), (5, 6), (200, 64)], ids=str)
def test_blocks_change_nothing(monkeypatch, shape):
    """One block multiplies by whole matrices, as on a GPU."""
    images, transform = random(2, *shape), Wavelets(shape, shift=(3, 7))
    blocks = transform.forward(images)
    back = transform.adjoint([2 * one for one in blocks])
    monkeypatch.setattr(filter_matrices, "_SIDE", filter_matrices._WHOLE)
    whole = transform.forward(images)
    for one, other in zip(blocks, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    torch.testing.assert_close(transform.adjoint([2 * one for one in whole]), back)
