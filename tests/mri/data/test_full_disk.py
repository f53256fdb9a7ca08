"""Outputs on a full disk: one error, and nothing left."""

import resource
from contextlib import contextmanager

import pytest
import torch
from training_cases import network

from applications.errors import InputError
from applications.files import write_json
from applications.mri.data import Volume, write_volume
from applications.mri.data.images import image_writer
from applications.mri.network.weights import Trained, save_weights


@contextmanager
def disk_of(size):
    """Inside, no file can be longer, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def volume(path):
    write_volume(path, Volume(torch.zeros(2, 2, 40, 40, dtype=torch.complex64) + 1))


def images(path):
    with image_writer(path, (1, 2, 40, 40), None, {"a": 1}) as add:
        for _ in range(2):
            add(torch.rand(40, 40))


def weights(path):
    net = network()
    save_weights(path, Trained(net, net.controls(), {}))


WRITERS = {
    "volume.h5": volume,
    "images.h5": images,
    "images.nii": images,
    "w.safetensors": weights,
    "r.json": lambda path: write_json(path, list(range(9999))),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_is_one_error_that_leaves_nothing(tmp_path, name, size):
    path = tmp_path / name
    with disk_of(size), pytest.raises(InputError, match=r"the file cannot be written .*too large"):
        WRITERS[name](path)
    assert list(tmp_path.iterdir()) == []
    WRITERS[name](path)
    whole = path.stat().st_size
    with disk_of(whole - 1), pytest.raises(InputError, match="the file cannot be written"):
        WRITERS[name](path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert path.stat().st_size == whole
