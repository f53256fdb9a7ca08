import gzip

import h5py
import nibabel
import numpy as np
import pytest
import torch

from applications.errors import InputError
from applications.mri.data import SliceDataset
from applications.mri.data.images import check_image_path, image_writer
from applications.mri.formats import Geometry
from applications.mri.formats.nifti import Plane, read_images
from applications.mri.simulation.anatomy import load_anatomies
from applications.mri.simulation.phantoms import SimulationSettings, simulate_folder

RAS = np.random.default_rng(0).uniform(0.2, 0.9, (6, 7, 8)).astype(np.float32)
RAS[5, 0, 0] = 1.0  # right, posterior, inferior
AFFINE = np.diag([1.0, 1, 1, 1])


def save(path, values, affine=AFFINE, code=1, units="mm"):
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units(units)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nibabel.save(image, path)
    return path


def padded(images, rows, columns):
    found = np.zeros((len(images), rows, columns), np.float32)
    top, left = (rows - images.shape[1]) // 2, (columns - images.shape[2]) // 2
    found[:, top : top + images.shape[1], left : left + images.shape[2]] = images
    return torch.from_numpy(found)


def test_slices_are_cut_as_radiologists_look_at_them(tmp_path):
    path = save(tmp_path / "head.nii", RAS)
    axial = read_images(path, Plane.AXIAL)  # rows from anterior, columns from the right
    expected = np.stack(
        [[[RAS[i, j, k] for i in range(5, -1, -1)] for j in range(6, -1, -1)] for k in range(8)]
    )
    assert torch.equal(axial, padded(expected, 7, 7))
    assert axial[0, 6, 0] == 1
    coronal = read_images(path, Plane.CORONAL)  # rows from superior, columns from the right
    expected = np.stack(
        [[[RAS[i, j, k] for i in range(5, -1, -1)] for k in range(7, -1, -1)] for j in range(7)]
    )
    assert torch.equal(coronal, padded(expected, 8, 8))
    sagittal = read_images(path, Plane.SAGITTAL)  # rows from superior, columns from anterior
    expected = np.stack(
        [[[RAS[i, j, k] for j in range(6, -1, -1)] for k in range(7, -1, -1)] for i in range(6)]
    )
    assert torch.equal(sagittal, padded(expected, 8, 8))
    stored = read_images(path, Plane.STORED)
    assert torch.equal(stored, padded(RAS.transpose(2, 0, 1), 7, 7))


@pytest.mark.parametrize("plane", [Plane.AXIAL, Plane.CORONAL, Plane.SAGITTAL])
@pytest.mark.parametrize("axes", ["LAS", "PSR", "ILA", "SRP"])
def test_images_do_not_depend_on_how_the_file_is_oriented(tmp_path, plane, axes):
    straight = nibabel.Nifti1Image(RAS, np.diag([1.0, 2, 3, 1]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(straight.affine), nibabel.orientations.axcodes2ornt(axes)
    )
    turned = straight.as_reoriented(turn)
    assert "".join(nibabel.aff2axcodes(turned.affine)) == axes
    path = save(tmp_path / "turned.nii.gz", turned.get_fdata(dtype=np.float32), turned.affine)
    expected = read_images(save(tmp_path / "ras.nii", RAS, straight.affine), plane)
    assert torch.equal(read_images(path, plane), expected)


def test_the_field_of_view_becomes_square_in_millimetres(tmp_path):
    """7 rows of 2 mm are 14 mm, so are 28 columns of half a millimetre, of which 6 are there."""
    path = save(tmp_path / "flat.nii", RAS, np.diag([0.5, 2, 1, 1]))
    assert read_images(path).shape == (8, 7, 28)
    assert torch.equal(read_images(path)[..., 11:17] != 0, torch.ones(8, 7, 6, dtype=torch.bool))


def test_empty_slices_at_the_ends_are_left_out_and_values_scaled(tmp_path):
    values = np.zeros((6, 7, 12), np.int16)
    values[:, :, 2:10] = (400 * RAS).round()
    values[:, :, 5] = 0  # in between they stay
    values[0, 0, 0] = 39  # noise
    images = read_images(save(tmp_path / "head.nii", values))
    assert images.shape == (8, 7, 7)
    assert (float(images.max()), float(images[3].max())) == (1.0, 0.0)
    assert images.dtype == torch.float32


def test_scans_are_simulated_from_a_volume(tmp_path):
    ball = np.indices((24, 30, 20)) - np.array([12, 15, 10])[:, None, None, None]
    values = (200 * (np.square(ball).sum(0) < 90) + ball[0] + 12).astype(np.float32)
    values[values < 100] = 0
    path = save(tmp_path / "sub-01.nii.gz", values)
    settings = SimulationSettings(16, 2, 0.0, anatomies=path, plane=Plane.CORONAL)
    files = simulate_folder(tmp_path / "out", settings)
    assert [file.name for file in files["test"]] == ["sub-01.h5"]
    assert len(SliceDataset(files["train"])) > 3
    images = load_anatomies(path, Plane.CORONAL)["sub-01"]
    assert images.shape[1:] == (24, 24)
    assert all(one.reference.max() > 0.1 for one in SliceDataset(tmp_path / "out" / "train"))


def contradicting(path):
    image = nibabel.Nifti1Image(RAS, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.diag([-1.0, 1, 1, 1]), 1)
    nibabel.save(image, path)


def truncated(path):
    save(path, RAS)
    path.write_bytes(path.read_bytes()[:-9])


BAD = {
    "missing": (lambda p: None, "a NIfTI file was needed, there is no such file; check the path"),
    "truncated": (truncated, "a complete NIfTI file was needed, it cannot be read"),
    "text": (lambda p: p.write_text("text"), "a complete NIfTI file was needed"),
    "complex": (
        lambda p: save(p, RAS.astype(np.complex64)),
        "real magnitudes were needed, got complex64; take absolute values",
    ),
    "several": (
        lambda p: save(p, np.stack([RAS, RAS], -1)),
        r"one volume of three axes was needed, got shape \(6, 7, 8, 2\); split it",
    ),
    "negative": (lambda p: save(p, RAS - 1), "magnitudes must be finite, >= 0 and not all 0"),
    "zero": (lambda p: save(p, 0 * RAS), "not all 0, got 0 to 0"),
    "not finite": (lambda p: save(p, np.where(RAS == 1, np.nan, RAS)), "magnitudes must be finite"),
    "not oriented": (
        lambda p: save(p, RAS, code=0),
        "one orientation must be declared, qform and sform state none; .*--plane stored",
    ),
    "oriented twice": (contradicting, "qform and sform state LAS and RAS; correct the header"),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_what_is_no_oriented_magnitude_volume_is_refused(tmp_path, write, message):
    write(tmp_path / "head.nii")
    with pytest.raises(InputError, match=rf"head\.nii: .*{message}"):
        load_anatomies(tmp_path / "head.nii")


def test_a_damaged_compressed_volume_is_refused(tmp_path):
    path = save(tmp_path / "head.nii.gz", RAS)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"head.nii.gz: a complete NIfTI file was needed"):
        read_images(path)


def test_a_volume_without_orientation_is_cut_as_stored(tmp_path):
    path = save(tmp_path / "head.nii", RAS, code=0)
    assert torch.equal(read_images(path, Plane.STORED), padded(RAS.transpose(2, 0, 1), 7, 7))


def test_a_plane_is_refused_where_there_is_no_choice(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["knee/images"] = np.full((2, 5, 5), 51, np.uint8)
    with pytest.raises(InputError, match="a plane can be chosen for NIfTI only"):
        load_anatomies(tmp_path / "own.h5", Plane.AXIAL)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = save(tmp_path / "head.nii", RAS)
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    message = r"head.nii: the package nibabel is needed .* pip install 'bilevel\[mri-formats\]'"
    with pytest.raises(InputError, match=message):
        read_images(path)
    with (
        pytest.raises(InputError, match=r"out.nii: the package nibabel is needed"),
        image_writer(tmp_path / "out.nii", (1, 1, 2, 3), None, {}),
    ):
        pass
    assert not (tmp_path / "out.nii").exists()


PLACE = Geometry((2.0, 1.5, 4.0), ((0, -1.5, 0, 7), (2.0, 0, 0, 8), (0, 0, 4.0, 9), (0, 0, 0, 1)))
IMAGES = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def write_images(path, n_volumes, geometry=PLACE):
    with image_writer(path, (n_volumes, 3, 4, 5), geometry, {"source": "s"}) as add:
        for image in IMAGES[:n_volumes].flatten(0, 1):
            add(image)


@pytest.mark.parametrize("n_volumes", [1, 2])
@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_nifti_holds_rows_columns_slices_and_volumes_in_their_place(tmp_path, name, n_volumes):
    write_images(tmp_path / name, n_volumes)
    image = nibabel.load(tmp_path / name)
    expected = IMAGES[:n_volumes].permute(2, 3, 1, 0).numpy()
    expected = expected[..., 0] if n_volumes == 1 else expected
    assert image.get_data_dtype() == np.float32
    assert np.array_equal(image.get_fdata(dtype=np.float32), expected)
    assert image.affine == pytest.approx(np.array(PLACE.affine))
    assert image.header.get_zooms()[:3] == pytest.approx((2, 1.5, 4))
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (image.get_sform(coded=True)[1], image.get_qform(coded=True)[1]) == (1, 1)
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") == name.endswith("gz")


@pytest.mark.parametrize("n_volumes", [1, 2])
def test_hdf5_holds_volumes_slices_rows_and_columns(tmp_path, n_volumes):
    write_images(tmp_path / "out.h5", n_volumes)
    with h5py.File(tmp_path / "out.h5") as file:
        found = file["reconstruction"][()]
        assert dict(file.attrs) == {"source": "s"}
    expected = IMAGES.numpy() if n_volumes == 2 else IMAGES[0].numpy()
    assert np.array_equal(found, expected)


def test_what_was_written_can_be_simulated_from(tmp_path):
    write_images(tmp_path / "out.nii", 1)
    stored = read_images(tmp_path / "out.nii", Plane.STORED)
    # 4 rows of 2 mm and 5 columns of 1.5 mm: 8 mm are 5.33 columns, rounded to 5.
    assert torch.equal(stored, IMAGES[0] / IMAGES[0].max())


def test_a_place_that_is_not_known_is_not_declared(tmp_path):
    for geometry, zooms, unit in (
        (None, (1, 1, 1), "unknown"),
        (Geometry((2.0, 1.5, 4.0)), (2, 1.5, 4), "mm"),
    ):
        write_images(tmp_path / "out.nii", 1, geometry)
        image = nibabel.load(tmp_path / "out.nii")
        assert image.header.get_zooms() == pytest.approx(zooms)
        assert image.header.get_xyzt_units()[0] == unit
        assert (image.get_sform(coded=True)[1], image.get_qform(coded=True)[1]) == (0, 0)


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "out.h5"])
def test_images_appear_whole_or_not_at_all(tmp_path, name):
    with (
        pytest.raises(InputError, match="bad slice"),
        image_writer(tmp_path / name, (1, 3, 4, 5), None, {}) as add,
    ):
        add(IMAGES[0, 0])
        raise InputError("bad slice")
    assert list(tmp_path.iterdir()) == []


def test_names_that_do_not_say_the_format_are_refused(tmp_path):
    for name in ("out", "out.png", "out.gz"):
        with pytest.raises(InputError, match=r"must end in one of .h5, .hdf5, .nii, .nii.gz"):
            check_image_path(tmp_path / name)
    with gzip.open(tmp_path / "x.nii.gz", "wb"):
        check_image_path(tmp_path / "x.nii.gz")


def test_what_is_known_of_thousands_of_slices_is_kept_beside_them(tmp_path):
    """HDF5 took 64 KiB an attribute before 1.8."""
    n = 9000
    record = {"trustworthy": [True] * n, "methods": ["network"] * n, "errors": [0.5] * n}
    with image_writer(tmp_path / "i.h5", (1, 1, 2, 2), None, record) as add:
        add(torch.ones(2, 2))
    with h5py.File(tmp_path / "i.h5") as file:
        assert {name: file.attrs[name].tolist() for name in record} == record
