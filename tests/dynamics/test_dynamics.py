"""Dynamics, controls, and who receives what."""

import pytest
import torch
from problems import Custom, real
from reference import assert_same, fresh

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, StructureError


class Recorder:
    """Remembers what init, step and the costs were given."""

    def __init__(self):
        self.seen = {}

    def problem(self, horizon):
        def step(u, c, t):
            self.seen["step", t] = c
            return u + self.total(c)

        def init(f, c):
            self.seen["init"] = c
            return f + self.total(c)

        def terminal(u, c):
            self.seen["terminal"] = c
            return u

        def running(u, c, t):
            self.seen["running", t] = c
            return u * 0

        return bl.ControlProblem(Custom(step, init), terminal, horizon, running)

    def total(self, c):
        leaves = tree.leaves_of(c)
        return sum(x for x in leaves if isinstance(x, torch.Tensor))


ONE, TWO, THREE, FOUR = (torch.tensor(float(i)) for i in range(1, 5))


def values(seen):
    if isinstance(seen, torch.Tensor):
        return seen.item()
    if isinstance(seen, bl.PerStep):
        return [values(x) for x in (seen.steps, seen.initial, seen.shared)]
    return seen if seen is None else tuple(values(x) for x in seen)


def test_a_plain_control_is_given_whole_to_everyone():
    recorder = Recorder()
    bl.adjoint(recorder.problem(2), ONE, (TWO, THREE))
    assert {values(c) for c in recorder.seen.values()} == {(2.0, 3.0)}
    assert set(recorder.seen) == {
        "init",
        "terminal",
        ("step", 1),
        ("step", 2),
        ("running", 1),
        ("running", 2),
    }


def test_a_per_step_control_gives_each_its_part():
    recorder = Recorder()
    bl.adjoint(recorder.problem(2), ONE, bl.PerStep([ONE, TWO], initial=THREE))
    seen = {key: values(c) for key, c in recorder.seen.items()}
    assert seen == {
        "init": 3.0,
        ("step", 1): 1.0,
        ("step", 2): 2.0,
        ("running", 1): 1.0,
        ("running", 2): 2.0,
        "terminal": [(1.0, 2.0), 3.0, None],
    }


def test_a_shared_part_comes_with_each_step_but_not_with_init():
    recorder = Recorder()
    bl.adjoint(recorder.problem(2), ONE, bl.PerStep([ONE, TWO], initial=THREE, shared=FOUR))
    seen = {key: values(c) for key, c in recorder.seen.items()}
    assert seen["step", 1] == seen["running", 1] == (1.0, 4.0)
    assert seen["step", 2] == seen["running", 2] == (2.0, 4.0)
    assert seen["init"] == 3.0
    assert seen["terminal"] == [(1.0, 2.0), 3.0, 4.0]


def test_unstack_splits_the_leading_axis_of_every_leaf_and_keeps_the_rest():
    stacked = {"A": real(1, 3, 2), "b": real(2, 3)}
    control = bl.PerStep.unstack(stacked, initial=ONE, shared=TWO)
    assert len(control.steps) == 3
    for t, theta in enumerate(control.steps):
        assert_same(theta, {"A": stacked["A"][t], "b": stacked["b"][t]}, rtol=0)
    assert control.initial is ONE
    assert control.shared is TWO


def test_unstack_is_differentiable():
    stacked = fresh(real(1, 3, 2))
    control = bl.PerStep.unstack(stacked)
    (control.steps[1] ** 2).sum().backward()
    truth = torch.zeros(3, 2, dtype=torch.float64)
    truth[1] = 2 * stacked.detach()[1]
    assert_same(stacked.grad, truth, rtol=0)


@pytest.mark.parametrize(
    "stacked",
    [{"a": real(1, 3), "b": real(2, 2)}, torch.tensor(1.0), {"a": real(1, 3), "k": 3}, {}],
    ids=["lengths differ", "no axis", "an integer", "nothing"],
)
def test_unstack_refuses_leaves_without_one_common_leading_axis(stacked):
    with pytest.raises(StructureError, match="same leading axis"):
        bl.PerStep.unstack(stacked)


def test_the_steps_of_a_control_are_frozen_in_a_tuple():
    steps = [ONE, TWO]
    control = bl.PerStep(steps)
    steps.append(THREE)
    assert len(control.steps) == 2


def test_dynamics_start_at_the_observation_and_show_their_whole_state_by_default():
    dynamics = bl.Map(lambda u, c, t: u * c + t)
    assert dynamics.init(ONE, TWO) is ONE
    assert dynamics.readout(ONE) is ONE
    assert float(dynamics.step(TWO, THREE, 4)) == 10


def test_dynamics_without_a_step_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        bl.Dynamics()


@pytest.mark.parametrize("horizon", [-1, 2.0, True, "3", None])
def test_a_horizon_that_is_no_count_is_refused(horizon):
    with pytest.raises(ArgumentError, match="horizon must be a whole number >= 0, got"):
        bl.ControlProblem(bl.Map(lambda u, c, t: u), lambda u, c: u, horizon)


def test_a_plain_function_as_dynamics_is_refused_with_the_remedy():
    with pytest.raises(ArgumentError, match=r"must be a Dynamics .*bilevel.Map.*, got function"):
        bl.ControlProblem(lambda u, c, t: u, lambda u, c: u, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("checkpointing", [None, bl.Checkpointing(2, 12)], ids=repr)
def test_a_gradient_of_thousands_of_steps_is_summed_with_more_digits_than_its_own(
    dtype, checkpointing
):
    horizon = 600
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u), lambda u, c: 0 * u, horizon, lambda u, c, t: c + 0 * u
    )
    one = torch.ones((), dtype=dtype)
    found = bl.adjoint(problem, one, one, checkpointing=checkpointing).gradient
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.tensor(float(horizon), dtype=dtype))
    if checkpointing is None:
        product = bl.hvp(problem, one, one, one)
        torch.testing.assert_close(product.gradient, found)
        leaf = one.clone().requires_grad_()
        (slope,) = torch.autograd.grad(bl.total_cost(problem, one, leaf), leaf)
        torch.testing.assert_close(slope, found)
