import math

import pytest
import torch

from applications.errors import InputError
from applications.mri.evaluation.metrics import score
from applications.mri.physics.consistency import (
    bounded,
    calibrate,
    consistent_image,
    inconsistency_normal,
    noise_level,
)
from applications.mri.physics.l1_spirit import (
    l1_spirit,
    soft_threshold_jointly,
    threshold_of_noise,
)
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.physics.wavelets import Wavelets
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.simulate import simulate

SIZE = 64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def full():
    image = resize(load_anatomies()["brain_t1_axial"][8], SIZE).clamp(0, 1)
    return simulate(image, 4, seeded(), noise_std=0.005)


@pytest.fixture(scope="module")
def mask():
    return PoissonDisc(5, 16).mask((SIZE, SIZE), seeded(1))


def psnr(reference, found):
    return score(reference[None], found[None]).psnr


def test_without_threshold_it_comes_to_the_minimum_of_data_and_consistency():
    # Small: it takes hundreds of steps to come there.
    image = resize(load_anatomies()["brain_t1_axial"][8], 32).clamp(0, 1)
    mask = PoissonDisc(3, 12).mask((32, 32), seeded(1))
    kspace = simulate(image, 4, seeded(), noise_std=0.005).kspace * mask
    scale = rss(ifft2c(kspace)).max()
    # As the iteration does: N bounded, and halved by c = 1/2.
    normal = 0.5 * bounded(inconsistency_normal(calibrate(kspace / scale, mask)))
    exact = consistent_image(kspace, mask, normal, 600)
    found = l1_spirit(kspace, mask, threshold=0.0, steps=300)
    difference = float((found - exact).abs().max() / exact.abs().max())
    assert difference < 1e-2, difference


def test_it_beats_zero_filling_and_the_unthresholded_minimum(full, mask):
    kspace = full.kspace * mask
    zero, plain, sparse = (
        psnr(full.reference, rss(images))
        for images in (ifft2c(kspace), l1_spirit(kspace, mask, 0.0), l1_spirit(kspace, mask))
    )
    assert sparse > zero + 3
    assert sparse > plain + 0.5


def test_the_threshold_is_a_setting_that_matters_and_scales_with_the_scan(full, mask):
    kspace = full.kspace * mask
    low, high = (l1_spirit(kspace, mask, t, steps=10) for t in (0.001, 0.05))
    assert float((low - high).abs().max() / low.abs().max()) > 0.01
    scaled = l1_spirit(1e6 * kspace, mask, 0.001, steps=10)
    torch.testing.assert_close(scaled, 1e6 * low, rtol=1e-4, atol=1e6 * 1e-6)


@pytest.mark.parametrize("n_coils", [1, 2, 11])
def test_any_number_of_coils_and_odd_sizes(n_coils, mask):
    image = resize(load_anatomies()["brain_t1_axial"][8], 65).clamp(0, 1)[:, :63]
    scan = simulate(image, n_coils, seeded(), noise_std=0.005)
    columns = CartesianRandom(2, 0.2).mask((65, 63), seeded(1))
    found = l1_spirit(scan.kspace * columns, columns, steps=20)
    assert found.shape == scan.kspace.shape
    assert psnr(scan.reference, rss(found)) > psnr(
        scan.reference, rss(ifft2c(scan.kspace * columns))
    )


def test_one_phase_for_all_and_one_order_of_coils_change_nothing_else(full, mask):
    kspace = full.kspace * mask
    images = l1_spirit(kspace, mask, 0.002, steps=10)
    turned = l1_spirit(kspace * torch.polar(torch.tensor(1.0), torch.tensor(2.0)), mask, 0.002, 10)
    factor = torch.polar(torch.tensor(1.0), torch.tensor(2.0))
    torch.testing.assert_close(turned, factor * images, rtol=1e-3, atol=2e-5)
    order = [2, 0, 3, 1]
    permuted = l1_spirit(kspace[order], mask, 0.002, steps=10)
    torch.testing.assert_close(permuted, images[order], rtol=1e-3, atol=2e-5)


def test_the_proximal_step_minimises_what_it_says():
    generator = seeded(3)
    b = torch.randn(3, 17, 20, dtype=torch.complex128, generator=generator)
    wavelets, threshold = Wavelets((16, 20)), 0.7
    b = b[:, :16]

    def cost(u):
        _, *details = wavelets.forward(torch.cat([u.real, u.imag]))
        joint = sum(torch.linalg.vector_norm(band, dim=0).sum() for band in details)
        return float(0.5 * (u - b).abs().square().sum() + threshold * joint)

    least = soft_threshold_jointly(b, wavelets, threshold)
    assert cost(least) < cost(b)
    for seed in range(5):
        away = torch.randn(b.shape, dtype=b.dtype, generator=seeded(seed))
        for length in (1e-1, 1e-3):
            assert cost(least + length * away) > cost(least)


def test_the_noise_level_is_found_and_sets_the_threshold():
    mask = torch.ones(64, 64, dtype=torch.bool)
    noise = torch.randn(8, 64, 64, dtype=torch.complex64, generator=seeded()) * math.sqrt(2)
    assert noise_level(0.03 * noise, mask) == pytest.approx(0.03, rel=0.1)
    smooth = torch.zeros(8, 64, 64, dtype=torch.complex64)
    smooth[:, 28:36, 28:36] = 1.0
    found = noise_level(fft2c(smooth) + 0.03 * noise, mask)
    assert found == pytest.approx(0.03, rel=0.15)
    assert threshold_of_noise(0.03 * noise, mask) == pytest.approx(5 * 0.03**2, rel=0.2)
    assert threshold_of_noise(1e-4 * noise, mask) == 0.001
    assert threshold_of_noise(noise, mask) == 0.02


def test_few_calibration_lines_are_not_fitted_with_more_weights_than_equations():
    image = load_anatomies()["brain_hires_t1"]
    scan = simulate(resize(image[len(image) - 1], 128).clamp(0, 1), 8, seeded(3), 0.01)
    for seed in (1, 2):
        columns = CartesianRandom(4, 0.04).mask((128, 128), seeded(seed))
        kspace = scan.kspace * columns
        zero, found = (
            psnr(scan.reference, rss(x))
            for x in (ifft2c(kspace), l1_spirit(kspace, columns, 0.001, steps=30))
        )
        assert found > zero + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, m: (k[0], m), "one slice"),
        (lambda k, m: (k * math.nan, m), "finite"),
        (lambda k, m: (k * 0, m), "zero wherever"),
        (lambda k, m: (k, m[:-1]), "must have shape"),
        (lambda k, m: (k, m, -1.0), "threshold >= 0"),
        (lambda k, m: (k, m, None, 0), "steps must be"),
        (lambda k, m: (k, CartesianRandom(4, 0.02).mask((SIZE, SIZE), seeded())), "fully sampled"),
    ],
)
def test_what_does_not_fit_is_refused(full, mask, change, message):
    with pytest.raises(InputError, match=message):
        l1_spirit(*change(full.kspace * mask, mask))
