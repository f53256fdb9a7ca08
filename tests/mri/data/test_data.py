import pickle
import xml.etree.ElementTree as ElementTree

import h5py
import numpy as np
import pytest
import torch

from applications.errors import InputError
from applications.mri.data import (
    SliceDataset,
    Volume,
    VolumeFile,
    implied_mask,
    write_volume,
)
from applications.mri.simulation.anatomy import Split, load_anatomies, resize, split


def volume(n_slices=3, n_coils=2, rows=8, columns=6, **fields):
    generator = torch.Generator().manual_seed(n_slices)
    kspace = torch.randn(
        n_slices, n_coils, rows, columns, dtype=torch.complex64, generator=generator
    )
    reference = torch.rand(n_slices, rows, columns, generator=generator)
    return Volume(**{"kspace": kspace, "reference": reference, **fields})


def write_raw(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def test_what_was_written_is_read_back_exactly(tmp_path):
    mask = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.bool)
    written = volume(mask=mask, acquisition="AXT2", patient_id="p7")
    write_volume(tmp_path / "scan.h5", written)
    file = VolumeFile(tmp_path / "scan.h5")
    assert (file.n_slices, file.n_coils, file.shape) == (3, 2, (8, 6))
    assert (file.acquisition, file.has_reference, file.reference_shape) == ("AXT2", True, (8, 6))
    for index in range(3):
        found = file.read_slice(index)
        assert torch.equal(found.kspace, written.kspace[index])
        assert torch.equal(found.reference, written.reference[index])
        assert torch.equal(found.mask, mask.expand(8, 6))
        assert (found.max, found.path, found.index) == (file.max, tmp_path / "scan.h5", index)
    assert file.max == float(written.reference.max())


def test_the_file_has_the_layout_of_fastmri(tmp_path):
    written = volume(patient_id="p7", reference=torch.rand(3, 4, 4))
    write_volume(tmp_path / "scan.h5", written)
    with h5py.File(tmp_path / "scan.h5") as file:
        assert set(file) == {"kspace", "reconstruction_rss", "ismrmrd_header"}
        assert file["kspace"].dtype == np.complex64
        assert file["kspace"].shape == (3, 2, 8, 6)
        assert file["reconstruction_rss"].dtype == np.float32
        assert file["ismrmrd_header"].shape == ()
        assert set(file.attrs) == {"acquisition", "max", "norm", "patient_id"}
        reference = written.reference.numpy()
        assert file.attrs["max"] == reference.max()
        assert file.attrs["norm"] == pytest.approx(np.linalg.norm(reference), rel=1e-6)
        root = ElementTree.fromstring(file["ismrmrd_header"][()])
    name = "{http://www.ismrm.org/ISMRMRD}"

    def number(*path):
        return int(root.find("/".join(f"{name}{part}" for part in path)).text)

    # Every field that the reader of fastMRI looks up.
    assert number("encoding", "encodedSpace", "matrixSize", "x") == 8
    assert number("encoding", "encodedSpace", "matrixSize", "y") == 6
    assert number("encoding", "reconSpace", "matrixSize", "x") == 4
    assert number("encoding", "reconSpace", "matrixSize", "y") == 4
    limits = ("encoding", "encodingLimits", "kspace_encoding_step_1")
    assert number(*limits, "center") == 3
    assert number(*limits, "maximum") == 5


def test_a_given_header_is_kept_and_optional_parts_may_be_absent(tmp_path):
    write_volume(tmp_path / "scan.h5", volume(reference=None, header="<x/>"))
    with h5py.File(tmp_path / "scan.h5") as file:
        assert file["ismrmrd_header"][()] == b"<x/>"
        assert set(file.attrs) == {"acquisition", "patient_id"}
    file = VolumeFile(tmp_path / "scan.h5")
    found = file.read_slice(0)
    assert not file.has_reference
    assert (found.reference, found.mask, found.max) == (None, None, None)


def test_a_file_of_kspace_alone_is_accepted(tmp_path):
    kspace = volume().kspace * (torch.arange(6) % 2)
    file = VolumeFile(write_raw(tmp_path / "scan.h5", kspace=kspace.numpy()))
    assert (file.n_slices, file.n_coils, file.shape) == (3, 2, (8, 6))
    assert (file.has_reference, file.acquisition) == (False, "unknown")
    assert implied_mask(file.read_slice(0).kspace)[0].tolist() == [False, True] * 3


def test_a_two_dimensional_mask_of_numbers_is_read_as_it_is(tmp_path):
    mask = (torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    path = write_raw(tmp_path / "scan.h5", kspace=volume().kspace.numpy(), mask=mask.numpy())
    assert torch.equal(VolumeFile(path).read_slice(1).mask, mask.bool())


def test_the_maximum_is_computed_where_no_attribute_states_it(tmp_path):
    reference = volume().reference.numpy()
    path = write_raw(
        tmp_path / "scan.h5", kspace=volume().kspace.numpy(), reconstruction_rss=reference
    )
    assert VolumeFile(path).max == float(reference.max())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_volume(tmp_path / "scan.h5", volume())
    before = (tmp_path / "scan.h5").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("applications.files.Path.replace", fail)
    with pytest.raises(InputError, match=r"scan.h5: the file cannot be written .disk full"):
        write_volume(tmp_path / "scan.h5", volume(n_slices=2))
    assert [path.name for path in tmp_path.iterdir()] == ["scan.h5"]
    assert (tmp_path / "scan.h5").read_bytes() == before


def test_a_write_replaces_an_existing_file(tmp_path):
    write_volume(tmp_path / "scan.h5", volume())
    write_volume(tmp_path / "scan.h5", volume(n_slices=2))
    assert VolumeFile(tmp_path / "scan.h5").n_slices == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_slices_are_read_when_asked_for_and_not_before(tmp_path):
    kspace = volume().kspace.numpy().copy()
    kspace[2, 1, 3, 4] = np.nan
    path = write_raw(tmp_path / "scan.h5", kspace=kspace)
    file = pickle.loads(pickle.dumps(VolumeFile(path)))
    assert torch.equal(file.read_slice(1).kspace, torch.from_numpy(kspace[1]))
    with pytest.raises(InputError, match=r"scan.h5: kspace must be finite, slice 2 holds 1 values"):
        file.read_slice(2)
    with pytest.raises(InputError, match="slice must lie in 0 to 2, got 3"):
        file.read_slice(3)


def test_a_folder_of_scans_of_any_size_is_one_dataset_in_order(tmp_path):
    volumes = {"b.h5": volume(2, 3, 5, 7), "a.h5": volume(3, 1, 8, 6), "c.h5": volume(1)}
    for name, content in volumes.items():
        write_volume(tmp_path / name, content)
    (tmp_path / "notes.txt").write_text("no scan")
    scans = SliceDataset(tmp_path)
    expected = [(name, k) for name in sorted(volumes) for k in range(len(volumes[name].kspace))]
    assert len(scans) == 6
    loader = torch.utils.data.DataLoader(scans, batch_size=None)
    for found, (name, index) in zip(loader, expected, strict=True):
        assert (found.path.name, found.index) == (name, index)
        assert torch.equal(found.kspace, volumes[name].kspace[index])
    assert [s.path.name for s in SliceDataset([tmp_path / "c.h5", str(tmp_path / "b.h5")])] == [
        "c.h5",
        "b.h5",
        "b.h5",
    ]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"other": np.zeros(3)}, r"bad.h5: dataset 'kspace' was needed, the file has \['other'\]"),
        (
            {"kspace": np.zeros((3, 4), np.complex64)},
            r"kspace must have the axes \(slice, coil, row, column\), got shape \(3, 4\)",
        ),
        (
            {"kspace": np.zeros((1, 2, 3, 4), np.float32)},
            "bad.h5: kspace must be complex64, got float32",
        ),
        (
            {"kspace": np.zeros((0, 2, 3, 4), np.complex64)},
            r"kspace must not be empty, got shape \(0, 2, 3, 4\)",
        ),
        (
            {
                "kspace": np.ones((2, 2, 3, 4), np.complex64),
                "reconstruction_rss": np.ones((1, 3, 4), np.float32),
            },
            "reconstruction_rss must have the 2 slices of kspace, got 1",
        ),
        (
            {"kspace": np.ones((1, 2, 3, 4), np.complex64), "mask": np.ones(5)},
            r"bad.h5: mask must have shape \(3, 4\), got \(5,\)",
        ),
        (
            {"kspace": np.ones((1, 2, 3, 4), np.complex64), "mask": np.full(4, 0.5)},
            "bad.h5: mask must hold 0 and 1 only",
        ),
        (
            {"kspace": np.ones((1, 2, 3, 4), np.complex64), "mask": np.zeros(4)},
            "bad.h5: mask must keep at least one position",
        ),
    ],
)
def test_a_file_in_another_layout_is_refused_when_opened(tmp_path, datasets, message):
    path = write_raw(tmp_path / "bad.h5", **datasets)
    with pytest.raises(InputError, match=message):
        VolumeFile(path)


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.h5: .* there is no such file"):
        VolumeFile(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("not a scan")
    with pytest.raises(InputError, match=r"text.h5: .* cannot be read"):
        VolumeFile(tmp_path / "text.h5")
    write_volume(tmp_path / "scan.h5", volume())
    content = (tmp_path / "scan.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut.h5: .* cannot be read .*truncated"):
        VolumeFile(tmp_path / "cut.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder has none"):
        SliceDataset(tmp_path / "empty")
    with pytest.raises(InputError, match=r"a folder of \.h5 files was needed"):
        SliceDataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="at least one file, got an empty sequence"):
        SliceDataset([])
    with pytest.raises(InputError, match="does not exist; create it first"):
        write_volume(tmp_path / "nowhere" / "scan.h5", volume())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kspace": torch.zeros(2, 3, 4)}, r"kspace must be complex .*float32 \(2, 3, 4\)"),
        ({"reference": torch.zeros(2, 8, 6)}, r"reference must have shape \(3, rows, columns\)"),
        ({"mask": torch.ones(8, dtype=torch.bool)}, r"mask must have shape \(6,\) or \(8, 6\)"),
    ],
)
def test_a_volume_that_does_not_fit_together_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        volume(**fields)


def test_the_implied_mask_is_where_any_coil_was_measured():
    kspace = torch.zeros(2, 3, 4, dtype=torch.complex64)
    kspace[0, 1, 2], kspace[1, 0, 0] = 1j, -2
    assert implied_mask(kspace).nonzero().tolist() == [[0, 0], [1, 2]]


def test_the_bundled_anatomies_are_images_between_zero_and_one():
    anatomies = load_anatomies()
    assert list(anatomies) == sorted(anatomies)
    assert len(anatomies) == 9
    for images in anatomies.values():
        assert images.shape[1:] == (256, 256)
        assert images.dtype == torch.float32
        assert float(images.min()) == 0
        assert 0.5 < float(images.max()) <= 1


def test_other_files_of_anatomies_are_checked(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["knee/images"] = np.full((2, 5, 5), 51, np.uint8)
    (images,) = load_anatomies(tmp_path / "own.h5").values()
    torch.testing.assert_close(images, torch.full((2, 5, 5), 0.2))
    path = write_raw(tmp_path / "flat.h5", images=np.zeros((2, 5, 5), np.uint8))
    with pytest.raises(InputError, match="'images/images' was needed"):
        load_anatomies(path)
    with pytest.raises(InputError, match="the file is empty"):
        load_anatomies(write_raw(tmp_path / "nothing.h5"))


def test_resizing_takes_means_over_areas():
    images = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0))
    blocks = images.reshape(2, 4, 3, 4, 3).mean((2, 4))
    torch.testing.assert_close(resize(images, 4), blocks)
    assert torch.equal(resize(images, 12), images)
    # 3 pixels to 2: each new one covers one and a half old ones.
    row = torch.tensor([[1.0, 2.0, 4.0]]).expand(3, 3)
    expected = torch.tensor([(1 + 2 / 2) / 1.5, (2 / 2 + 4) / 1.5])
    torch.testing.assert_close(resize(row, 2), expected.expand(2, 2))
    for size in (5, 7, 11):
        small = resize(images, size)
        torch.testing.assert_close(small.mean((1, 2)), images.mean((1, 2)))
        assert resize(torch.ones(1, 12, 12), size).max() <= 1
    with pytest.raises(InputError, match="size must lie in 1 to 12"):
        resize(images, 13)


@pytest.mark.parametrize("n_slices", [*range(9, 25), 60, 155])
@pytest.mark.parametrize("gap", [1, 2])
def test_no_slice_is_the_neighbour_of_one_in_another_role(n_slices, gap):
    found = split(n_slices, gap=gap)
    roles = (found.train, found.validation, found.test)
    assert all(role and role == tuple(range(role[0], role[-1] + 1)) for role in roles)
    assert found.train[0] == 0
    assert found.test[-1] == n_slices - 1
    assert found.validation[0] - found.train[-1] == gap + 1
    assert found.test[0] - found.validation[-1] == gap + 1


def test_the_shares_of_a_split_are_as_asked():
    found = split(20)
    assert (len(found.train), len(found.validation), len(found.test)) == (12, 3, 3)
    assert isinstance(found, Split)
    found = split(100, train=0.4, validation=0.3, test=0.28)
    assert (len(found.train), len(found.validation), len(found.test)) == (40, 30, 28)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_slices": 4}, "leave no training slice of 4"),
        ({"n_slices": 20, "gap": 0}, "gap must be >= 1, got 0"),
        ({"n_slices": 20, "train": 0.9}, "sum of at most 1"),
        ({"n_slices": 20, "test": 0.0}, "the shares must be > 0"),
    ],
)
def test_a_split_that_leaks_or_leaves_nothing_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        split(**settings)


def test_a_block_is_a_volume_of_the_slices_it_names(tmp_path):
    write_volume(tmp_path / "scan.h5", volume(5))
    whole = VolumeFile(tmp_path / "scan.h5")
    part = VolumeFile(whole.path, readers=whole.readers, block=(1, 3))
    assert (part.n_slices, part.max) == (2, whole.max)
    slices = SliceDataset([part, whole])
    assert [one.index for one in slices] == [1, 3, 0, 1, 2, 3, 4]
    for one in slices:
        assert torch.equal(one.kspace, whole.read_slice(one.index).kspace)
    with pytest.raises(InputError, match="slice must lie in 0 to 1, got 2"):
        part.read_slice(2)


@pytest.mark.parametrize("block", [(0, 5), (-1,), ()])
def test_a_block_outside_the_volume_is_refused(tmp_path, block):
    write_volume(tmp_path / "scan.h5", volume(5))
    with pytest.raises(InputError, match="a block must name slices in 0 to 4, at least one"):
        VolumeFile(tmp_path / "scan.h5", block=block)


def test_volumes_in_the_layout_of_fastmri_are_a_data_set_in_three_lines(tmp_path):
    """As the page on MRI has it, for a training of one's own."""
    mask = torch.arange(6) % 2 == 0
    for name in ("a.h5", "b.h5"):
        write_volume(tmp_path / name, volume(mask=mask))
    slices = SliceDataset(tmp_path)
    loader = torch.utils.data.DataLoader(slices, batch_size=None, shuffle=True)
    found = [(one.kspace, one.measured, one.reference) for one in loader]
    assert len(found) == 6
    expected = volume()
    for kspace, measured, reference in found:
        (index,) = (k for k in range(3) if torch.equal(kspace, expected.kspace[k]))
        assert torch.equal(measured, mask.expand(8, 6))
        assert torch.equal(reference, expected.reference[index])
