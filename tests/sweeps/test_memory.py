"""Measurements of a step, budgets, and the bytes that sweeps really use."""

import importlib

import pytest
import torch
from choices import FOLDER
from counting import calls as counted_calls
from problems import CASES, real, square
from reference import assert_same, fresh, plain_gradients
from torch import nn

import bilevel as bl
from bilevel.errors import ArgumentError
from bilevel.sweeps.memory import LiveBytes, bytes_of

measure = importlib.import_module("benchmarks.measure")
KIB = 1024


# --- Counting


def test_live_bytes_come_and_go_with_tensors():
    with LiveBytes() as live:
        x = torch.zeros(100)
        y = x[10:].view(9, 10).t()
        assert live.now == 400
        z = x + 1
        assert (live.now, live.peak) == (800, 800)
        z.add_(1)
        del x
        assert live.now == 800
        del y
        assert live.now == 400
        del z
    assert (live.now, live.peak) == (0, 800)


def test_live_bytes_leave_out_what_was_there_before():
    x = torch.zeros(100)
    with LiveBytes() as live:
        kept = [x.t(), x[3:], x.detach()]
        x.mul_(2)
    assert (live.now, live.peak) == (0, 0)
    assert bytes_of(kept) == 400


def test_live_bytes_see_a_graph_and_a_pull():
    x = torch.zeros(100, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sin()  # keeps exp(x), of which both derivatives are made
        assert live.now == 800
        (g,) = torch.autograd.grad(y, x, torch.ones(100))
        del y
        assert live.now == g.nbytes


def tanh_problem(horizon, per_step=False, rows=64, size=16):
    """tanh(u theta): one state a step is saved, and a theta of 1/4 state."""
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(u @ c)), lambda u, c: square(u), horizon
    )
    draw = [0.3 * real(i, size, size) for i in range(horizon if per_step else 1)]
    return problem, real(99, rows, size), bl.PerStep(draw) if per_step else draw[0]


@pytest.mark.parametrize("per_step", [False, True])
def test_a_measured_step_has_the_bytes_that_its_operations_keep(per_step):
    problem, observation, control = tanh_problem(20, per_step)
    found = bl.sweeps.measure(problem, observation, control)
    assert found.state_bytes == observation.nbytes
    assert found.graph_bytes == observation.nbytes + per_step * 16 * 16 * 8


def test_measuring_leaves_the_generator_and_the_arguments_alone():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: nn.functional.dropout(c * u)), lambda u, c: square(u), 30
    )
    before = torch.get_rng_state()
    found = bl.sweeps.measure(problem, real(1, 50), real(2, 50))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.state_bytes == 400 + before.nbytes  # a step that draws has its random state kept


@pytest.mark.parametrize("horizon", [5, 40])
def test_the_largest_of_distinct_steps_counts(horizon):
    def step(u, c, t):
        for w in c:
            u = torch.tanh(u @ w)
        return u

    wide = [real(1, 8, 8), real(2, 8, 8), real(3, 8, 8)]
    steps = [[real(t, 8, 8)] for t in range(horizon)]
    problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u), horizon)
    thin = bl.sweeps.measure(problem, real(4, 8, 8), bl.PerStep(steps))
    steps[3] = wide
    found = bl.sweeps.measure(problem, real(4, 8, 8), bl.PerStep(steps))
    assert thin.graph_bytes == 512 + 512
    assert found.graph_bytes == 3 * 512 + 3 * 512


def test_every_step_of_a_short_horizon_is_measured():
    def step(u, c, t):
        return torch.tanh(c * u).sin().cos() if t == 3 else torch.tanh(c * u)

    problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u), 5)
    assert bl.sweeps.measure(problem, real(1, 10), real(2, 10)).graph_bytes == 4 * 80 - 80


def test_running_costs_belong_to_the_graph_of_a_step():
    problem, observation, control = tanh_problem(3)
    costly = bl.ControlProblem(
        problem.dynamics, problem.terminal, 3, lambda u, c, t: u.exp().sin().sum()
    )
    plain = bl.sweeps.measure(problem, observation, control).graph_bytes
    assert bl.sweeps.measure(costly, observation, control).graph_bytes >= plain + observation.nbytes


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_case_can_be_measured_and_swept_within_the_least_budget(case):
    arguments = (case.problem, case.observation, case.control)
    found = bl.sweeps.measure(*arguments)
    assert found.state_bytes > 0
    least = found.working_bytes + found.state_bytes
    least += found.graph_bytes if case.problem.horizon else 0
    with pytest.raises(ArgumentError, match=f"too small.*at least {least} bytes"):
        bl.adjoint(*arguments, checkpointing=bl.Budget(least - 1))
    swept = bl.adjoint(*arguments, checkpointing=bl.Budget(least))
    _, gradient, observation_gradient = plain_gradients(*arguments)
    assert_same(swept.gradient, gradient)
    assert_same(swept.observation_gradient, observation_gradient)


# --- Budgets


@pytest.mark.parametrize("storage", [bl.InMemory(), bl.OnDisk(FOLDER)], ids=repr)
def test_a_budget_is_the_plan_of_its_measurement(storage):
    arguments = tanh_problem(40, per_step=True)
    found = bl.sweeps.measure(*arguments)
    size = 200 * KIB
    planned = bl.plan(
        40, size, found.state_bytes, found.graph_bytes, storage, working_bytes=found.working_bytes
    )
    swept = bl.adjoint(*arguments, checkpointing=bl.Budget(size, storage))
    assert 40 < swept.forward_steps == planned.forward_steps
    assert planned.storage == storage


def test_a_budget_serves_rollouts_and_solvers():
    problem, observation, control = tanh_problem(30)
    budget = bl.Budget("140 KiB")
    free, tight = fresh(control), fresh(control)
    square(bl.rollout(problem.dynamics, observation, free, 30)).backward()
    square(bl.rollout(problem.dynamics, observation, tight, 30, checkpointing=budget)).backward()
    assert_same(tight.grad, free.grad)
    solved = bl.ControlSolver(problem, checkpointing=budget).solve(control, observation, steps=2)
    assert solved.adjoint.forward_steps > 59


def test_something_else_than_a_checkpointing_is_refused():
    with pytest.raises(ArgumentError, match="must be a Checkpointing, a Budget or None, got int"):
        bl.adjoint(*tanh_problem(3), checkpointing=5)


# --- Bytes that are really used


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("kib", [130, 150, 250, 400, 900])
def test_a_sweep_stays_within_its_budget_beyond_the_gradient(kib, per_step):
    arguments = tanh_problem(60, per_step, rows=64)  # a state of 8 KiB, a theta of 2 KiB
    budget = bl.Budget(kib * KIB)

    def run():
        return bl.adjoint(*arguments, checkpointing=budget)

    gradient = bytes_of(run().gradient)
    peak = measure.peak_live_bytes(run)
    assert peak <= kib * KIB + gradient
    # And the budget is used: what is planned is not far above what lives.
    assert peak - gradient >= 0.5 * min(kib * KIB, 60 * 8 * KIB)


def test_a_sweep_on_disk_holds_a_few_states_only(tmp_path):
    arguments = tanh_problem(200)
    chosen = bl.Checkpointing(storage=bl.OnDisk(tmp_path))
    peak = measure.peak_live_bytes(lambda: bl.adjoint(*arguments, checkpointing=chosen))
    assert peak < 10 * 8 * KIB
    kept = measure.peak_live_bytes(lambda: bl.adjoint(*arguments))
    assert kept > 199 * 8 * KIB


def test_a_backward_of_a_rollout_holds_no_more_than_its_snapshots():
    problem, observation, control = tanh_problem(60)
    control = fresh(control)
    chosen = bl.Checkpointing(snapshots=5)

    def run():
        final = bl.rollout(problem.dynamics, observation, control, 60, checkpointing=chosen)
        return torch.autograd.grad(square(final), control)

    # Beside the snapshots: the loss and its gradient, two copies of u(T), a step and its pull.
    assert measure.peak_live_bytes(run) < (5 + 10) * 8 * KIB + 3 * torch.get_rng_state().nbytes


@pytest.mark.parametrize("horizon", [2500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_thousands_of_steps_run_in_the_memory_of_their_schedule(horizon):
    step = bl.Map(lambda u, c, t: u + 1e-4 * torch.sin(c * u))
    problem = bl.ControlProblem(step, lambda u, c: square(u), horizon)
    observation, control = real(1, 4), real(2, 4)
    chosen = bl.Checkpointing(snapshots=30, block=40)
    found = bl.adjoint(problem, observation, control, checkpointing=chosen)
    assert found.forward_steps == chosen.schedule(horizon).forward_steps
    with LiveBytes() as live:
        short = bl.ControlProblem(step, problem.terminal, 2000)
        bl.adjoint(short, observation, control, checkpointing=chosen)
    assert live.peak < (30 + 40 * 6) * 32 * 2 + 20_000
    h = 1e-6
    direction = real(3, 4)
    controls = torch.stack([control + h * direction, control - h * direction])
    plain = observation.expand(2, -1)
    for _ in range(horizon):
        plain = plain + 1e-4 * torch.sin(controls * plain)
    slope = float(square(plain[0]) - square(plain[1])) / (2 * h)
    assert float(found.gradient @ direction) == pytest.approx(slope, rel=1e-6)


def test_a_hessian_vector_product_stays_within_its_budget_beyond_what_it_returns():
    problem, observation, control = tanh_problem(60)
    budget = bl.Budget("300 KiB")

    def run():
        return bl.hvp(problem, observation, control, control, checkpointing=budget)

    returned = 2 * control.nbytes
    assert measure.peak_live_bytes(run) <= 300 * KIB + returned


def test_ten_thousand_steps_of_a_control_per_step_begin_at_once():
    class StopError(Exception):
        pass

    calls = []

    def step(u, c, t):
        calls.append(t)
        if len(calls) == 500:
            raise StopError
        return u + c

    horizon = 10**4
    control = bl.PerStep([torch.zeros(())] * horizon)
    problem = bl.ControlProblem(bl.Map(step), lambda u, c: u.sum(), horizon)
    chosen = bl.Checkpointing(snapshots=100, block=50)
    with counted_calls() as seen, pytest.raises(StopError):
        bl.adjoint(problem, torch.zeros(()), control, checkpointing=chosen)
    assert horizon < seen.made < 100 * horizon  # every leaf is looked at a few times


N, STEPS = 4096, 40
LARGE = real(11, N)
BUDGETS = {  # state, control, terminal cost, storage, and the budget in bytes of a state
    "a number": (LARGE, real(12, 1)[0], square, bl.InMemory(), 24),
    "a control like the state": (LARGE, real(12, N), square, bl.InMemory(), 34),
    "a control larger than the state": (
        real(11, 64),
        real(12, 64, 64) / 8,
        square,
        bl.InMemory(),
        900,
    ),
    "a control per step": (
        LARGE,
        bl.PerStep([real(t, N) for t in range(STEPS)]),
        square,
        bl.InMemory(),
        34,
    ),
    "a heavy terminal cost": (
        LARGE,
        real(12, N),
        lambda u: (1.1 * (1.1 * (1.1 * u).sin()).sin()).sin().sum(),
        bl.InMemory(),
        45,
    ),
    "on the host": (LARGE, real(12, N), square, bl.OnHost(), 34),
    "on disk": (LARGE, real(12, N), square, bl.OnDisk(FOLDER), 34),
}


@pytest.mark.parametrize("sweep", ["adjoint", "hvp"])
@pytest.mark.parametrize("name", BUDGETS)
def test_no_sweep_exceeds_its_budget_beyond_what_it_returns(name, sweep):
    state, control, cost, storage, states = BUDGETS[name]

    def step(u, c, t):
        return torch.tanh(c @ u if c.ndim == 2 else c * u)

    problem = bl.ControlProblem(bl.Map(step), lambda u, c: cost(u), STEPS)
    budget = bl.Budget(states * state.nbytes, storage)
    with LiveBytes() as live:
        if sweep == "hvp":
            found = bl.hvp(problem, state, control, control, checkpointing=budget)
            returned = found.gradient, found.product
        else:
            found = bl.adjoint(problem, state, control, checkpointing=budget)
            returned = found.gradient, found.observation_gradient
        beyond = live.peak - bytes_of(returned)
    # A state of the generator more or less, and 2 %.
    assert beyond <= 1.02 * budget.bytes + 2 * torch.get_rng_state().nbytes


def test_states_of_the_generator_wait_on_disk_with_the_states(tmp_path):
    step = bl.Map(lambda u, c, t: nn.functional.dropout(torch.tanh(c * u)))
    problem = bl.ControlProblem(step, lambda u, c: square(u), 400)
    given = problem, real(1, 8), real(2, 8)
    torch.manual_seed(1)
    expected = bl.adjoint(*given).gradient
    torch.manual_seed(1)
    with LiveBytes() as live:
        found = bl.adjoint(*given, checkpointing=bl.Checkpointing(storage=bl.OnDisk(tmp_path)))
    assert torch.equal(found.gradient, expected)
    assert live.peak < 20 * torch.get_rng_state().nbytes


@pytest.mark.parametrize(
    "states", [17, 26, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 40))]
)
def test_small_budgets_of_a_large_shared_control_are_kept(states):
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(u * c) + 0.1 * u), lambda u, c: square(u), 60
    )
    budget = bl.Budget(states * LARGE.nbytes)
    with LiveBytes() as live:
        found = bl.adjoint(problem, LARGE, real(12, N), checkpointing=budget)
        beyond = live.peak - bytes_of((found.gradient, found.observation_gradient))
    assert beyond <= 1.005 * budget.bytes


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(bl.optim.SGD(0.01), marks=pytest.mark.slow),
        bl.optim.SGD(0.01, momentum=0.9),
        pytest.param(
            bl.optim.SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
            marks=pytest.mark.slow,
        ),
        bl.optim.Adam(0.01),
        pytest.param(bl.optim.AdamW(0.01), marks=pytest.mark.slow),
        bl.optim.ProximalGradient(0.01, bl.prox.L1(0.1)),
    ],
    ids=repr,
)
def test_an_inner_iteration_stays_within_its_budget(rule):
    # Moments begin as one zero, which is no measure of what they take later.
    problem = bl.BilevelProblem(
        lambda w, a, _: ((w - a) ** 2 * (1 + w**2)).sum(), lambda w, a, _: square(w - 1)
    )
    budget = bl.Budget(48 * LARGE.nbytes)
    solver = bl.BilevelSolver(problem, rule, 100, bl.MLM(budget), certificate=None)
    params, control = torch.zeros_like(LARGE), real(12, N)
    with LiveBytes() as live:
        found = solver.hypergradient(params, control)
        beyond = live.peak - bytes_of((found.gradient, found.params))
    assert beyond <= 1.02 * budget.bytes
