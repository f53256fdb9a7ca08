from dataclasses import replace
from itertools import chain

import h5py
import numpy as np
import pytest
import torch

from applications.errors import InputError
from applications.files import make_folder, make_place
from applications.mri.data import SliceDataset, VolumeFile
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.simulation.anatomy import load_anatomies, resize, split
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder

SIZE, N_SLICES = 16, 9  # split(9): slices 0-4, 6 and 8


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("anatomies") / "own.h5"
    values = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for name in ("head", "neck"):
            file[f"{name}/images"] = values.integers(0, 256, (N_SLICES, 20, 20), dtype=np.uint8)
    return SimulationSettings(SIZE, 2, noise_std=0.0, anatomies=path)


def contents(files):
    return {path.relative_to(path.parents[1]): path.read_bytes() for path in chain(*files.values())}


def kspace_of(path):
    file = VolumeFile(path)
    return torch.stack([file.read_slice(k).kspace for k in range(file.n_slices)])


def test_files_have_the_layout_of_fastmri_by_role(tmp_path, settings):
    told = []
    files = simulate_folder(tmp_path / "out", settings, lambda *done: told.append(done))
    assert told == [(k, 6) for k in range(1, 7)]
    for role, n_slices in (("train", 5), ("validation", 1), ("test", 1)):
        assert files[role] == [tmp_path / "out" / role / f"{n}.h5" for n in ("head", "neck")]
        assert sorted((tmp_path / "out" / role).iterdir()) == files[role]
        for path in files[role]:
            with h5py.File(path) as file:
                assert set(file) == {"kspace", "reconstruction_rss", "ismrmrd_header"}
                assert file["kspace"].shape == (n_slices, 2, SIZE, SIZE)
                assert file["kspace"].dtype == np.complex64
                assert file["reconstruction_rss"].shape == (n_slices, SIZE, SIZE)
                assert file.attrs["acquisition"] == path.stem
                assert file.attrs["patient_id"] == "simulated"
        assert len(SliceDataset(tmp_path / "out" / role)) == 2 * n_slices


def test_without_noise_a_scan_is_its_anatomy_seen_by_the_coils_of_its_volume(tmp_path, settings):
    anatomies = load_anatomies(settings.anatomies)
    for role, paths in simulate_folder(tmp_path, settings).items():
        for path in paths:
            kept = anatomies[path.stem][list(getattr(split(N_SLICES), role))]
            images = resize(kept, SIZE)
            references = torch.stack([s.reference for s in SliceDataset([path])])
            coil_images = ifft2c(kspace_of(path))
            torch.testing.assert_close(rss(coil_images), references, rtol=1e-3, atol=1e-4)
            # All slices share one factor a pixel: the root sum of squares of the coils.
            factors = references / images
            bright = (images > 0.1).all(0)
            torch.testing.assert_close(
                factors[:, bright], factors[:1, bright].expand(len(images), -1), rtol=1e-3, atol=0
            )


def test_roles_share_no_slice_and_no_coils(tmp_path, settings):
    roles = split(N_SLICES)
    assert not set(roles.train) & set(roles.validation) | set(roles.validation) & set(roles.test)
    files = simulate_folder(tmp_path, settings)
    every = [s for paths in files.values() for path in paths for s in kspace_of(path)]
    assert len(every) == 14
    for i, one in enumerate(every):
        assert not any(torch.allclose(one, other) for other in every[:i])


def test_files_depend_on_the_seed_alone(tmp_path, settings):
    first, again = (contents(simulate_folder(tmp_path / n, settings)) for n in ("a", "b"))
    names = {
        n: torch.equal(kspace_of(tmp_path / "a" / n), kspace_of(tmp_path / "b" / n)) for n in first
    }
    assert set(first) == set(again)
    assert all(names.values())
    files = simulate_folder(tmp_path / "c", replace(settings, seed=1))
    for path in chain(*files.values()):
        name = path.relative_to(tmp_path / "c")
        assert not torch.equal(kspace_of(path), kspace_of(tmp_path / "a" / name))


def test_repeats_are_training_volumes_with_coils_of_their_own(tmp_path, settings):
    files = simulate_folder(tmp_path, replace(settings, repeats=3))
    names = {role: [path.name for path in paths] for role, paths in files.items()}
    once = ["head.h5", "neck.h5"]
    assert names["train"] == [f"{n}_{k}.h5" for n in ("head", "neck") for k in range(3)]
    assert (names["validation"], names["test"]) == (once, once)
    one, *others = (kspace_of(tmp_path / "train" / f"head_{k}.h5") for k in range(3))
    for other in others:
        assert (one - other).norm() > 0.1 * one.norm()


@pytest.mark.parametrize(
    ("change", "shape"),
    [({"size": 12}, (5, 2, 12, 12)), ({"n_coils": 3}, (5, 3, SIZE, SIZE))],
    ids=repr,
)
def test_size_and_coils_are_those_asked_for(tmp_path, settings, change, shape):
    files = simulate_folder(tmp_path, replace(settings, **change))
    assert kspace_of(files["train"][0]).shape == shape


def test_noise_has_the_strength_asked_for(tmp_path, settings):
    noisy = replace(settings, noise_std=0.5)
    files = simulate_folder(tmp_path, noisy)
    for path in files["train"]:
        stored = torch.stack([s.reference for s in SliceDataset([path])])
        # E |f|^2 = |F u|^2 + 2 std^2 a value, both coils and all positions together.
        energy = kspace_of(path).abs().square().sum() - stored.square().sum()
        n_values = 5 * 2 * SIZE**2
        assert float(energy / n_values) == pytest.approx(2 * 0.5**2, rel=0.1)


def test_the_bundled_anatomies_are_the_default():
    assert SimulationSettings().anatomies is None
    assert set(load_anatomies(None)) >= {"brain_t1_axial", "skull_base_t1_axial"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"size": 21}, "size must lie in 1 to 20"),
        ({"n_coils": 0}, "n_coils must be >= 1"),
        ({"noise_std": -0.1}, "noise_std must be >= 0, got -0.1"),
    ],
    ids=repr,
)
def test_settings_out_of_range_are_refused(tmp_path, settings, change, message):
    with pytest.raises(InputError, match=message):
        simulate_folder(tmp_path, replace(settings, **change))


def test_places_that_cannot_be_written_are_refused(tmp_path, settings, monkeypatch):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"file.*: the folder cannot be made .*choose another"):
        simulate_folder(tmp_path / "file", settings)
    with pytest.raises(InputError, match="the folder cannot be made"):
        make_folder(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="a file will be written, this is a folder; add a file"):
        make_place(tmp_path)
    monkeypatch.setattr("applications.files.os.access", lambda *_: False)
    with pytest.raises(InputError, match="the folder cannot be written; choose another"):
        make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_folders_are_made_with_their_parents(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    make_place(tmp_path / "c" / "d" / "file.txt")
    assert (tmp_path / "c" / "d").is_dir()
    assert not (tmp_path / "c" / "d" / "file.txt").exists()
