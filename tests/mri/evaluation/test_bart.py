import pytest
import torch

from applications.errors import InputError
from applications.mri.evaluation import bart
from applications.mri.evaluation.bart import bart_installed, bart_l1_wavelet
from applications.mri.evaluation.metrics import score
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.sampling import PoissonDisc
from applications.mri.simulation.anatomy import load_anatomies, resize
from applications.mri.simulation.simulate import simulate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_the_program_it_is_named(monkeypatch):
    monkeypatch.setattr(bart, "bart_installed", lambda: False)
    mask = torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(InputError, match="apt-get install bart"):
        bart_l1_wavelet(torch.ones(2, 8, 8, dtype=torch.complex64), mask, mask, 0.01)


def test_files_are_read_as_they_were_written(tmp_path):
    values = torch.randn(1, 5, 4, 3, 1, 2, dtype=torch.complex64, generator=seeded()).numpy()
    bart._write(tmp_path / "x", values)
    assert (bart._read(tmp_path / "x") == values).all()


@pytest.mark.skipif(not bart_installed(), reason="BART is not installed")
def test_two_maps_and_wavelets_beat_zero_filling_in_its_units():
    image = resize(load_anatomies()["brain_t1_axial"][8], 96).clamp(0, 1)
    full = simulate(image, 6, seeded(), 0.01)
    mask = PoissonDisc(4, 20).mask((96, 96), seeded(1))
    kspace = full.kspace * mask
    found = bart_l1_wavelet(kspace, mask, kspace, 0.005)
    zero, ours = (score(full.reference[None], x[None]).psnr for x in (rss(ifft2c(kspace)), found))
    assert ours > zero + 3
    scaled = bart_l1_wavelet(100 * kspace, mask, kspace, 0.005)
    torch.testing.assert_close(scaled, 100 * found, rtol=1e-2, atol=1e-1)
