"""Theorem 1 and equations (4) to (8), on every case, against plain autograd and differences."""

from functools import cache

import pytest
import torch
from choices import CHECKPOINTINGS, covering
from hypothesis import given, settings, strategies as st
from problems import CASES, TELLING, random_case
from reference import (
    assert_same,
    autograd,
    fresh,
    initial,
    moved,
    plain_cost,
    plain_gradients,
    plain_multipliers,
    plain_states,
    random_like,
    random_point,
    running_cost,
    terminal_cost,
    theta,
)

import bilevel as bl
from bilevel import tree
from bilevel.errors import StructureError

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_pair = pytest.mark.parametrize(("case", "checkpointing"), covering(CASES, TELLING[-1:]))


@cache
def swept(case, checkpointing=None):
    return bl.adjoint(
        case.problem,
        case.observation,
        case.control,
        checkpointing=checkpointing,
        keep_states=True,
        keep_multipliers=True,
    )


@pytest.mark.parametrize(("case", "checkpointing"), covering(CASES, TELLING))
def test_cost_and_gradients_are_those_of_autograd_on_the_plain_loop(case, checkpointing):
    cost, gradient, observation_gradient = plain_gradients(
        case.problem, case.observation, case.control
    )
    found = bl.adjoint(case.problem, case.observation, case.control, checkpointing=checkpointing)
    assert_same(found.cost, cost, rtol=1e-14)
    assert_same(found.gradient, gradient)
    assert_same(found.observation_gradient, observation_gradient)
    assert found.states is None
    assert found.multipliers is None


@pytest.mark.parametrize(
    ("case", "checkpointing"), covering([c for c in CASES if c.bitwise], TELLING)
)
def test_gradients_are_those_of_autograd_to_the_last_bit_where_the_additions_agree(
    case, checkpointing
):
    cost, gradient, observation_gradient = plain_gradients(
        case.problem, case.observation, case.control
    )
    found = bl.adjoint(case.problem, case.observation, case.control, checkpointing=checkpointing)
    assert_same(found.cost, cost, rtol=0)
    assert_same(found.gradient, gradient, rtol=0)
    assert_same(found.observation_gradient, observation_gradient, rtol=0)


@every_pair
def test_keeping_states_and_multipliers_does_not_change_a_bit_of_the_rest(case, checkpointing):
    bare = bl.adjoint(case.problem, case.observation, case.control, checkpointing=checkpointing)
    kept = swept(case, checkpointing)
    for name in ("cost", "gradient", "observation_gradient", "final_state"):
        # Keeping interior multipliers makes autograd add in another order inside a long block.
        rtol = 1e-14 if checkpointing.keeps_graphs and name.endswith("gradient") else 0
        assert_same(getattr(bare, name), getattr(kept, name), rtol)


@every_pair
def test_states_are_those_of_the_plain_loop(case, checkpointing):
    truth = plain_states(
        case.problem.dynamics,
        case.observation,
        tree.detach(case.control),
        case.problem.horizon,
    )
    found = swept(case, checkpointing)
    assert len(found.states) == case.problem.horizon + 1
    for state, expected in zip(found.states, truth, strict=True):
        assert_same(state, tree.detach(expected), rtol=0)
    assert_same(found.final_state, tree.detach(truth[-1]), rtol=0)


@cache
def multipliers_of(case):
    states = plain_states(
        case.problem.dynamics, case.observation, tree.detach(case.control), case.problem.horizon
    )
    return plain_multipliers(case.problem, tree.detach(states), case.control)


@every_pair
def test_multiplier_t_is_minus_the_total_derivative_of_the_cost_in_state_t(case, checkpointing):
    found = swept(case, checkpointing)
    assert len(found.multipliers) == case.problem.horizon + 1
    for multiplier, expected in zip(found.multipliers, multipliers_of(case), strict=True):
        assert_same(multiplier, expected)


@every_case
def test_everything_that_comes_back_is_detached(case):
    found = swept(case)
    record = (
        found.cost,
        found.gradient,
        found.observation_gradient,
        found.final_state,
        found.states,
        found.multipliers,
    )
    assert not any(x.requires_grad for x in tree.leaves_of(record) if isinstance(x, torch.Tensor))


@every_case
def test_gradients_are_those_of_central_differences(case):
    found = bl.adjoint(case.problem, case.observation, case.control)
    generator = torch.Generator().manual_seed(1)
    step = 1e-5
    pairs = [(case.control, found.gradient, 0), (case.observation, found.observation_gradient, 1)]
    for values, gradient, place in pairs:
        direction = random_like(values, generator)

        def cost(h, values=values, direction=direction, place=place):
            arguments = [tree.detach(case.control), case.observation]
            arguments[place] = moved(values, direction, h)
            return float(plain_cost(case.problem, arguments[1], arguments[0]).detach())

        difference = (cost(step) - cost(-step)) / (2 * step)
        slope = float(tree.inner(gradient, direction))
        # The error of central differences is step^2 times a third derivative, plus eps / step.
        assert slope == pytest.approx(difference, rel=1e-6, abs=1e-7)


def by_hand(case, states, multipliers):
    """Equation (4), written out: J plus each multiplier times its defect."""
    problem, control = case.problem, case.control
    value = terminal_cost(problem, states[-1], control)
    value = value + sum(
        running_cost(problem, states[t - 1], control, t) for t in range(1, problem.horizon + 1)
    )
    images = [problem.dynamics.init(case.observation, initial(control))]
    for t in range(1, problem.horizon + 1):
        images.append(problem.dynamics.step(states[t - 1], theta(control, t), t))
    for multiplier, state, image in zip(multipliers, states, images, strict=True):
        leaves = [tree.leaves_of(x) for x in (multiplier, state, image)]
        for m, u, g in zip(*leaves, strict=True):
            if m is not None:
                value = value + (m.conj() * (u - g)).real.sum()
    return value.detach()


@every_case
def test_lagrangian_away_from_the_swept_point_is_the_cost_plus_multipliers_times_defects(case):
    states, multipliers = random_point(case.problem, case.observation, case.control, seed=2)
    found = bl.lagrangian(case.problem, case.observation, case.control, states, multipliers)
    assert_same(found.detach(), by_hand(case, states, multipliers), rtol=1e-13)


@every_case
def test_lagrangian_at_swept_states_is_the_cost_whatever_the_multipliers(case):
    found = swept(case)
    _, multipliers = random_point(case.problem, case.observation, case.control, seed=3)
    value = bl.lagrangian(case.problem, case.observation, case.control, found.states, multipliers)
    assert_same(value.detach(), found.cost, rtol=1e-13)


def lagrangian_gradients(case, states, multipliers):
    """grad_U L, grad_Lambda L, grad_Theta L and grad_f L by autograd through `bl.lagrangian`."""
    inputs = [fresh(x) for x in (states, multipliers, case.control, case.observation)]
    value = bl.lagrangian(case.problem, inputs[3], inputs[2], inputs[0], inputs[1])
    return autograd(value, *inputs)


@every_case
def test_lagrangian_is_stationary_in_states_and_multipliers_at_the_swept_point(case):
    found = swept(case)
    in_states, in_multipliers, in_control, in_observation = lagrangian_gradients(
        case, found.states, found.multipliers
    )
    scale = 1 + tree.norm(found.multipliers)
    assert tree.norm(in_states) <= 1e-13 * scale
    assert tree.norm(in_multipliers) <= 1e-13 * (1 + tree.norm(found.states))
    assert_same(in_control, found.gradient)
    assert_same(in_observation, found.observation_gradient)


@every_case
def test_kkt_residuals_are_the_norms_of_the_gradients_of_the_lagrangian_at_any_point(case):
    states, multipliers = random_point(case.problem, case.observation, case.control, seed=4)
    in_states, in_multipliers, in_control, _ = lagrangian_gradients(case, states, multipliers)
    found = bl.kkt(case.problem, case.observation, case.control, states, multipliers)
    assert found.costate == pytest.approx(tree.norm(in_states), rel=1e-12)
    assert found.feasibility == pytest.approx(tree.norm(in_multipliers), rel=1e-12)
    assert found.stationarity == pytest.approx(tree.norm(in_control), rel=1e-12)


@every_case
def test_kkt_at_the_swept_point_leaves_the_gradient_of_the_cost_alone(case):
    found = swept(case)
    residuals = bl.kkt(
        case.problem, case.observation, case.control, found.states, found.multipliers
    )
    assert residuals.feasibility == 0
    assert residuals.costate <= 1e-13 * (1 + tree.norm(found.multipliers))
    assert residuals.stationarity == pytest.approx(tree.norm(found.gradient), rel=1e-12)


def test_kkt_takes_states_and_multipliers_that_require_grad_and_no_grad_mode():
    case = CASES[1]
    states, multipliers = random_point(case.problem, case.observation, case.control, seed=5)
    plain = bl.kkt(case.problem, case.observation, case.control, states, multipliers)
    attached = [fresh(x) for x in (case.observation, case.control, states, multipliers)]
    with torch.no_grad():
        assert bl.kkt(case.problem, *attached) == plain
    assert bl.kkt(case.problem, *attached) == plain


@pytest.mark.parametrize("which", ["states", "multipliers"])
@pytest.mark.parametrize("function", [bl.lagrangian, bl.kkt])
def test_a_point_of_another_length_is_refused_by_name(function, which):
    case = CASES[3]
    states, multipliers = random_point(case.problem, case.observation, case.control, seed=6)
    point = {"states": states, "multipliers": multipliers}
    point[which] = point[which][:-1]
    with pytest.raises(StructureError, match=f"{which} must have one entry.*6 in all, got 5"):
        function(case.problem, case.observation, case.control, **point)


@settings(max_examples=40)
@given(
    horizon=st.integers(0, 6),
    size=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
    per_step=st.booleans(),
    checkpointing=st.sampled_from(CHECKPOINTINGS),
)
def test_theorem_1_holds_for_random_sizes_horizons_and_coefficients(
    horizon, size, seed, dtype, per_step, checkpointing
):
    case = random_case(horizon, size, seed, dtype, per_step)
    cost, gradient, observation_gradient = plain_gradients(
        case.problem, case.observation, case.control
    )
    found = swept(case, checkpointing)
    # Random sizes meet cancellation, so the tolerance is a little above that of the fixed cases.
    assert_same(found.cost, cost, rtol=1e-12)
    assert_same(found.gradient, gradient, rtol=1e-11)
    assert_same(found.observation_gradient, observation_gradient, rtol=1e-11)
    truth = plain_multipliers(case.problem, found.states, case.control)
    for multiplier, expected in zip(found.multipliers, truth, strict=True):
        assert_same(multiplier, expected, rtol=1e-11)
    residuals = bl.kkt(
        case.problem, case.observation, case.control, found.states, found.multipliers
    )
    assert residuals.costate <= 1e-12 * (1 + tree.norm(found.multipliers))
