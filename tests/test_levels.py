"""Levels inside of levels: inner objectives with rollouts and implicit functions in them."""

import pytest
import torch
from problems import real, square

import bilevel as bl

F64 = torch.float64
A, B = torch.tensor(0.7, dtype=F64), real(1, 3)
SHRINK = bl.Map(lambda state, control, t: state * control)
ROOT = bl.implicit(lambda a: a**0.5, lambda w, a: w**2 - a)
# Each is a^3 b, found by something that is differentiated inside.
THROUGH = {
    "rollout, states kept": lambda a: bl.rollout(SHRINK, B, a, 3),
    "rollout, graphs kept": lambda a: bl.rollout(
        SHRINK, B, a, 3, checkpointing=bl.Checkpointing(block=None)
    ),
    "total cost": lambda a: (
        bl.total_cost(bl.ControlProblem(SHRINK, lambda state, control: state.sum(), 3), B, a)
        * B
        / B.sum()
    ),
    "implicit": lambda a: ROOT(a**6) * B,
    "implicit of a rollout": lambda a: ROOT(bl.rollout(SHRINK, 1 + 0 * a, a, 6)) * B,
}


@pytest.mark.parametrize("name", THROUGH)
@pytest.mark.parametrize("method", [bl.Implicit(), bl.MLM(), bl.Unrolled()], ids=repr)
def test_an_inner_objective_with_another_level_in_it_is_right(name, method):
    # w = a^3 b, F = |w - 1|^2 / 2.
    through = THROUGH[name]
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - through(a)) / 2, lambda w, a, batch: square(w - 1) / 2
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, method, on_failure="raise")
    found = solver.hypergradient(torch.zeros(3, dtype=F64), A)
    exact = 3 * A**2 * (B @ (A**3 * B - 1))
    torch.testing.assert_close(found.gradient, exact, rtol=1e-10, atol=0)
    assert found.certificate.trustworthy


@pytest.mark.parametrize("name", ["rollout, states kept", "implicit"])
def test_the_params_may_go_through_it_too(name):
    # The inner problem is curved in the params through the other level: w^3 = a, so w = a^(1/3).
    cube = {
        "rollout, states kept": lambda w: bl.rollout(SHRINK, w, w, 2),
        "implicit": lambda w: ROOT(w**6),
    }[name]
    problem = bl.BilevelProblem(lambda w, a, batch: (cube(w) - a) ** 2, lambda w, a, batch: w**2)
    start = torch.tensor(1.0, dtype=F64)
    for method in (bl.Implicit(), bl.MLM()):
        solver = bl.BilevelSolver(problem, bl.optim.SGD(0.08), 40, method, on_failure="raise")
        found = solver.hypergradient(start, A)
        assert found.gradient.item() == pytest.approx(2 / 3 * A.item() ** (-1 / 3), rel=1e-7)
