from pathlib import Path

import pytest
import torch

from applications.errors import InputError
from applications.mri.data import SliceDataset, Volume, write_volume
from applications.mri.sampling import CartesianRandom, Radial
from applications.mri.simulation.anatomy import load_anatomies, split
from applications.mri.tasks.task_facts import facts_of
from applications.mri.tasks.task_list import TaskSettings, parse_task, read_task_list
from applications.mri.tasks.tasks import open_tasks

SMALL = {"size": 16, "coils": 2}


def scan(path, n_slices=2, n_coils=2, rows=8, columns=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(n_slices)
    shape = (n_slices, n_coils, rows, columns)
    write_volume(path, Volume(torch.randn(shape, dtype=torch.complex64, generator=generator)))


@pytest.fixture
def folder(tmp_path):
    """Scans by role, of two sizes and coil counts."""
    for role in ("train", "validation", "test"):
        scan(tmp_path / "own" / role / "a.h5")
    scan(tmp_path / "own" / "train" / "b.h5", 3, 4, 10, 6)
    return tmp_path


def test_a_list_is_read_with_its_defaults_and_folders_relative_to_it(folder):
    path = folder / "list.yaml"
    path.write_text(
        """
defaults: {mask: radial, spokes: 9}
tasks:
  - {name: one, scans: own}
  - {name: two, anatomy: brain_t1_axial, mask: random, spokes: null, acceleration: 3,
     roles: [train, test], size: 16}
"""
    )
    assert read_task_list(path) == [
        TaskSettings("one", scans=folder / "own", mask="radial", spokes=9),
        TaskSettings(
            "two", anatomy="brain_t1_axial", acceleration=3.0, roles=("train", "test"), size=16
        ),
    ]
    assert read_task_list(path)[0].sampling == Radial(9)


def test_a_task_of_the_command_line_is_that_of_a_list():
    found = parse_task("name=a, scans=there/x,acceleration=2.5,center=0.25,roles=train+test")
    expected = TaskSettings("a", Path("there/x"), roles=("train", "test"))
    assert found.sampling == CartesianRandom(2.5, 0.25)
    assert (found.scans, found.roles) == (expected.scans, expected.roles)


def test_a_divided_folder_gives_each_role_its_files(folder):
    tasks = open_tasks([TaskSettings("t", scans=folder / "own")], folder)
    parts = tasks.every[0].parts
    assert {role: [f.path.name for f in part.files] for role, part in parts.items()} == {
        "train": ["a.h5", "b.h5"],
        "validation": ["a.h5"],
        "test": ["a.h5"],
    }


def test_volumes_of_an_undivided_folder_are_cut_into_disjoint_blocks(folder):
    scan(folder / "flat" / "c.h5", 9)
    task = open_tasks([TaskSettings("t", scans=folder / "flat")], folder).every[0]
    whole, cut = SliceDataset(folder / "flat"), split(9)
    for role, part in task.parts.items():
        indices = getattr(cut, role)
        assert [one.index for one in part] == list(indices)
        for one, index in zip(part, indices, strict=True):
            assert torch.equal(one.kspace, whole[index].kspace)


def test_simulated_tasks_show_their_anatomy_and_share_scans(tmp_path):
    settings = [
        TaskSettings("a", anatomy="brain_t1_axial", **SMALL),
        TaskSettings("b", anatomy="brain_t1_axial", mask="radial", **SMALL),
        TaskSettings("c", anatomy="brain_t1_axial", seed=1, **SMALL),
    ]
    a, b, c = open_tasks(settings, tmp_path).every
    n = len(load_anatomies()["brain_t1_axial"])
    cut = split(n)
    for task in (a, b, c):
        assert {r: len(p) for r, p in task.parts.items()} == {
            role: len(getattr(cut, role)) for role in ("train", "validation", "test")
        }
    assert torch.equal(a.parts["test"][0].kspace, b.parts["test"][0].kspace)
    assert not torch.equal(a.parts["test"][0].kspace, c.parts["test"][0].kspace)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_becomes_of_coils_and_sizes_is_counted(folder):
    task = open_tasks([TaskSettings("t", scans=folder / "own")], folder).every[0]
    facts = facts_of(task, 3)
    assert facts.slices == {"train": 5, "validation": 2, "test": 2}
    assert facts.sizes == {(8, 6): 6, (10, 6): 3}
    padded, compressed = facts.coils
    assert (padded.came, padded.volumes, padded.energy_kept) == (2, 3, 1.0)
    middle = SliceDataset(folder / "own" / "train").files[1].read_slice(1).kspace
    singular = torch.linalg.svdvals(middle.flatten(1)).square()
    assert compressed.energy_kept == pytest.approx(float(singular[:3].sum() / singular.sum()))
    text = facts.summary
    assert "2 coils padded with zeros to 3" in text
    assert f"4 coils compressed to 3, {100 * compressed.energy_kept:.1f} %" in text
    assert "8 x 6, 10 x 6, in batches of 2 sizes" in text
    assert facts.as_json()["sizes"][1] == {"matrix": [10, 6], "slices": 3}


def entry(**changes):
    fields = {"name": "t", "anatomy": "brain_t1_axial"} | changes
    return ",".join(f"{key}={value}" for key, value in fields.items() if value is not None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name", "--task must be key=value"),
        ("name=a,name=b", "each key once"),
        (entry(speed=3), "the keys acceleration, anatomy, .* were needed, got 'speed'"),
        (entry(name=None), "a name was needed, got none"),
        (entry(anatomy=None), "got neither"),
        (entry(scans="x"), "got both"),
        (entry(roles="train+tset"), r"roles must be some of .*, got train\+tset"),
        (entry(acceleration="fast"), "acceleration must be a number, got 'fast'"),
        (entry(size="3.5"), "size must be a whole number"),
        (entry(target_noise=-1), "target_noise must be >= 0"),
    ],
)
def test_a_wrong_entry_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_task(text)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one task was needed, the list is empty"),
        ([entry(), entry()], "each task needs a name of its own, 't' came twice"),
        ([entry(mask="rundom")], "task 't': --mask must be one of"),
        ([entry(mask="radial", acceleration=4)], "task 't': --acceleration does not belong"),
        ([entry(anatomy="knee")], "task 't': the anatomy must be one of .* got 'knee'"),
        ([entry(roles="validation", **SMALL)], "the role train was needed, N = 0"),
        ([entry(roles="train", **SMALL)], "the role validation was needed, M = 0"),
        ([entry(anatomy=None, scans="{}/none")], "task 't': .*none: a folder of .h5 files"),
        ([entry(anatomy=None, scans="{}/empty")], "task 't': .* the folder has none"),
        ([entry(anatomy=None, scans="{}/short")], "whole volumes into the folders train"),
        (
            [entry(anatomy=None, scans="{}/half")],
            "the folder validation was needed for the role validation",
        ),
    ],
)
def test_a_wrong_list_is_refused(tmp_path, texts, message):
    (tmp_path / "empty").mkdir()
    scan(tmp_path / "short" / "a.h5", 2)
    scan(tmp_path / "half" / "train" / "a.h5", 2)
    settings = [parse_task(text.format(tmp_path)) for text in texts]
    with pytest.raises(InputError, match=message):
        open_tasks(settings, tmp_path / "simulated")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a task list was needed, there is no such file"),
        ("tasks: [", "YAML was needed"),
        ("- a", "a mapping with 'tasks', a list, was needed, got list"),
        ("taks: []", "was needed, got dict of taks"),
        ("tasks: []\ntest: 1", "the keys defaults, tasks were needed, got 'test'"),
        ("tasks: [a]", "task 1: a mapping was needed, got str"),
        ("tasks: []\ndefaults: [1]\n", "defaults: a mapping was needed, got list"),
        ("tasks: [{name: a, anatomy: b, sze: 3}]", "task 1: the keys .* got 'sze'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    path = tmp_path / "list.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_task_list(path)
