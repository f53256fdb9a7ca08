"""Compiled steps: the same numbers, and a warned way back."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError, CompileWarning

CONTROL = bl.PerStep([0.4 * real(k, 3, 3) for k in range(3)])
START = real(9, 3)


def problem(g=lambda u, c, t: torch.tanh(c @ u) + u / t, *, compiled=False):
    dynamics = bl.Compiled(bl.Map(g)) if compiled else bl.Map(g)
    return bl.ControlProblem(dynamics, lambda u, c: square(u), 3)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found.steps, expected.steps, strict=True))


def counting(monkeypatch, build=lambda function: function):
    """A compiler that compiles by `build`; the functions it was given."""
    given = []

    def compiler(function, **_options):
        given.append(function)
        return build(function)

    monkeypatch.setattr(torch, "compile", compiler)
    return given


def test_a_step_that_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch):
    def refuse(function):
        def compiled(*arguments):
            raise RuntimeError("InvalidCxxCompiler: no working compiler found")

        return compiled

    counting(monkeypatch, refuse)
    expected = bl.adjoint(problem(), START, CONTROL).gradient
    with pytest.warns(CompileWarning, match=r"could not be compiled.*InvalidCxxCompiler") as seen:
        found = bl.adjoint(problem(compiled=True), START, CONTROL).gradient
    assert len(seen) == 1
    assert same(found, expected)


def test_a_compiler_that_refuses_at_once_is_a_warning_too(monkeypatch):
    def refuse(function):
        raise RuntimeError("torch.compile is not supported here")

    counting(monkeypatch, refuse)
    with pytest.warns(CompileWarning, match=r"\(torch.compile is not supported here\)"):
        found = bl.adjoint(problem(compiled=True), START, CONTROL).gradient
    assert same(found, bl.adjoint(problem(), START, CONTROL).gradient)


def test_complex_tensors_are_left_to_the_plain_step(monkeypatch):
    given = counting(monkeypatch)
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = bl.ControlProblem(
        bl.Map(lambda u, c, t: u * torch.exp(1j * c)), lambda u, c: square(u - 1), 3
    )
    start = START + 0j
    with pytest.warns(CompileWarning, match="no kernels for complex tensors"):
        found = bl.adjoint(
            dataclasses.replace(turn, dynamics=bl.Compiled(turn.dynamics)), start, angle
        ).gradient
    assert torch.equal(found, bl.adjoint(turn, start, angle).gradient)
    assert given == []


def test_the_error_of_a_step_is_not_taken_for_one_of_the_compiler(monkeypatch):
    counting(monkeypatch)
    step = bl.Compiled(bl.Map(lambda u, c, t: u @ c))
    with pytest.raises(RuntimeError, match=r"size mismatch|shape"):
        step.step(torch.ones(2), torch.ones(3, 3), 1)


def test_the_function_of_a_map_is_compiled_once_and_not_the_step_that_all_maps_share(monkeypatch):
    given = counting(monkeypatch)

    def g(u, c, t):
        return torch.tanh(c @ u)

    compiled = problem(g, compiled=True)
    for _ in range(2):
        bl.adjoint(compiled, START, CONTROL)
    bl.adjoint(dataclasses.replace(compiled, running=lambda u, c, t: square(u)), START, CONTROL)
    assert given == [g]


def test_what_is_compiled_already_is_not_compiled_again():
    given = bl.Compiled(bl.Map(lambda u, c, t: u))
    assert isinstance(bl.Compiled(given).dynamics, bl.Map)
    with pytest.raises(ArgumentError, match=r"dynamics must be a Dynamics .*Map.*, got function"):
        bl.Compiled(lambda u, c, t: u)


def test_another_dynamics_is_compiled_anew(monkeypatch):
    counting(monkeypatch)
    first = bl.Compiled(bl.Map(lambda u, c, t: u + c))
    assert float(first.step(torch.ones(()), torch.ones(()), 1)) == 2
    second = dataclasses.replace(first, dynamics=bl.Map(lambda u, c, t: u - c))
    assert float(second.step(torch.ones(()), torch.ones(()), 1)) == 0


@dataclasses.dataclass(frozen=True)
class Shifted(bl.Dynamics):
    by: float

    def step(self, state, control, t):
        return state["u"] * control, state

    def init(self, observation, control):
        return {"u": observation + self.by}

    def readout(self, state):
        return state["u"]


def test_init_and_readout_are_those_of_the_dynamics():
    compiled = bl.Compiled(Shifted(2.0))
    assert compiled.readout(compiled.init(1.0, None)) == 3.0


def test_second_derivatives_and_budgets_are_those_of_the_plain_step(monkeypatch):
    given = counting(monkeypatch)
    direction = bl.PerStep([real(20 + k, 3, 3) for k in range(3)])
    compiled = problem(compiled=True)
    found = bl.hvp(compiled, START, CONTROL, direction).product
    assert same(found, bl.hvp(problem(), START, CONTROL, direction).product)
    assert bl.sweeps.measure(compiled, START, CONTROL) == bl.sweeps.measure(
        problem(), START, CONTROL
    )
    assert given == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "checkpointing",
    [None, bl.Checkpointing(block=None), bl.Checkpointing(snapshots=1), bl.Budget("1 MiB")],
    ids=repr,
)
def test_a_compiled_step_gives_the_same_gradient(checkpointing, recwarn):
    expected = bl.adjoint(problem(), START, CONTROL)
    found = bl.adjoint(problem(compiled=True), START, CONTROL, checkpointing=checkpointing)
    torch.testing.assert_close(found.cost, expected.cost, rtol=1e-12, atol=0)
    for a, b in zip(found.gradient.steps, expected.gradient.steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert not [w for w in recwarn if w.category is CompileWarning]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_step_draws_the_random_numbers_of_the_plain_one(recwarn):
    def g(u, c, t):
        return torch.nn.functional.dropout(c @ u, 0.5)

    found = []
    for compiled in (False, True):
        torch.manual_seed(3)
        found.append(bl.adjoint(problem(g, compiled=compiled), START, CONTROL))
    torch.testing.assert_close(found[1].cost, found[0].cost, rtol=1e-12, atol=0)
    for a, b in zip(found[1].gradient.steps, found[0].gradient.steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert not [w for w in recwarn if w.category is CompileWarning]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("g", "reason"),
    [
        (lambda u, c, t: c @ u if float(u.detach().sum()) > 0 else -c @ u, "data-dependent"),
        (lambda u, c, t: c @ u + ROWS[t], "again and again"),
    ],
)
def test_code_that_torch_cannot_trace_runs_as_it_is(g, reason):
    control = bl.PerStep([0.4 * real(k, 3, 3) for k in range(12)])
    plain = bl.ControlProblem(bl.Map(g), lambda u, c: square(u), 12)
    expected = bl.adjoint(plain, START, control)
    with pytest.warns(CompileWarning, match=reason):
        found = bl.adjoint(
            dataclasses.replace(plain, dynamics=bl.Compiled(plain.dynamics)), START, control
        )
    torch.testing.assert_close(found.cost, expected.cost, rtol=1e-12, atol=0)


ROWS = [real(40 + t, 3) for t in range(13)]


@pytest.mark.slow
def test_without_a_compiler_the_step_runs_as_it_is(tmp_path):
    code = (
        "import torch, warnings, bilevel as bl\n"
        "p = bl.ControlProblem(bl.Compiled(bl.Map(lambda u, c, t: c * u)), lambda u, c: u, 3)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    print(float(bl.adjoint(p, torch.tensor(2.0), torch.tensor(3.0)).cost))\n"
        "print([str(w.message) for w in seen if w.category is CompileWarning])\n"
    )
    none = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **none},
        cwd=Path(__file__).parents[2],
    )
    cost, warned = found.stdout.splitlines()
    assert cost == "54.0"
    assert "No working C++ compiler found" in warned
