import numpy as np
import pytest
import torch

from applications.errors import InputError
from applications.mri.evaluation.baselines import (
    Case,
    best_lamda,
    calibration_width,
    espirit_maps,
    l1_wavelet,
    sense,
    zero_filled,
)
from applications.mri.evaluation.metrics import score
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.sampling import CartesianEquispaced, PoissonDisc, Radial
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.simulate import simulate

SIZE = 48


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def full():
    image = resize(load_anatomies()["brain_t1_axial"][8], SIZE)
    return simulate(image, 4, seeded(), noise_std=1e-3)


@pytest.fixture(scope="module")
def maps(full):
    return espirit_maps(full.kspace, 12, crop=0.0)


@pytest.fixture(scope="module")
def case(full):
    mask = PoissonDisc(4, 12).mask((SIZE, SIZE), seeded(1))
    kspace = full.kspace * mask
    return Case(kspace, mask, espirit_maps(kspace, calibration_width(mask)), full.reference)


def psnr(reference, found):
    return score(reference[None], found[None]).psnr


def test_zero_filling_is_the_root_sum_of_squares_of_the_inverse_transform(full):
    torch.testing.assert_close(zero_filled(full.kspace), rss(ifft2c(full.kspace)))
    assert psnr(full.reference, zero_filled(full.kspace)) > 50


def test_the_calibration_is_the_largest_full_square_at_the_centre():
    assert calibration_width(torch.ones(64, 40, dtype=torch.bool)) == 24
    assert calibration_width(torch.ones(64, 11, dtype=torch.bool)) == 11
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[32, 33] = True
    assert calibration_width(mask) == 0
    mask[27:37, 26:38] = True
    assert calibration_width(mask) == 10
    mask[32, 30] = False
    assert calibration_width(mask) == 3
    columns = CartesianEquispaced(4, 0.08).mask((16, 128), seeded())
    columns[:, [58, 69]] = False  # what stands beside the 10 central columns by chance
    assert calibration_width(columns) == 10
    assert calibration_width(Radial(16).mask((64, 64), seeded())) >= 3


def test_espirit_maps_are_the_normalised_sensitivities_up_to_a_phase(full, maps):
    torch.testing.assert_close(rss(maps), torch.ones(SIZE, SIZE), rtol=0, atol=1e-5)
    truth = full.coils / rss(full.coils)
    inside = full.reference > 0.2 * full.reference.max()
    agreement = (maps.conj() * truth).sum(0).abs()[inside]
    assert agreement.min() > 0.99


def test_cropping_sets_maps_to_zero_in_the_background(full):
    kept = rss(espirit_maps(full.kspace, 12, crop=0.9)) > 0
    inside = full.reference > 0.2 * full.reference.max()
    assert kept[inside].float().mean() > 0.95
    assert kept.float().mean() < 0.95


def test_sense_of_full_data_with_little_noise_recovers_the_reference(full, maps):
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool)
    found = sense(full.kspace, mask, maps, 0.0)
    assert found.dtype == torch.float32
    assert psnr(full.reference, found) > 40


def test_sense_solves_its_normal_equations(case):
    found = sense(case.kspace, case.mask, case.maps, 0.05, iterations=100)
    # The same problem by dense algebra on one image of 48 x 48 would be large: check the equation.
    scale = zero_filled(case.kspace).max()

    def normal(image):
        coils = torch.fft.fftshift(
            torch.fft.fft2(torch.fft.ifftshift(case.maps * image, dim=(-2, -1)), norm="ortho"),
            dim=(-2, -1),
        )
        return (case.maps.conj() * ifft2c(coils * case.mask)).sum(0) + 0.05 * image

    right = (case.maps.conj() * ifft2c(case.kspace / scale)).sum(0)
    image, residual = torch.zeros_like(right), right.clone()
    direction, energy = residual.clone(), residual.abs().square().sum()
    for _ in range(100):
        applied = normal(direction)
        step = energy / (direction.conj() * applied).sum().real
        image, residual = image + step * direction, residual - step * applied
        energy, before = residual.abs().square().sum(), energy
        direction = residual + energy / before * direction
        if energy < 1e-12:
            break
    torch.testing.assert_close(found, scale * image.abs(), rtol=0, atol=1e-4 * float(scale))


def test_wavelets_beat_sense_and_sense_with_regularisation_beats_zero_filling(case):
    zero = psnr(case.reference, zero_filled(case.kspace))
    assert psnr(case.reference, sense(case.kspace, case.mask, case.maps, 0.02)) > zero + 1
    assert psnr(case.reference, l1_wavelet(case.kspace, case.mask, case.maps, 0.003)) > zero + 3


@pytest.mark.parametrize("method", [sense, l1_wavelet])
def test_a_baseline_does_not_depend_on_the_unit_and_leaves_the_random_state_alone(case, method):
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that SigPy would use
    found = method(case.kspace, case.mask, case.maps, 0.01, iterations=10)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    scaled = method(1e-4 * case.kspace, case.mask, case.maps, 0.01, iterations=10)
    torch.testing.assert_close(1e4 * scaled, found, rtol=1e-3, atol=1e-4)
    other = method(case.kspace, case.mask, case.maps, 0.1, iterations=10)
    assert (other - found).abs().max() > 1e-3
    fewer = method(case.kspace, case.mask, case.maps, 0.01, iterations=2)
    assert (fewer - found).abs().max() > 1e-4


def test_a_sweep_finds_the_value_of_highest_mean_psnr(case):
    reference = case.reference

    def method(kspace, mask, maps, lamda):
        return reference * (1 + abs(lamda - 0.3)) + 0.01

    found = best_lamda(method, [1.0, 0.3, 0.1, 0.3], [case, case])
    assert found.lamda == 0.3
    assert found.lamdas == (0.1, 0.3, 1.0)
    assert found.psnrs[1] == pytest.approx(psnr(reference, reference + 0.01), rel=1e-6)
    assert max(found.psnrs) == found.psnrs[1]
    assert not found.at_edge
    assert best_lamda(method, [1.0, 0.5], [case]).at_edge


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: espirit_maps(c.kspace, 3), "calibration must lie in 4 to 48, got 3"),
        (lambda c: espirit_maps(0 * c.kspace, 12), "kspace must be finite and not all zero"),
        (lambda c: espirit_maps(c.kspace[0], 12), r"\(coils, rows, columns\), got .*\(48, 48\)"),
        (lambda c: sense(c.kspace, c.mask, c.maps[:2], 0.1), "maps must have the shape"),
        (lambda c: l1_wavelet(c.kspace, c.mask, 0 * c.maps, 0.1), "not all be zero.*lower crop"),
        (lambda c: sense(c.kspace, c.mask[:4], c.maps, 0.1), r"mask must have shape \(48, 48\)"),
        (lambda c: l1_wavelet(c.kspace, c.mask, c.maps, -1.0), "lamda must be >= 0, got -1.0"),
        (lambda c: best_lamda(sense, [], [c]), "at least one lamda and one case"),
    ],
)
def test_what_a_baseline_cannot_use_is_refused(case, call, message):
    with pytest.raises(InputError, match=message):
        call(case)
