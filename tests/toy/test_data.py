import gzip
import struct

import numpy as np
import pytest
import torch

from applications.errors import InputError
from applications.toy.data import Convention, Dataset, corrupt, load, permute_labels, rotate, split


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n, n_classes=10):
    """Samples that can be told apart: each image holds its number."""
    inputs = torch.arange(n, dtype=torch.float32)[:, None].expand(n, 4) / n
    return Dataset(inputs, torch.arange(n) % n_classes, n_classes, 2, "numbers")


def write(folder, part, n, side=3, packed=False, first=0):
    images = np.full((n, side, side), 51, np.uint8)
    labels = (np.arange(n) + first).astype(np.uint8)
    for values, ending in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
        shape = struct.pack(f">{values.ndim}I", *values.shape)
        content = bytes([0, 0, 8, values.ndim]) + shape + values.tobytes()
        path = folder / f"{part}-{ending}{'.gz' * packed}"
        path.write_bytes(gzip.compress(content) if packed else content)


def test_digits_need_no_folder():
    data = load()
    assert (len(data), data.n_classes, data.side, data.name) == (1797, 10, 8, "digits")
    assert (float(data.inputs.min()), float(data.inputs.max())) == (0.0, 1.0)
    assert data.inputs.shape == (1797, 64)
    assert data.labels.bincount().min() == 174


def test_parts_of_a_folder_are_put_together_the_training_part_first(tmp_path):
    write(tmp_path, "t10k", 2, first=5)
    write(tmp_path, "train", 3, packed=True)
    data = load(tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 5, 6]
    assert (data.n_classes, data.side, data.name) == (7, 3, tmp_path.name)
    torch.testing.assert_close(data.inputs, torch.full((5, 9), 0.2))
    assert load(tmp_path, "t10k").labels.tolist() == [5, 6]


def test_folders_without_matching_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="none: a folder of IDX files was needed; this is none"):
        load(tmp_path / "none")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz were needed, the folder has"):
        load(tmp_path)
    write(tmp_path, "train", 3)
    with pytest.raises(InputError, match="part 't10k' was needed, the folder has train; take one"):
        load(tmp_path, "t10k")
    with pytest.raises(InputError, match="a folder was needed to read the part 'train' from"):
        load(None, "train")
    write(tmp_path, "other", 2, side=4)
    with pytest.raises(InputError, match=r"of one size were needed, got \[\(3, 3\), \(4, 4\)\]"):
        load(tmp_path)
    (tmp_path / "other-labels-idx1-ubyte").unlink()
    with pytest.raises(
        InputError, match=r"its labels were needed, other-labels.* Copy them beside"
    ):
        load(tmp_path)
    write(tmp_path, "other", 2)
    images = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "other-images-idx3-ubyte").write_bytes(images)
    with pytest.raises(InputError, match="one label an image was needed, got 2 for 3; copy"):
        load(tmp_path)
    oblong = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 3, 2) + bytes(12)
    (tmp_path / "other-images-idx3-ubyte").write_bytes(oblong)
    with pytest.raises(InputError, match="square images were needed, got 3 x 2; pad them"):
        load(tmp_path)


def test_parts_of_a_split_are_disjoint_and_depend_on_the_seed_alone():
    data = numbered(50)
    parts = split(data, [20, 10, 15], seeded())
    assert [len(part) for part in parts] == [20, 10, 15]
    found = torch.cat([part.inputs[:, 0] for part in parts])
    assert len(found.unique()) == 45
    again, other = split(data, [20, 10, 15], seeded()), split(data, [20, 10, 15], seeded(1))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0].inputs, other[0].inputs)
    for part in parts:  # labels stay with their images
        number = (part.inputs[:, 0] * 50).round().long()
        assert torch.equal(part.labels, number % 10)


def test_a_split_larger_than_the_data_is_refused():
    with pytest.raises(
        InputError, match=r"numbers: 30 \+ 21 = 51 samples were needed, there are 50"
    ):
        split(numbered(50), [30, 21], seeded())
    with pytest.raises(InputError, match=r"sizes must be at least 1 each, got \[3, 0\]"):
        split(numbered(50), [3, 0], seeded())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_the_exact_convention_leaves_exactly_that_share_wrong(share):
    data = numbered(1000)
    found = corrupt(data, share, Convention.EXACT, seeded())
    assert int(found.wrong.sum()) == round(1000 * share)
    assert torch.equal(found.wrong, found.data.labels != data.labels)
    assert torch.equal(found.data.inputs, data.inputs)


def test_the_uniform_convention_leaves_a_tenth_of_ten_classes_right_by_chance():
    data = numbered(40_000)
    found = corrupt(data, 0.5, Convention.UNIFORM, seeded())
    assert torch.equal(found.wrong, found.data.labels != data.labels)
    # 18000 in the mean, with a standard deviation of 42.
    assert abs(int(found.wrong.sum()) - 18_000) < 200
    assert found.data.labels[found.wrong].bincount().min() > 1600  # 1800 in the mean


@pytest.mark.parametrize("convention", Convention)
def test_corruption_depends_on_the_seed_alone(convention):
    data = numbered(200)
    one, again, other = (corrupt(data, 0.5, convention, seeded(s)).data.labels for s in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(InputError, match=r"share must lie in 0 to 1, got 1\.5"):
        corrupt(numbered(5), 1.5, Convention.EXACT, seeded())


def test_images_turn_by_90_degrees():
    data = Dataset(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0]), 1, 2, "one")
    assert rotate(data, 1).inputs.tolist() == [[2.0, 4.0, 1.0, 3.0]]
    assert torch.equal(rotate(rotate(data, 1), -1).inputs, data.inputs)


def test_permuted_labels_are_all_wrong_and_consistent():
    data = numbered(100)
    labels = permute_labels(data, seeded()).labels.reshape(10, 10)
    assert bool((labels == labels[0]).all())
    assert sorted(labels[0].tolist()) == list(range(10))
    assert not bool((labels[0] == torch.arange(10)).any())
