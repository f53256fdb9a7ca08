"""Commands that are interrupted again and again end with the results of one that was not."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import applications.mri.commands.meta as meta_commands
import bilevel as bl
from applications.errors import InputError
from applications.keeping import going_on
from applications.mri.commands.app import app as mri
from applications.toy.cli import app as toy

TASK = "name={},anatomy=brain_t1_axial,size=24,coils=2,acceleration=2,center=0.25,roles={}"
TASKS = ["--task", TASK.format("head", "train+validation+test")]
NETWORK = ["--preset", "tiny", "--coils", "2", "--inner-steps", "1", "--crop", "0"]
COMMANDS = {
    "task-weights": (
        toy,
        [
            *("task-weights", "--tasks", "1", "--validations", "2", "--train", "12"),
            *("--seeds", "2", "--updates", "4", "--inner-steps", "3", "--fit-steps", "4"),
        ],
    ),
    "hyper-cleaning": (
        toy,
        [
            *("hyper-cleaning", "--train", "20", "--validation", "20", "--test", "20"),
            *("--updates", "6", "--inner-steps", "3"),
        ],
    ),
    "meta-train": (
        mri,
        ["meta-train", *TASKS, *NETWORK, "--evaluations", "8", "--ablations", "vector,penalty"],
    ),
    "transfer": (
        mri,
        ["transfer", *TASKS, *NETWORK[:4], "--evaluations", "6", "--steps", "0,1"],
    ),
}


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(x) for x in value] if isinstance(value, list) else value


def left_by(folder):
    weights = {p.name: load_file(p) for p in folder.rglob("*.safetensors")}
    return timeless(json.loads((folder / "results.json").read_text())), weights


SLOW = ("hyper-cleaning", "meta-train", "transfer")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in COMMANDS]
)
def test_a_command_goes_on_where_it_was_interrupted(name, tmp_path, monkeypatch):
    app, arguments = COMMANDS[name]
    monkeypatch.setattr(meta_commands, "going_on", partial(going_on, every=2))
    monkeypatch.setattr("applications.toy.cli._EVERY", 2)

    def call(out, *more):
        return CliRunner().invoke(app, [*arguments, "--out", str(out), *more])

    whole = call(tmp_path / "whole", "--resume")  # there is nothing to go on with: it begins
    assert whole.exit_code == 0, whole.output
    saves, save = [], bl.outer.Kept.save

    def interrupted(kept, update, state):
        save(kept, update, state)
        saves.append(update)
        if len(saves) == 2 and len(codes) < 2:
            raise KeyboardInterrupt

    codes = []
    with monkeypatch.context() as patch:
        patch.setattr(bl.outer.Kept, "save", interrupted)
        while not codes or codes[-1]:
            saves.clear()
            codes.append(call(tmp_path / "cut", *(["--resume"] if codes else [])).exit_code)
            if len(codes) == 1:
                refused = call(tmp_path / "cut")
                assert "an interrupted run left its state there; go on with it" in refused.stderr
    assert codes in ([130, 130, 0], [130, 0])
    (results, weights), (expected, others) = left_by(tmp_path / "cut"), left_by(tmp_path / "whole")
    assert results == expected
    assert weights.keys() == others.keys()
    for file, tensors in weights.items():
        assert all(torch.equal(x, others[file][n]) for n, x in tensors.items())
    assert not (tmp_path / "cut" / "state").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_no_state_is_refused_and_left(tmp_path, resume):
    notes = tmp_path / "state" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with (
        pytest.raises(InputError, match=r"no folder of an interrupted run: it holds 'notes.txt'"),
        going_on(notes.parent, {}, resume=resume),
    ):
        pass
    assert notes.read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["update-plan.txt", "update-000000001.safetensors", ".lock"])
def test_files_that_are_no_checkpoints_are_left(tmp_path, name, resume):
    """Their names begin as those of checkpoints do."""
    mine = tmp_path / "state" / "plans" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with going_on(tmp_path / "state", {}, resume=resume) as kept:
        assert kept.finished("part", lambda: 3) == 3
        assert len(list((tmp_path / "state" / "part").glob("update-*"))) == 1
    assert [one for one in (tmp_path / "state").rglob("*") if one.is_file()] == [mine]
    assert mine.read_text() == "mine"
