import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from applications.errors import InputError
from applications.files import write_whole
from applications.mri.network.architecture import narrow, paper
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import (
    EarlierWeightsWarning,
    Trained,
    load_weights,
    save_weights,
)
from bilevel import tree

PRESETS = {"paper": paper, "narrow": narrow}


def small(preset, n_coils=2, seed=3):
    network = Network(replace(preset(n_coils), n_phases=2, filters=3, features=2), seed)
    return Trained(network, network.controls(), {"steps": 7, "samplings": "(CartesianRandom(),)"})


def metadata(trained):
    return {"architecture": json.dumps(asdict(trained.network.architecture))}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_was_saved_is_loaded_exactly(tmp_path, preset):
    saved = small(preset)
    save_weights(tmp_path / "w.safetensors", saved)
    found = load_weights(str(tmp_path / "w.safetensors"))
    assert found.network.architecture == saved.network.architecture
    assert found.record == saved.record
    leaves, structure = tree.flatten(found.control)
    expected, expected_structure = tree.flatten(saved.control)
    assert structure == expected_structure
    for new, old in zip(leaves, expected, strict=True):
        assert new is old is None or (new.dtype == old.dtype and torch.equal(new, old))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_loaded_weights_reconstruct_the_same_image_bit_by_bit(tmp_path):
    saved = small(narrow)
    save_weights(tmp_path / "w.safetensors", saved)
    found = load_weights(tmp_path / "w.safetensors")
    kspace = torch.randn(1, 2, 16, 16, dtype=torch.complex64)
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[5:11, 5:11] = True
    images = [
        one.network.reconstruct(one.network.prepare(kspace, mask), one.control).image
        for one in (saved, found)
    ]
    assert torch.equal(*images)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.safetensors: a weights file was needed.*train one"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="a weights file was needed, there is none"):
        load_weights(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused(tmp_path, share):
    path = tmp_path / "w.safetensors"
    save_weights(path, small(paper))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        InputError, match=r"w.safetensors: a complete safetensors file was .* copy it again"
    ):
        load_weights(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_text("not weights")
    with pytest.raises(InputError, match="a complete safetensors file was needed"):
        load_weights(path)


@pytest.mark.parametrize(
    "described",
    [
        None,
        {},
        {"architecture": "not json"},
        {"architecture": '"text"'},
        {"architecture": '{"n_coils": 2, "colour": 1}'},
        {"architecture": '{"n_coils": 0}'},
        {"architecture": '{"n_coils": "two"}'},
        {"architecture": '{"n_coils": 2.5}'},
        {"architecture": '{"n_coils": 2}', "record": "not json"},
    ],
    ids=repr,
)
def test_safetensors_of_another_program_are_refused(tmp_path, described):
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(2)}, path, described)
    with pytest.raises(InputError, match=r"w.safetensors: .* use weights that `train` wrote"):
        load_weights(path)


def without(tensors, name):
    return {n: v for n, v in tensors.items() if n != name}


FIRST = "initial.net.0.weight"
CHANGES = {
    "shape": (lambda t: t | {FIRST: t[FIRST][:, :1].clone()}, r"float32 \[3, 2, 3, 3, 2\], got "),
    "missing": (lambda t: without(t, FIRST), r"float32 \[3, 2, 3, 3, 2\], got None"),
    "further": (lambda t: t | {"extra": torch.ones(1)}, r"'extra' must be None, got float32 \[1\]"),
    "integers": (lambda t: t | {FIRST: t[FIRST].int()}, r"be float32 .*, got int32 \[3, 2, 3, 3"),
    "halves": (lambda t: t | {FIRST: t[FIRST].half()}, r"be float32 .*, got float16 \[3, 2, 3, 3"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_are_not_those_of_the_architecture_are_refused(tmp_path, change, message):
    path, trained = tmp_path / "w.safetensors", small(paper)
    save_weights(path, trained)
    save_file(change(load_file(path)), path, metadata(trained))
    with pytest.raises(InputError, match=f"w.safetensors: 1 tensors differ .*{message}"):
        load_weights(path)


def test_the_architecture_of_another_size_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, small(paper))
    save_file(load_file(path), path, metadata(small(paper, n_coils=3)))
    message = r"tensors differ from the stored architecture, 'initial.net.0.weight' must be float32"
    with pytest.raises(InputError, match=message):
        load_weights(path)


@pytest.mark.parametrize("broken", ["chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("disk full")], ids=repr)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "w.safetensors"
    save_weights(path, small(paper))
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(f"applications.files.Path.{broken}", fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="disk full"):
        save_weights(path, small(narrow))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert path.read_bytes() == before


def test_a_first_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("applications.files.Path.write_bytes", fail)
    with pytest.raises(InputError, match=r"w.safetensors: the file cannot be written .disk full"):
        save_weights(tmp_path / "w.safetensors", small(paper))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "w.safetensors", tmp_path / "none" / "w.safetensors"):
        with pytest.raises(InputError, match=r"w.safetensors: the folder cannot be written"):
            save_weights(path, small(paper))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: the file cannot be written .*choose another"):
        save_weights(tmp_path / "folder", small(paper))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_is_written_whole_and_readable_by_others(tmp_path):
    content = save({"weight": torch.arange(3.0)})
    write_whole(tmp_path / "w", b"old")
    write_whole(tmp_path / "w", content)
    assert (tmp_path / "w").read_bytes() == content
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o644


def test_weights_of_the_light_of_before_are_read_with_a_word(tmp_path):
    network = Network(narrow(3))
    save_weights(tmp_path / "old.safetensors", Trained(network, network.controls(), {}))
    with pytest.warns(EarlierWeightsWarning, match=r"old.safetensors: these are weights of"):
        found = load_weights(tmp_path / "old.safetensors")
    assert found.network.architecture == narrow(3)


def test_other_weights_of_the_same_kind_are_read_without_a_word(tmp_path, recwarn):
    save_weights(tmp_path / "w.safetensors", small(narrow))
    load_weights(tmp_path / "w.safetensors")
    assert not recwarn
