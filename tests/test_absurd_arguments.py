"""Arguments that no command can take: one line that says so, before anything large is made."""

import os

import pytest
import torch
import typer
from command_lines import refused
from typer.testing import CliRunner

from applications.command_line import command_line
from applications.errors import InputError
from applications.mri.commands.app import app as mri
from applications.mri.sampling import Radial
from applications.toy.cli import app as toy

HUGE = 10**30
TASK = "name=a,anatomy=brain_t1_axial,size=16,coils=2,acceleration=2,center=0.25,roles=train"


def ended(app, *arguments):
    found = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert found.exit_code == 2, found.output
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found.output


@pytest.mark.parametrize(
    ("app", "arguments"),
    [
        (mri, ("train", "--task", TASK)),
        (mri, ("meta-train", "--task", TASK)),
        (mri, ("transfer", "--task", TASK)),
        (mri, ("demo",)),
        (mri, ("simulate",)),
        (mri, ("evaluate", "--data", ".")),
        (mri, ("reconstruct", "--scan", "scan.h5")),
        (toy, ("task-weights",)),
        (toy, ("hyper-cleaning",)),
    ],
    ids=lambda one: one[0] if isinstance(one, tuple) else "",
)
def test_every_command_refuses_numbers_that_nothing_takes(app, arguments, tmp_path):
    given = *arguments, "--out", tmp_path / "out"
    for threads in (-1, 10**9, HUGE):  # of which the library for threads would end the process
        assert "--threads" in ended(app, *given, "--threads", threads)
    if arguments[0] != "reconstruct":
        said = ended(app, *given, "--seed", HUGE)
        assert said == f"error: --seed must lie between -2^63 and 2^63 - 1, got {HUGE}.\n"
    assert not (tmp_path / "out").exists()


def test_sizes_that_no_machine_holds_are_refused(tmp_path):
    out, budget = ("--out", tmp_path / "out"), ("--evaluations", 4)
    said = refused("train", "--task", TASK, "--preset", "paper", "--coils", 10**9, *out)
    assert "n_coils must be at most 1024, got 1000000000" in said
    said = refused("train", "--task", TASK, "--learning-rate", 1e300, *out)
    assert "learning_rate must be at most 1e+30, got 1e+300" in said
    said = refused("meta-train", "--task", TASK, *budget, "--outer-rate", 1e300, *out)
    assert "outer_rate must be at most 1e+30, got 1e+300" in said
    said = refused("train", "--task", TASK, "--budget", "9" * 400, *out)
    assert "a budget is a number of bytes" in said
    with pytest.raises(InputError, match="spokes must lie in 1 to 10000, got 1000000000"):
        Radial(10**9)


def test_tensorboard_is_given_no_name_that_it_cannot_write(tmp_path):
    pytest.importorskip("tensorboard")
    given = "--task", TASK, "--steps", 1, "--out", tmp_path / "out"
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    said = refused("train", *given, "--tensorboard", odd)
    assert "caf\\udce9: TensorBoard needs a folder whose name is text in UTF-8" in said


def test_torch_without_memory_is_one_line():
    def full() -> None:
        """Ask for too much."""
        torch.empty(2**60)

    def broken() -> None:
        """Be wrong."""
        raise RuntimeError("something else")

    app = command_line("", "toy", {"full": full, "broken": broken})
    assert isinstance(app, typer.Typer)
    said = ended(app, "full")
    assert said.startswith("error: there is not enough memory (")
    assert said.count("\n") == 1
    assert isinstance(CliRunner().invoke(app, ["broken"]).exception, RuntimeError)
