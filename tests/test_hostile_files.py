"""Files from strangers: refused in one line that names them, or read with sound numbers."""

import gzip
import importlib
import json
import os
import resource
import signal
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from command_lines import refused, succeed
from counting import calls
from forks import forked
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save

from applications import inputs
from applications.errors import InputError
from applications.inputs import checked_size, content, following_links, reading, unpacked
from applications.mri.data import VolumeFile, open_scan
from applications.mri.data.writing import hdf5_file, set_attributes
from applications.mri.formats import hdf5
from applications.mri.formats.fastmri_header import minimal_header
from applications.mri.formats.hdf5 import opened
from applications.mri.network.architecture import paper
from applications.mri.network.reconstruction import Network
from applications.mri.network.tensor_files import read_metadata, read_tensors, write_tensors
from applications.mri.network.weights import Trained, load_weights, save_weights
from applications.mri.simulation.phantoms import SimulationSettings
from applications.mri.tasks.task_list import parse_task, read_task_list
from applications.trials import survives

invented = importlib.import_module("benchmarks.hostile.invented")
valid = importlib.import_module("benchmarks.hostile.valid")
judged = importlib.import_module("benchmarks.hostile.judged")
spoil = importlib.import_module("benchmarks.hostile.spoiled").spoil
KINDS = list(valid.KINDS)
SHAPE = (1, 2, valid.N, valid.N)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


several = pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, 6), marks=pytest.mark.slow)], ids=["first", "more"]
)


@several
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_valid_is_accepted(kind, seeds, tmp_path):
    for seed in seeds:
        place = tmp_path / str(seed)
        place.mkdir()
        path = valid.KINDS[kind](place, np.random.default_rng(seed))
        assert judged.judged(kind, path) == judged.ACCEPTED


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_files_are_refused_by_name_or_their_numbers_are_sound(kind, seed, tmp_path_factory):
    rng, place = np.random.default_rng(seed), tmp_path_factory.mktemp("files")
    path = valid.KINDS[kind](place, rng)
    spoil(place, path, rng)
    assert judged.judged(kind, path) in {judged.ACCEPTED, judged.REFUSED}


MADE_UP = [
    (kind, inventor)
    for kind, inventors in invented.INVENTORS.items()
    for inventor in (*inventors, invented.no_file(kind))
    if inventor not in invented.HARMLESS and "bomb" not in getattr(inventor, "__name__", "")
]


@several
@pytest.mark.parametrize(
    ("kind", "inventor"), MADE_UP, ids=lambda one: getattr(one, "__name__", one)
)
def test_what_is_made_up_to_do_harm_is_refused(kind, inventor, seeds, tmp_path):
    for seed in seeds:
        place = tmp_path / str(seed)
        place.mkdir()
        path = inventor(place, np.random.default_rng(seed))
        with calls() as seen:
            assert judged.judged(kind, path) == judged.REFUSED
        assert seen.made < 10**6


def secret_file(folder):
    path = folder.parent / "secret.h5"
    with h5py.File(path, "w") as file:
        values = np.ones(SHAPE, np.complex64)
        values[..., valid.N // 2, valid.N // 2] = 50
        file["kspace"] = values
    return path, values


def external(path, secret):
    with h5py.File(path, "w") as file:
        file["kspace"] = h5py.ExternalLink(str(secret), "/kspace")


def virtual(path, secret):
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(SHAPE, "c8")
        layout[:] = h5py.VirtualSource(str(secret), "kspace", SHAPE)
        file.create_virtual_dataset("kspace", layout)


def stored_outside(path, secret):
    with h5py.File(secret) as file:
        raw = secret.with_suffix(".raw")
        raw.write_bytes(file["kspace"][()].tobytes())
    with h5py.File(path, "w") as file:
        n_bytes = raw.stat().st_size
        file.create_dataset("kspace", SHAPE, "c8", external=[(str(raw), 0, n_bytes)])


DOORS = {
    external: r"'kspace' is a link to another file, \['/kspace', '.*secret.h5'\], and is not foll",
    virtual: "'kspace' is a virtual dataset, made of others, and is not read",
    stored_outside: "'kspace' is stored in other files, and is not read",
}


@pytest.mark.parametrize(("door", "message"), DOORS.items(), ids=lambda one: str(one)[:20])
def test_a_file_reads_others_only_if_that_is_allowed(folder, door, message):
    secret, values = secret_file(folder)
    door(folder / "scan.h5", secret)
    with pytest.raises(InputError, match=f"scan.h5: {message}.*--follow-links if you trust it"):
        VolumeFile(folder / "scan.h5")
    with following_links():
        volume = VolumeFile(folder / "scan.h5")
    # The reader keeps the permission, and others do not get it.
    assert torch.equal(volume.read_slice(0).kspace, torch.from_numpy(values[0]))
    with pytest.raises(InputError, match="not"):
        VolumeFile(folder / "scan.h5")


def test_the_command_line_follows_links_if_it_is_told_to(folder):
    secret, _ = secret_file(folder)
    external(folder / "scan.h5", secret)
    out = folder / "image.h5"
    message = refused("reconstruct", "--scan", folder / "scan.h5", "--out", out)
    assert "take --follow-links if you trust it" in message
    succeed("reconstruct", "--scan", folder / "scan.h5", "--out", out, "--follow-links")
    assert out.is_file()


def test_a_virtual_dataset_of_itself_is_refused_even_if_links_are_followed(folder):
    path = folder / "scan.h5"
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout(SHAPE, "c8")
        layout[:] = h5py.VirtualSource(".", "kspace", SHAPE)
        file.create_virtual_dataset("kspace", layout)
    with following_links(), pytest.raises(InputError, match=r"'kspace' is a virt.* of itself"):
        VolumeFile(path)


def test_soft_links_in_a_file_are_followed_and_those_in_circles_refused(folder):
    path = folder / "scan.h5"
    with h5py.File(path, "w") as file:
        file["inner/values"] = np.ones(SHAPE, np.complex64)
        file["inner/again"] = h5py.SoftLink("values")
        file["kspace"] = h5py.SoftLink("/inner/again")
        file["a"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")
    assert VolumeFile(path).shape == (valid.N, valid.N)
    with opened(path) as file:
        assert file.get("inner/none") is None
        with pytest.raises(InputError, match="links at 'a' go in circles"):
            file.get("a")


def test_no_pipe_device_or_folder_is_read_and_no_hole(folder):
    os.mkfifo(folder / "pipe.h5")
    (folder / "zero.h5").symlink_to("/dev/zero")
    (folder / "folder.h5").mkdir()
    with (folder / "holes.cfl").open("wb") as file:
        file.truncate(2**40)
    for name, kind in (
        ("pipe.h5", "a pipe or a device"),
        ("zero.h5", "a pipe or a device"),
        ("folder.h5", "a folder"),
        ("holes.cfl", "all but 0 are holes"),
        ("none.h5", "there is no such file; check"),
    ):
        for read in (checked_size, lambda path, what: content(path, what, 100)):
            with pytest.raises(InputError, match=f"{name}: a scan was needed, .*{kind}"):
                read(folder / name, "a scan")


def test_no_more_is_unpacked_than_a_file_may_announce(folder, monkeypatch):
    path = folder / "a.gz"
    data = bytes(range(256)) * 40
    assert unpacked(path, gzip.compress(data) + gzip.compress(b"more"), "x") == data + b"more"
    assert unpacked(path, data, "x") == data
    monkeypatch.setattr(inputs, "FREE", 2**16)
    packed = gzip.compress(bytes(2**22))
    assert unpacked(path, packed, "x", 10) == bytes(10)
    with pytest.raises(
        InputError, match=rf"a.gz: x is announced with \d+ bytes, in a file of {len(packed)}"
    ):
        unpacked(path, packed, "x")
    with pytest.raises(InputError, match=r"a.gz: x was needed, it cannot be read"):
        unpacked(path, gzip.compress(data)[:-9], "x")


@pytest.mark.parametrize(
    "error",
    [RuntimeError, KeyError, ValueError, TypeError, OSError, MemoryError, RecursionError],
)
def test_whatever_goes_wrong_while_a_file_is_read_is_one_line_that_names_it(error, folder):
    message = r"a.h5: a scan was needed, it cannot be read \(.*why.*\); copy or download it again.$"
    with pytest.raises(InputError, match=message) as found, reading(folder / "a.h5", "a scan"):
        raise error("why\n" + "x" * 5000)
    assert "\n" not in str(found.value) and len(str(found.value)) < 1000


def test_the_largest_numbers_of_float32_do_not_become_zeros(folder):
    """Their power of two would be infinite in float32."""
    values = np.zeros(SHAPE, np.complex64)
    values[..., valid.N // 2, valid.N // 2] = 3.3e38
    with h5py.File(folder / "scan.h5", "w") as file:
        file["kspace"] = values
    one = VolumeFile(folder / "scan.h5").read_slice(0)
    assert one.unit == 2.0**127
    assert one.kspace.abs().max() == pytest.approx(3.3e38 / 2.0**127)


@pytest.mark.parametrize("layout", ["fastMRI", "ISMRMRD"])
@pytest.mark.parametrize(
    "declared",
    [
        "<!DOCTYPE ismrmrdHeader>",
        '<!DOCTYPE x [<!ENTITY a "cartesian">]>',
        '<!DOCTYPE x SYSTEM "file:///etc/hostname">',
    ],
)
def test_headers_have_no_document_type(layout, declared, folder):
    """Whether or not what it declares would be read."""
    if layout == "ISMRMRD":
        xml = valid.ismrmrd_xml().replace("?>", f"?>{declared}", 1)
        path = valid.ismrmrd_file(folder, np.random.default_rng(0), xml)
    else:
        path = valid.fastmri(folder, np.random.default_rng(0))
        with h5py.File(path, "a") as file:
            file.pop("ismrmrd_header", None)
            xml = minimal_header((valid.N, valid.N), (valid.N, valid.N))
            file["ismrmrd_header"] = xml.replace("?>", f"?>{declared}", 1)
    with pytest.raises(InputError, match=rf"{path}: .*must have no document type \(DOCTYPE\)"):
        open_scan(path)


def test_names_in_another_encoding_are_read(folder):
    path = valid.fastmri(folder, np.random.default_rng(0))
    other = path.with_name(os.fsdecode(b"caf\xe9 [b].h5"))
    path.rename(other)
    assert open_scan(other)[0].n_slices >= 1
    other.write_bytes(b"no scan")
    message = refused("reconstruct", "--scan", other, "--out", folder / "image.h5")
    assert "caf\\udce9 [b].h5: a complete HDF5 file was needed" in message


def test_weights_and_images_have_names_in_another_encoding(folder):
    scan = valid.fastmri(folder, np.random.default_rng(0))
    n_coils = open_scan(scan)[0].n_coils
    shape = replace(paper(n_coils), n_phases=1, filters=2, features=2, feature_kernel=3)
    network = Network(shape, 0)
    weights = folder / os.fsdecode(b"caf\xe9.safetensors")
    save_weights(weights, Trained(network, network.controls(), {}))
    load_weights(weights)
    scan = scan.rename(folder / os.fsdecode(b"caf\xe9.h5"))
    out = folder / os.fsdecode(b"caf\xe9.image.h5")
    succeed("reconstruct", "--scan", scan, "--weights", weights, "--out", out, "--no-check")
    with h5py.File(os.fsencode(out)) as file:
        assert file.attrs["source"] == r"caf\udce9.h5"
        assert file.attrs["weights"] == r"caf\udce9.safetensors"


def test_texts_that_hdf5_does_not_take_are_written_as_escapes(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        set_attributes(file, {"a": "b\0c \udcff", "n": 3})
        assert dict(file.attrs) == {"a": r"b\x00c \udcff", "n": 3}


def test_aliases_count_as_often_as_they_stand_for_something(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text("defaults: &d {coils: 4}\ntasks: [{<<: *d, name: a, anatomy: x}]\n")
    assert read_task_list(path)[0].coils == 4
    for text in invented.YAMLS[:3]:
        path.write_text(text)
        with pytest.raises(InputError, match=r"tasks.yaml: YAML .* stand for more than 20000"):
            read_task_list(path)


@pytest.mark.parametrize(
    "entry", ["noise=nan", "noise=inf", "coils=1e9", "repeats=1e12", "size=1e9"]
)
def test_numbers_of_a_task_are_bounded(entry):
    with pytest.raises(InputError, match=rf"{entry.partition('=')[0]} must be finite and at most"):
        parse_task(f"name=a,anatomy=brain_t1_axial,{entry}")


def test_a_network_that_the_file_cannot_hold_is_never_built(tmp_path):
    path = tmp_path / "w.safetensors"
    fields = {"n_coils": 2, "filters": 4000}
    header = {"__metadata__": {"architecture": json.dumps(fields)}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match=r"w.safetensors: weights of .* more than \d+ bytes, the"):
        load_weights(path)


def test_weights_are_the_same_bytes_each_time(tmp_path):
    """The package writes metadata in an order that changes from one call to the next."""
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    metadata = {str(k): "x" for k in range(20)}
    path, contents = tmp_path / "w.safetensors", set()
    for _ in range(5):
        write_tensors(path, tensors, metadata)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert len({save(tensors, metadata) for _ in range(5)}) > 1
    found = read_tensors(path, "w", "r")
    assert {n: v.tolist() for n, v in found.items()} == {"b": [1, 1], "a": [0, 0, 0]}
    assert read_metadata(path, "w", "r") == metadata


def on_a_full_disk(folder):
    """What is said where no file may grow beyond 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    said = []
    for name in ("closing", "writing"):
        try:
            with hdf5_file(folder / f"{name}.h5") as file:
                if name == "closing":
                    file.create_dataset("a", (1000,), "f8")[:] = 1
                    for k in range(200):
                        file.attrs[str(k)] = "x" * 200
                else:
                    file["a"] = np.ones(10**6)
        except InputError as error:
            said.append(str(error))
    return "\n".join(said)


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path):
    lines = forked(on_a_full_disk, tmp_path).splitlines()
    for name, line in zip(("closing.h5", "writing.h5"), lines, strict=True):
        assert f"{name}: the file cannot be written (" in line
        assert line.count("choose another") == 1
    assert [*tmp_path.iterdir()] == []


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), hdf5_file(tmp_path / "a.h5"):
        raise RuntimeError("mine")
    assert [*tmp_path.iterdir()] == []


def crash():
    os.abort()


def loop():
    while True:
        pass


@pytest.mark.parametrize(
    ("work", "fate"),
    [(crash, "a crash"), (loop, "no end within 1 s"), (lambda: 1 / 0, None), (list, None)],
    ids=["crash", "loop", "error", "end"],
)
def test_what_ends_or_stops_a_process_is_known_beforehand(work, fate, capfd):
    assert survives(work, 1) == fate
    assert capfd.readouterr() == ("", "")


def test_a_file_that_would_end_the_process_is_refused(folder, monkeypatch):
    path = valid.fastmri(folder, np.random.default_rng(0))
    monkeypatch.setattr(hdf5, "_touch", lambda path: os.abort())
    with pytest.raises(InputError, match=r"scan.h5: .* is damaged and leads HDF5 to a crash; copy"):
        VolumeFile(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_coils", 10**9), ("repeats", 10**12), ("noise_std", float("nan")), ("seed", 2**70)],
)
def test_settings_of_a_simulation_are_bounded(name, value):
    with pytest.raises(InputError, match=rf"{name} must be finite and at most .*, got {value}"):
        SimulationSettings(**{name: value})
