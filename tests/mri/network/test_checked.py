"""The one call for a slice: what it takes, and what it says to what does not fit."""

import numpy as np
import pytest
import torch

from applications.errors import InputError
from applications.mri import reconstruct
from applications.mri.network.architecture import paper
from applications.mri.network.reconstruction import Network, classical_reconstruction
from applications.mri.network.weights import pretrained
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.simulation.simulate import simulate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def full(shape=(48, 40), n_coils=3):
    rows, columns = ((torch.arange(n) - n // 2)[:, None] / n for n in shape)
    image = ((rows**2 + columns.mT**2) < 0.16).float() * 0.7
    return simulate(image, n_coils, seeded(), 0.005).kspace


def scan(shape=(48, 40), n_coils=3, sampling=None):
    mask = (sampling or PoissonDisc(3, 14)).mask(shape, seeded(1))
    return full(shape, n_coils) * mask, mask


KSPACE, MASK = scan()


@pytest.fixture(scope="module")
def plain():
    return reconstruct(KSPACE, MASK)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128, ">c8"])
def test_arrays_of_numpy_are_taken(plain, dtype):
    found = reconstruct(KSPACE.numpy().astype(dtype), MASK.numpy())
    torch.testing.assert_close(found.image, plain.image)
    assert found.certificate == plain.certificate


def test_arrays_in_any_order_and_those_that_cannot_be_written_are_taken(plain):
    reversed_ = KSPACE.numpy()[:, ::-1].copy()[:, ::-1]
    reversed_.flags.writeable = False
    torch.testing.assert_close(reconstruct(reversed_, np.asfortranarray(MASK)).image, plain.image)


@pytest.mark.parametrize("factor", [2.0**67, 2.0**-80])
def test_extreme_values_are_scaled_and_the_images_scaled_back(plain, factor):
    found = reconstruct(KSPACE * factor, MASK)
    torch.testing.assert_close(found.image / factor, plain.image)
    assert found.certificate.error == pytest.approx(plain.certificate.error, rel=1e-4)


@pytest.mark.parametrize(("shape", "n_coils"), [((63, 47), 1), ((48, 41), 2)])
@pytest.mark.parametrize("sampling", [CartesianRandom(2, 0.2), PoissonDisc(3, 12)], ids=repr)
def test_odd_sizes_and_one_coil_are_taken(shape, n_coils, sampling):
    kspace, mask = scan(shape, n_coils, sampling)
    found = reconstruct(kspace.to(torch.complex128), mask)
    assert found.image.shape == (1, *shape)
    assert bool(torch.isfinite(found.image).all())
    assert found.certificate.n_held_out > 0


NOT_FINITE = torch.where(MASK, torch.nan, 0) + 0j * KSPACE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((MASK, KSPACE), r"kspace, complex, and then mask, .* swapped; call reconstruct\(kspace"),
        ((MASK.numpy(), KSPACE.numpy()), "they are swapped"),
        ((KSPACE[0], MASK), r"complex of shape \(coils, rows, columns\), .* pass one slice"),
        ((KSPACE[None], MASK), r"got torch.complex64 \(1, 3, 48, 40\); pass one slice"),
        ((KSPACE.abs(), MASK), r"kspace must be complex .* got torch.float32 \(3, 48, 40\)"),
        ((KSPACE, MASK.mT), r"mask must have shape \(48, 40\), got \(40, 48\)"),
        ((KSPACE, MASK[None]), r"mask must have shape \(48, 40\), got \(1, 48, 40\)"),
        ((KSPACE, MASK[:, 0]), r"mask must have shape \(48, 40\), got \(48,\)"),
        ((KSPACE, MASK.float()), "mask must be boolean, got torch.float32; convert it with"),
        ((KSPACE, ~MASK & MASK), "mask must keep at least one position"),
        ((0 * KSPACE,), "mask must keep at least one position"),
        ((0 * KSPACE, MASK), "kspace is zero wherever the mask samples"),
        ((NOT_FINITE, MASK), r"kspace must be finite, \d+ of its values are not; leave out"),
        (([[1j]], MASK), "kspace must be a tensor or an array of numpy, got list"),
        ((KSPACE, "mask.npy"), "mask must be a tensor or an array of numpy, got str"),
        ((np.array([[["a"]]]), MASK), "kspace must hold numbers that torch takes, got an array of"),
        ((KSPACE[:0], MASK), "at least one coil"),
        ((KSPACE.to_sparse(), MASK), "kspace must be a dense tensor that holds values, got one of"),
        ((KSPACE, MASK.to("meta")), "mask must be a dense tensor that holds values"),
        (
            (KSPACE.to(torch.complex128) * 1e60, MASK),
            r"range of single precision, .* its largest value is",
        ),
        ((KSPACE.to(torch.complex128) * 1e-60, MASK), r"largest value is .*e-6\d; divide it by"),
        ((torch.full((3, 48, 40), 1e38 + 0j),), "images must be finite, that of this slice leaves"),
    ],
)
def test_what_does_not_fit_is_one_error_that_says_so(given, message):
    with pytest.raises(InputError, match=message):
        reconstruct(*given)


def test_a_calibration_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"calibration must be complex of the shape of kspace"):
        reconstruct(KSPACE, MASK, calibration=KSPACE[:, :20])


@pytest.mark.parametrize("factor", [1e-6, 0.1, 30.0, 1e12])
def test_the_strength_of_a_calibration_apart_does_not_matter(factor):
    """It has another flip angle and bandwidth; the threshold is for the image."""
    kspace, shape = full(), (48, 40)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, ::2] = True
    apart = torch.zeros_like(kspace)
    apart[..., 8:32] = kspace[..., 8:32]
    for method in (
        lambda other: reconstruct(kspace * mask, mask, calibration=other.to(torch.complex128)),
        lambda other: classical_reconstruction(kspace * mask, mask, calibration=other),
    ):
        found, expected = method(apart * factor), method(apart)
        torch.testing.assert_close(found.image, expected.image, rtol=1e-3, atol=1e-4)
        if expected.certificate is not None:
            errors = found.certificate.error, found.certificate.classical
            expected = expected.certificate.error, expected.certificate.classical
            assert errors == pytest.approx(expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_half_precision_are_taken(plain):
    found = reconstruct(KSPACE.to(torch.complex32), MASK)
    torch.testing.assert_close(found.image, plain.image, rtol=0, atol=1e-2)


def test_no_derivative_is_half_taken(plain):
    """What of the scale alone would be a wrong number."""
    found = reconstruct(KSPACE.clone().requires_grad_(), MASK)
    assert torch.equal(found.image, plain.image)
    assert not found.image.requires_grad and not found.coil_images.requires_grad


def test_arrays_with_masked_values_have_zeros_there(plain):
    masked = np.ma.array(np.where(MASK, KSPACE, 99), mask=~MASK.expand(KSPACE.shape).numpy())
    assert torch.equal(reconstruct(masked).image, plain.image)


def test_what_is_zero_in_all_coils_is_not_measured_whatever_the_mask_says(plain):
    with pytest.warns(UserWarning, match=r"\d+ of the 1920 positions of the mask are zero in all"):
        found = reconstruct(KSPACE, torch.ones_like(MASK))
    assert torch.equal(found.image, plain.image)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_change_nothing(plain, dtype, device):
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.autocast("cpu", torch.bfloat16):
            found = reconstruct(KSPACE, MASK, pretrained())
        with torch.device(device):
            slow = classical_reconstruction(KSPACE, MASK)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.image, plain.image, rtol=1e-4, atol=1e-4)
    assert slow.image.dtype == torch.float32


def test_nothing_global_is_changed():
    """The weights are read anew, which makes layers."""
    random = torch.get_rng_state()
    reconstruct(KSPACE, MASK, pretrained(), check=False)
    Network(paper(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_values_outside_the_mask_are_ignored_even_where_they_are_not_finite(plain):
    dirty = torch.where(MASK, KSPACE, torch.nan + 0j)
    torch.testing.assert_close(reconstruct(dirty, MASK).image, plain.image)


def test_weights_are_those_given(plain):
    network = pretrained()
    found = reconstruct(KSPACE, MASK, network, check=False)
    torch.testing.assert_close(found.image, plain.image)
    assert found.certificate is None
    with pytest.raises(InputError, match="trained must be network and weights, got str"):
        reconstruct(KSPACE, MASK, "weights.safetensors")


@pytest.mark.parametrize("factor", [2.0**67, 2.0**-80])
def test_l1_spirit_and_preparing_take_extreme_values_too(factor):
    torch.testing.assert_close(l1_spirit(KSPACE * factor, MASK) / factor, l1_spirit(KSPACE, MASK))
    network = pretrained().network
    scans = [network.prepare(KSPACE[None] * one, MASK) for one in (1.0, factor)]
    torch.testing.assert_close(scans[1].start, scans[0].start)
    torch.testing.assert_close(scans[1].scale / factor, scans[0].scale)
