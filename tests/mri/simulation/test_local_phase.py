import math

import pytest
import torch

from applications.errors import InputError
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.local_phase import (
    dipole_phase,
    rough_phase,
    smooth_noise,
    tissue_phase,
    with_local_phase,
    with_structures,
)
from applications.mri.simulation.simulate import simulate

SIZE = 96


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def image():
    return resize(load_anatomies()["brain_t1_axial"][8], SIZE).clamp(0, 1)


@pytest.mark.parametrize("draw", [tissue_phase, dipole_phase, rough_phase, with_local_phase])
def test_what_is_drawn_depends_on_the_generator_alone(image, draw):
    assert torch.equal(draw(image, seeded(3)), draw(image, seeded(3)))
    assert not torch.equal(draw(image, seeded(3)), draw(image, seeded(4)))


def test_phases_that_no_polynomial_has_are_left_in_most_images(image):
    """The phase between neighbours of the object changes by much somewhere."""
    steep = 0
    for seed in range(10):
        found = with_local_phase(image, seeded(seed))
        product = found[1:] * found[:-1].conj()
        inside = (image[1:] > 0.2) & (image[:-1] > 0.2)
        steep += int((product.angle().abs()[inside] > 0.7).sum() > 20)
    assert steep >= 6


def test_tissue_of_like_intensity_turns_together():
    image = torch.full((SIZE, SIZE), 0.3)
    image[:, SIZE // 2 :] = 0.9
    differing = 0
    for seed in range(20):
        angle = tissue_phase(image, seeded(seed))
        differing += int((angle[:, : SIZE // 2].mean() - angle[:, SIZE // 2 :].mean()).abs() > 0.3)
    assert differing >= 5


def test_the_field_of_a_disc_of_air_is_that_of_a_cylinder_across_the_main_field():
    """Outside of it, cos(2 angle) / r^2: of both signs, and a quarter at twice the distance."""
    y, x = torch.meshgrid(torch.arange(256) - 128, torch.arange(256) - 128, indexing="ij")
    image = ((y**2 + x**2) > 10**2).float()
    field = dipole_phase(image, seeded(1))
    at = {
        r: torch.stack(
            [
                field[128 + round(r * math.sin(a)), 128 + round(r * math.cos(a))]
                for a in torch.linspace(0, 2 * math.pi, 73)[:-1].tolist()
            ]
        )
        for r in (20, 40)
    }
    near, far = (at[r].max() - at[r].min() for r in (20, 40))
    assert float(near / far) == pytest.approx(4, rel=0.15)
    waves = torch.fft.rfft(at[20] - at[20].mean()).abs()
    assert int(waves.argmax()) == 2


def test_structures_are_of_any_phase_and_keep_magnitudes_in_bounds(image):
    for seed in range(5):
        found = with_structures(image + 0j, seeded(seed))
        assert float(found.abs().max()) <= 1 + 1e-5
    angles = torch.cat(
        [
            (f := with_structures(image + 0j, seeded(seed))).angle()[(f - image).abs() > 0.05]
            for seed in range(8)
        ]
    )
    assert all(
        bool(((angles > low) & (angles < low + math.pi / 2)).any())
        for low in (-math.pi, -math.pi / 2, 0, math.pi / 2)
    )
    dark = torch.zeros(SIZE, SIZE)
    assert torch.equal(with_structures(dark + 0j, seeded()), dark + 0j)


def test_no_strength_is_no_change(image):
    torch.testing.assert_close(with_local_phase(image, seeded(), 0.0), image + 0j)


def test_smooth_noise_has_its_scale_and_deviation():
    image = torch.zeros(128, 128)
    for scale in (0.02, 0.1):
        noise = smooth_noise(image, scale, seeded())
        assert float(noise.std()) == pytest.approx(1, rel=1e-3)
        lag = round(scale * 128)
        similar = float((noise[lag:] * noise[:-lag]).mean())
        assert similar == pytest.approx(math.exp(-0.25), abs=0.2)  # exp(-d^2 / (4 s^2)) at d = s


def test_a_simulated_scan_has_it_where_asked_for(image):
    plain = simulate(image, 4, seeded(), 0.0)
    same = simulate(image, 4, seeded(), 0.0, local_phase=0.0)
    assert torch.equal(plain.kspace, same.kspace)
    local = simulate(image, 4, seeded(), 0.0, local_phase=1.0)
    assert not torch.allclose(local.image.angle(), plain.image.angle(), atol=0.1)


def test_a_negative_strength_is_refused(image):
    with pytest.raises(InputError, match="local_phase must be >= 0"):
        simulate(image, 2, seeded(), local_phase=-1.0)
