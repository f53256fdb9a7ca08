import h5py
import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from scan_files import write_cfl

from applications.errors import InputError
from applications.mri.sampling import (
    CartesianEquispaced,
    CartesianMagic,
    CartesianRandom,
    FromFile,
    GaussianColumns,
    GaussianPoints,
    PoissonDisc,
    Radial,
    chosen_sampling,
)

SHAPE = (6, 9)
MASK = np.random.default_rng(0).random(SHAPE) < 0.4
COLUMNS = MASK[0]


def save_h5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values


def save_png(path, values):
    from PIL import Image

    Image.fromarray(values.astype(np.uint8) * 255).save(path)


WRITERS = {
    "bool.npy": lambda p, m: np.save(p, m),
    "float.npy": lambda p, m: np.save(p, m.astype(np.float32)),
    "one.npz": lambda p, m: np.savez(p, pattern=m),
    "named.npz": lambda p, m: np.savez(p, mask=m.astype(np.uint8), other=np.ones(3)),
    "one.h5": lambda p, m: save_h5(p, pattern=m),
    "scan.h5": lambda p, m: save_h5(p, mask=m.astype(np.float32), kspace=np.ones(3)),
    "bart.cfl": lambda p, m: write_cfl(p.with_suffix(""), np.atleast_2d(m)[None]),
}


@pytest.mark.parametrize("values", [MASK, COLUMNS], ids=["positions", "columns"])
@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)
def test_the_mask_is_that_of_the_file(tmp_path, name, write, values):
    write(tmp_path / name, values)
    sampling = chosen_sampling(str(tmp_path / name))
    assert sampling == FromFile(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # whatever the state of the generator
        found = sampling.mask(SHAPE, generator)
        assert torch.equal(found, torch.from_numpy(np.broadcast_to(values, SHAPE).copy()))
        found[:] = False  # of no effect on the next


@pytest.mark.parametrize("name", ["mask.npy", "mask.NPY", "mask.npz", "mask.h5"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_mask_of_columns_may_be_a_matrix_of_one_row_or_column(tmp_path, name, axis):
    """As MATLAB stores it."""
    write = {"npz": np.savez, "h5": lambda p, m: save_h5(p, mask=m)}.get(name[-3:].strip("."))
    path = tmp_path / name
    if write is None:
        with path.open("wb") as file:
            np.save(file, np.expand_dims(COLUMNS, axis))
    else:
        write(path, np.expand_dims(COLUMNS, axis))
    found = FromFile(path).mask(SHAPE, torch.Generator())
    assert torch.equal(found, torch.from_numpy(np.broadcast_to(COLUMNS, SHAPE).copy()))


def test_white_in_a_picture_is_measured(tmp_path):
    save_png(tmp_path / "mask.png", MASK)
    found = FromFile(tmp_path / "mask.png").mask(SHAPE, torch.Generator())
    assert torch.equal(found, torch.from_numpy(MASK))


BAD = {
    "missing": ("m.npy", lambda p: None, "a mask file was needed, there is no such file; check"),
    "missing pair": ("m.cfl", lambda p: None, "m.hdr: a pair of .hdr and .cfl was needed"),
    "suffix": ("m.txt", lambda p: p.write_text("1"), "must end in one of .npy, .npz, .h5"),
    "damaged": (
        "m.npy",
        lambda p: p.write_bytes(b"no array"),
        "a complete .npy file was needed, it cannot be read",
    ),
    "damaged archive": (
        "m.npz",
        lambda p: (np.savez(p, MASK), p.write_bytes(p.read_bytes()[:-30])),
        "a complete .npz file was needed",
    ),
    "damaged picture": (
        "m.png",
        lambda p: (save_png(p, MASK), p.write_bytes(p.read_bytes()[:40])),
        "a complete .png file was needed",
    ),
    "no picture": ("m.png", lambda p: p.write_text("?"), "a complete .png file was needed"),
    "objects": (
        "m.npy",
        lambda p: np.save(p, np.array([None, 1]), allow_pickle=True),
        "a complete .npy file was needed",
    ),
    "several": (
        "m.npz",
        lambda p: np.savez(p, a=MASK, b=MASK),
        r"an array named 'mask', or one array alone, was needed, got \['a', 'b'\]; rename",
    ),
    "none": ("m.h5", lambda p: save_h5(p), r"one array alone, was needed, got \[\]"),
    "rank": (
        "m.npy",
        lambda p: np.save(p, np.ones((2, 3, 4))),
        r"over columns or over rows and columns was needed, got shape \(2, 3, 4\)",
    ),
    "values": (
        "m.npy",
        lambda p: np.save(p, np.array([0.0, 0.5, 1.0])),
        r"must hold 0 and 1 only, this holds others \(float64\); threshold it",
    ),
    "not a number": ("m.npy", lambda p: np.save(p, np.array([0, np.nan])), "0 and 1 only"),
    "text": ("m.npy", lambda p: np.save(p, np.array(["0", "1"])), "0 and 1 only"),
    "empty": ("m.npy", lambda p: np.save(p, np.zeros(SHAPE)), "keep at least one position; draw"),
    "colours": (
        "m.png",
        lambda p: imsave(p, MASK.astype(float)),
        "a grey picture was needed, got 4 colours; convert it",
    ),
}


@pytest.mark.parametrize(("name", "write", "message"), BAD.values(), ids=BAD)
def test_a_file_without_a_mask_is_refused_when_chosen(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        FromFile(tmp_path / name)


def test_a_mask_of_another_size_is_refused_when_drawn(tmp_path):
    np.save(tmp_path / "m.npy", MASK)
    sampling = FromFile(tmp_path / "m.npy")
    for shape in ((9, 6), (6, 8), (12, 9)):
        message = rf"m.npy: mask must have shape \({shape[0]}, {shape[1]}\), got \(6, 9\)"
        with pytest.raises(InputError, match=message):
            sampling.mask(shape, torch.Generator())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("random", {"acceleration": 3.0, "center_fraction": 0.1}, CartesianRandom(3.0, 0.1)),
        ("equispaced", {"acceleration": 3.0}, CartesianEquispaced(3.0)),
        ("magic", {"acceleration": 3.0, "center_fraction": 0.1}, CartesianMagic(3.0, 0.1)),
        ("gaussian", {"center_fraction": 0.1, "width": 0.2}, GaussianColumns(4.0, 0.1, 0.2)),
        ("gaussian-2d", {"calibration": 8, "width": 0.2}, GaussianPoints(8.0, 8, 0.2)),
        ("poisson", {"acceleration": 3.0, "calibration": 0}, PoissonDisc(3.0, 0)),
        ("radial", {"spokes": 5}, Radial(5)),
    ],
)
def test_a_sampling_is_chosen_by_its_name_and_settings(name, options, expected):
    every = dict.fromkeys(["acceleration", "center_fraction", "calibration", "width", "spokes"])
    assert chosen_sampling(name, **(every | options)) == expected


@pytest.mark.parametrize(
    ("name", "option", "flag"),
    [
        ("magic", "calibration", "calibration"),
        ("poisson", "width", "width"),
        ("gaussian-2d", "center_fraction", "center"),
        ("file", "acceleration", "acceleration"),
    ],
)
def test_settings_of_another_sampling_are_refused(tmp_path, name, option, flag):
    np.save(tmp_path / "m.npy", MASK)
    mask = str(tmp_path / "m.npy") if name == "file" else name
    with pytest.raises(InputError, match=rf"--{flag} does not belong to --mask .*; leave it out"):
        chosen_sampling(mask, **{option: 4})


def test_a_name_of_no_sampling_is_refused_with_the_list():
    with pytest.raises(
        InputError, match=r"--mask must be one of random, .*radial, or a file .*'x'"
    ):
        chosen_sampling("x")
