import math

import pytest
import torch

from applications.errors import InputError
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.simulation.coils import Loops, biot_savart_coils, receive_field
from applications.mri.simulation.simulate import noise_covariance, simulate, smooth_phase


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loop(centre, normal, radius):
    return Loops(
        torch.tensor([centre], dtype=torch.float64),
        torch.tensor([normal], dtype=torch.float64),
        torch.tensor([radius], dtype=torch.float64),
    )


def disc(n):
    axis = (torch.arange(n) - n // 2) / (n / 2)
    return ((axis[:, None] ** 2 + axis[None, :] ** 2) < 0.6).float() * 0.8


@pytest.mark.parametrize("angle", [0.0, 0.7, math.pi / 2, 4.0])
def test_the_field_on_the_axis_of_a_loop_has_its_closed_form(angle):
    radius, distance = 0.5, torch.linspace(0.6, 2.0, 5, dtype=torch.float64)
    normal = (math.cos(angle), math.sin(angle), 0.0)
    ring = loop([1.5 * n for n in normal], normal, radius)
    exact = radius**2 / (2 * (radius**2 + distance**2) ** 1.5)
    for d, field in zip(distance, exact, strict=True):
        x, y = (torch.tensor([(1.5 - float(d)) * n], dtype=torch.float64) for n in normal[:2])
        found = receive_field(ring, y, x)
        # B is along the normal, so B_x - i B_y has the phase -angle.
        expected = field * complex(math.cos(angle), -math.sin(angle))
        torch.testing.assert_close(found[0, 0, 0], expected, rtol=1e-10, atol=1e-14)


def test_the_field_of_a_distant_loop_is_that_of_a_dipole():
    radius = 0.01
    y = x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    found = receive_field(loop([2.0, 0.0, 0.5], [1.0, 0.0, 0.0], radius), y, x)[0]
    r = torch.stack(
        torch.broadcast_tensors(x[None, :] - 2.0, y[:, None], torch.tensor(-0.5).double())
    )
    distance = r.norm(dim=0)
    moment = torch.tensor([math.pi * radius**2, 0.0, 0.0]).double()[:, None, None]
    dipole = (3 * r * (moment * r).sum(0) / distance**5 - moment / distance**3) / (4 * math.pi)
    # The next term of the expansion is (radius / distance)^2, some 1e-4.
    torch.testing.assert_close(found, torch.complex(dipole[0], -dipole[1]), rtol=2e-4, atol=1e-9)


def test_the_line_integral_has_converged_at_its_default_number_of_segments():
    generator = torch.Generator().manual_seed(4)
    angle = 2 * math.pi * torch.rand(3, generator=generator, dtype=torch.float64)
    normals = torch.stack([angle.cos(), angle.sin(), torch.zeros(3).double()], 1)
    loops = Loops(1.55 * normals, normals, torch.full((3,), 0.6).double())
    y = x = torch.linspace(-0.8, 0.8, 9, dtype=torch.float64)
    fine = receive_field(loops, y, x, segments=400)
    error = (receive_field(loops, y, x) - fine).abs().max() / fine.abs().max()
    assert error < 1e-4


def test_coils_are_smooth_differ_and_share_one_scale_only():
    coils = biot_savart_coils((64, 48), 8, seeded())
    assert coils.dtype == torch.complex64
    magnitude = rss(coils)
    rows = (torch.arange(64) - 32) / 32
    columns = (torch.arange(48) - 24) / 24
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= 1
    assert float(magnitude[inside].square().mean()) == pytest.approx(1, rel=1e-5)
    assert magnitude[inside].max() > 1.5 * magnitude[inside].min()
    # Smooth: outside a few of the lowest frequencies of a windowed coil there is next to nothing.
    window = torch.hann_window(64)[:, None] * torch.hann_window(48)[None, :]
    spectrum = fft2c(coils * window).abs().square().sum(0)
    low = spectrum[32 - 6 : 32 + 7, 24 - 6 : 24 + 7].sum()
    assert low / spectrum.sum() > 0.999
    flat = coils.flatten(1) / coils.flatten(1).norm(dim=1, keepdim=True)
    overlap = (flat @ flat.mH).abs() - torch.eye(8)
    assert overlap.max() < 0.9


def test_each_draw_of_coils_is_another_and_the_settings_matter():
    def draw(seed=0, **settings):
        return biot_savart_coils((16, 16), 4, seeded(seed), **settings)

    assert torch.equal(draw(), draw())
    for other in (draw(1), draw(ring=2.0), draw(jitter=0.0)):
        assert (draw() - other).abs().max() > 0.05


@pytest.mark.parametrize("n_coils", [1, 2, 3, 16])
def test_any_number_of_coils_gives_a_finite_image(n_coils):
    found = simulate(disc(24), n_coils, seeded())
    assert found.kspace.shape == (n_coils, 24, 24)
    assert torch.isfinite(torch.view_as_real(found.kspace)).all()


def test_the_phase_is_smooth_and_reaches_its_strength():
    phase = smooth_phase((40, 30), seeded(), 1.2)
    assert float(phase.abs().max()) == pytest.approx(1.2, rel=1e-5)
    # A cubic has no fourth differences.
    assert torch.diff(phase.double(), n=4, dim=0).abs().max() < 2e-5
    assert torch.diff(phase.double(), n=4, dim=1).abs().max() < 2e-5
    assert not torch.equal(phase, smooth_phase((40, 30), seeded(1), 1.2))


@pytest.mark.parametrize("n_coils", [1, 2, 5, 8])
def test_the_noise_covariance_is_positive_definite_with_the_correlation_asked(n_coils):
    covariance = noise_covariance(n_coils, seeded(), 0.4)
    torch.testing.assert_close(covariance, covariance.mH)
    assert float(covariance.diagonal().real.mean()) == pytest.approx(1, rel=1e-12)
    assert torch.linalg.eigvalsh(covariance)[0] > 0
    spread = covariance.diagonal().real.sqrt()
    correlation = covariance.abs() / (spread[:, None] * spread[None, :])
    for coil in range(n_coils - 1):
        assert float(correlation[coil, coil + 1]) == pytest.approx(0.4, rel=1e-12)


def test_simulated_noise_has_the_covariance_asked():
    n, std = 96, 0.05
    generator = seeded(5)
    found = simulate(disc(n), 4, generator, std, correlation=0.5)
    noise = (found.kspace - fft2c(found.clean)).flatten(1) / std
    # Phase and coils are drawn before the covariance: the same draws again.
    again = seeded(5)
    smooth_phase((n, n), again, 1.0)
    biot_savart_coils((n, n), 4, again)
    expected = 2 * noise_covariance(4, again, 0.5)  # real and imaginary part
    measured = (noise @ noise.mH / noise.shape[1]).to(torch.complex128)
    # The standard deviation of a sample covariance over n^2 = 9216 values is about 2 / 96.
    torch.testing.assert_close(measured, expected, rtol=0, atol=0.11)
    relation = noise @ noise.mT / noise.shape[1]
    assert (
        relation.abs().max() < 0.11
    )  # circular: real and imaginary parts are alike and independent
    image_noise = ifft2c(found.kspace) - found.clean
    assert float(image_noise.real.std()) == pytest.approx(std, rel=0.05)


def test_the_record_is_consistent_and_the_given_coils_are_used():
    image, coils = disc(32), biot_savart_coils((32, 32), 5, seeded(9))
    found = simulate(image, 5, seeded(1), 0.0, coils=coils)
    torch.testing.assert_close(found.image.abs(), image)
    torch.testing.assert_close(found.clean, coils * found.image)
    torch.testing.assert_close(found.kspace, fft2c(found.clean))
    torch.testing.assert_close(found.reference, image * rss(coils))
    assert found.kspace.dtype == found.clean.dtype == torch.complex64
    assert found.reference.dtype == torch.float32


def test_a_simulation_depends_on_the_seed_and_on_each_setting():
    def kspace(seed=0, **settings):
        return simulate(disc(16), 3, seeded(seed), **settings).kspace

    assert torch.equal(kspace(), kspace())
    for other in (
        kspace(1),
        kspace(noise_std=0.02),
        kspace(phase=0.1),
        kspace(correlation=0.7),
    ):
        assert not torch.equal(kspace(), other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate(torch.zeros(2, 4, 4), 2, seeded()), r"image must be real .*\(2, 4, 4\)"),
        (lambda: simulate(torch.full((4, 4), 2.0), 2, seeded()), r"in \[0, 1\], got 2 to 2"),
        (lambda: simulate(torch.full((4, 4), torch.nan), 2, seeded()), r"in \[0, 1\], got nan"),
        (lambda: simulate(disc(4), 2, seeded(), -1.0), "noise_std must be >= 0, got -1.0"),
        (lambda: simulate(disc(4), 2, seeded(), coils=torch.zeros(3, 4, 4)), r"\(2, 4, 4\), got"),
        (lambda: simulate(disc(4), 2, seeded(), correlation=1.0), r"correlation must lie in \[0"),
        (lambda: biot_savart_coils((4, 4), 0, seeded()), "n_coils must be >= 1"),
        (lambda: biot_savart_coils((4, 4), 2, seeded(), ring=1.0), r"ring > sqrt\(2\)"),
    ],
)
def test_what_cannot_be_simulated_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
