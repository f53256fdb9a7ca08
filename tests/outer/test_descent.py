"""The outer loop itself: bars, warnings, and optimisers that do not keep the rules."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

import bilevel as bl
from bilevel.errors import ArgumentError, UnsupportedError
from bilevel.outer import watching as progress
from bilevel.outer.descent import StandstillError

ONE = torch.ones(1, dtype=torch.float64)


def solver(optimizer=lambda p: torch.optim.SGD(p, 0.1), **settings):
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: u.square().sum() / 2, 1)
    return bl.ControlSolver(problem, optimizer, **settings)


def only(*names):
    """As if of rich and tqdm only these were installed."""
    return lambda name: importlib.util.find_spec(name) if name in names else None


@pytest.mark.parametrize("package", ["rich", "tqdm"])
def test_a_bar_shows_cost_and_gradient_on_standard_error(package, monkeypatch, capsys):
    monkeypatch.setattr(progress, "find_spec", only(package))
    found = solver().solve(0 * ONE, ONE, steps=3, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err
    # The last update began at u = 0.81: J = 0.81^2 / 2.
    assert found.costs[-1] == pytest.approx(0.32805)
    assert "cost 0.3281, gradient 0.81" in shown.err


def test_rich_is_preferred(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import of it would fail
    solver().solve(0 * ONE, ONE, steps=1, progress=True)


def test_a_bar_without_rich_and_tqdm_is_refused(monkeypatch):
    monkeypatch.setattr(progress, "find_spec", only())
    with pytest.raises(UnsupportedError, match=r"progress=True needs rich or tqdm, and neither"):
        solver().solve(0 * ONE, ONE, steps=3, progress=True)
    assert solver().solve(0 * ONE, ONE, steps=3).steps == 3


def test_no_bar_writes_nothing(capsys):
    solver().solve(0 * ONE, ONE, steps=3)
    assert capsys.readouterr() == ("", "")


def test_a_warning_names_the_line_of_the_caller():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        solver().solve(0 * ONE, ONE, steps=1, tolerance=1e-9)
    assert [Path(w.filename).name for w in seen] == [Path(__file__).name]


class Idle(torch.optim.Optimizer):
    """Never asks for a gradient."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        return None


def test_an_optimizer_that_never_asks_for_the_gradient_is_refused():
    with pytest.raises(ArgumentError, match="step\\(closure\\) must call the closure"):
        solver(Idle).solve(0 * ONE, ONE, steps=2)


class Stuck(Idle):
    """Asks, and finds no way down."""

    def step(self, closure=None):
        closure()
        raise StandstillError


def test_a_standstill_ends_the_iteration_unless_there_are_other_batches():
    alone = solver(Stuck, on_failure="ignore").solve(0 * ONE, ONE, steps=4, tolerance=1e-9)
    assert (alone.steps, alone.converged) == (0, False)
    assert float(alone.control) == 0
    problem = solver().problem
    batched = bl.ControlSolver(lambda b: (problem, b * ONE), Stuck).solve(
        0 * ONE, steps=4, batches=[1.0, 3.0]
    )
    assert batched.steps == 4
    assert batched.costs == [0.5, 4.5, 0.5, 4.5]


def test_the_record_of_each_update_is_handed_to_the_callback():
    seen = []
    solver().solve(0 * ONE, ONE, steps=2, callback=lambda p: seen.append(p.found))
    assert all(isinstance(found, bl.control.Adjoint) for found in seen)
    assert [float(found.gradient) for found in seen] == pytest.approx([1.0, 0.9])
