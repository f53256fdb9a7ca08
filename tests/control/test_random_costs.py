"""Costs that draw at random: as a plain loop draws them, whatever is kept, and anew each time."""

import pytest
import torch

import bilevel as bl
from bilevel.sweeps import OnDisk

HORIZON = 5
CHECKPOINTINGS = [
    bl.Checkpointing(),
    bl.Checkpointing(block=2),
    bl.Checkpointing(snapshots=1),
    bl.Checkpointing(snapshots=2, block=2),
    bl.Checkpointing(block=None),
]
DRAWS = ["terminal", "running", "step", "all", "now and then"]


def drawn(x):
    return x * torch.rand((), dtype=x.dtype)


def problem_of(draws):
    def step(u, theta, t):
        u = torch.tanh(theta[0] * u + theta[1])
        return drawn(u) if draws in ("step", "all") else u

    def running(u, theta, t):
        cost = (theta[0] * u**2).sum()
        now = draws in ("running", "all") or (draws == "now and then" and t == 3)
        return drawn(cost) if now else cost

    def terminal(u, control):
        cost = ((u - control[1]) ** 2).sum()
        return drawn(cost) if draws in ("terminal", "all", "now and then") else cost

    return bl.ControlProblem(bl.Map(step), terminal, HORIZON, running)


def point():
    u = torch.tensor([0.3, -1.2], dtype=torch.float64)
    theta = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    return u, theta


def plain_loop(problem, u, control):
    total = 0.0
    for t in range(1, problem.horizon + 1):
        total = total + problem.running(u, control, t)
        u = problem.dynamics.step(u, control, t)
    return total + problem.terminal(u, control)


def truth(problem):
    """Cost, gradient and Hessian product under a seed, and where the generator stands."""
    u, control = point()
    control = [x.clone().requires_grad_() for x in control]
    torch.manual_seed(7)
    cost = plain_loop(problem, u, control)
    end = torch.get_rng_state()
    gradient = torch.autograd.grad(cost, control, create_graph=True)
    product = torch.autograd.grad(sum(gradient), control)
    return cost, gradient, product, end


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)
@pytest.mark.parametrize("draws", DRAWS)
def test_every_sweep_draws_what_the_plain_loop_draws(draws, checkpointing):
    problem = problem_of(draws)
    cost, gradient, product, end = truth(problem)
    u, control = point()
    direction = (torch.ones((), dtype=u.dtype), torch.ones((), dtype=u.dtype))
    given = {"checkpointing": checkpointing}
    for sweep in (bl.adjoint, bl.total_cost, bl.hvp):
        torch.manual_seed(7)
        if sweep is bl.total_cost:
            leaves = [x.clone().requires_grad_() for x in control]
            found_cost = bl.total_cost(problem, u, tuple(leaves), **given)
            assert torch.equal(torch.get_rng_state(), end)
            found = torch.autograd.grad(found_cost, leaves, create_graph=True)
            second = torch.autograd.grad(sum(found), leaves)
            torch.testing.assert_close(second, product)
        elif sweep is bl.hvp:
            record = bl.hvp(problem, u, control, direction, **given)
            found_cost, found = record.cost, record.gradient
            torch.testing.assert_close(record.product, product)
        else:
            record = bl.adjoint(problem, u, control, **given)
            found_cost, found = record.cost, record.gradient
        torch.testing.assert_close(found_cost, cost)
        torch.testing.assert_close(tuple(found), gradient)
        assert torch.equal(torch.get_rng_state(), end), sweep.__name__


def test_snapshots_on_disk_keep_the_draws(tmp_path):
    problem = problem_of("all")
    _, gradient, _, _ = truth(problem)
    torch.manual_seed(7)
    found = bl.adjoint(problem, *point(), checkpointing=bl.Checkpointing(3, 1, OnDisk(tmp_path)))
    torch.testing.assert_close(found.gradient, gradient)


@pytest.mark.parametrize("draws", DRAWS)
def test_the_lagrangian_and_its_residuals_see_the_same_draws(draws):
    problem = problem_of(draws)
    cost, gradient, _, _ = truth(problem)
    torch.manual_seed(7)
    swept = bl.adjoint(problem, *point(), keep_states=True, keep_multipliers=True)
    torch.manual_seed(7)
    value = bl.lagrangian(problem, *point(), swept.states, swept.multipliers)
    torch.testing.assert_close(value, cost)
    torch.manual_seed(7)
    residuals = bl.kkt(problem, *point(), swept.states, swept.multipliers)
    assert max(residuals.feasibility, residuals.costate) < 1e-12
    torch.testing.assert_close(residuals.stationarity, float(torch.stack(gradient).detach().norm()))


def test_a_minibatch_of_the_terminal_cost_is_drawn_anew_by_each_sweep():
    seen = set()

    def terminal(u, control):
        chosen = int(torch.randint(512, ()))
        seen.add(chosen)
        return control * u

    problem = bl.ControlProblem(bl.Map(lambda u, c, t: c * u), terminal, 3)
    torch.manual_seed(0)
    for _ in range(50):
        bl.adjoint(problem, torch.tensor(1.0), torch.tensor(0.5))
    assert len(seen) > 40


@pytest.mark.parametrize(
    "method",
    [bl.MLM(), bl.Unrolled(), bl.MLM(checkpointing=bl.Checkpointing(block=None))],
    ids=repr,
)
def test_an_outer_objective_with_dropout_draws_the_same_masks_in_every_method(method):
    def outer(w, a, batch):
        return (torch.nn.functional.dropout(w, 0.5) ** 2).sum() + a

    problem = bl.BilevelProblem(lambda w, a, batch: ((w - a) ** 2).sum() / 2, outer)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 4, method, certificate=None)
    w, a = torch.zeros(8, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    torch.manual_seed(3)
    values = [float(solver.hypergradient(w, a).value) for _ in range(3)]
    # w = 1 - 0.5^4 after four steps; a kept entry is doubled.
    torch.manual_seed(3)
    reached = torch.full_like(w, 1 - 0.5**4)
    expected = [float(outer(reached, a, None)) for _ in range(3)]
    assert values == pytest.approx(expected)
    assert len(set(values)) > 1


@pytest.mark.parametrize(
    "method", [bl.MLM(), bl.Unrolled(), bl.Implicit(), bl.OneStep()], ids=lambda m: type(m).__name__
)
def test_a_certificate_sees_the_draw_of_the_outer_objective_and_makes_none_itself(method):
    def outer(w, a, batch):
        return (torch.rand(3, dtype=w.dtype) * (w - 1) ** 2).sum()

    problem = bl.BilevelProblem(lambda w, a, batch: ((w - a) ** 2).sum(), outer)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.4), 30, method, on_failure="ignore")
    w, a = torch.zeros(3, dtype=torch.float64), torch.tensor([2.0, 3, 4], dtype=torch.float64)
    torch.manual_seed(7)
    found = [solver.hypergradient(w, a) for _ in range(3)]
    torch.manual_seed(7)
    for one in found:
        weights = torch.rand(3, dtype=torch.float64)
        gradient = 2 * weights * (a - 1)
        assert float(one.value) == pytest.approx(float((weights * (a - 1) ** 2).sum()))
        if isinstance(method, bl.OneStep):  # leaves out 0.2 of every entry
            gradient *= 0.8
            assert one.certificate.error_estimate == pytest.approx(0.2)
        else:
            assert one.certificate.trustworthy, one.certificate
            assert one.certificate.error_estimate < 1e-10
        assert torch.allclose(one.gradient, gradient)


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)
def test_a_sweep_that_draws_nothing_leaves_the_generator_to_other_threads(checkpointing):
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: c * u), lambda u, c: u, 4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    others = []  # drawn on the way back, as another thread would
    bl.adjoint(
        problem,
        torch.tensor(1.0),
        torch.tensor(0.5),
        checkpointing=checkpointing,
        stop=lambda swept: others.append(torch.rand(())),
    )
    others += [torch.rand(()) for _ in range(3)]
    torch.testing.assert_close(torch.stack(others[:3]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [True, False])
def test_costs_of_a_short_dtype_are_summed_in_a_longer_one(dtype, cast):
    def running(u, control, t):
        return u.float() * 33.0 if cast else u * 33.0

    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u + (0 * c).to(u)),
        lambda u, c: 6 * u.float() * c,
        91,
        running,
    )
    one = torch.ones((), dtype=dtype)
    for found in (
        bl.total_cost(problem, one, torch.ones(())),
        bl.adjoint(problem, one, torch.ones(()), checkpointing=bl.Checkpointing(block=50)).cost,
        bl.hvp(problem, one, torch.ones(()), torch.ones(())).cost,
    ):
        assert found.dtype == torch.float32
        assert float(found) == 3009  # odd numbers above 2048 are none of float16


def test_a_total_cost_has_the_dtype_of_its_costs():
    for dtype in (torch.float32, torch.float64):
        one = torch.ones((), dtype=dtype)
        problem = bl.ControlProblem(
            bl.Map(lambda u, c, t: u * c), lambda u, c: u, 2, lambda u, c, t: u
        )
        assert bl.total_cost(problem, one, one).dtype == dtype
