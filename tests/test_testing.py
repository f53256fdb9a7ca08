"""The public checks: they pass what is right and catch what is wrong."""

import math
from dataclasses import replace

import pytest
import torch
from bilevel_cases import logistic, ridge, trees
from problems import cplx, real, square

import bilevel as bl
from bilevel.errors import ArgumentError


@pytest.mark.parametrize("draw", [real, cplx], ids=["real", "complex"])
def test_the_dot_product_test_tells_an_adjoint_from_a_transpose(draw):
    A = draw(1, 4, 3)
    like = draw(2, 3), draw(3, 4)
    right = bl.testing.dot_product_test(lambda v: A @ v, lambda w: A.mH @ w, *like)
    wrong = bl.testing.dot_product_test(lambda v: A @ v, lambda w: 1.01 * A.mH @ w, *like)
    assert right.difference <= 1e-15
    assert wrong.difference > 1e-4
    if draw is cplx:
        transposed = bl.testing.dot_product_test(lambda v: A @ v, lambda w: A.mT @ w, *like)
        assert transposed.difference > 0.01


def test_the_dot_product_test_takes_trees():
    tree = {"x": real(4, 3), "n": 3, "z": cplx(5, 2)}
    same = bl.testing.dot_product_test(lambda v: v, lambda v: v, tree)
    assert same.difference == 0
    assert same.forward == pytest.approx(same.adjoint)


def test_a_right_gradient_has_order_two_and_a_wrong_one_order_one():
    case = trees()

    def value(control):
        return case.problem.outer(case.params, control, None)

    gradient = torch.autograd.grad(
        value(
            control := bl.tree.map_leaves(
                lambda x: x.clone().requires_grad_() if bl.tree.is_variable(x) else x, case.control
            )
        ),
        [control["shift"], control["log"][1]],
    )
    right = {"shift": gradient[0], "log": (None, gradient[1]), "n": None}
    assert bl.testing.taylor_test(value, right, case.control).order == pytest.approx(2, abs=0.05)
    wrong = {**right, "shift": 1.001 * gradient[0]}
    assert bl.testing.taylor_test(value, wrong, case.control, largest=1e-4).order < 1.5


def test_a_linear_function_leaves_only_rounding():
    x = real(6, 3)
    assert bl.testing.taylor_test(lambda x: x.sum(), torch.ones_like(x), x).order == math.inf
    with pytest.raises(ArgumentError, match="n_steps must be a whole number >= 2"):
        bl.testing.taylor_test(lambda x: x.sum(), torch.ones_like(x), x, n_steps=1)


def check(case, steps, optimizer=None, **settings):
    solver = bl.BilevelSolver(
        case.problem, optimizer or bl.optim.SGD(case.step_size), steps, **settings
    )
    return bl.check_hypergradient(solver, case.params, case.control, n_directions=1)


# With strong decays, so that some tens of steps converge.
DECAYED = replace(logistic(), control=torch.zeros(4, dtype=torch.float64), step_size=0.7, steps=60)


@pytest.mark.parametrize("case", [ridge(3), ridge(3, complex_=True), DECAYED, trees()], ids=repr)
def test_every_method_is_compared_with_the_differences(case):
    found = check(case, min(case.steps, 120), certificate=None)
    errors = {type(row.method): row.error for row in found.rows}
    assert found.difference_error < 1e-6
    for method in (bl.Unrolled, bl.MLM, bl.Implicit):
        assert errors[method] < 1e-6
    assert errors[bl.OneStep] > 1e-3
    assert found.recommendation.startswith("Take Implicit")


def test_before_convergence_the_sweep_is_recommended_and_the_error_of_implicit_is_true():
    case = ridge(5)
    found = check(case, 3, certificate=None)
    rows = {type(row.method): row for row in found.rows}
    assert rows[bl.MLM].error < 1e-6
    assert rows[bl.Implicit].error > 0.01
    assert "Take MLM" in found.recommendation
    assert "% off" in found.recommendation


def test_the_table_has_a_row_for_each_method_and_says_what_does_not_apply():
    case = ridge(3)
    found = check(case, 20, bl.optim.SGD(lambda c: case.step_size * torch.sigmoid(c).mean()))
    text = str(found)
    assert [line.split()[0] for line in text.splitlines()[1:5]] == [
        "Unrolled",
        "MLM",
        "Implicit",
        "OneStep",
    ]
    assert found.recommendation in text
    start = bl.BilevelProblem(
        case.problem.inner,
        lambda w, c, batch: square(w),
        start=lambda w, c: w + c["start"],
    )
    learned = bl.BilevelProblem(lambda w, c, batch: square(w - 1), start.outer, start=start.start)
    solver = bl.BilevelSolver(learned, bl.optim.SGD(0.1), 3, certificate=None)
    table = bl.check_hypergradient(solver, case.params, {"start": real(7, 3)})
    assert "neither on step sizes nor on the start" in str(table)
    assert "Implicit does not apply" in table.recommendation


def test_objectives_that_draw_are_compared_draw_by_draw():
    def outer(w, a, batch):
        return (torch.nn.functional.dropout(w, 0.5) ** 2).sum() + (torch.rand(6).to(w) * a).sum()

    problem = bl.BilevelProblem(lambda w, a, batch: ((w - a) ** 2).sum(), outer)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.4), 30)
    control = torch.linspace(1, 2, 6, dtype=torch.float64)
    torch.manual_seed(2)
    after = torch.rand(())
    torch.manual_seed(2)
    check = bl.check_hypergradient(solver, torch.zeros(6, dtype=torch.float64), control)
    errors = {type(row.method).__name__: row.error for row in check.rows}
    assert max(errors[name] for name in ("Unrolled", "MLM", "Implicit")) < 1e-8
    assert check.recommendation.startswith("Take Implicit")
    assert torch.equal(torch.rand(()), after)  # the generator stands where it stood


def test_no_method_is_recommended_on_differences_that_do_not_settle():
    count = iter(range(10**6))

    def outer(w, a, batch):
        return (w**2).sum() * (1 + next(count) % 7)

    problem = bl.BilevelProblem(lambda w, a, batch: ((w - a) ** 2).sum(), outer)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.4), 30, bl.Unrolled(), certificate=None)
    point = torch.ones(2, dtype=torch.float64)
    check = bl.check_hypergradient(solver, point, 2 * point, methods=[bl.Implicit()])
    assert "do not settle" in check.recommendation


def test_an_objective_that_is_not_smooth_is_found_out():
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - a),
        lambda w, a, batch: (1e6 * w).round().sum() / 1e6 + square(w),
    )
    case = ridge(2)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.4), 30, certificate=None)
    found = bl.check_hypergradient(solver, case.params, case.control)
    assert "not smooth" in found.recommendation


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (lambda w, a, b: square(w) / 2 + (w * a.item()).sum() + a * w.sum(), lambda w, a, b: w @ w),
        (lambda w, a, b: square(w - a), lambda w, a, b: square(w - 1) * (1 + a.item() ** 2)),
        (lambda w, a, b: square(w - a), lambda w, a, b: square(w - 1) * w.data.sum()),
    ],
    ids=["inner", "outer, of the control", "outer, of the params"],
)
def test_a_gradient_that_is_cut_is_called_so(inner, outer):
    solver = bl.BilevelSolver(bl.BilevelProblem(inner, outer), bl.optim.SGD(0.3), 30)
    start, control = torch.zeros(2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    found = bl.check_hypergradient(solver, start, control)
    assert "a gradient is cut on the way" in found.recommendation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_directions": 0}, "n_directions must be a whole number >= 1, got 0"),
        ({"step": 0.0}, "step must be > 0 and finite, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    case = ridge(2)
    solver = bl.BilevelSolver(case.problem, bl.optim.SGD(0.4), 3)
    with pytest.raises(ArgumentError, match=message):
        bl.check_hypergradient(solver, case.params, case.control, **settings)


def test_proximal_gradient_is_compared_with_gmres():
    case = ridge(3)
    found = check(
        case, 200, bl.optim.ProximalGradient(case.step_size / 2, bl.prox.L2(0.3)), certificate=None
    )
    row = next(row for row in found.rows if isinstance(row.method, bl.Implicit))
    assert isinstance(row.method.linear, bl.linear.GMRES)
    assert row.error < 1e-6


CUTS = {
    "detach": lambda u, c, t: torch.tanh(c.detach() * u) + 0.1 * c,
    "item": lambda u, c, t: torch.tanh(c.detach()[0].item() * u) + 0.1 * c,
    "new tensor": lambda u, c, t: torch.tanh(torch.tensor(c.tolist(), dtype=c.dtype) * u) + 0.1 * c,
}


@pytest.mark.parametrize("name", CUTS)
def test_a_gradient_that_is_cut_inside_a_step_is_told_by_a_difference(name):
    problem = bl.ControlProblem(bl.Map(CUTS[name]), lambda u, c: (u**2).sum(), 4)
    found = bl.testing.check_gradient(problem, 1 + real(1, 3).abs(), real(2, 3))
    assert not found.agrees


class Cut(torch.autograd.Function):
    """tanh, whose backward has no derivative, and does not say so."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = torch.tanh(x).detach()
        return ctx.kept.clone()

    @staticmethod
    def backward(ctx, v):
        return v * (1 - ctx.kept**2)


@pytest.mark.filterwarnings("ignore:.*loses terms:bilevel.ConvergenceWarning")  # said at once, too
def test_a_backward_that_is_cut_is_told_by_a_difference_of_gradients():
    for function, right in ((torch.tanh, True), (Cut.apply, False)):
        step = bl.Map(lambda u, c, t, function=function: function(c * u))
        problem = bl.ControlProblem(step, lambda u, c: (u**2).sum(), 4)
        given = problem, 1 + real(1, 3).abs(), real(2, 3)
        assert bl.testing.check_gradient(*given).agrees
        assert bl.testing.check_product(*given).agrees == right


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["plain", "dropout", "running"])
def test_a_right_gradient_agrees_with_the_difference(name, dtype):
    def step(u, c, t):
        v = torch.tanh(c * u)
        return torch.nn.functional.dropout(v, 0.3) if name == "dropout" else v

    running = (lambda u, c, t: (c * u).sum() * 0.1) if name == "running" else None
    problem = bl.ControlProblem(bl.Map(step), lambda u, c: (u**2).sum(), 4, running)
    before = torch.get_rng_state()
    found = bl.testing.check_gradient(problem, real(1, 3).to(dtype), real(2, 3).to(dtype))
    assert found.agrees
    assert found.slope == pytest.approx(
        found.difference, rel=1e-6 if dtype == torch.float64 else 0.05
    )
    assert torch.equal(torch.get_rng_state(), before)
