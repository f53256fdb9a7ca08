"""Layouts that are written beside the one of fastMRI."""

import fcntl

import h5py
import numpy as np
import pytest
import torch
from scan_files import coil_images, kspace_of

from applications.errors import InputError
from applications.mri.data import (
    SliceDataset,
    UnusableSliceError,
    VolumeFile,
    fully_sampled,
    scans_in,
)
from applications.mri.formats.fastmri_header import minimal_header
from applications.mri.physics.operators import ifft2c, rss

SLICES, COILS, ROWS, COLUMNS = 3, 2, 12, 10
KSPACE = kspace_of(coil_images(SLICES, COILS, ROWS, COLUMNS)).numpy()


def written(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def records(values, names, kind="<f4"):
    found = np.zeros(values.shape, [(name, kind) for name in names])
    found[names[0]], found[names[1]] = values.real, values.imag
    return found


def pairs(values):
    return np.stack([values.real, values.imag], axis=-1)


LAYOUTS = {
    "complex128": KSPACE.astype(complex),
    "pairs": pairs(KSPACE),
    "pairs of float64": pairs(KSPACE).astype(float),
    "MATLAB": records(KSPACE, ("real", "imag"), "<f8"),
    "other names": records(KSPACE, ("Re", "Im")),
    "names of numpy, unlike kinds": records(KSPACE, ("r", "i"), ">f4"),
    "one average": KSPACE[None],
    "equal averages": np.stack([KSPACE, KSPACE]),
    "averages in pairs": pairs(np.stack([0.5 * KSPACE, 1.5 * KSPACE])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_scan(tmp_path, layout):
    volume = VolumeFile(written(tmp_path / "scan.h5", kspace=LAYOUTS[layout]))
    assert (volume.n_slices, volume.n_coils, volume.shape) == (SLICES, COILS, (ROWS, COLUMNS))
    for index in range(SLICES):
        found = volume.read_slice(index).kspace
        assert found.dtype == torch.complex64
        torch.testing.assert_close(found, torch.from_numpy(KSPACE[index]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [KSPACE[:, 1], pairs(KSPACE[:, 1])], ids=["complex", "pairs"])
def test_a_file_of_a_single_coil_has_no_axis_of_coils(tmp_path, values):
    esc, of_all = np.full((2, SLICES, ROWS, COLUMNS), [[[[2]]], [[[7]]]], np.float32)
    path = tmp_path / "scan.h5"
    written(path, kspace=values, reconstruction_esc=esc, reconstruction_rss=of_all)
    volume = VolumeFile(path)
    assert (volume.n_slices, volume.n_coils, volume.shape) == (SLICES, 1, (ROWS, COLUMNS))
    one = volume.read_slice(2)
    assert torch.equal(one.kspace, torch.from_numpy(KSPACE[2, 1:]))
    assert (float(one.reference.max()), volume.max) == (2, 2)  # of this coil, not of all


def test_averages_that_measured_different_lines_are_joined_not_diluted(tmp_path):
    """As in fastMRI's prostate scans: odd lines twice, even lines once."""
    odd = (np.arange(COLUMNS) % 2).astype(np.float32)
    values = np.stack([odd * KSPACE, (1 - odd) * KSPACE, 3 * odd * KSPACE])
    volume = VolumeFile(written(tmp_path / "scan.h5", kspace=values))
    expected = torch.from_numpy(KSPACE[1] * (1 + odd))  # the mean of 1 and 3
    torch.testing.assert_close(volume.read_slice(1).kspace, expected, rtol=1e-6, atol=1e-6)
    assert volume.facts.remarks == ("3 averages are averaged",)


@pytest.mark.parametrize(
    ("shown", "image_shape"),
    [((6, 6), (6, 6)), ((12, 4), (12, 4)), ((99, 5), (12, 5)), ((7, 10), (7, 10))],
)
def test_the_matrix_that_the_header_asks_for_crops_the_image(tmp_path, shown, image_shape):
    header = minimal_header((ROWS, COLUMNS), shown)
    volume = VolumeFile(written(tmp_path / "scan.h5", kspace=KSPACE, ismrmrd_header=header))
    assert (volume.shape, volume.image_shape) == ((ROWS, COLUMNS), image_shape)


@pytest.mark.parametrize("n", [2, 12])
def test_a_third_encoding_is_refused_by_name(tmp_path, n):
    header = minimal_header((ROWS, COLUMNS), (6, 6)).replace("<z>1</z></m", f"<z>{n}</z></m", 1)
    path = written(tmp_path / "scan.h5", kspace=KSPACE, ismrmrd_header=header)
    with pytest.raises(InputError, match=rf"scan.h5: a 2-D scan was needed, .* size z of {n}; tra"):
        VolumeFile(path)


MASKS = torch.rand(SLICES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (MASKS, MASKS),
        (MASKS[:, None], MASKS),
        (MASKS[:, 0], MASKS[:, :1].expand(-1, ROWS, -1)),
        (MASKS[:, 0, None, None], MASKS[:, :1].expand(-1, ROWS, -1)),
        (MASKS[0, 0].reshape(1, 1, 1, -1, 1), MASKS[:1, :1].expand(SLICES, ROWS, -1)),
        (MASKS[:1], MASKS[:1].expand(SLICES, -1, -1)),
    ],
    ids=["positions", "coil axis", "columns", "axes of one", "fastMRI", "one for all"],
)
def test_masks_may_differ_from_slice_to_slice(tmp_path, mask, expected):
    volume = VolumeFile(written(tmp_path / "scan.h5", kspace=KSPACE, mask=mask.numpy()))
    for index in range(SLICES):
        assert torch.equal(volume.read_slice(index).mask, expected[index])


def test_a_mask_of_other_slices_is_refused(tmp_path):
    path = written(tmp_path / "scan.h5", kspace=KSPACE, mask=np.ones((SLICES + 1, ROWS, COLUMNS)))
    with pytest.raises(InputError, match=r"scan.h5: mask must have shape \(3, 12, 10\), got \(4, "):
        VolumeFile(path)


def test_a_locked_file_is_named_with_the_true_cause(tmp_path):
    path = written(tmp_path / "scan.h5", kspace=KSPACE)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as HDF5 locks what it writes
        with pytest.raises(InputError) as refusal:
            VolumeFile(path)
    assert "scan.h5: another program has the file open for writing, it is locked" in str(
        refusal.value
    )
    assert VolumeFile(path).n_slices == SLICES


def test_folders_have_scans_in_capitals_and_hidden_files_that_are_none(tmp_path):
    for name in ("a.h5", "b.hdf5", "c.H5", "d.HDF5"):
        written(tmp_path / name, kspace=KSPACE)
    (tmp_path / "._a.h5").write_bytes(b"\0\5\26\7 of macOS")
    (tmp_path / ".b.h5.x1").write_bytes(b"half of it")
    (tmp_path / "e.h5").mkdir()
    assert [file.path.name for file in SliceDataset(tmp_path).files] == [
        *("a.h5", "b.hdf5", "c.H5", "d.HDF5"),
    ]


@pytest.mark.parametrize("size", [(14, 10), (12, 11), (24, 20)])
def test_a_reference_larger_than_kspace_is_named_with_the_true_cause(tmp_path, size):
    reference = np.ones((SLICES, *size), np.float32)
    path = written(tmp_path / "scan.h5", kspace=KSPACE, reconstruction_rss=reference)
    one = VolumeFile(path).read_slice(1)  # to reconstruct, no reference is needed
    message = rf"scan.h5: a reference of at most 12 x 10, .* got {size[0]} x {size[1]} .slice 1."
    with pytest.raises(InputError, match=message):
        fully_sampled(one)


@pytest.mark.parametrize("stated", ["big", np.arange(3), [5.0]])
def test_a_maximum_that_is_no_number_is_computed(tmp_path, stated):
    reference = np.full((SLICES, ROWS, COLUMNS), 5, np.float32)
    path = written(tmp_path / "scan.h5", kspace=KSPACE, reconstruction_rss=reference)
    with h5py.File(path, "a") as file:
        file.attrs["max"] = stated
    assert VolumeFile(path).max == 5


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1e60, r"up to \S+e\+60"), (1e-60, r"up to \S+e-6"), (1e-43, r"up to \S+e-43")],
)
def test_values_beyond_single_precision_are_named_as_such(tmp_path, factor, said):
    path = tmp_path / "scan.h5"
    values = np.random.default_rng(0).standard_normal((2, 2, 8, 8)) * factor
    with h5py.File(path, "w") as file:
        file["kspace"] = values + 0j
    with pytest.raises(
        UnusableSliceError, match=rf"scan.h5: slice 1 has values {said}.* divide it"
    ):
        VolumeFile(path).read_slice(1)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            np.full(COLUMNS, 255, np.uint8),
            r"mask must hold 0 and 1 only, it has others \(uint8\); th",
        ),
        (True, r"mask must have shape \(12, 10\), got \(1,\)"),
    ],
)
def test_what_is_no_mask_is_named(tmp_path, mask, message):
    with pytest.raises(InputError, match=rf"scan.h5: {message}"):
        VolumeFile(written(tmp_path / "scan.h5", kspace=KSPACE, mask=mask))


@pytest.mark.parametrize("factor", [1e6, 1e-3])
def test_a_reference_in_other_units_is_refused(tmp_path, factor):
    """No method could be measured by it."""
    image = rss(ifft2c(torch.from_numpy(KSPACE))).numpy()
    path = written(tmp_path / "a.h5", kspace=KSPACE, reconstruction_rss=factor * image[:, 2:-2])
    one = VolumeFile(path).read_slice(1)
    with pytest.raises(InputError, match=r"a\.h5: a reference in the units of .* slice 1 is 0?\.?"):
        fully_sampled(one)
    path = written(tmp_path / "b.h5", kspace=KSPACE, reconstruction_rss=1.5 * image)
    assert torch.equal(
        fully_sampled(VolumeFile(path).read_slice(1))[1], torch.from_numpy(image[1]) * 1.5
    )


def test_a_clean_reference_of_a_noisy_scan_is_taken(tmp_path):
    image = rss(ifft2c(torch.from_numpy(KSPACE))).numpy()
    noise = np.random.default_rng(0).standard_normal((2, *KSPACE.shape)) * 50 * image.max()
    noisy = (KSPACE + noise[0] + 1j * noise[1]).astype(np.complex64)
    path = written(tmp_path / "a.h5", kspace=noisy, reconstruction_rss=image)
    assert torch.equal(fully_sampled(VolumeFile(path).read_slice(0))[1], torch.from_numpy(image[0]))


def test_a_link_to_nothing_in_a_folder_is_named_not_left_out(tmp_path):
    written(tmp_path / "a.h5", kspace=KSPACE)
    (tmp_path / "b.h5").symlink_to(tmp_path / "gone.h5")
    (tmp_path / "c.h5").symlink_to(tmp_path)
    assert [one.name for one in scans_in(tmp_path)] == ["a.h5", "b.h5"]
    with pytest.raises(InputError, match=r"b\.h5: .*there is no such file"):
        SliceDataset(tmp_path)
