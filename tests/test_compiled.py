"""Compiled steps: the same numbers, and a warned way back."""

import pytest
import torch
from problems import real, square

import bilevel as bl

CONTROL = bl.PerStep([0.4 * real(k, 3, 3) for k in range(3)])


def problem(**settings):
    step = bl.Map(lambda u, c, t: torch.tanh(c @ u) + u / t)
    return bl.ControlProblem(step, lambda u, c: square(u), 3, **settings)


def test_a_step_that_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch):
    def refuse(function, **_options):
        def compiled(*arguments):
            raise RuntimeError("InvalidCxxCompiler: no working compiler found")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)
    expected = bl.adjoint(problem(), real(9, 3), CONTROL).gradient.steps
    with pytest.warns(
        bl.CompileWarning, match=r"could not be compiled.*InvalidCxxCompiler"
    ) as seen:
        found = bl.adjoint(problem(compile=True), real(9, 3), CONTROL).gradient.steps
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_error_of_a_step_is_not_taken_for_one_of_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    step = bl.Compiled(bl.Map(lambda u, c, t: u @ c))
    with pytest.raises(RuntimeError, match=r"size mismatch|shape"):
        step.step(torch.ones(2), torch.ones(3, 3), 1)


def test_compile_wraps_the_dynamics_once_and_passes_its_parts_on():
    given = problem(compile=True)
    assert isinstance(given.dynamics, bl.Compiled)
    again = bl.ControlProblem(given.dynamics, given.terminal, 3, compile=True)
    assert isinstance(again.dynamics.dynamics, bl.Map)
    with pytest.raises(bl.ArgumentError, match="takes a Dynamics, got function"):
        bl.Compiled(lambda u, c, t: u)


def test_second_derivatives_are_those_of_the_plain_step(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: pytest.fail("compiled"))
    direction = bl.PerStep([real(20 + k, 3, 3) for k in range(3)])
    found = bl.hvp(problem(compile=True), real(9, 3), CONTROL, direction).product.steps
    expected = bl.hvp(problem(), real(9, 3), CONTROL, direction).product.steps
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_step_gives_the_same_gradient():
    expected = bl.adjoint(problem(), real(9, 3), CONTROL)
    for checkpointing in (None, bl.Checkpointing(block=None), bl.Checkpointing(snapshots=1)):
        found = bl.adjoint(problem(compile=True), real(9, 3), CONTROL, checkpointing=checkpointing)
        torch.testing.assert_close(found.cost, expected.cost, rtol=1e-12, atol=0)
        for a, b in zip(found.gradient.steps, expected.gradient.steps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
