"""The penalty path: hypergradients by first derivatives, and what it knows of their error."""

from dataclasses import replace

import pytest
import torch
from bilevel_cases import CASES, logistic, ridge, scalar
from problems import real
from torch.autograd.function import once_differentiable

import bilevel as bl
from bilevel import errors, tree

F64 = torch.float64
SLOW_LOGISTIC = pytest.param(replace(logistic(), steps=100), marks=pytest.mark.slow)
EVERY = [
    case
    if "300" not in repr(case) and case.steps < 300
    else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
]


def solver_of(case, method=None, steps=None, **settings):
    method = bl.Penalty() if method is None else method
    steps = case.steps if steps is None else steps
    return bl.BilevelSolver(case.problem, bl.optim.SGD(case.step_size), steps, method, **settings)


def relative(found, exact):
    filled = tree.filled(found, exact), tree.filled(exact, found)
    return tree.norm(tree.subtract(*filled)) / tree.norm(exact)


@pytest.mark.parametrize("case", EVERY, ids=repr)
def test_it_is_exact_with_no_product_with_second_derivatives(case):
    found = solver_of(case).hypergradient(case.params, case.control)
    assert relative(found.gradient, case.exact) < 1e-8
    assert found.certificate.trustworthy
    assert found.certificate.products == 0
    assert found.certificate.curvature > 0
    assert found.linear is None


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("case", [ridge(20), SLOW_LOGISTIC], ids=repr)
def test_the_estimate_is_the_error_over_a_grid_of_strengths(case, order):
    for strength in (8.0, 64.0, 512.0):
        solver = solver_of(case, bl.Penalty(strength, order), certificate=bl.AgainstMinimiser(1.0))
        found = solver.hypergradient(case.params, case.control)
        error = relative(found.gradient, case.exact)
        assert 0.5 * error < found.certificate.error_estimate < 2 * error
        assert relative(found.certificate.corrected(), case.exact) < error


def test_the_error_falls_with_the_power_of_the_strength_that_the_order_says():
    case = logistic()
    for order in (1, 3):
        each = [
            solver_of(case, steps=60, method=bl.Penalty(s, order), certificate=None)
            .hypergradient(case.params, case.control)
            .gradient
            for s in (32.0, 64.0)
        ]
        coarse, fine = (relative(h, case.exact) for h in each)
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("steps", [12, 25, 50])
def test_inner_steps_that_end_too_early_are_in_the_estimate(steps):
    case = logistic()
    for strength in (None, 16.0, 65536.0):
        solver = solver_of(case, bl.Penalty(strength), steps, on_failure="ignore")
        found = solver.hypergradient(case.params, case.control)
        error = relative(found.gradient, case.exact)
        assert error / 3 < found.certificate.error_estimate < 4 * error


def test_an_inner_problem_far_from_its_end_is_not_trusted():
    case = logistic()
    with pytest.warns(bl.ConvergenceWarning, match="make more inner steps"):
        solver_of(case, steps=5).hypergradient(case.params, case.control)


def test_a_saddle_is_no_minimiser():
    problem = bl.BilevelProblem(
        lambda w, a, batch: (w[0] ** 2 - 1) ** 2 + (w[1] - a) ** 2,
        lambda w, a, batch: ((w - 1) ** 2)[1],
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.05), 200, bl.Penalty(), on_failure="ignore")
    found = solver.hypergradient(torch.zeros(2, dtype=F64), torch.tensor(0.5, dtype=F64))
    assert not found.certificate.trustworthy
    assert "saddle" in found.certificate.reason


@pytest.mark.parametrize("method", [bl.Penalty(), bl.Implicit(), bl.MLM()], ids=repr)
def test_a_shallow_saddle_among_many_unknowns_is_met_beside_many_steps(method):
    d = 500
    values = torch.cat([torch.linspace(0.1, 10, d - 1, dtype=F64), torch.tensor([-0.1]).to(F64)])
    problem = bl.BilevelProblem(
        lambda w, a, batch: (values * w**2).sum() / 2 + (w**4).sum() / 4 - a * w[:3].sum(),
        lambda w, a, batch: (w[:3] ** 2).sum(),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 200, method, on_failure="ignore")
    found = solver.hypergradient(torch.zeros(d, dtype=F64), torch.tensor(1.0, dtype=F64))
    assert "saddle" in found.certificate.reason


def fitted(dtype, scale=1.0):
    """Ridge regression, its outer objective times a number, and the exact hypergradient."""
    X, y, a = real(1, 10, 3), real(2, 10), torch.tensor(-1.0, dtype=F64)

    def outer(w, X):
        return scale * ((X[:4] @ w - 1) ** 2).sum()

    def exact(a):
        H = X.T @ X / 10 + a.exp() * torch.eye(3, dtype=F64)
        return outer(torch.linalg.solve(H, X.T @ y / 10), X)

    X_short, y_short = X.to(dtype), y.to(dtype)
    problem = bl.BilevelProblem(
        lambda w, a, b: ((X_short @ w - y_short) ** 2).sum() / 10 + a.exp() * (w**2).sum(),
        lambda w, a, b: outer(w, X_short),
    )
    return problem, torch.zeros(3, dtype=dtype), a.to(dtype), torch.func.grad(exact)(a)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "strength"),
    [(torch.float32, 1e10), (torch.float32, 1e20), (F64, 1e20), (torch.bfloat16, 1e4)],
)
def test_a_penalty_that_moves_the_params_by_rounding_alone_is_not_trusted(dtype, strength, order):
    problem, params, control, _ = fitted(dtype)
    method = bl.Penalty(strength, order)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 200, method, on_failure="ignore")
    found = solver.hypergradient(params, control)
    assert not found.certificate.trustworthy
    assert "lower the strength" in found.certificate.reason


RULES = [bl.optim.SGD(0.2), bl.optim.ProximalGradient(0.2, bl.prox.Box(-5.0, 5.0))]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(("dtype", "scale"), [(F64, 1e-30), (F64, 1e15), (torch.float32, 1e-20)])
def test_an_outer_objective_of_any_scale_is_seen(rule, dtype, scale):
    problem, params, control, exact = fitted(dtype, scale)
    found = bl.BilevelSolver(problem, rule, 200, bl.Penalty()).hypergradient(params, control)
    assert found.certificate.trustworthy
    assert abs(found.gradient - exact) <= 4e-3 * abs(exact)


class Once(torch.autograd.Function):
    """The square, as a fused kernel has it: its backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 2 * x * slope


class Never(torch.autograd.Function):
    """The square, whose backward refuses to be recorded."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivative")
        (x,) = ctx.saved_tensors
        return 2 * x * slope


@pytest.mark.parametrize("square", [Once.apply, Never.apply], ids=["once", "never"])
def test_no_second_derivative_is_asked_for(square):
    X, y, alpha = real(1, 30, 4), real(2, 30), real(3, 4)
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(X @ w - y).mean() / 2 + (a.exp() * square(w)).sum() / 2,
        lambda w, a, batch: square(w - 1).sum(),
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 300, bl.Penalty())
    found = solver.hypergradient(torch.zeros(4, dtype=F64), alpha)
    H = X.T @ X / 30 + alpha.exp().diag()
    w = torch.linalg.solve(H, X.T @ y / 30)
    exact = -alpha.exp() * w * torch.linalg.solve(H, 2 * (w - 1))
    assert relative(found.gradient, exact) < 1e-7
    assert found.certificate.trustworthy
    with pytest.raises((bl.BilevelError, RuntimeError)):
        bl.BilevelSolver(problem, bl.optim.SGD(0.5), 300, bl.Implicit()).hypergradient(
            torch.zeros(4, dtype=F64), alpha
        )


def test_a_compiled_objective_is_differentiated_once():
    case = ridge(2)
    inner = torch.compile(case.problem.inner, backend="aot_eager")
    problem = bl.BilevelProblem(inner, case.problem.outer)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(case.step_size), case.steps, bl.Penalty())
    found = solver.hypergradient(case.params, case.control)
    assert relative(found.gradient, case.exact) < 1e-7
    torch._dynamo.reset()


def test_in_float32_the_strength_is_chosen_against_its_rounding():
    case = ridge(20)
    single = [tree.map_leaves(lambda x: x.float(), x) for x in (case.params, case.control)]

    def cast(objective):
        return lambda w, a, batch: objective(w.double(), a.double(), batch).float()

    problem = bl.BilevelProblem(cast(case.problem.inner), cast(case.problem.outer))
    solver = bl.BilevelSolver(problem, bl.optim.SGD(case.step_size), case.steps, bl.Penalty())
    found = solver.hypergradient(*single)
    assert found.gradient.dtype == torch.float32
    assert relative(found.gradient.double(), case.exact) < 1e-3
    assert found.certificate.trustworthy


def test_a_warm_start_goes_on_from_the_multiplier():
    case = logistic()
    solver = solver_of(case, steps=100)
    cold = solver.hypergradient(case.params, case.control)
    warm = solver.hypergradient(case.params, case.control + 1e-3, warm=cold.warm)
    assert warm.warm.steps - cold.warm.steps <= cold.warm.steps
    exact = solver_of(case, bl.Implicit()).hypergradient(case.params, case.control + 1e-3)
    assert relative(warm.gradient, exact.gradient) < 1e-7
    found = bl.BilevelSolver(
        case.problem, bl.optim.SGD(case.step_size), 100, bl.Implicit()
    ).hypergradient(case.params, case.control, warm=cold.warm)
    assert found.linear.products < 12  # q of one is that of the other


@pytest.mark.parametrize(
    "rule",
    [
        bl.optim.SGD(0.3, momentum=0.5, weight_decay=lambda c: c["decay"].exp()),
        bl.optim.Adam(0.05, weight_decay=lambda c: c["decay"].exp()),
        bl.optim.ProximalGradient(0.3, bl.prox.L2(lambda c: c["decay"].exp())),
    ],
    ids=["SGD", "Adam", "L2"],
)
def test_what_the_rule_adds_to_the_objective_is_differentiated(rule):
    X, y = real(1, 12, 3), real(2, 12)
    problem = bl.BilevelProblem(
        lambda w, c, batch: ((X @ w - y - c["shift"]) ** 2).mean() / 2,
        lambda w, c, batch: ((w - 1) ** 2).sum() / 2,
    )
    control = {"decay": torch.tensor(-0.5, dtype=F64), "shift": torch.tensor(0.3, dtype=F64)}
    d = control["decay"].exp()
    H = X.T @ X / 12 + d * torch.eye(3, dtype=F64)
    w = torch.linalg.solve(H, X.T @ (y + 0.3) / 12)
    q = torch.linalg.solve(H, w - 1)
    exact = {"decay": -d * (w @ q), "shift": (X.T @ torch.ones(12, dtype=F64) / 12) @ q}
    solver = bl.BilevelSolver(problem, rule, 300, bl.Penalty())
    found = solver.hypergradient(torch.zeros(3, dtype=F64), control)
    assert relative(found.gradient, exact) < 1e-4
    assert found.certificate.trustworthy


def test_a_sparse_solution_has_the_hypergradient_of_its_support():
    X, y = real(1, 20, 8), real(2, 20)
    problem = bl.BilevelProblem(
        lambda w, a, batch: ((X @ w - y) ** 2).mean() / 2,
        lambda w, a, batch: ((w - 0.1) ** 2).sum() / 2,
    )
    rule = bl.optim.ProximalGradient(0.3, bl.prox.L1(lambda a: a.exp()))
    given = torch.zeros(8, dtype=F64), torch.tensor(-2.5, dtype=F64)
    methods = bl.Penalty(), bl.Implicit(bl.linear.GMRES())
    each = [bl.BilevelSolver(problem, rule, 250, m).hypergradient(*given) for m in methods]
    assert 0 < int((each[0].params == 0).sum()) < 8
    assert relative(each[0].gradient, each[1].gradient) < 1e-7


def test_a_set_that_moves_with_the_control_is_refused():
    problem = bl.BilevelProblem(
        lambda w, a, batch: ((w - 2) ** 2).sum(), lambda w, a, batch: (w**2).sum()
    )
    rule = bl.optim.ProximalGradient(0.3, bl.prox.Box(upper=lambda a: a))
    solver = bl.BilevelSolver(problem, rule, 10, bl.Penalty())
    with pytest.raises(errors.UnsupportedError, match="the set of Box moves with the control"):
        solver.hypergradient(torch.zeros(3), torch.tensor(1.0))


def test_a_control_of_the_steps_alone_is_refused():
    problem = bl.BilevelProblem(lambda w, c, batch: (w - 2) ** 2, lambda w, c, batch: w**2 + c["a"])
    rule = bl.optim.SGD(lambda c: c["rate"])
    solver = bl.BilevelSolver(problem, rule, 10, bl.Penalty())
    control = {"a": torch.tensor(1.0), "rate": torch.tensor(0.1)}
    with pytest.raises(errors.LostGradientError, match=r"rate.*Penalty differentiates the limit"):
        solver.hypergradient(torch.tensor(0.0), control)


def test_an_outer_objective_that_draws_draws_the_same_everywhere():
    case = ridge(20)

    def outer(w, a, batch):
        keep = torch.rand(w.shape) < 0.5
        return (keep * (w - 1) ** 2).sum()

    problem = bl.BilevelProblem(case.problem.inner, outer)
    each = []
    for method in (bl.Penalty(), bl.Implicit()):
        torch.manual_seed(3)
        solver = bl.BilevelSolver(problem, bl.optim.SGD(case.step_size), case.steps, method)
        each.append(solver.hypergradient(case.params, case.control).gradient)
    assert relative(*each) < 1e-7


def test_batches_of_the_steps_need_one_to_judge_by():
    case = logistic()
    X, y = real(12, 40, 4), (real(14, 40) > 0).double()
    problem = bl.BilevelProblem(
        lambda w, a, batch: (
            torch.nn.functional.binary_cross_entropy_with_logits(batch[0] @ w, batch[1])
            + (a.exp() * w**2).sum() / 2
        ),
        case.problem.outer,
    )
    rule = bl.optim.SGD(bl.ByStep(lambda t: 1.0 / (1 + t / 20)))
    batches = bl.Minibatches((X, y), 20)
    solver = bl.BilevelSolver(problem, rule, 100, bl.Penalty(64.0))
    with pytest.warns(bl.ConvergenceWarning, match="pass linear_batch="):
        solver.hypergradient(case.params, case.control, batches)
    whole = bl.BilevelSolver(problem, bl.optim.SGD(1.0), 400, bl.Implicit())
    exact = whole.hypergradient(case.params, case.control, (X, y)).gradient
    quiet = bl.BilevelSolver(problem, rule, 200, bl.Penalty(64.0), on_failure="ignore")
    found = quiet.hypergradient(case.params, case.control, batches, linear_batch=(X, y))
    assert relative(found.gradient, exact) < 0.1


def test_it_is_judged_against_the_minimiser_alone():
    case = scalar()
    steps = solver_of(case, certificate=bl.AgainstSteps(), on_failure="ignore")
    found = steps.hypergradient(case.params, case.control)
    assert "penalty path gives the derivative of the minimiser" in found.certificate.reason
    constants = bl.certificates.Constants(convexity=3.0, coupling=1.0, outer=2.0)
    solver = solver_of(case, certificate=bl.AgainstMinimiser(constants=constants))
    with pytest.raises(errors.ArgumentError, match="Penalty does not have"):
        solver.hypergradient(case.params, case.control)


def test_a_descent_by_it_ends_where_that_by_implicit_does():
    case = ridge(2)
    ends = [
        solver_of(case, method, 30, certificate=None)
        .solve(case.params, case.control, lambda p: torch.optim.SGD(p, 1.0), steps=8)
        .control
        for method in (bl.Penalty(), bl.Implicit())
    ]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.0}, "strength must be > 0"),
        ({"strength": -64.0}, "strength must be > 0"),
        ({"strength": float("inf")}, "strength must be > 0 and finite"),
        ({"strength": float("nan")}, "strength must be"),
        ({"strength": "large"}, "strength must be a number"),
        ({"order": 0}, "order must be a whole number >= 1"),
        ({"order": 2.5}, "order must be a whole number >= 1"),
        ({"order": True}, "order must be a whole number >= 1"),
        ({"order": 7}, "order must be at most 6"),
        ({"rtol": 1.0}, "rtol must be > 0 and < 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(errors.ArgumentError, match=message):
        bl.Penalty(**settings)


def test_an_outer_objective_too_stiff_for_the_strength_is_said():
    problem = bl.BilevelProblem(
        lambda w, a, batch: (w - a) ** 2 / 2, lambda w, a, batch: 1e6 * (w - 1) ** 2
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 200, bl.Penalty(8.0))
    with pytest.raises(errors.DivergenceError, match="raise the strength"):
        solver.hypergradient(torch.tensor(0.0), torch.tensor(0.5))
    chosen = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 200, bl.Penalty())
    found = chosen.hypergradient(torch.tensor(0.0, dtype=F64), torch.tensor(0.5, dtype=F64))
    assert float(found.gradient) == pytest.approx(-1e6, rel=1e-6)


def test_an_outer_objective_at_its_minimum_has_hypergradient_zero():
    problem = bl.BilevelProblem(
        lambda w, a, batch: (w - a) ** 2 / 2, lambda w, a, batch: (w - 1) ** 2
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(1.0), 20, bl.Penalty(), certificate=None)
    assert solver.hypergradient(torch.tensor(0.0), torch.tensor(1.0)).gradient == 0


def test_a_problem_by_its_residual_has_no_objective_to_add_to():
    problem = bl.BilevelProblem(
        residual=lambda w, a, batch: w**3 + w - a, outer=lambda w, a, batch: w**2
    )
    with pytest.raises(errors.ArgumentError, match="Penalty needs an inner objective"):
        bl.BilevelSolver(problem, bl.optim.FixedPoint(), 10, bl.Penalty())
