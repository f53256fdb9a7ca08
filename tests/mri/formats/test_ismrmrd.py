import re

import h5py
import ismrmrd
import numpy as np
import pytest
import torch
from scan_files import coil_images, header, kspace_of, line, lines_of, write_ismrmrd

from applications.errors import InputError
from applications.mri.data import SliceDataset, VolumeFile, open_scan
from applications.mri.evaluation.kept import KeptImages
from applications.mri.physics.operators import centre_crop, ifft2c

COILS, SAMPLES, COLUMNS = 2, 16, 10
WIDE = coil_images(COILS, SAMPLES, COLUMNS)
KSPACE = kspace_of(WIDE)
XML = header((SAMPLES, COLUMNS))


def written(folder, lines, xml=XML):
    return write_ismrmrd(folder / "scan.h5", lines, xml)


def images_of(volume, index=0):
    return ifft2c(volume.read_slice(index).kspace).to(torch.complex128)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "n_kept"), [(16, 8), (16, 7), (15, 8), (15, 7), (16, 16)])
def test_oversampling_is_removed_by_cropping_the_image(tmp_path, n, n_kept):
    """The pixel at the centre stays at the centre, for odd sizes too."""
    wide = coil_images(COILS, n, COLUMNS)
    xml = header((n, COLUMNS), shown_x=n_kept, x_mm=n, shown_x_mm=n_kept)
    volume = VolumeFile(written(tmp_path, lines_of(kspace_of(wide)), xml))
    assert volume.shape == (n_kept, COLUMNS)
    first = n // 2 - n_kept // 2
    assert_same(images_of(volume), wide[:, first : first + n_kept])


def test_lines_that_were_not_measured_are_zero_and_not_in_the_mask(tmp_path):
    measured = [0, 3, 4, 5, 8]
    one = VolumeFile(written(tmp_path, lines_of(KSPACE, measured))).read_slice(0)
    expected = torch.zeros(COLUMNS, dtype=torch.bool)
    expected[measured] = True
    assert torch.equal(one.mask, expected.expand(SAMPLES // 2, COLUMNS))
    assert not one.kspace[..., ~expected].any()
    undersampled = ifft2c(KSPACE * expected)[:, 4:12]
    assert_same(ifft2c(one.kspace), undersampled)


def test_lines_lie_around_the_centre_that_the_header_declares(tmp_path):
    """Partial Fourier: steps count from the first measured line, the zero frequency is step 3."""
    lines = lines_of(KSPACE, range(2, COLUMNS))
    for one in lines:
        one.idx.kspace_encode_step_1 -= 2
    one = VolumeFile(written(tmp_path, lines, header((SAMPLES, COLUMNS), centre=3))).read_slice(0)
    assert one.mask[0].tolist() == [False] * 2 + [True] * 8
    kept = KSPACE.clone()
    kept[..., :2] = 0
    assert_same(ifft2c(one.kspace), ifft2c(kept)[:, 4:12])


def test_noise_and_navigators_are_left_out(tmp_path):
    rubbish = np.full((COILS, SAMPLES), 1e6)
    flags = [
        ismrmrd.ACQ_IS_NOISE_MEASUREMENT,
        ismrmrd.ACQ_IS_NAVIGATION_DATA,
        ismrmrd.ACQ_IS_PHASECORR_DATA,
        ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
        ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA,
    ]
    # A noise scan has its own length and number of channels.
    other = [line(np.ones((COILS + 1, 5)), [flags[0]])]
    other += [line(rubbish, [flag], kspace_encode_step_1=5) for flag in flags]
    volume = VolumeFile(written(tmp_path, [*other, *lines_of(KSPACE), *other]))
    assert volume.n_coils == COILS
    assert_same(images_of(volume), WIDE[:, 4:12])


def test_averages_are_averaged_line_by_line(tmp_path):
    first, second = lines_of(KSPACE), lines_of(3 * KSPACE, range(4), average=1)
    found = VolumeFile(written(tmp_path, first + second)).read_slice(0)
    weights = torch.ones(COLUMNS)
    weights[:4] = 2  # the mean of 1 and 3
    assert_same(ifft2c(found.kspace), ifft2c(KSPACE * weights)[:, 4:12])


def test_repetitions_and_contrasts_are_volumes_the_contrast_fastest(tmp_path):
    lines = [
        one
        for repetition in (1, 0)
        for contrast in (0, 1)
        for one in lines_of(
            (1 + contrast + 10 * repetition) * KSPACE, repetition=repetition, contrast=contrast
        )
    ]
    volumes = open_scan(written(tmp_path, lines))
    for volume, factor in zip(volumes, (1, 2, 11, 12), strict=True):
        assert volume.acquisition == "AXT2"
        assert_same(images_of(volume), factor * WIDE[:, 4:12])


def test_a_data_set_has_the_slices_of_all_volumes_of_a_file(tmp_path):
    lines = [one for k in range(3) for one in lines_of((1 + k) * KSPACE, repetition=k)]
    slices = SliceDataset([written(tmp_path, lines)])
    assert len(slices) == 3
    for one, factor in zip(slices, (1, 2, 3), strict=False):
        assert_same(ifft2c(one.kspace), factor * WIDE[:, 4:12])
    assert [file.label for file in slices.files] == [f"scan_volume{k}" for k in range(3)]
    outputs = KeptImages(tmp_path, slices.files).outputs
    assert [one.path.stem for one in outputs[::2]] == [file.label for file in slices.files]
    assert len(SliceDataset([slices.files[1]])) == 1


@pytest.mark.parametrize(("mode", "used"), [("embedded", True), ("separate", False)])
def test_calibration_lines_are_used_where_they_belong_to_the_image(tmp_path, mode, used):
    calibration = [ismrmrd.ACQ_IS_PARALLEL_CALIBRATION]
    both = [ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING]
    lines = lines_of(KSPACE, [0, 2, 8]) + lines_of(KSPACE, [4, 6], flags=both)
    lines += lines_of(KSPACE, [5], flags=calibration)
    lines += lines_of(7 * KSPACE, [4], flags=calibration)  # measured for the image already
    xml = header((SAMPLES, COLUMNS), calibration=mode)
    found = VolumeFile(written(tmp_path, lines, xml)).read_slice(0)
    measured = [0, 2, 4, *([5] if used else []), 6, 8]
    assert found.mask[0].nonzero().flatten().tolist() == measured
    kept = torch.zeros(COLUMNS)
    kept[measured] = 1
    assert_same(ifft2c(found.kspace), ifft2c(KSPACE * kept)[:, 4:12])


def test_samples_to_be_discarded_are_not_read(tmp_path):
    lines = [
        line(
            np.pad(KSPACE[:, :, column].numpy(), ((0, 0), (3, 2)), constant_values=99),
            kspace_encode_step_1=column,
            discard_pre=3,
            discard_post=2,
            center_sample=3 + SAMPLES // 2,
        )
        for column in range(COLUMNS)
    ]
    assert_same(images_of(VolumeFile(written(tmp_path, lines))), WIDE[:, 4:12])


def test_phase_oversampling_is_left_to_the_image(tmp_path):
    """Ten columns of 15 mm; six of 9 mm are shown."""
    xml = header((SAMPLES, COLUMNS), shown_y=6, shown_y_mm=9)
    volume = VolumeFile(written(tmp_path, lines_of(KSPACE), xml))
    assert (volume.shape, volume.image_shape) == ((8, 10), (8, 6))
    assert_same(centre_crop(images_of(volume), volume.image_shape), WIDE[:, 4:12, 2:8])


def test_what_scanners_round_is_no_contradiction(tmp_path):
    views = {"shown_y": 9, "shown_y_mm": 15.1, "shown_x_mm": 16.3}
    volume = VolumeFile(written(tmp_path, lines_of(KSPACE), header((SAMPLES, COLUMNS), **views)))
    assert (volume.shape, volume.image_shape) == ((8, 10), (8, 10))
    assert_same(images_of(volume), WIDE[:, 4:12])


ANGLE = 0.3
TILTED = np.array(
    [[np.cos(ANGLE), np.sin(ANGLE), 0], [-np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1.0]]
)


def test_slices_lie_in_order_of_position_and_the_affine_finds_them(tmp_path):
    positions = {0: (5, 6, 12.0), 1: (5, 6, 2.0), 2: (5, 6, 7.0)}  # counters are not the order
    lines = [
        one
        for counter, position in positions.items()
        for one in lines_of(
            (1 + counter) * KSPACE, slice=counter, position=position, directions=TILTED
        )
    ]
    xml = header((SAMPLES, COLUMNS), shown_y=7, shown_y_mm=10.5)
    volume = VolumeFile(written(tmp_path, lines, xml))
    for index, factor in enumerate((2, 3, 1)):
        assert_same(images_of(volume, index), factor * WIDE[:, 4:12])
    geometry = volume.facts.geometry
    assert geometry.spacing == pytest.approx((2, 1.5, 5))
    affine = np.array(geometry.affine)
    flip = np.diag([-1, -1, 1])  # left-posterior to right-anterior
    # Of 10 columns 7 are shown from column 1 on; the centre of 10 is 5, of the shown 4.
    for index, z in enumerate((2, 7, 12)):
        assert affine @ (4, 4, index, 1) == pytest.approx((*flip @ (5, 6, z), 1))
    step = affine @ (5, 4, 0, 1) - affine @ (4, 4, 0, 1)
    assert step[:3] == pytest.approx(flip @ TILTED[0] * 2)
    step = affine @ (4, 5, 0, 1) - affine @ (4, 4, 0, 1)
    assert step[:3] == pytest.approx(flip @ TILTED[1] * 1.5)


@pytest.mark.parametrize("case", ["no directions", "unequal distances"])
def test_voxels_have_no_place_where_it_is_not_declared(tmp_path, case):
    directions = np.zeros((3, 3)) if case == "no directions" else np.eye(3)
    lines = [
        one
        for counter, z in enumerate((0, 4, 9))
        for one in lines_of(KSPACE, slice=counter, position=(0, 0, z), directions=directions)
    ]
    geometry = VolumeFile(written(tmp_path, lines)).facts.geometry
    assert (geometry.spacing, geometry.affine) == (pytest.approx((2, 1.5, 4)), None)


def changed(change, **fields):
    """All lines, the fourth of them changed."""
    lines = lines_of(KSPACE, **fields)
    change(lines[3])
    return lines


def setting(name, value):
    return lambda one: setattr(one.idx if hasattr(one.idx, name) else one, name, value)


BAD = {
    "radial": (
        lambda: lines_of(KSPACE),
        header((SAMPLES, COLUMNS), trajectory="radial"),
        "the trajectory must be cartesian, got radial; grid the scan first",
    ),
    "3-D": (
        lambda: lines_of(KSPACE),
        header((SAMPLES, COLUMNS), z=8),
        "a 2-D scan was needed, encoded matrix size z must be 1, got 8; transform",
    ),
    "second phase encoding": (
        lambda: changed(setting("kspace_encode_step_2", 1)),
        XML,
        "a 2-D scan was needed, lines have a second phase encoding",
    ),
    "oversampling removed already": (
        lambda: lines_of(KSPACE),
        header((2 * SAMPLES, COLUMNS)),
        "a readout of 32 samples was declared .*oversampling included.*, got 16; correct",
    ),
    "oversampling of the matrix alone": (
        lambda: lines_of(KSPACE),
        header((SAMPLES, COLUMNS), shown_x_mm=2 * SAMPLES),
        "oversampling along x must be the same in matrix size and field of view, got 16 of 32 mm "
        "encoded for 8 of 32 mm shown; correct the header",
    ),
    "view larger than encoded": (
        lambda: lines_of(KSPACE),
        header((SAMPLES, COLUMNS), shown_y_mm=20),
        "oversampling along y must be the same",
    ),
    "no size": (
        lambda: lines_of(KSPACE),
        header((SAMPLES, COLUMNS), shown_x_mm=0),
        "matrix sizes and fields of view along x must be > 0",
    ),
    "header is no XML": (lambda: lines_of(KSPACE), "<x", "a header in ISMRMRD's XML was needed"),
    "size is no number": (
        lambda: lines_of(KSPACE),
        XML.replace("<x>16</x>", "<x>many</x>"),
        "a header in ISMRMRD's XML was needed, it cannot be read .Failed to convert",
    ),
    "lines of different length": (
        lambda: [*lines_of(KSPACE, range(9)), line(np.ones((2, 14)), kspace_encode_step_1=9)],
        XML,
        r"all lines must have the same number_of_samples, got \[14, 16\]; split",
    ),
    "coils come and go": (
        lambda: [*lines_of(KSPACE, range(9)), line(np.ones((1, 16)), kspace_encode_step_1=9)],
        XML,
        r"all lines must have the same active_channels, got \[1, 2\]",
    ),
    "outside": (
        lambda: changed(setting("kspace_encode_step_1", 10)),
        XML,
        "phase encoding steps 0 to 10 around 5 must fit the encoded matrix size y of 10",
    ),
    "measured twice": (
        lambda: changed(setting("kspace_encode_step_1", 2)),
        XML,
        "a line must be measured once a volume and average, slice 0 has phase encoding column 2",
    ),
    "calibrated twice": (
        lambda: lines_of(KSPACE) + 2 * lines_of(KSPACE[..., :3], flags=[20], average=1),
        XML,
        "a line must be measured once a volume and average, slice 0 has phase encoding column 0",
    ),
    "two encodings": (
        lambda: changed(setting("encoding_space_ref", 1)),
        XML,
        r"all lines must be of one of the 1 encodings in the header, got \[0, 1\]; split",
    ),
    "only noise": (
        lambda: lines_of(KSPACE, flags=[ismrmrd.ACQ_IS_NOISE_MEASUREMENT]),
        XML,
        "lines of an image were needed, all 10 are noise scans, navigators or the like",
    ),
    "only calibration": (
        lambda: lines_of(KSPACE, flags=[ismrmrd.ACQ_IS_PARALLEL_CALIBRATION]),
        header((SAMPLES, COLUMNS), calibration="external"),
        "every volume must have lines of an image, one has none",
    ),
    "interrupted": (
        lambda: [
            *lines_of(KSPACE),
            *lines_of(KSPACE, slice=1),
            *lines_of(KSPACE, repetition=1),
        ],
        XML,
        r"every volume must have the same number of slices, got \[2, 1\]",
    ),
    "directions not at right angles": (
        lambda: lines_of(KSPACE, directions=np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])),
        XML,
        "directions of readout, phase encoding and slices must be of length 1 and at right angles",
    ),
    "directions of two scans": (
        lambda: changed(lambda one: setattr(one, "read_dir", (0, 1, 0))),
        XML,
        "all lines of a volume must have the same directions, they have several",
    ),
    "positions of two scans": (
        lambda: changed(lambda one: setattr(one, "position", (0, 0, 3))),
        XML,
        "the lines of slice 0 must have one position, they are up to 3 mm apart",
    ),
}


@pytest.mark.parametrize(("lines", "xml", "message"), BAD.values(), ids=BAD)
def test_a_scan_that_is_not_what_it_declares_or_not_supported_is_refused(
    tmp_path, lines, xml, message
):
    path = written(tmp_path, lines(), xml)
    with pytest.raises(InputError, match=rf"scan\.h5: .*{message}"):
        VolumeFile(path)


def test_values_that_are_missing_or_not_finite_are_refused_when_their_slice_is_read(tmp_path):
    path = written(tmp_path, lines_of(KSPACE))
    with ismrmrd.Dataset(path) as file:
        stored = file._file["dataset/data"]
        row = stored[3]
        row["data"] = row["data"][:-2]
        stored[3] = row
    volume = VolumeFile(path)
    with pytest.raises(InputError, match="acquisition 3 must hold complex values of 2 coils, at"):
        volume.read_slice(0)
    path.unlink()
    lines = changed(lambda one: one.data.__setitem__((0, 2), np.nan))
    with pytest.raises(InputError, match="kspace must be finite, slice 0 holds"):
        VolumeFile(written(tmp_path, lines)).read_slice(0)


def test_damaged_and_ambiguous_files_are_refused(tmp_path):
    path = written(tmp_path, lines_of(KSPACE))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"scan.h5: a complete HDF5 file was needed"):
        VolumeFile(path)
    path.write_bytes(content)
    write_ismrmrd(path, lines_of(KSPACE), XML, group="second")
    message = "one scan was needed, the file holds ['dataset', 'second']; copy one out"
    with pytest.raises(InputError, match=re.escape(message)):
        VolumeFile(path)


def test_groups_that_are_no_acquisitions_are_not_taken_for_them(tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["dataset/xml"], file["dataset/data"] = XML, np.zeros(3)
    with pytest.raises(InputError, match=r"dataset 'kspace' was needed, the file has .'dataset'."):
        VolumeFile(tmp_path / "scan.h5")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = written(tmp_path, lines_of(KSPACE))
    monkeypatch.setitem(__import__("sys").modules, "ismrmrd.xsd", None)
    message = r"scan.h5: the package ismrmrd.xsd is needed .* pip install 'bilevel\[mri-formats\]'"
    with pytest.raises(InputError, match=message):
        VolumeFile(path)
