"""Nothing that a user has is lost, and no two runs write one file."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from command_lines import call as run, refused, succeed
from forks import forked
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from applications.errors import InputError
from applications.mri.bundled.paths import bundled_scan_path
from applications.mri.commands.train import state_folder
from applications.mri.data import Volume, VolumeFile, write_volume
from applications.mri.data.images import image_writer
from applications.mri.evaluation import scanning
from applications.mri.evaluation.figures import draw_image
from applications.mri.network.architecture import narrow
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, load_weights, save_weights
from applications.mri.simulation.simulate import simulate
from applications.outputs import PICTURE, Kind, Output, claimed

SIZE, COILS = 24, 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a user has: scans to evaluate and to reconstruct, and weights."""
    folder = tmp_path_factory.mktemp("home")
    generator = torch.Generator().manual_seed(0)
    disc = torch.zeros(SIZE, SIZE)
    disc[6:18, 5:20] = 0.8
    disc[10:12, 8:12] = 0.2
    for name in ("data/a.h5", "data/b.h5", "other/v.h5"):
        (folder / name).parent.mkdir(exist_ok=True)
        kspace = torch.stack([simulate(disc, COILS, generator).kspace for _ in range(2)])
        write_volume(folder / name, Volume(kspace, patient_id=name))
    network = Network(replace(narrow(COILS), n_phases=2, filters=3, features=2), 1)
    save_weights(folder / "w.safetensors", Trained(network, network.controls(), {}))
    return folder


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def reconstruct(home, out, *options):
    scan, weights = home / "data" / "a.h5", home / "w.safetensors"
    return "reconstruct", "--scan", scan, "--weights", weights, "--out", out, *options


def evaluate(home, out, *options):
    folder, weights = home / "data", home / "w.safetensors"
    options = ("--acceleration", 2, "--center", 0.3, *options)
    return "evaluate", "--data", folder, "--weights", weights, "--out", out, *options


def train(home, out, *options, preset=("--preset", "tiny")):
    options = ("--acceleration", 2, "--center", 0.3, "--steps", 1, *options, *preset)
    return "train", "--data", home / "data", "--out", out, *options


def test_an_output_that_is_an_input_is_refused(home, tmp_path):
    before = content(home)
    (tmp_path / "linked").symlink_to(home)
    mask = tmp_path / "mask.h5"
    with h5py.File(mask, "w") as file:
        file["mask"] = np.ones(SIZE)
    os.link(home / "data" / "a.h5", tmp_path / "hard.h5")
    calls = [
        reconstruct(home, home / "data" / "a.h5"),
        reconstruct(home, home / "data" / ".." / "data" / "a.h5"),
        reconstruct(home, tmp_path / "linked" / "data" / "a.h5"),
        reconstruct(home, tmp_path / "hard.h5"),
        reconstruct(home, mask, "--mask", mask),
        reconstruct(home, tmp_path / "i.h5", "--png", home / "w.safetensors"),
        evaluate(home, home / "data" / "b.h5"),
        evaluate(home, home / "w.safetensors"),
        evaluate(home, home / "other" / "v.h5", "--baselines", home / "other"),
        train(home, home / "data" / "b.h5"),
        train(home, home / "w.safetensors", "--init", home / "w.safetensors", preset=()),
        train(home, home / "other" / "v.h5", "--validation", home / "other"),
    ]
    for call in calls:
        found = refused(*call)
        assert "the output must not be an input" in found, found
    assert content(home) == before
    assert not (tmp_path / "i.h5").exists()


def annotated(path):
    with h5py.File(path, "w") as file:
        file["reconstruction"], file["tumour"] = np.ones((1, 2, 2), "f4"), np.ones((2, 2))
        file.attrs["source"] = "a.h5"


def drawn_by_the_user():
    figure = Figure()
    figure.subplots().plot([1, 2])
    drawn = BytesIO()
    figure.savefig(drawn)
    return drawn.getvalue()


FOREIGN = {
    "raw scan": ("i.h5", lambda p, home: p.write_bytes((home / "data/b.h5").read_bytes())),
    "raw scan with images": (
        "i.h5",
        lambda p, home: h5py.File(p, "w").update({"kspace": [1], "reconstruction": [1]}),
    ),
    "Siemens": ("i.h5", lambda p, home: p.write_bytes(bundled_scan_path().read_bytes())),
    "other HDF5": ("i.hdf5", lambda p, home: h5py.File(p, "w").update({"x": [1]})),
    "images of another program": (
        "i.h5",
        lambda p, home: h5py.File(p, "w").update({"reconstruction": np.ones((1, 2, 2), "f4")}),
    ),
    "images that were annotated": ("i.h5", lambda p, home: annotated(p)),
    "text": ("i.h5", lambda p, home: p.write_text("my notes")),
    "head of a patient": (
        "i.nii.gz",
        lambda p, home: nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2)), np.eye(4)), p),
    ),
    "text as NIfTI": ("i.nii", lambda p, home: p.write_text("my notes")),
    "not compressed": ("i.nii.gz", lambda p, home: p.write_text("my notes")),
}


def test_an_existing_file_of_another_kind_is_not_replaced_by_images(home, tmp_path):
    for case, (name, write) in FOREIGN.items():
        path = tmp_path / case / name
        path.parent.mkdir()
        made = write(path, home)
        if isinstance(made, h5py.File):
            made.close()
        before = content(path.parent)
        found = refused(*reconstruct(home, path))
        assert f"{path}: a file lies there that is not a file of such images" in found, case
        assert content(path.parent) == before


def test_other_outputs_replace_nothing_of_another_kind_either(home, tmp_path):
    path = tmp_path / "file"
    cohort = b'{"scans": ["a", "b"], "convention": 1}'
    texts = b"{}", b'{"name": 1}', b"notes", cohort, b"[]"
    for written in (*texts, drawn_by_the_user(), (home / "data/a.h5").read_bytes()):
        path.write_bytes(written)
        found = refused(*reconstruct(home, tmp_path / "i.h5", "--json", path))
        assert "not a file of such results, it would be lost" in found
        assert "not a file of such results, it would be lost" in refused(*evaluate(home, path))
        assert "not a file of weights, it would be lost" in refused(*train(home, path))
        found = refused(*reconstruct(home, tmp_path / "i.h5", "--png", path))
        assert "not a picture that this program drew" in found
        assert content(tmp_path) == {path: written}
    other = tmp_path / "w.safetensors"
    for metadata in (None, {"architecture": "llama"}, {"architecture": '{"layers": 3}'}):
        save_file({"x": torch.ones(1)}, other, metadata and metadata | {"record": "{}"})
        assert "not a file of weights" in refused(*train(home, other))
        other.unlink()
    state_folder(other).write_text("notes")
    assert "the folder cannot be made or written" in refused(*train(home, other))
    state_folder(other).unlink()
    state_folder(other).mkdir()
    notes = state_folder(other) / "training" / "notes"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert "no folder of checkpoints: it holds 'notes'" in refused(*train(home, other))
    assert notes.read_text() == "mine"


def test_earlier_outputs_of_the_same_kind_and_empty_files_are_replaced(home, tmp_path):
    image, png, scores, new = (tmp_path / n for n in ("i.h5", "p.png", "s.json", "w"))
    nifti = tmp_path / "i.nii.gz"
    image.write_bytes(b"")  # as mktemp makes them
    for _ in range(2):
        succeed(*reconstruct(home, image, "--png", png))
        succeed(*reconstruct(home, nifti))
        succeed(*evaluate(home, scores))
        succeed(*train(home, new))
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        *("i.h5", "i.nii.gz", "p.png", "s.json", "w"),
    ]
    assert json.loads(scores.read_text())["convention"] == "fastmri"


@pytest.mark.parametrize("what", ["pipe", "link", "dangling link", "device"])
def test_what_is_no_regular_file_is_refused(home, tmp_path, what):
    path, kept = tmp_path / "out.h5", tmp_path / "kept.h5"
    kept.write_bytes(b"")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(kept)
    elif what == "dangling link":
        path.symlink_to(tmp_path / "none.h5")
    else:
        path = Path("/dev/null")
    for call in (reconstruct, evaluate, train):
        assert f"{path}: a regular file will be written" in refused(*call(home, path))
    with pytest.raises(InputError, match="a regular file will be written"):
        draw_image(path, torch.ones(2, 2))
    assert kept.read_bytes() == b""


def test_what_is_protected_from_writing_is_kept(home, tmp_path):
    """Renaming onto a file asks nobody but its folder."""
    for name, call in (("i.h5", reconstruct), ("i.nii", reconstruct), ("s.json", evaluate)):
        path = tmp_path / name
        succeed(*call(home, path))
        path.chmod(0o444)
        before = content(tmp_path)
        assert f"{path}: the file that lies there is protected" in refused(*call(home, path))
        assert content(tmp_path) == before


def test_who_may_read_outputs_is_what_the_user_says(home, tmp_path):
    path, old = tmp_path / "i.h5", os.umask(0o077)
    try:
        succeed(*reconstruct(home, path))
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)
    succeed(*reconstruct(home, path))
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    succeed(*reconstruct(home, path))
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("what", ["text", "link", "pipe", "folder"])
def test_what_lies_at_the_place_of_a_lock_is_kept(home, tmp_path, what):
    kept = tmp_path / "kept"
    kept.write_text("precious")
    locks = tmp_path / ".i.h5.lock", tmp_path / "out" / ".lock"
    (tmp_path / "out").mkdir()
    for lock in locks:
        {
            "text": lambda lock: lock.write_text("precious"),
            "link": lambda lock: lock.symlink_to(kept),
            "pipe": os.mkfifo,
            "folder": Path.mkdir,
        }[what](lock)
    folder = ("reconstruct", "--scan", home / "data", "--weights", home / "w.safetensors")
    for call in (reconstruct(home, tmp_path / "i.h5"), (*folder, "--out", tmp_path / "out")):
        assert "the place of its lock" in refused(*call)
    assert kept.read_text() == "precious"
    if what == "text":
        assert {lock.read_text() for lock in locks} == {"precious"}
    assert sorted(tmp_path.iterdir()) == sorted([locks[0], kept, tmp_path / "out"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_ended_leaves_neither_halves_nor_locks(home, tmp_path, monkeypatch, number):
    def image(*_):
        assert len(content(tmp_path)) == 2  # the lock, and what has been written
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(scanning, "reconstructed", image)
    before = signal.getsignal(number)
    found = run(*reconstruct(home, tmp_path / "i.h5"))
    assert found.exit_code == 128 + number
    assert found.stderr == "interrupted: the files that were written are complete.\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


def test_two_outputs_of_one_run_need_files_of_their_own(home, tmp_path):
    path = tmp_path / "x.h5"
    for option in ("--png", "--json"):
        found = refused(*reconstruct(home, path, option, tmp_path / "." / "x.h5"))
        assert "each output needs a file of its own" in found
    assert list(tmp_path.iterdir()) == []


def claim(out):
    with claimed([Output(out, PICTURE)]):
        pass


def test_two_runs_with_one_output_are_refused_by_a_lock(home, tmp_path):
    out = tmp_path / "out"
    anything = Kind("anything", lambda _: True)
    with claimed([Output(out, anything)]):
        for call in (evaluate, train):
            assert f"{out}: another run is writing there; wait" in refused(*call(home, out))
        found = refused(*reconstruct(home, tmp_path / "i.h5", "--png", out))
        assert "another run is writing there" in found
        assert "another run is writing there" in forked(claim, out)
    assert list(tmp_path.iterdir()) == []
    succeed(*evaluate(home, out))


@pytest.mark.parametrize("command", ["demo", "simulate", "meta-train", "transfer", "reconstruct"])
def test_two_runs_with_one_folder_are_refused_by_a_lock(home, tmp_path, command):
    options = {
        "demo": (),
        "simulate": (),
        "meta-train": ("--task", f"name=a,scans={home / 'data'}", "--seconds", 1),
        "transfer": ("--task", f"name=a,scans={home / 'data'}", "--seconds", 1),
        "reconstruct": ("--scan", home / "data", "--weights", home / "w.safetensors"),
    }[command]
    with claimed([], folder=tmp_path / "out"):
        found = refused(command, "--out", tmp_path / "out", *options)
    assert f"{tmp_path / 'out'}: another run is writing there" in found
    assert list((tmp_path / "out").iterdir()) == []


def test_only_one_of_many_runs_gets_a_place(tmp_path):
    path, got, lost = tmp_path / "out.png", [], []
    barrier, over = threading.Barrier(8), threading.Event()

    def run():
        barrier.wait()
        try:
            with claimed([Output(path, PICTURE)]):
                got.append(1)
                over.wait(20)
        except InputError:
            lost.append(1)
        if len(lost) == 7:
            over.set()

    runs = [threading.Thread(target=run) for _ in range(8)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert (len(got), len(lost)) == (1, 7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "reconstruct", "train", "meta-train"])
def test_folders_that_were_made_for_nothing_go(home, tmp_path, command):
    """Those of outputs, of images and of a folder of outputs; what lay there before stays."""
    (tmp_path / "there").mkdir()
    new, mine = tmp_path / "new" / "deep", tmp_path / "there" / "mine"
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    with h5py.File(spoilt / "a.h5", "w") as file:
        file["kspace"] = np.zeros((2, COILS, SIZE, SIZE), np.complex64)
    options = {
        "evaluate": ("--data", spoilt, "--out", mine / "s.json", "--images", new),
        "reconstruct": ("--scan", spoilt / "a.h5", "--out", new / "i.h5", "--png", mine / "i.png"),
        "train": ("--data", spoilt, "--out", new / "w.safetensors", "--steps", 1),
        "meta-train": ("--task", f"name=a,scans={spoilt}", "--out", new, "--evaluations", 1),
    }[command]
    refused(command, *options)
    assert not new.parent.exists()
    assert not mine.exists()
    assert sorted(tmp_path.iterdir()) == [spoilt, tmp_path / "there"]


def test_a_lock_that_a_killed_run_left_holds_nobody_up(tmp_path):
    (tmp_path / ".out.lock").write_bytes(b"")
    with claimed([Output(tmp_path / "out", PICTURE)]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_simulated_scans_replace_no_others(home, tmp_path):
    (tmp_path / "test").mkdir()
    scan = tmp_path / "test" / "brain_pd.h5"
    scan.write_bytes((home / "data" / "a.h5").read_bytes())
    before = content(tmp_path)
    anatomies = home / "anatomies.h5"
    with h5py.File(anatomies, "w") as file:
        for name in ("brain_pd", "brain_t2"):
            file[f"{name}/images"] = np.full((9, 20, 20), 99, np.uint8)
    options = ("--size", 16, "--anatomies", anatomies)
    found = refused("simulate", "--out", tmp_path, *options)
    assert f"{scan}: a file lies there that is not a simulated scan" in found
    assert content(tmp_path) == before
    scan.unlink()
    for _ in range(2):
        succeed("simulate", "--out", tmp_path, *options, "--coils", 1)


def test_folders_of_results_keep_what_is_of_another_kind(home, tmp_path):
    task = ("--task", f"name=a,scans={home / 'data'}", "--seconds", 1)
    for command in ("demo", "meta-train", "transfer"):
        options = () if command == "demo" else task
        for name in ("results.json", "figure.png"):
            out = tmp_path / command / name
            out.mkdir(parents=True)
            (out / name).write_text("{}")
            assert "it would be lost" in refused(command, "--out", out, *options)
            assert content(out) == {out / name: b"{}"}
    out = tmp_path / "meta"
    (out / "weights").mkdir(parents=True)
    kept = out / "weights" / "uniform-0-all.safetensors"
    kept.write_bytes((home / "w.safetensors").read_bytes())
    options = (*task, "--init", kept)
    assert "must not be an input" in refused("meta-train", "--out", out, *options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a b", "a?b"), "'a b' and 'a.b' would both be 'a_b' there"),
        (("a_b", "a b"), "'a_b' and 'a b' would both be 'a_b' there"),
        (("T1 head", "t1_Head"), "would both be 't1_Head' there"),
        (("a", "a"), "'a' came twice"),
        (("x" * 161, "b"), "at most 160 bytes"),
        (("b", "adapted-b"), "must not begin with 'adapted-'"),
    ],
)
def test_names_of_tasks_that_map_to_one_file_are_refused(home, tmp_path, names, message):
    tasks = [a for name in names for a in ("--task", f"name={name},scans={home / 'data'}")]
    found = refused("meta-train", "--out", tmp_path / "out", *tasks, "--seconds", 1)
    assert re.search(message, found)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_when_loaded(home, tmp_path, value):
    path = tmp_path / "w.safetensors"
    trained = load_weights(home / "w.safetensors")
    save_weights(path, trained)
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = value
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    for call in (
        ("reconstruct", "--scan", home / "data" / "a.h5", "--weights", path, "--out"),
        ("evaluate", "--data", home / "data", "--weights", path, "--out"),
        ("train", "--data", home / "data", "--init", path, "--out"),
    ):
        found = refused(*call, tmp_path / "out.h5")
        assert f"{path}: weights must be finite, {name!r} holds 1 of" in found
    assert [one.name for one in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("name", ["i.h5", "i.nii", "i.nii.gz"])
def test_images_that_are_not_finite_are_never_written(tmp_path, name):
    path = tmp_path / name
    bad = torch.ones(3, 4)
    bad[1, 2] = float("nan")
    message = rf"{name}: images must be finite, that of slice 1 has 1 values"
    shape = (1, 2, 3, 4)
    with pytest.raises(InputError, match=message), image_writer(path, shape, None, {}) as add:
        add(torch.ones(3, 4))
        add(bad)
    with pytest.raises(InputError, match=r"p.png: the image must be finite"):
        draw_image(tmp_path / "p.png", bad)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_leave_no_image(home, tmp_path):
    trained = load_weights(home / "w.safetensors")
    control = trained.control
    huge = [{n: v * 1e30 for n, v in step.items()} for step in control.steps]
    path = tmp_path / "w.safetensors"
    save_weights(path, replace(trained, control=replace(control, steps=huge)))
    scan = home / "data" / "a.h5"
    found = refused("reconstruct", "--scan", scan, "--weights", path, "--out", tmp_path / "i.h5")
    assert "a.h5: images must be finite, that of this slice leaves the range" in found
    assert "use other weights. This is slice 0." in found
    assert [one.name for one in tmp_path.iterdir()] == ["w.safetensors"]
    assert VolumeFile(scan).n_slices == 2
