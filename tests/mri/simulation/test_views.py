import pytest
import torch

from applications.errors import InputError
from applications.mri.data import SliceDataset
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.simulation.anatomy import load_anatomies, wraps
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder
from applications.mri.simulation.simulate import simulate
from applications.mri.simulation.views import columns_in_view, folded, in_view
from applications.mri.tasks.task_list import parse_task
from applications.mri.tasks.tasks import open_each


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("columns", "n"), [(12, 6), (12, 4), (13, 6), (12, 12), (15, 5)])
def test_what_lies_outside_comes_in_from_the_other_side(columns, n):
    """That keeps every n-th sample of k-space, where n is a whole number."""
    images = torch.randn(3, 5, columns, dtype=torch.complex128, generator=seeded())
    found = folded(images, n)
    torch.testing.assert_close(found.sum(-1), images.sum(-1))
    for column in range(n):
        onto = [k for k in range(columns) if (k - columns // 2 - column + n // 2) % n == 0]
        torch.testing.assert_close(found[..., column], images[..., onto].sum(-1))
    if columns % (2 * n) == 0:
        every = columns // n
        kept = fft2c(images)[..., ::every] * every**0.5
        torch.testing.assert_close(fft2c(found), kept)


def test_each_coil_folds_with_its_own_sensitivity_and_the_noise_stays_white():
    image = torch.zeros(32, 32)
    image[8:24, 4:28] = 0.7
    one = simulate(image, 4, seeded(1), noise_std=0.05)
    kspace, reference = in_view(one, 20)
    torch.testing.assert_close(reference, rss(folded(one.coils * one.image, 20)))
    assert float((reference - folded(one.reference, 20)).abs().max()) > 0.05  # no sum of magnitudes
    noise = kspace - fft2c(folded(one.clean, 20))
    assert float(noise.abs().square().mean()) == pytest.approx(2 * 0.05**2, rel=0.1)
    same = in_view(one, 32)
    assert torch.equal(same[0], one.kspace)


@pytest.mark.parametrize(
    ("columns", "wrap", "n"), [(128, 0.5, 64), (128, 0.7, 90), (63, 1.0, 63), (64, 0.125, 8)]
)
def test_the_share_of_the_columns_gives_an_even_number(columns, wrap, n):
    assert columns_in_view(columns, wrap) == n


@pytest.mark.parametrize(
    ("wrap", "message"),
    [(0.0, "in .0, 1., got 0"), (1.5, "got 1.5"), (0.1, "wrap = 0.1 leaves 6 of 64; choose")],
)
def test_a_share_out_of_range_is_refused(wrap, message):
    with pytest.raises(InputError, match=message):
        columns_in_view(64, wrap)


def test_the_bundled_heads_wrap_as_they_state_unless_told_otherwise(tmp_path):
    assert wraps() == {"head_wrapped_t1_coronal": 0.5}
    settings = SimulationSettings(32, 2, names=("head_wrapped_t1_coronal", "brain_pd"))
    simulate_folder(tmp_path / "stated", settings)
    shapes = {f.path.stem: f.shape for f in SliceDataset(tmp_path / "stated" / "test").files}
    assert shapes == {"brain_pd": (32, 32), "head_wrapped_t1_coronal": (32, 16)}
    images = load_anatomies()["head_wrapped_t1_coronal"]
    seen = images[..., 64:192].sum((1, 2)) / images.sum((1, 2))
    assert float(seen.max()) < 0.98  # a part of every slice lies outside


def test_tasks_and_settings_choose_the_view(tmp_path):
    task = parse_task("name=a,anatomy=brain_pd,size=32,coils=2,wrap=0.75,roles=test")
    (opened,) = open_each([task], tmp_path / "tasks")
    assert opened.parts["test"].files[0].shape == (32, 24)
    simulate_folder(tmp_path / "data", SimulationSettings(32, 2, wrap=0.625))
    files = SliceDataset(tmp_path / "data" / "test").files
    assert {file.shape for file in files} == {(32, 20)}
    one = files[0].read_slice(0)
    torch.testing.assert_close(
        rss(ifft2c(one.kspace)).mean(), one.reference.mean(), rtol=0.2, atol=0
    )
