"""Options are made from the fields of settings: defaults, ranges and names stand in one place."""

import inspect
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from typer.testing import CliRunner

from applications.command_line import command_line
from applications.errors import InputError
from applications.mri.commands.app import app as mri_app
from applications.mri.commands.demo import DemoSettings
from applications.mri.data import Volume, write_volume
from applications.mri.meta.results import ExperimentSettings
from applications.mri.meta.settings import MetaSettings
from applications.mri.meta.transfer_results import TransferSettings
from applications.mri.network.architecture import narrow
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, save_weights
from applications.mri.simulation.phantoms import SimulationSettings
from applications.mri.training.settings import TrainingSettings
from applications.options import Given, options_of
from applications.settings import Written, check_counts, only, setting
from applications.toy.cleaning import CleaningSettings
from applications.toy.cli import app as toy_app
from applications.toy.task_results import Settings

ROOT = Path(__file__).parents[3]


def halved(text):
    if not text.isdigit():
        raise InputError(f"--half must be a whole number, got {text!r}; write one.")
    return int(text) // 2


@dataclass(frozen=True)
class Inner:
    """Settings within others."""

    depth: int = setting(3, "How deep.", least=1)
    width: float = setting(0.5, "How wide.", name="breadth")


@dataclass(frozen=True)
class Outer:
    """Settings of which only some are options."""

    part: Inner = only("depth")
    names: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Flat:
    """Settings of every kind."""

    count: int = setting(2, "How many.")
    inner: Inner = field(default_factory=Inner)
    half: int = setting(7, "Halved.", written=Written(str, None, halved))
    flag: bool = setting(False, "Whether.")

    def __post_init__(self):
        check_counts(self, "count")


def called(*arguments):
    """What a command is called with, or how it is refused."""
    seen = []

    def show(
        out: Annotated[Path, typer.Option(help="Where to.")],
        settings: Annotated[Flat, "Sizes"],
        more: int = 0,
    ) -> None:
        seen.append((out, settings, more))

    app = command_line("For a test.", "test", {"show": show, "other": lambda: None})
    found = CliRunner().invoke(app, ["show", "--out", "x", *map(str, arguments)])
    return (found, seen[0]) if seen else (found, None)


def test_a_command_gets_its_settings_made():
    _, (out, settings, more) = called()
    assert (out, settings, more) == (Path("x"), Flat(), 0)
    written = ["--count", 4, "--depth", 5, "--breadth", 0.1, "--half", 9, "--flag", "--more", 1]
    _, (_, settings, more) = called(*written)
    assert (settings, more) == (Flat(4, Inner(5, 0.1), 4, True), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", 0], "error: count must be at least 1, got 0.\n"),
        (["--half", "x"], "error: --half must be a whole number, got 'x'; write one.\n"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message):
    found, seen = called(*arguments)
    assert (found.exit_code, found.stderr, seen) == (2, message, None)
    found, _ = called("--depth", 0)
    assert found.exit_code == 2
    assert "--depth" in found.stderr


def test_a_command_may_complete_settings_and_only_some_fields_may_be_options():
    assert [one.name for one in options_of(Outer)] == ["depth", "depth", "breadth"]
    values = {"count": 3, "depth": 4, "breadth": 0.5, "half": None, "flag": False}
    found = Given(Flat, values).settings(inner=Inner(9))
    assert found == Flat(3, Inner(9))


@pytest.mark.parametrize(
    "kind",
    [
        *(DemoSettings, SimulationSettings, TrainingSettings, ExperimentSettings),
        *(TransferSettings, Settings, CleaningSettings),
    ],
)
def test_no_option_has_a_default_of_its_own(kind):
    """What is written where nothing is written makes the settings that fields alone make."""
    options = options_of(kind)
    assert len({one.name for one in options}) == len(options)
    values = {one.name: one.default for one in options}
    assert not any(default is inspect.Parameter.empty for default in values.values())
    budget = {"training": MetaSettings(seconds=1)} if "evaluations" in values else {}
    budget |= {"steps": 1} if kind is TrainingSettings else {}
    assert Given(kind, values).settings(**budget) == kind(**budget)


FRESH = """
import bilevel, os, sys, torch
for app, package, said in {cases!r}:
    if not (child := os.fork()):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
        if app == "nothing":
            from applications.errors import needing
            with needing("mri"):
                import applications.mri.nothing
        sys.modules[package] = None
        __import__("applications." + app + ".__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
MISSING = 'error: the package {} is needed and not installed; pip install "bilevel[{}]".\n'


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Exit codes and what was said of programs without a package, forked from one interpreter."""
    folder = tmp_path_factory.mktemp("missing")
    keys = [(app, package) for app in ("mri", "toy") for package in ("typer", "rich")]
    keys.append(("nothing", "nothing"))
    cases = [(*key, str(folder / " ".join(key))) for key in keys]
    code = FRESH.format(cases=cases)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    codes = [int(line) for line in found.stdout.splitlines()]
    return {
        key: (code, (folder / " ".join(key)).read_text())
        for key, code in zip(keys, codes, strict=True)
    }


@pytest.mark.xdist_group("missing")
@pytest.mark.parametrize("package", ["typer", "rich"])
@pytest.mark.parametrize("app", ["mri", "toy"])
def test_a_missing_package_is_one_line_that_names_the_extra(app, package, ended):
    assert ended[app, package] == (2, MISSING.format(package, app))


def test_a_package_that_is_missed_at_work_is_one_line_too(tmp_path, monkeypatch):
    network = Network(replace(narrow(2), n_phases=1, filters=2, features=2), 1)
    save_weights(tmp_path / "w", Trained(network, network.controls(), {}))
    kspace = torch.randn(1, 2, 16, 16, dtype=torch.complex64, generator=torch.Generator())
    write_volume(tmp_path / "scan.h5", Volume(kspace))
    tiny = "--tasks 1 --validations 1 --train 4 --validation 3 --test 3 --seeds 1"
    toy = f"task-weights --out {tmp_path}/toy --updates 1 --inner-steps 1 --fit-steps 1 {tiny}"
    mri = f"reconstruct --scan {tmp_path}/scan.h5 --weights {tmp_path}/w --out {tmp_path}/i.h5"
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, app, line in (
        ("mri", mri_app, f"{mri} --png {tmp_path}/i.png"),
        ("toy", toy_app, toy),
    ):
        found = CliRunner().invoke(app, line.split())
        assert (found.exit_code, found.stderr) == (2, MISSING.format("matplotlib", name))


@pytest.mark.xdist_group("missing")
def test_a_missing_module_of_our_own_is_no_missing_extra(ended):
    code, said = ended["nothing", "nothing"]
    assert code == 1
    assert "ModuleNotFoundError" in said


def test_console_scripts_are_the_command_lines():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == {"bilevel-mri", "bilevel-toy"}
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
