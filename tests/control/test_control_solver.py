"""Algorithm 2 against training loops written by hand with plain autograd."""

import dataclasses
import warnings

import pytest
import torch
from choices import CHECKPOINTINGS, OPTIMIZERS, lbfgs
from problems import C128, case_named, cplx, real, square
from reference import assert_same, fresh, plain_cost, plain_gradients, wanted

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, ConvergenceError, DivergenceError

C, U = 0.5 * real(1, 3), real(2, 3)
SGD = OPTIMIZERS["SGD"]


def tanh_problem(target=1.0, horizon=3):
    return bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(c * u + t * 0.1)),
        lambda u, c: square(u - target),
        horizon,
        lambda u, c, t: 0.1 * square(c),
    )


def by_hand(problem, observation, control, optimizer, steps, schedule=None, project=None):
    """Plain autograd, `torch.optim`, and nothing of this library but the problem."""
    control = fresh(control)
    made = optimizer(wanted(control))
    scheduler = None if schedule is None else schedule(made)
    costs = []
    for k in range(steps):
        p, f = (problem, observation) if observation is not None else problem(k)
        made.zero_grad()
        cost = plain_cost(p, f, control)
        cost.backward()
        made.step()
        if scheduler is not None:
            scheduler.step()
        if project is not None:
            with torch.no_grad():
                control.copy_(project(control))
        costs.append(float(cost.detach()))
    return tree.detach(control), costs


# An optimiser sees gradients, and not how they were swept.
@pytest.mark.parametrize(
    ("optimizer", "checkpointing"),
    [*((name, None) for name in OPTIMIZERS), *(("Adam", one) for one in CHECKPOINTINGS)],
    ids=repr,
)
def test_iterates_are_those_of_a_training_loop_written_by_hand(optimizer, checkpointing):
    truth, costs = by_hand(tanh_problem(), U, C, OPTIMIZERS[optimizer], 12)
    solver = bl.ControlSolver(tanh_problem(), OPTIMIZERS[optimizer], checkpointing)
    found = solver.solve(C, U, steps=12)
    assert_same(found.control, truth, rtol=1e-11)
    assert found.costs == pytest.approx(costs, rel=1e-11)
    assert found.steps == 12


@pytest.mark.parametrize(
    "name",
    [
        "complex state, complex and real control",
        "per-step control with theta_0, shared part and running cost",
        "phases with complex convolutions",
        "tree state with integers",
    ],
)
def test_iterates_on_trees_are_those_of_a_training_loop_written_by_hand(name):
    case = case_named(name)
    truth, costs = by_hand(case.problem, case.observation, case.control, OPTIMIZERS["Adam"], 5)
    solver = bl.ControlSolver(case.problem, OPTIMIZERS["Adam"])
    found = solver.solve(case.control, case.observation, steps=5)
    # Adam divides by the size of a gradient, which magnifies rounding where that is small.
    assert_same(found.control, truth, rtol=1e-9)
    assert found.costs == pytest.approx(costs, rel=1e-9)


def test_the_default_optimizer_is_adam_at_one_hundredth():
    truth, _ = by_hand(tanh_problem(), U, C, lambda p: torch.optim.Adam(p, lr=1e-2), 5)
    assert_same(bl.ControlSolver(tanh_problem()).solve(C, U, steps=5).control, truth, rtol=1e-11)


def test_the_record_belongs_to_the_last_control():
    found = bl.ControlSolver(tanh_problem(), SGD).solve(C, U, steps=4)
    cost, gradient, _ = plain_gradients(tanh_problem(), U, found.control)
    assert found.cost == pytest.approx(float(cost), rel=1e-14)
    assert_same(found.adjoint.gradient, gradient)
    assert found.gradient_norm == pytest.approx(tree.norm(gradient), rel=1e-12)
    assert len(found.adjoint.states) == len(found.adjoint.multipliers) == 4
    assert not found.control.requires_grad
    assert len(found.costs) == len(found.gradient_norms) == found.steps == 4
    _, first, _ = plain_gradients(tanh_problem(), U, C)
    assert found.gradient_norms[0] == pytest.approx(tree.norm(first), rel=1e-12)


def test_no_steps_evaluate_the_control_as_it_came():
    found = bl.ControlSolver(tanh_problem(), SGD).solve(C, U, steps=0)
    cost, _, _ = plain_gradients(tanh_problem(), U, C)
    assert found.cost == pytest.approx(float(cost), rel=1e-14)
    assert (found.costs, found.steps) == ([], 0)
    assert_same(found.control, C, rtol=0)


def test_lbfgs_finds_the_complex_least_squares_solution():
    A, b = cplx(3, 5, 3), cplx(4, 5)
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u - A @ c), lambda u, c: square(u) / 2, 1)
    found = bl.ControlSolver(problem, lbfgs).solve(torch.zeros(3, dtype=C128), b, steps=2)
    exact = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    # A cost known to eps fixes its minimiser to about sqrt(eps).
    assert_same(found.control, exact, rtol=1e-6)
    assert found.control.dtype == C128


def batch_problem(target):
    return tanh_problem(target), U * target


def test_batches_are_taken_in_turn_and_begun_again():
    batches = [0.2, 0.4, 0.9]
    truth, costs = by_hand(lambda k: batch_problem(batches[k % 3]), None, C, SGD, 8)
    found = bl.ControlSolver(batch_problem, SGD).solve(C, steps=8, batches=batches)
    assert_same(found.control, truth, rtol=1e-12)
    assert found.costs == pytest.approx(costs, rel=1e-12)
    assert found.cost == found.costs[-1]
    assert found.gradient_norm == found.gradient_norms[-1]
    assert found.adjoint is None


@pytest.mark.parametrize(
    ("batches", "message", "made"),
    [([], "batches gave nothing", 0), (iter([0.2, 0.4]), "batches gave 2 batches, then ended", 2)],
    ids=["empty", "read once"],
)
def test_batches_that_run_dry_are_refused_with_what_was_reached(batches, message, made):
    with pytest.raises(ArgumentError, match=message) as caught:
        bl.ControlSolver(batch_problem, SGD).solve(C, steps=5, batches=batches)
    reached = caught.value.progress
    truth = bl.ControlSolver(batch_problem, SGD).solve(C, steps=made, batches=[0.2, 0.4])
    assert_same(reached.control, truth.control, rtol=0)
    assert (reached.steps, reached.costs) == (made, truth.costs)
    assert reached.reason == str(caught.value)


def test_a_scheduler_steps_once_an_update():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    truth, _ = by_hand(tanh_problem(), U, C, SGD, 7, schedule)
    rates = []
    found = bl.ControlSolver(tanh_problem(), SGD).solve(
        C,
        U,
        steps=7,
        scheduler=schedule,
        callback=lambda seen: rates.append(seen.optimizer.param_groups[0]["lr"]),
    )
    assert_same(found.control, truth, rtol=1e-12)
    assert rates == pytest.approx([0.02 * 0.5 ** (k // 2) for k in range(1, 8)])


def test_a_projection_holds_the_control_in_its_set_after_each_update():
    def project(c):
        return c.clamp(min=0.0)

    optimizer = OPTIMIZERS["momentum"]
    truth, _ = by_hand(tanh_problem(-1.0), U, C, optimizer, 10, project=project)
    found = bl.ControlSolver(tanh_problem(-1.0), optimizer).solve(C, U, steps=10, project=project)
    free = bl.ControlSolver(tanh_problem(-1.0), optimizer).solve(C, U, steps=10)
    assert_same(found.control, truth, rtol=1e-11)
    assert float(found.control.min()) == 0
    assert float(free.control.min()) < 0


def quadratic():
    """The walk of 3 steps: gradient descent contracts by 1 - 0.02 * 12 an update."""
    return bl.ControlProblem(
        bl.Map(lambda u, c, t: u + c), lambda u, c: u**2 / 2, 3, lambda u, c, t: c**2 / 2
    )


ZERO, FOUR = torch.tensor(0.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)


def test_the_tolerance_stops_the_iteration_as_soon_as_the_gradient_is_within_it():
    found = bl.ControlSolver(quadratic(), SGD).solve(ZERO, FOUR, steps=500, tolerance=1e-6)
    # |gradient| = 12 (1 - 0.24)^k
    expected = next(k for k in range(500) if 12 * 0.76**k <= 1e-6)
    assert found.converged
    assert found.steps == expected
    assert found.gradient_norm == pytest.approx(12 * 0.76**expected, rel=1e-6)
    assert found.gradient_norm <= 1e-6 < found.gradient_norms[-1]


def test_a_tolerance_that_holds_at_the_start_takes_no_step():
    found = bl.ControlSolver(quadratic(), SGD).solve(ZERO, FOUR, steps=5, tolerance=12.0)
    assert found.converged
    assert found.steps == 0
    assert_same(found.control, ZERO, rtol=0)


def test_a_tolerance_reached_by_the_last_update_counts():
    found = bl.ControlSolver(quadratic(), SGD).solve(ZERO, FOUR, steps=1, tolerance=9.2)
    assert found.gradient_norm == pytest.approx(12 * 0.76)
    assert found.converged


def test_the_tolerance_works_with_lbfgs_and_with_batches():
    found = bl.ControlSolver(quadratic(), lbfgs).solve(ZERO, FOUR, steps=5, tolerance=1e-6)
    assert found.converged
    assert float(found.control) == pytest.approx(-1, abs=1e-6)
    solver = bl.ControlSolver(lambda batch: (quadratic(), batch), SGD)
    found = solver.solve(ZERO, steps=500, batches=[FOUR], tolerance=1e-6)
    assert found.converged
    assert float(found.control) == pytest.approx(-1, abs=1e-6)


def test_without_a_tolerance_nothing_is_called_converged_or_complained_about():
    assert not bl.ControlSolver(quadratic(), SGD).solve(ZERO, FOUR, steps=2).converged


def test_a_tolerance_that_is_missed_warns_by_default():
    solver = bl.ControlSolver(quadratic(), SGD)
    with pytest.warns(bl.ConvergenceWarning, match="the gradient norm is .* after 2 steps, above"):
        found = solver.solve(ZERO, FOUR, steps=2, tolerance=1e-6)
    assert not found.converged


def test_a_tolerance_that_is_missed_raises_if_asked_to():
    solver = bl.ControlSolver(quadratic(), SGD, on_failure="raise")
    with pytest.raises(ConvergenceError, match=r"after 2 steps, above the tolerance 1e-06"):
        solver.solve(ZERO, FOUR, steps=2, tolerance=1e-6)


def test_a_tolerance_that_is_missed_is_silent_if_asked_to():
    solver = bl.ControlSolver(quadratic(), SGD, on_failure="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not solver.solve(ZERO, FOUR, steps=2, tolerance=1e-6).converged


def test_a_callback_sees_each_iteration_and_can_stop_it():
    seen = []

    def callback(progress):
        seen.append((progress.step, progress.cost, float(progress.control)))
        assert not progress.control.requires_grad
        return progress.step == 3

    found = bl.ControlSolver(quadratic(), SGD).solve(ZERO, FOUR, steps=10, callback=callback)
    assert found.steps == 3
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert [cost for _, cost, _ in seen] == found.costs
    # theta_k + 1 = (1 - 0.24)^k
    assert [c for _, _, c in seen] == pytest.approx([0.76**k - 1 for k in (1, 2, 3)])


def test_a_state_that_is_not_finite_is_named_with_its_iteration():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u / (1 - c) if t == 2 else u + c), lambda u, c: u, 4
    )
    one = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(
        DivergenceError, match=r"iteration 1: the cost is inf.*u\(2\) is the first state"
    ):
        bl.ControlSolver(problem, SGD).solve(one, one)


def test_a_derivative_that_is_not_finite_is_told_from_a_state_that_is_not():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u + torch.sqrt(c - c)), lambda u, c: u + c, 2
    )
    with pytest.raises(DivergenceError, match=r"iteration 1: .* every state is finite"):
        bl.ControlSolver(problem, SGD).solve(FOUR, FOUR)


def test_an_iteration_that_diverges_later_names_the_iteration():
    # theta_k + 1 = (1 - 12 lr)^k overflows its square at 1e154, k = 78 with lr = 8.
    problem = quadratic()
    with pytest.raises(DivergenceError, match=r"iteration 7[89]:"):
        bl.ControlSolver(problem, lambda p: torch.optim.SGD(p, lr=8.0)).solve(ZERO, FOUR)


@pytest.mark.parametrize("optimizer", [SGD, lbfgs])
def test_the_callers_control_and_observation_are_left_as_they_were(optimizer):
    control, observation = fresh(C), fresh(U)
    found = bl.ControlSolver(tanh_problem(), optimizer).solve(control, observation, steps=2)
    assert_same(control.detach(), C, rtol=0)
    assert_same(observation.detach(), U, rtol=0)
    assert control.grad is None
    assert observation.grad is None
    assert (control._version, observation._version) == (0, 0)
    assert found.control.data_ptr() != control.data_ptr()


def test_integers_in_the_control_are_carried():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(c["c"] * u * c["n"])), lambda u, c: square(u), 3
    )
    found = bl.ControlSolver(problem, SGD).solve({"c": C, "n": torch.tensor(2)}, U, steps=2)
    assert int(found.control["n"]) == 2
    assert found.adjoint.gradient["n"] is None


def test_solving_works_under_no_grad():
    truth = bl.ControlSolver(tanh_problem(), lbfgs).solve(C, U, steps=1)
    with torch.no_grad():
        found = bl.ControlSolver(tanh_problem(), lbfgs).solve(C, U, steps=1)
    assert_same(found.control, truth.control, rtol=0)


SETTINGS = {
    "problem": tanh_problem(0.3),
    "optimizer": OPTIMIZERS["Adam"],
    "on_failure": "ignore",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_the_solver_changes_the_outcome(name):
    def outcome(solver):
        try:
            return solver.solve(C, U, steps=3, tolerance=1e-9).control.tolist()
        except ConvergenceError as error:
            return str(error)

    solver = bl.ControlSolver(tanh_problem(), SGD, on_failure="raise")
    changed = dataclasses.replace(solver, **{name: SETTINGS[name]})
    assert outcome(solver) != outcome(changed)
    both = [dataclasses.replace(s, on_failure="ignore") for s in (solver, changed)]
    if name != "on_failure":
        assert outcome(both[0]) != outcome(both[1])


def test_the_checkpointing_of_the_solver_is_that_of_its_sweeps():
    counts = []
    for checkpointing in CHECKPOINTINGS:
        solver = bl.ControlSolver(tanh_problem(horizon=4), SGD, checkpointing)
        counts.append(solver.solve(C, U, steps=1).adjoint.forward_steps)
    assert counts == [c.schedule(4).forward_steps for c in CHECKPOINTINGS]
    assert counts[:4] == [7, 4, 10, 8]


def test_wrong_fields_are_refused():
    with pytest.raises(ArgumentError, match=r"problem must be a ControlProblem .* got int"):
        bl.ControlSolver(3)
    with pytest.raises(ArgumentError, match=r"on_failure must be .* got 'shout'"):
        bl.ControlSolver(quadratic(), on_failure="shout")


def test_batches_go_with_a_build_function_only():
    with pytest.raises(ArgumentError, match="batches go with a solver that holds build"):
        bl.ControlSolver(quadratic(), SGD).solve(ZERO, FOUR, batches=[1])
    with pytest.raises(ArgumentError, match="batches go with a solver that holds build"):
        bl.ControlSolver(batch_problem, SGD).solve(ZERO, FOUR)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": -1}, "steps must be a whole number >= 0, got -1"),
        ({"tolerance": -1e-3}, "tolerance must be >= 0 and finite, got -0.001"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0 and finite, got nan"),
    ],
)
def test_negative_steps_or_tolerances_are_refused(setting, message):
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: u.square().sum(), 2)
    with pytest.raises(ArgumentError, match=message):
        bl.ControlSolver(problem).solve(torch.zeros(1), torch.ones(1), **setting)


THREE = [0.2, 0.4, 0.9]


def mean_by_hand(groups, optimizer):
    """Plain autograd on the mean of a few problems an update."""
    control = fresh(C)
    made = optimizer(wanted(control))
    costs = []
    for group in groups:
        made.zero_grad()
        cost = sum(plain_cost(*batch_problem(b), control) for b in group) / len(group)
        cost.backward()
        made.step()
        costs.append(float(cost.detach()))
    return tree.detach(control), costs


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_accumulated_batches_move_by_the_mean_of_their_gradients(optimizer):
    groups = [(0.2, 0.4), (0.9, 0.2), (0.4, 0.9)]  # a group reaches into the next round
    truth, costs = mean_by_hand(groups, OPTIMIZERS[optimizer])
    solver = bl.ControlSolver(batch_problem, OPTIMIZERS[optimizer])
    found = solver.solve(C, steps=3, batches=THREE, accumulate=2)
    assert_same(found.control, truth, rtol=1e-11)
    assert found.costs == pytest.approx(costs, rel=1e-12)


def test_accumulation_takes_what_an_optimiser_asks_for_again():
    def mean(batches):
        """One problem whose cost is the mean of two."""
        first, second = (batch_problem(b) for b in batches)
        both = bl.ControlProblem(
            bl.Map(
                lambda u, c, t: [
                    p.dynamics.step(x, c, t) for (p, _), x in zip((first, second), u, strict=True)
                ]
            ),
            lambda u, c: (first[0].terminal(u[0], c) + second[0].terminal(u[1], c)) / 2,
            3,
            first[0].running and (lambda u, c, t: 0.1 * square(c)),
        )
        return both, [first[1], second[1]]

    truth = bl.ControlSolver(mean, lbfgs).solve(C, steps=2, batches=[THREE[:2]])
    found = bl.ControlSolver(batch_problem, lbfgs).solve(
        C, steps=2, batches=THREE[:2], accumulate=2
    )
    assert_same(found.control, truth.control, rtol=1e-8)  # LBFGS magnifies rounding


def test_accumulation_without_batches_is_refused():
    message = r"accumulate needs a solver that holds build\(batch\) and a first-order optimiser"
    with pytest.raises(ArgumentError, match=message):
        bl.ControlSolver(tanh_problem(), SGD).solve(C, U, accumulate=2)
    with pytest.raises(ArgumentError, match=message):
        bl.ControlSolver(batch_problem, bl.NewtonCG()).solve(C, batches=THREE, accumulate=2)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ArgumentError, match="accumulate must be a whole number >= 1, got"):
            bl.ControlSolver(batch_problem, SGD).solve(C, batches=THREE, accumulate=wrong)


def test_a_budget_is_planned_once_for_each_shape_of_observation():
    calls = []

    def step(u, c, t):
        calls.append(len(u))
        return torch.tanh(c * u)

    def build(n):
        u = torch.linspace(0.1, 1, n, dtype=torch.float64)
        return bl.ControlProblem(bl.Map(step), lambda u, c: square(u), 3), u

    half = torch.tensor(0.5, dtype=torch.float64)
    graphs = bl.Checkpointing(block=None)
    truth = bl.ControlSolver(build, SGD, graphs).solve(half, steps=6, batches=[40, 50])
    plain = len(calls)
    calls.clear()
    budget = bl.Budget("1 MB")
    found = bl.ControlSolver(build, SGD, budget).solve(half, steps=6, batches=[40, 50])
    assert_same(found.control, truth.control, rtol=0)
    # Three steps are measured once for 40 entries and once for 50, though there are six updates:
    # each advanced and taped, and two pairs taped, after one step that leads there.
    assert len(calls) == plain + 2 * (1 + 3 * 2 + 2 * 2)


@pytest.mark.parametrize("optimizer", ["Adam", "momentum"])
def test_an_optimiser_that_gets_its_state_back_goes_on_bit_by_bit(optimizer):
    make, kept = OPTIMIZERS[optimizer], {}
    whole = bl.ControlSolver(tanh_problem(), make).solve(C, U, steps=9)
    first = bl.ControlSolver(tanh_problem(), make).solve(
        C, U, steps=4, callback=lambda seen: kept.update(seen.optimizer.state_dict())
    )

    def restored(leaves):
        made = make(leaves)
        made.load_state_dict(kept)
        return made

    rest = bl.ControlSolver(tanh_problem(), restored).solve(first.control, U, steps=5)
    assert_same(rest.control, whole.control, rtol=0)
    assert first.costs + rest.costs == whole.costs
