"""Problems whose answers are known on paper or by dynamic programming, solved by Algorithm 2."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from choices import lbfgs
from problems import KNOWN, double_integrator, fibonacci, riccati, walk, zeros
from reference import theta

import bilevel as bl

pytestmark = pytest.mark.xdist_group("known answers")  # each is solved once


def solve(problem, observation, control, steps=2):
    return bl.ControlSolver(problem, lbfgs).solve(control, observation, steps=steps)


@cache
def solved(known):
    return solve(known.problem, known.observation, known.control)


@pytest.fixture
def solved_lqr():
    known = next(one for one in KNOWN if "regulator" in one.name)
    return known, solved(known)


@pytest.mark.parametrize("known", KNOWN, ids=repr)
def test_solver_reaches_the_known_minimum(known):
    found = solved(known)
    assert found.cost == pytest.approx(known.cost, abs=known.digits, rel=0)
    if known.first_control is not None:
        # A cost known to eps fixes its minimiser to about sqrt(eps).
        assert float(theta(found.control, 1)) == pytest.approx(known.first_control, abs=1e-6)
    if known.multipliers is not None:
        multipliers = [float(x) for x in found.adjoint.multipliers]
        assert multipliers == pytest.approx(known.multipliers, abs=1e-6)


def test_the_walk_has_every_multiplier_equal_to_minus_x0_over_t_plus_one():
    known = walk(7, 2.0, shared=False)
    found = solve(known.problem, known.observation, known.control)
    assert [float(x) for x in found.adjoint.multipliers] == pytest.approx([-2 / 8] * 8, abs=1e-13)
    assert [float(x) for x in found.control.steps] == pytest.approx([-2 / 8] * 7, abs=1e-13)


def test_the_costly_walk_of_ten_steps_costs_half_the_golden_ratio_to_nine_digits():
    assert fibonacci(22) / fibonacci(21) / 2 == pytest.approx(0.809016992508679, abs=1e-15)


def test_the_solver_finds_the_controls_of_the_riccati_recursion(solved_lqr):
    known, found = solved_lqr
    cost, controls = riccati()
    assert cost == pytest.approx(known.cost, abs=1e-14)
    assert controls[0] == pytest.approx(known.first_control, abs=1e-14)
    assert [float(u) for u in found.control.steps] == pytest.approx(controls, abs=1e-6)


def test_lqr_multipliers_are_minus_the_riccati_matrix_times_the_state(solved_lqr):
    known, found = solved_lqr
    assert found.adjoint.multipliers[-1].tolist() == pytest.approx(
        (-10 * found.adjoint.final_state).tolist(), abs=1e-12
    )
    # J*(x) = x P x / 2, so that lambda_0 . x0 = -2 J*.
    first = float(found.adjoint.multipliers[0] @ known.observation)
    assert first == pytest.approx(-2 * known.cost, abs=1e-5)


@pytest.mark.parametrize("n_steps", [4, 10])
def test_the_method_of_multipliers_meets_the_end_constraint_of_the_double_integrator(n_steps):
    nu, penalty = torch.zeros(2, dtype=torch.float64), 1e4
    control, goal = zeros(n_steps), torch.tensor([1.0, 0.0], dtype=torch.float64)
    rest = torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        found = solve(double_integrator(n_steps, nu, penalty), rest, control, steps=1)
        defect = found.adjoint.final_state - goal
        nu, control = nu + penalty * defect, found.control
    exact = 12 * n_steps**2 / (n_steps**2 - 1)
    assert defect.abs().max() <= 1e-6
    assert found.cost == pytest.approx(exact, abs=1e-10)
    # The controls fall on a line from rest to rest; the multiplier of the end is -lambda_T.
    u = [float(x) for x in found.control.steps]
    slopes = [b - a for a, b in pairwise(u)]
    assert slopes == pytest.approx([slopes[0]] * (n_steps - 1), abs=1e-4)
    assert found.adjoint.multipliers[-1].tolist() == pytest.approx((-nu).tolist(), abs=1e-9)
    # J* grows as the square of the distance d, and nu = -dJ*/dd.
    assert float(nu[0]) == pytest.approx(-2 * exact, rel=1e-6)
