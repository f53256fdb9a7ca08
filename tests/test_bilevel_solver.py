"""The outer loop: optimisers, warm starts, batches, stopping, history."""

import dataclasses
import math
import warnings

import pytest
import torch
from bilevel_cases import logistic, ridge
from choices import OPTIMIZERS
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError, ConvergenceError, DivergenceError, StructureError

H = torch.tensor([0.7, 1.0, 1.5], dtype=torch.float64)


def quadratic():
    """w(a) = a / H, F = |w - goal|^2 / 2 + |a|^2 / 2: a* = goal H / (1 + H^2)."""
    goal = real(1, 3)
    problem = bl.BilevelProblem(
        lambda w, a, batch: (H * w**2 / 2 - a * w).sum(),
        lambda w, a, batch: (square(w - goal) + square(a)) / 2,
    )
    return problem, torch.zeros_like(goal), goal * H / (1 + H**2)


def solver(problem, steps=20, rate=0.5, **settings):
    return bl.BilevelSolver(problem, bl.optim.SGD(rate), steps, **{"certificate": None, **settings})


DESCENTS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.3),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.7),
    "Adam": lambda p: torch.optim.Adam(p, 0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
}


# An optimiser sees gradients, and not how they were found.
@pytest.mark.parametrize(
    ("method", "name"),
    [(bl.Unrolled(), "Adam"), (bl.MLM(), "LBFGS"), *((bl.Implicit(), name) for name in DESCENTS)],
    ids=repr,
)
def test_every_method_and_optimizer_finds_the_minimum(method, name):
    problem, zero, best = quadratic()
    steps = 2 if name == "LBFGS" else 80
    found = solver(problem, 15, method=method).solve(zero, zero, DESCENTS[name], steps=steps)
    atol = 1e-3 if name == "LBFGS" else 1e-2
    torch.testing.assert_close(found.control, best, rtol=0, atol=atol)
    assert found.steps == len(found.values) == len(found.gradient_norms) == steps
    assert found.value == pytest.approx(
        float(problem.outer(found.params, found.control, None)), rel=1e-12
    )


def test_one_step_descends_with_the_inner_part_scaled_by_the_step_size():
    # It takes eta (w - goal) for the derivative through w; where a + eta (w - goal) = 0 it ends.
    problem, zero, _ = quadratic()
    goal, eta = real(1, 3), 0.5
    found = solver(problem, 10, eta, method=bl.OneStep()).solve(
        zero, zero, DESCENTS["SGD"], steps=80
    )
    torch.testing.assert_close(found.control, eta * goal / (1 + eta / H), rtol=1e-4, atol=0)


def test_maximize_climbs():
    problem, zero, _ = quadratic()
    found = solver(problem).solve(zero, zero, OPTIMIZERS["maximize"], steps=20)
    assert found.values == sorted(found.values)
    assert found.values[-1] > found.values[0]


@pytest.mark.parametrize(
    "optimizer", [bl.optim.SGD(0.1, momentum=0.9), bl.optim.Adam(0.05)], ids=repr
)
def test_two_warm_halves_are_one_iteration(optimizer):
    # Momentum, moments and the step count all go on.
    case = logistic()
    whole = bl.BilevelSolver(case.problem, optimizer, 20, bl.Unrolled(), certificate=None)
    half = dataclasses.replace(whole, inner_steps=10)
    first = half.hypergradient(case.params, case.control)
    second = half.hypergradient(case.params, case.control, warm=first.warm)
    once = whole.hypergradient(case.params, case.control)
    assert second.warm.steps == 20
    torch.testing.assert_close(second.params, once.params, rtol=1e-14, atol=0)


def test_a_warm_start_carries_the_linear_solution():
    case = ridge(20)
    warm_solver = solver(case.problem, case.steps, case.step_size, method=bl.Implicit())
    first = warm_solver.hypergradient(case.params, case.control)
    second = warm_solver.hypergradient(case.params, case.control, warm=first.warm)
    assert second.linear.steps <= 1 < first.linear.steps


def test_steps_of_batches_go_on_counting_with_a_warm_start():
    seen = []
    problem = bl.BilevelProblem(
        lambda w, a, batch: seen.append(batch) or square(w - a), lambda w, a, batch: square(w)
    )
    stepwise = solver(problem, 3, 0.1, method=bl.Unrolled())
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    batches = bl.ByStep(lambda t: t)
    first = stepwise.hypergradient(zero, one, inner_batch=batches)
    stepwise.hypergradient(zero, one, inner_batch=batches, warm=first.warm)
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("warm", [True, False])
def test_warm_start_goes_on_from_the_last_inner_state(warm):
    problem, zero, _ = quadratic()
    found = solver(problem, 1, 0.5).solve(
        zero, zero + 1, lambda p: torch.optim.SGD(p, 1e-9), steps=30, warm_start=warm
    )
    expected = (1 - (1 - 0.5 * H) ** (31 if warm else 1)) / H
    torch.testing.assert_close(found.params, expected, rtol=1e-6, atol=0)


def test_a_single_loop_is_one_inner_step_and_one_neumann_term_both_warm():
    # SOBA (Dagreou et al. 2022): theta, q and alpha each make one step an iteration.
    problem, zero, best = quadratic()
    method = bl.Implicit(bl.linear.Neumann(terms=2, step=0.5, rtol=0.0))
    soba = solver(problem, 1, 0.5, method=method, on_failure="ignore")
    found = soba.solve(zero, zero, lambda p: torch.optim.SGD(p, 0.05), steps=500)
    torch.testing.assert_close(found.control, best, rtol=1e-6, atol=0)
    # Cold, one step and one term are far from the solution.
    cold = soba.solve(zero, zero, lambda p: torch.optim.SGD(p, 0.05), steps=60, warm_start=False)
    assert float((cold.control - best).abs().max()) > 0.05


def test_batches_come_in_pairs_and_begin_again():
    seen = []

    def inner(w, a, batch):
        return square(w - a * batch)

    def outer(w, a, batch):
        seen.append(batch)
        return square(w - batch)

    one = torch.ones(1, dtype=torch.float64)
    solver(bl.BilevelProblem(inner, outer), 2, 0.1, method=bl.Unrolled()).solve(
        0 * one, one, steps=5, batches=[(1.0, 10.0), (2.0, 20.0)]
    )
    assert seen == [10.0, 20.0, 10.0, 20.0, 10.0]


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "batches gave nothing"), ([1, 2], "pairs"), ([(1, 2, 3)], "pairs")],
)
def test_batches_that_are_empty_or_no_pairs_are_refused(batches, message):
    problem, zero, _ = quadratic()
    with pytest.raises(ArgumentError, match=message):
        solver(problem).solve(zero, zero, steps=3, batches=batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be a whole number >= 0"),
        ({"tolerance": -1.0}, "tolerance must be >= 0"),
        ({"inner_tolerance": 0.0}, "inner_tolerance must be > 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    problem, zero, _ = quadratic()
    with pytest.raises(ArgumentError, match=message):
        solver(problem).solve(zero, zero, **settings)


def test_a_tolerance_stops_and_says_so():
    problem, zero, best = quadratic()
    sgd = lambda p: torch.optim.SGD(p, 0.3)  # noqa: E731
    found = solver(problem, 60).solve(zero, zero, sgd, steps=200, tolerance=1e-6)
    assert found.converged
    assert found.steps < 200
    assert found.gradient_norm <= 1e-6
    torch.testing.assert_close(found.control, best, rtol=0, atol=2e-6)
    with pytest.warns(bl.ConvergenceWarning, match="above the tolerance"):
        short = solver(problem).solve(zero, zero, sgd, steps=2, tolerance=1e-6)
    assert not short.converged
    with pytest.raises(ConvergenceError, match="above the tolerance"):
        solver(problem, on_failure="raise").solve(zero, zero, sgd, steps=2, tolerance=1e-6)


@pytest.mark.parametrize("method", [bl.MLM(), bl.Implicit()], ids=repr)
def test_an_inner_tolerance_ends_the_inner_iteration_early(method):
    made = []

    def inner(w, a, batch):
        made.append(1)
        return square(w - a) / 2

    problem = bl.BilevelProblem(inner, lambda w, a, batch: square(w) / 2)
    one = torch.ones(2, dtype=torch.float64)
    loose = solver(problem, 1000, 0.5, method=method)
    found = loose.solve(0 * one, one, steps=0, inner_tolerance=1e-3)
    assert found.hypergradient.warm.steps in (20, 30)
    assert float((found.params - one).norm()) <= 1e-3
    assert len(made) < 120
    torch.testing.assert_close(found.hypergradient.gradient, one, rtol=1e-2, atol=0)


def test_a_schedule_a_projection_and_a_callback_are_used():
    problem, zero, _ = quadratic()
    seen = []

    def callback(progress):
        seen.append((progress.step, progress.optimizer.param_groups[0]["lr"]))
        assert isinstance(progress.found, bl.solution.Hypergradient)
        assert progress.cost == float(progress.found.value)
        return progress.step == 4

    found = solver(problem).solve(
        zero,
        zero,
        lambda p: torch.optim.SGD(p, 1.0),
        steps=10,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        project=lambda a: a.clamp(-0.01, 0.01),
        callback=callback,
    )
    assert seen == [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]
    assert float(found.control.abs().max()) <= 0.01


def test_a_value_that_is_not_finite_names_the_outer_and_the_inner_iteration():
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w) * a.exp().sum() / 2 + w.sum(),
        lambda w, a, batch: -100 * a.sum() + w.sum(),
    )
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(DivergenceError, match=r"iteration 2: the inner .* after step \d+ of 400"):
        solver(problem, 400, 0.5).solve(one, 0 * one, lambda p: torch.optim.SGD(p, 0.1), steps=9)


def test_the_control_and_the_params_of_the_caller_are_not_changed():
    problem, zero, _ = quadratic()
    params, control = zero.clone(), zero.clone()
    solver(problem).solve(params, control, steps=3)
    assert torch.equal(params, zero)
    assert torch.equal(control, zero)


def test_untrustworthy_hypergradients_are_reported_once_with_their_number():
    problem, zero, _ = quadratic()
    loose = solver(problem, 1, 0.1, certificate=bl.AgainstMinimiser())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = loose.solve(zero, zero + 1, steps=3, warm_start=False)
    assert len([w for w in caught if w.category is bl.ConvergenceWarning]) == 1
    assert "4 hypergradients of 3 updates are not trustworthy" in str(caught[0].message)
    assert len(found.certificates) == 3
    with pytest.raises(ConvergenceError, match="iteration 1: "):
        dataclasses.replace(loose, on_failure="raise").solve(zero, zero + 1, steps=3)


def test_meta_learned_initialisations_are_a_start():
    # MAML: two tasks min (w - c_i)^2 / 2, one step of size 1/2 from a: w_i = (a + c_i) / 2; the
    # best start for sum (w_i - c_i)^2 is the mean of the c_i.
    centres = torch.tensor([1.0, 4.0], dtype=torch.float64)
    problem = bl.BilevelProblem(
        inner=lambda w, a, batch: square(w - centres) / 2,
        outer=lambda w, a, batch: square(w - centres),
        start=lambda w, a: a.expand(2),
    )
    zero = torch.tensor(0.0, dtype=torch.float64)
    found = solver(problem, 1, 0.5).solve(
        torch.zeros_like(centres), zero, lambda p: torch.optim.SGD(p, 0.5), steps=40
    )
    assert float(found.control) == pytest.approx(2.5, abs=1e-6)


def test_implicit_maml_learns_the_start_through_a_proximal_term():
    # iMAML (Rajeswaran et al. 2019): w_i = argmin (w - c_i)^2 / 2 + lam (w - a)^2 / 2.
    centres, lam = torch.tensor([1.0, 4.0], dtype=torch.float64), 0.5
    problem = bl.BilevelProblem(
        inner=lambda w, a, batch: square(w - centres) / 2 + lam * square(w - a) / 2,
        outer=lambda w, a, batch: square(w - centres),
        start=lambda w, a: a.expand(2),
    )
    zero = torch.tensor(0.0, dtype=torch.float64)
    found = solver(problem, 60, 0.5, method=bl.Implicit()).solve(
        torch.zeros_like(centres), zero, lambda p: torch.optim.SGD(p, 0.5), steps=60
    )
    assert float(found.control) == pytest.approx(2.5, abs=1e-6)


def test_adaptation_makes_scaled_steps_on_one_task():
    problem, zero, _ = quadratic()
    half = solver(problem, rate=0.2)
    found = bl.adapt(half.optimizer, zero, lambda w: square(w - 1) / 2, 3, weight=0.5)
    torch.testing.assert_close(found, (1 - 0.9**3) * (zero + 1), rtol=1e-14, atol=0)
    with pytest.raises(ArgumentError, match="weight must be > 0"):
        bl.adapt(solver(problem).optimizer, zero, lambda w: square(w), 3, weight=0.0)


def test_a_warm_start_of_another_shape_is_refused():
    problem, zero, _ = quadratic()
    warm = bl.methods.Warm(torch.zeros(2, dtype=torch.float64), 3)
    with pytest.raises(StructureError, match=r"warm.state must be float64\[3\]"):
        solver(problem).hypergradient(zero, zero, warm=warm)


def test_the_history_is_drawn():
    problem, zero, _ = quadratic()
    found = solver(problem, certificate=bl.AgainstMinimiser()).solve(zero, zero, steps=5)
    figure = found.plot()
    lines = {axes.get_title(): axes.lines[0].get_ydata().tolist() for axes in figure.axes}
    assert lines["outer objective"] == found.values
    assert lines["norm of the hypergradient"] == found.gradient_norms
    assert len(lines["estimated relative error"]) == 5
    assert math.isfinite(sum(lines["estimated relative error"]))


@pytest.mark.parametrize(
    "rule", [bl.optim.SGD(0.1), bl.optim.SGD(0.05, momentum=0.9), bl.optim.Adam(0.05)], ids=repr
)
def test_inner_steps_alone_go_on_where_they_ended(rule):
    """Five steps with their batches are two and then three, and those of a hypergradient."""
    case = ridge(3)
    batches = bl.ByStep(float)
    problem = bl.BilevelProblem(
        lambda w, a, batch: case.problem.inner(w, a, None) + batch * square(w) / 50,
        lambda w, a, batch: square(w) + 0 * a.sum(),
    )

    def advance(steps, warm=None):
        one = bl.BilevelSolver(problem, rule, steps, certificate=None)
        return one.advance(case.params, case.control, batches, warm)

    whole, parts = advance(5), advance(3, advance(2))
    assert whole.steps == parts.steps == 5
    torch.testing.assert_close(rule.params(parts.state), rule.params(whole.state))
    found = bl.BilevelSolver(problem, rule, 5, bl.MLM(), certificate=None).hypergradient(
        case.params, case.control, batches
    )
    assert torch.equal(rule.params(whole.state), found.params)


@pytest.mark.parametrize(
    ("make", "came"),
    [
        (lambda: torch.optim.SGD([torch.zeros(1)], 0.1), "got torch.optim.SGD"),
        (lambda: torch.optim.Adam, "got the class torch.optim.Adam"),
        (lambda: bl.optim.SGD, "got the class SGD"),
    ],
    ids=["an optimiser", "its class", "the class of a rule"],
)
def test_an_optimiser_of_torch_is_no_inner_rule_and_named_as_such(make, came):
    problem = bl.BilevelProblem(lambda w, a, batch: w, lambda w, a, batch: w)
    with pytest.raises(ArgumentError, match=rf"like\(torch.optim.SGD, lr=0.1\), {came}\."):
        bl.BilevelSolver(problem, make())
