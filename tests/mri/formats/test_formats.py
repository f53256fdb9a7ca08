import pickle
import tracemalloc

import h5py
import numpy as np
import pytest
import torch
from scan_files import (
    as_bart,
    coil_images,
    header,
    kspace_of,
    lines_of,
    write_cfl,
    write_ismrmrd,
)

from applications.errors import InputError
from applications.mri.data import (
    SliceDataset,
    Volume,
    VolumeFile,
    fully_sampled,
    implied_mask,
    open_scan,
    write_volume,
)
from applications.mri.physics.operators import ifft2c

SLICES, COILS, ROWS, COLUMNS = 3, 2, 12, 10
IMAGES = coil_images(SLICES, COILS, ROWS, COLUMNS)
KSPACE = kspace_of(IMAGES)


def write_fastmri(path, images=IMAGES):
    write_volume(path, Volume(kspace_of(images), acquisition="AXT2"))
    return path


def write_m4raw(path, images=IMAGES, n_repetitions=1):
    """Without mask and norm, with a header that is no ISMRMRD, as the published files."""
    kspace = kspace_of(images)
    for k in range(n_repetitions):
        with h5py.File(path.with_name(f"{path.name}{k + 1:02}.h5"), "w") as file:
            file["kspace"] = kspace.numpy() * (k + 1)
            file["reconstruction_rss"] = np.ones((len(kspace), *kspace.shape[-2:]), np.float32)
            file["ismrmrd_header"] = b"<h xmlns='http://www.ismrm.org/ISMRMRD'><TE>1.0</TE></h>"
            file.attrs.update(acquisition="AXT2", max=1.0, patient_id="p")
    return path


def write_raw(path, images=IMAGES):
    """Twice oversampled; what lies outside the field of view is noise."""
    n_slices, n_coils, rows, columns = images.shape
    wide = coil_images(n_slices, n_coils, 2 * rows, columns, seed=1)
    wide[:, :, rows // 2 : -(rows // 2)] = images
    lines = [
        one
        for k, kspace in enumerate(kspace_of(wide))
        for one in lines_of(kspace, slice=k, position=(0, 0, 4 * k))
    ]
    return write_ismrmrd(path, lines, header((2 * rows, columns)))


def write_bart(path, images=IMAGES):
    return write_cfl(path, as_bart(kspace_of(images)))


WRITERS = {
    "fastmri": ("scan.h5", write_fastmri),
    "m4raw": ("2022061003_T2", write_m4raw),
    "ismrmrd": ("scan.mrd", write_raw),
    "bart": ("scan", write_bart),
}


@pytest.fixture(params=WRITERS)
def scan(request, tmp_path):
    name, write = WRITERS[request.param]
    return write(tmp_path / name)


def test_every_format_gives_the_coil_images_that_were_written(scan):
    volume = open_scan(scan)[0]
    assert (volume.n_slices, volume.n_coils) == (SLICES, COILS)
    assert volume.shape == volume.image_shape == (ROWS, COLUMNS)
    for index, expected in enumerate(IMAGES):
        one = volume.read_slice(index)
        assert one.kspace.dtype == torch.complex64
        found = ifft2c(one.kspace)
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)
        assert (one.path, one.index) == (scan, index)
        assert implied_mask(one.kspace).all()
        assert one.mask is None or one.mask.all()


def test_a_scan_is_written_back_and_read_again_unchanged(scan, tmp_path):
    kspace = torch.stack([VolumeFile(scan).read_slice(k).kspace for k in range(SLICES)])
    write_volume(tmp_path / "again.h5", Volume(kspace))
    again = VolumeFile(tmp_path / "again.h5")
    assert all(torch.equal(again.read_slice(k).kspace, kspace[k]) for k in range(SLICES))


def test_every_format_can_be_sent_to_workers_and_be_part_of_a_data_set(scan):
    dataset = pickle.loads(pickle.dumps(SliceDataset([scan])))
    assert len(dataset) == SLICES
    for index, one in enumerate(dataset):
        kspace, reference = fully_sampled(one)
        assert torch.equal(kspace, VolumeFile(scan).read_slice(index).kspace)
        assert reference.shape == (ROWS, COLUMNS)


def test_a_slice_or_volume_that_is_not_there_is_refused(scan):
    n_volumes = len(open_scan(scan))
    with pytest.raises(
        InputError, match=f"volume must lie in 0 to {n_volumes - 1}, got {n_volumes}"
    ):
        VolumeFile(scan, n_volumes)
    with pytest.raises(InputError, match="slice must lie in 0 to 2, got 3"):
        VolumeFile(scan).read_slice(3)


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
def test_one_slice_is_held_in_memory_at_a_time(tmp_path, name, write):
    n_slices, n_coils, rows, columns = 10, 4, 256, 32
    path = write(tmp_path / name, coil_images(n_slices, n_coils, rows, columns))
    one = 8 * n_coils * rows * columns
    VolumeFile(path).read_slice(0)  # whatever is made once
    tracemalloc.start()
    try:
        volume = VolumeFile(path)
        for index in range(n_slices):
            volume.read_slice(index)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * one  # the volume would be 10


def test_repetitions_of_m4raw_are_volumes_in_order(tmp_path):
    scan = write_m4raw(tmp_path / "2022061003_T2", n_repetitions=3)
    write_m4raw(tmp_path / "2022061003_T1", n_repetitions=2)
    volumes = open_scan(scan)
    assert [v.volume for v in volumes] == [0, 1, 2]
    assert {v.n_volumes for v in volumes} == {3}
    for k, volume in enumerate(volumes):
        assert torch.equal(volume.read_slice(1).kspace, KSPACE[1] * (k + 1))
        assert (volume.acquisition, volume.has_reference, volume.max) == ("AXT2", True, 1.0)
    alone = open_scan(tmp_path / "2022061003_T202.h5")
    assert len(alone) == 1
    assert torch.equal(alone[0].read_slice(0).kspace, 2 * KSPACE[0])


def test_columns_that_m4raw_never_measured_are_no_part_of_the_mask(tmp_path):
    scan = write_m4raw(tmp_path / "s_T1")
    with h5py.File(tmp_path / "s_T101.h5", "a") as file:
        file["kspace"][..., :2] = 0
    one = VolumeFile(scan).read_slice(0)
    assert one.mask is None
    assert implied_mask(one.kspace)[0].tolist() == [False] * 2 + [True] * 8


def test_repetitions_that_do_not_belong_together_are_refused(tmp_path):
    scan = write_m4raw(tmp_path / "s_T2", n_repetitions=3)
    with h5py.File(tmp_path / "s_T203.h5", "a") as file:
        del file["kspace"], file["reconstruction_rss"]
        file["kspace"] = KSPACE[:2].numpy()
    with pytest.raises(InputError, match=r"s_T203.h5: a repetition must have 3 slices .* got 2 of"):
        open_scan(scan)
    (tmp_path / "s_T202.h5").unlink()
    with pytest.raises(InputError, match=r"without gaps, s_T202.h5 is missing; copy it"):
        open_scan(scan)
    (tmp_path / "s_T201.h5").write_text("no scan")
    (tmp_path / "s_T203.h5").unlink()
    with pytest.raises(InputError, match=r"s_T201.h5: a complete HDF5 file was needed"):
        open_scan(scan)


def test_voxel_sizes_and_swapped_axes_are_told_from_the_header_of_fastmri(tmp_path):
    text = header((ROWS, COLUMNS))
    write_volume(tmp_path / "scan.h5", Volume(KSPACE, header=text))
    geometry = VolumeFile(tmp_path / "scan.h5").facts.geometry
    assert (geometry.spacing, geometry.affine) == ((2.0, 1.5, 4.0), None)
    write_volume(tmp_path / "scan.h5", Volume(KSPACE.transpose(2, 3), header=text))
    with pytest.raises(InputError, match=r"readout along its rows, 12 x 10 by the header, got 10"):
        VolumeFile(tmp_path / "scan.h5")
    write_volume(tmp_path / "scan.h5", Volume(KSPACE, header="no XML"))
    assert VolumeFile(tmp_path / "scan.h5").facts.geometry is None


@pytest.mark.parametrize("suffix", ["", ".cfl", ".hdr"])
def test_a_pair_of_bart_has_three_names(tmp_path, suffix):
    write_bart(tmp_path / "scan.v1")
    volume = VolumeFile(tmp_path / f"scan.v1{suffix}")
    assert torch.equal(volume.read_slice(2).kspace, KSPACE[2])


def test_bart_stores_the_first_axis_fastest_and_little_endian(tmp_path):
    """Bytes by hand: 2 x 3 positions of one coil, real parts 0 to 5 along the first axis first."""
    (tmp_path / "s.hdr").write_text("# Dimensions\n2 3 1 1 1\n# Command\nphantom\n")
    stored = b"".join(np.array([k, -k], "<f4").tobytes() for k in range(6))
    (tmp_path / "s.cfl").write_bytes(stored)
    volume = VolumeFile(tmp_path / "s.cfl")
    assert (volume.n_slices, volume.n_coils, volume.shape) == (1, 1, (2, 3))
    expected = torch.tensor([[0, 2, 4], [1, 3, 5]]) * (1 - 1j)
    assert torch.equal(volume.read_slice(0).kspace[0], expected.to(torch.complex64))


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_rows_and_columns_are_the_two_long_axes_of_bart(tmp_path, axes):
    shape = [1, 1, 1, COILS, *[1] * 9, SLICES]
    shape[axes[0]], shape[axes[1]] = ROWS, COLUMNS
    write_cfl(tmp_path / "s", as_bart(KSPACE).reshape(shape))
    assert torch.equal(VolumeFile(tmp_path / "s").read_slice(1).kspace, KSPACE[1])


def test_further_axes_of_bart_are_volumes_the_lowest_fastest(tmp_path):
    values = np.zeros((1, ROWS, COLUMNS, COILS, 1, 2, 1, 1, 1, 1, 3, 1, 1, SLICES), np.complex64)
    for echo in range(2):
        for time in range(3):
            factor = 1 + echo + 10 * time
            values[:, :, :, :, 0, echo, 0, 0, 0, 0, time, 0, 0] = factor * as_bart(
                KSPACE
            ).squeeze().reshape(1, ROWS, COLUMNS, COILS, SLICES)
    volumes = open_scan(write_cfl(tmp_path / "s", values))
    for volume, factor in zip(volumes, (1, 2, 11, 12, 21, 22), strict=True):
        assert torch.equal(volume.read_slice(2).kspace, factor * KSPACE[2])


def cut_values(base):
    path = base.with_name("s.cfl")
    path.write_bytes(path.read_bytes()[:-8])


def real_values(base):
    base.with_name("s.cfl").write_bytes(KSPACE.real.numpy().tobytes())


def big_endian(base):
    stored = as_bart(KSPACE).ravel(order="F").astype(">c8")
    base.with_name("s.cfl").write_bytes(stored.tobytes())


def not_finite(base):
    values = as_bart(KSPACE).copy()
    values[0, 1, 2, 1, ..., 0] = np.nan
    write_cfl(base, values)


BAD_PAIRS = {
    "header missing": (lambda b: b.with_name("s.hdr").unlink(), r"s.hdr: a pair .* copy both"),
    "values missing": (lambda b: b.with_name("s.cfl").unlink(), r"s.cfl: a pair .* copy both"),
    "truncated": (cut_values, r"s.cfl: 5760 bytes were needed, .* got 5752; copy or export"),
    "real": (real_values, "got 2880; the values are real, or half of them missing: convert"),
    "big-endian": (big_endian, "s.cfl: little-endian values were needed, these are big-endian"),
    "sizes": (
        lambda b: b.with_name("s.hdr").write_text("# Dimensions\n1 12 11 2 1\n"),
        r"2112 bytes were needed, complex64 of the shape 1 x 12 x 11 x 2 in s.hdr, got 5760",
    ),
    "no sizes": (
        lambda b: b.with_name("s.hdr").write_text("12 10\n"),
        "a line '# Dimensions' was needed and below it sizes >= 1, it has none",
    ),
    "zero": (
        lambda b: b.with_name("s.hdr").write_text("# Dimensions\n1 0 2\n"),
        "sizes >= 1, it has none; export the pair again",
    ),
    "3-D": (
        lambda b: write_cfl(b, np.ones((4, 5, 6, 2))),
        r"two of the axes 0, 1 and 2 must be above 1, got \(4, 5, 6\); .*bart transpose 0 13",
    ),
    "1-D": (lambda b: write_cfl(b, np.ones((4, 1, 1, 2))), r"got \(4, 1, 1\)"),
    "maps": (
        lambda b: write_cfl(b, np.ones((4, 5, 1, 2, 3))),
        "axis 4 must be 1, got 3; choose one with bart slice 4",
    ),
    "not finite": (not_finite, "s.cfl: kspace must be finite, slice 0 holds 1 values"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_pair_of_bart_that_is_damaged_or_something_else_is_refused(tmp_path, change, message):
    write_bart(tmp_path / "s")
    change(tmp_path / "s")
    with pytest.raises(InputError, match=message):
        VolumeFile(tmp_path / "s.cfl").read_slice(0)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_extreme_values_of_bart_are_not_taken_for_big_endian(tmp_path, factor):
    values = as_bart(KSPACE).copy()
    values[:, :, ::2] = 0
    base = write_cfl(tmp_path / "s", values * np.complex64(factor))
    one = VolumeFile(base).read_slice(0)
    expected = torch.from_numpy(values[0, ..., 0]).squeeze().movedim(-1, 0)
    torch.testing.assert_close(one.kspace * (one.unit / factor), expected)


@pytest.mark.parametrize("name", ["scan.dat", "scan", "scan.mrd", "scan.nii"])
def test_what_no_format_recognises_is_refused_with_the_list_of_formats(tmp_path, name):
    message = (
        "k-space was needed, NIfTI holds images"
        if name.endswith("nii")
        else (r"one of M4Raw .*BART .*ISMRMRD .*fastMRI HDF5 .*; this does not exist")
    )
    with pytest.raises(InputError, match=rf"{name}: .*{message}"):
        VolumeFile(tmp_path / name)
    (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=message.replace("does not exist", "is none of them")):
        VolumeFile(tmp_path / name)


def test_a_format_is_told_from_the_content_not_from_the_name(tmp_path):
    write_raw(tmp_path / "a.h5")
    write_fastmri(tmp_path / "b.dat")
    assert len(SliceDataset(tmp_path)) == SLICES  # only *.h5 of a folder
    for name in ("a.h5", "b.dat"):
        found = ifft2c(VolumeFile(tmp_path / name).read_slice(0).kspace)
        torch.testing.assert_close(found, IMAGES[0].to(found.dtype), rtol=1e-5, atol=1e-5)
