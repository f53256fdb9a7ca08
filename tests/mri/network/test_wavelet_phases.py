"""The phases of `light`: they begin as l1-SPIRiT, and only ever shrink what all coils share."""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

import bilevel as bl
from applications.errors import InputError
from applications.mri.network.architecture import ANY, Architecture, light
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.network.wavelet_phases import EVERY, STEPS, Gains, WaveletPhase
from applications.mri.physics.consistency import (
    fitted_kernels,
    times,
    towards_consistency,
)
from applications.mri.physics.l1_spirit import (
    l1_spirit,
    momenta,
    quick_steps,
    soft_threshold_jointly,
    threshold_of_noise,
)
from applications.mri.physics.operators import fft2c, ifft2c, rss, sample, sample_adjoint
from applications.mri.physics.wavelets import Wavelets, spread
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.simulate import simulate

SIZE = 64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(n_phases=2, warm_up=6):
    return replace(light(), n_phases=n_phases, warm_up=warm_up, gains=4)


def disturbed(control, seed=1, size=0.3):
    """Weights as training might leave them: none of them where it started."""
    generator = seeded(seed)

    def moved(value):
        return value + size * torch.randn(value.shape, generator=generator).to(value.dtype)

    return bl.PerStep(
        [{n: moved(v) if "gains" in n else v for n, v in step.items()} for step in control.steps],
        control.initial,
    )


@pytest.fixture(scope="module")
def scan():
    image = resize(load_anatomies()["brain_t1_axial"][8], SIZE).clamp(0, 1)
    full = simulate(image, 4, seeded(), noise_std=0.01, local_phase=1.0)
    mask = PoissonDisc(4, 16).mask((SIZE, SIZE), seeded(1))
    return full, mask, full.kspace * mask


def made(network, control, kspace, mask):
    return network.reconstruct(network.prepare(kspace[None], mask), control)


def test_the_untrained_network_is_steps_of_l1_spirit(scan):
    _, mask, kspace = scan
    network = Network(small())
    found = made(network, network.controls(), kspace, mask)
    scale = rss(ifft2c(kspace)).max()
    f = kspace / scale
    threshold = threshold_of_noise(f, mask)
    matrices = towards_consistency(fitted_kernels(f, mask), (SIZE, SIZE))
    u, before = quick_steps(f, mask, matrices, threshold, 6, EVERY)
    factors = momenta(6 + 2 * STEPS)[6:]
    for phase in range(2):
        for factor in factors[phase * STEPS : (phase + 1) * STEPS]:
            ahead = u + factor * (u - before)
            before = u
            u = times(matrices, ahead - sample_adjoint(sample(ahead, mask) - f, mask))
        shift = spread((SIZE, SIZE), (6 + STEPS * phase) // EVERY + phase)
        u = soft_threshold_jointly(u, Wavelets((SIZE, SIZE), shift=shift), STEPS * threshold)
    torch.testing.assert_close(found.coil_images[0], scale * u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.image[0], rss(scale * u), rtol=1e-4, atol=1e-5)


def test_untrained_light_is_near_l1_spirit(scan):
    full, mask, kspace = scan
    network = Network(light())
    image = made(network, network.controls(), kspace, mask).image[0]

    def error(x):
        return float((x - full.reference).norm() / full.reference.norm())

    assert error(image) < 1.1 * error(rss(l1_spirit(kspace, mask)))


def test_a_phase_of_all_coils_changes_nothing_but_that_phase(scan):
    _, mask, kspace = scan
    network = Network(small())
    control = disturbed(network.controls())
    plain = made(network, control, kspace, mask)
    turn = torch.polar(torch.tensor(1.0), torch.tensor(2.1))
    turned = made(network, control, turn * kspace, mask)
    torch.testing.assert_close(turned.image, plain.image, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(turned.coil_images, turn * plain.coil_images, rtol=1e-3, atol=1e-5)


def test_the_order_of_coils_does_not_matter(scan):
    _, mask, kspace = scan
    network = Network(small())
    control = disturbed(network.controls())
    plain, order = made(network, control, kspace, mask), [2, 0, 3, 1]
    permuted = made(network, control, kspace[order], mask)
    torch.testing.assert_close(permuted.image, plain.image, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        permuted.coil_images, plain.coil_images[:, order], rtol=1e-3, atol=1e-5
    )


def test_gains_lie_between_nothing_and_all_whatever_the_weights():
    for seed in range(5):
        gains = Gains(4, seeded(seed))
        weights = {
            n: 3 * torch.randn(p.shape, generator=seeded(seed)) for n, p in gains.named_parameters()
        }
        magnitude = torch.rand(2, 3, 8, 9, generator=seeded(seed)) ** 4
        coarser = torch.rand(2, 3, 4, 5, generator=seeded(seed))
        threshold = torch.tensor([0.001, 0.01])[:, None, None, None]
        found = functional_call(gains, weights, (magnitude, coarser, threshold, 1))
        assert found.shape == magnitude.shape
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1


def test_a_shrunk_coefficient_keeps_its_phase_in_every_coil(scan):
    full, _, _ = scan
    phase = WaveletPhase(small(), 0, seeded())
    with torch.no_grad():
        for parameter in phase.gains.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(2)))
        images = full.clean[None]
        shrunk = phase.shrunk(images, torch.full((1, 1, 1, 1), 0.05))
    wavelets = Wavelets((SIZE, SIZE), shift=spread((SIZE, SIZE), phase.number))
    pairs = [
        wavelets.forward(torch.cat([x.real, x.imag], 1))[1:] for x in (images[0:1], shrunk[0:1])
    ]
    for one, other in zip(*pairs, strict=True):
        before, after = (torch.complex(*x[0].chunk(2)) for x in (one, other))
        large = before.abs() > 1e-3 * before.abs().max()
        ratio = (after / before)[large]
        assert float(ratio.imag.abs().max()) < 1e-2
        assert float(ratio.real.min()) > -1e-2
        assert float(ratio.real.max()) < 1 + 1e-2
        assert float(ratio.real.std()) > 1e-3  # not one gain for all


@pytest.mark.parametrize("n_coils", [1, 3, 9])
def test_one_set_of_weights_takes_any_number_of_coils_and_odd_sizes(n_coils):
    image = resize(load_anatomies()["brain_t1_axial"][8], 65).clamp(0, 1)[:, :63]
    full = simulate(image, n_coils, seeded(), noise_std=0.01)
    mask = CartesianRandom(2, 0.2).mask((65, 63), seeded(1))
    network = Network(small())
    found = made(network, network.controls(), full.kspace * mask, mask)
    assert found.coil_images.shape == (1, n_coils, 65, 63)
    zero = rss(ifft2c(full.kspace * mask))
    assert (found.image[0] - full.reference).norm() < (zero - full.reference).norm()


def test_the_gradient_of_the_training_problem_is_that_of_finite_differences(scan):
    full, mask, kspace = scan
    network = Network(small(1, 3))
    control = disturbed(network.controls())
    prepared = network.prepare(kspace[None], mask)
    wide = replace(
        prepared,
        **{
            name: value.to(torch.complex128 if value.is_complex() else torch.float64)
            for name, value in vars(prepared).items()
            if isinstance(value, torch.Tensor) and value.dtype != torch.bool
        },
    )
    control = bl.PerStep([{n: v.double() for n, v in s.items()} for s in control.steps], {})
    target = full.clean[None].to(torch.complex128)
    problem, start = network.training_problem(wide, target, rss(target), Loss(50, 1, 0))
    found = bl.adjoint(problem, start, control)
    for name, value in control.steps[0].items():
        direction = torch.randn(value.shape, dtype=value.dtype, generator=seeded(4))
        costs = [
            float(
                bl.adjoint(
                    problem,
                    start,
                    bl.PerStep([control.steps[0] | {name: value + sign * 1e-6 * direction}], {}),
                ).cost
            )
            for sign in (1, -1)
        ]
        difference = (costs[0] - costs[1]) / 2e-6
        slope = float((found.gradient.steps[0][name] * direction).sum())
        # ReLU and the absolute value have corners: some of 4096 pixels lie within the step of one.
        assert slope == pytest.approx(difference, rel=1e-3, abs=1e-7), name


def test_a_crop_of_rows_is_a_smaller_scan_of_the_same_kind(scan):
    full, _, _ = scan
    mask = CartesianRandom(3, 0.2).mask((SIZE, SIZE), seeded(1))
    network = Network(small())
    whole = network.prepare((full.kspace * mask)[None], mask)
    part = whole.crop_rows(8, 32)
    torch.testing.assert_close(ifft2c(part.before), ifft2c(whole.before)[..., 8:40, :])
    assert part.consistent.shape == (1, 32, SIZE, 4, 4)
    assert torch.equal(part.threshold, whole.threshold)


def disc_scan(degrees, radius=5, size=96):
    """A bundled slice in which a disc has another phase than what is around it."""
    image = resize(load_anatomies()["brain_t1_axial"][10], size).clamp(0, 1)
    full = simulate(image, 8, seeded(), noise_std=0.01)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = (y - size // 2) ** 2 + (x - size * 2 // 5) ** 2 <= radius**2
    value = torch.polar(torch.tensor(0.6), torch.tensor(math.radians(degrees)))
    clean = full.coils * torch.where(disc, value, full.image)
    return full.kspace + fft2c(clean - full.clean), rss(clean), disc


COLUMNS, POINTS = CartesianRandom(4, 0.12), PoissonDisc(6, 20)


@pytest.mark.parametrize(
    ("degrees", "sampling"),
    [
        *((0, POINTS), (90, COLUMNS), (180, POINTS)),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0, COLUMNS), (90, POINTS))),
        pytest.param(180, COLUMNS, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_disc_of_any_phase_is_left_even_by_weights_gone_astray(degrees, sampling):
    kspace, truth, disc = disc_scan(degrees)
    mask = sampling.mask((96, 96), seeded(1))
    network = Network(replace(light(), n_phases=4, gains=8))
    control = disturbed(network.controls(), size=0.05)
    ours = made(network, control, kspace * mask, mask).image[0]
    classical = rss(l1_spirit(kspace * mask, mask))
    left, other = (float(x[disc].mean() / truth[disc].mean()) for x in (ours, classical))
    assert left > 0.9 * other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_coils": 8}, f"n_coils must be {ANY}"),
        ({"scale_input": False}, "scale_input True"),
        ({"warm_up": 0}, "warm_up must be at least 1"),
        ({"gains": -1}, "gains must be at least 1"),
    ],
)
def test_sizes_that_make_no_network_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Architecture(**{"n_coils": ANY, "scale_input": True, "gains": 4, "warm_up": 3} | settings)


def test_light_has_so_many_weights_and_is_for_no_coil_count():
    control = Network(light()).controls()
    assert sum(value.numel() for step in control.steps for value in step.values()) < 1e5
    with pytest.raises(InputError, match="any number of coils, got 8"):
        light(8)
