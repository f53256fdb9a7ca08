"""The weights that come with the package: what they are, and that they do what they are for."""

import h5py
import numpy as np
import pytest
import torch
from command_lines import succeed

from applications.mri.bundled.paths import bundled, bundled_scan_path
from applications.mri.data import Volume, VolumeFile, implied_mask, write_volume
from applications.mri.evaluation.methods import network_methods
from applications.mri.evaluation.metrics import score
from applications.mri.evaluation.scanning import Making, reconstructed
from applications.mri.network.architecture import light
from applications.mri.network.weights import pretrained
from applications.mri.physics.l1_spirit import l1_spirit
from applications.mri.physics.operators import fft2c, rss
from applications.mri.sampling import CartesianRandom, PoissonDisc
from applications.mri.simulation.anatomy import load_anatomies, resize, split
from applications.mri.simulation.simulate import simulate
from applications.mri.tasks.task_list import read_task_list

SIZE = 128


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_they_are_small_and_tell_how_they_were_made():
    trained = pretrained()
    assert trained.network.architecture == light()
    files = list(bundled("anatomy.h5").parent.iterdir())
    assert bundled("pretrained.safetensors").stat().st_size < 2e6
    assert sum(file.stat().st_size for file in files) < 8e6
    listed = read_task_list(bundled("pretrained.yaml"))
    assert list(trained.record["samplings"]) == [one.name for one in listed]
    log = np.genfromtxt(bundled("pretrained.csv"), delimiter=",", names=True)
    assert sorted(set(log["run"])) == [1, 2]
    assert log["seconds"][-1] <= trained.record["seconds"]
    first, second = (log["mean_loss"][log["run"] == run] for run in (1, 2))
    assert first[-1] < 0.95 * first[0]
    assert second[-10:].mean() < second[:10].mean()


@pytest.mark.parametrize("name", ["pretrained.first.yaml", "pretrained.yaml"])
def test_what_they_were_trained_on_is_as_various_as_scans_are(name):
    listed = read_task_list(bundled(name))
    assert {one.anatomy for one in listed} <= set(load_anatomies())
    assert sum(one.local_phase > 0 for one in listed) > len(listed) / 2
    assert sum(one.wrap is not None for one in listed) >= 3
    assert len({one.coils for one in listed}) >= 5
    assert not any("test" in one.roles for one in listed)


@pytest.mark.parametrize(
    ("anatomy", "sampling"),
    [
        ("brain_t2", PoissonDisc(8, 16)),
        ("head_neck_t1_sagittal", CartesianRandom(4, 0.08)),
        pytest.param("brain_t2", CartesianRandom(4, 0.08), marks=pytest.mark.slow),
        pytest.param("head_neck_t1_sagittal", PoissonDisc(8, 16), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_held_out_slice_gains_over_the_start_and_the_classical_method(anatomy, sampling):
    images = load_anatomies()[anatomy]
    held_out = images[split(len(images)).test[0]]
    full = simulate(resize(held_out, SIZE), 8, seeded(1))
    mask = sampling.mask((SIZE, SIZE), seeded(2))
    methods = network_methods(pretrained())
    with torch.no_grad():
        found = {name: method(full.kspace * mask, mask) for name, method in methods.items()}
    found["l1-SPIRiT"] = rss(l1_spirit(full.kspace * mask, mask))
    # Over the object: the reference is exactly black in air, which no measured one is.
    psnr = {n: score(full.reference[None], x[None]).object_psnr for n, x in found.items()}
    assert psnr["ours"] > max(psnr["start"], psnr["l1-SPIRiT"]) + 0.1


def reconstruct(kspace):
    mask, trained = implied_mask(kspace), pretrained()
    with torch.no_grad():
        scan = trained.network.prepare(kspace[None], mask)
        return trained.network.reconstruct(scan, trained.control), mask


def test_the_measured_scan_keeps_its_data():
    scan = VolumeFile(bundled_scan_path()).read_slice(0)
    mask = CartesianRandom(2.0, 0.16).mask(tuple(scan.kspace.shape[1:]), seeded(0))
    found = reconstructed(Making(pretrained()), scan, mask)
    assert found.certificate.trustworthy
    assert found.method == "network"
    measured = scan.kspace[:, mask]
    defect = fft2c(found.coil_images[0])[:2][:, mask] - measured
    assert defect.norm() < 0.15 * measured.norm()
    assert not found.coil_images[0, 2:].isnan().any()


def test_noise_does_not_make_the_phases_diverge_and_is_told(tmp_path):
    noise = torch.randn(8, SIZE, SIZE, dtype=torch.complex64, generator=seeded(0))
    mask = PoissonDisc(8, 16).mask((SIZE, SIZE), seeded(1))
    write_volume(tmp_path / "scan.h5", Volume((noise * mask)[None], mask=mask))
    text = succeed("reconstruct", "--scan", tmp_path / "scan.h5", "--out", tmp_path / "image.h5")
    assert "Slice 0 is not trustworthy" in text
    with h5py.File(tmp_path / "image.h5") as file:
        found = torch.from_numpy(file["reconstruction"][()])
    assert float(found.norm()) < float(noise.norm())  # of which an eighth was measured


def test_they_are_what_reconstruct_takes_unless_told_otherwise(tmp_path):
    image = resize(load_anatomies()["brain_t2"][9], 64)
    mask = PoissonDisc(4, 16).mask((64, 64), seeded(1))
    kspace = simulate(image, 8, seeded(0)).kspace * mask
    write_volume(tmp_path / "scan.h5", Volume(kspace[None]))
    text = succeed("reconstruct", "--scan", tmp_path / "scan.h5", "--out", tmp_path / "image.h5")
    assert "Coils" not in text
    assert "Look at" not in text
    with h5py.File(tmp_path / "image.h5") as file:
        found = torch.from_numpy(file["reconstruction"][()])
    torch.testing.assert_close(found, reconstruct(kspace)[0].image)
