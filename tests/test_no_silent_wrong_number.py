"""What other libraries get wrong without a word; each case here has a known right answer."""

import math
import warnings

import pytest
import torch
from bilevel_cases import ridge
from problems import cplx, real, square
from torch import nn

import bilevel as bl
from bilevel.errors import ArgumentError, DivergenceError, LostGradientError, StructureError

METHODS = [bl.Unrolled(), bl.MLM(), bl.Implicit()]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
LINEAR = [
    bl.linear.CG(),
    bl.linear.NormalCG(),
    bl.linear.GMRES(),
    bl.linear.Dense(),
    bl.linear.CG(rtol=0.0, max_steps=1000),
    bl.linear.Neumann(terms=20000, step=0.1, rtol=1e-11),
]


def gradient(problem, params, control, method, optimizer, steps, **settings):
    solver = bl.BilevelSolver(problem, optimizer, steps, method, certificate=None)
    return solver.hypergradient(params, control, **settings).gradient


@every_method
def test_a_one_dimensional_inner_problem(method):
    # Two peers return exactly 0. min (w - a)^2 / 2, F = w^2 / 2: the hypergradient is a.
    problem = bl.BilevelProblem(
        lambda w, a, batch: ((w - a) ** 2).sum() / 2, lambda w, a, batch: (w**2).sum() / 2
    )
    a = torch.tensor([0.7], dtype=torch.float64)
    found = gradient(problem, torch.zeros_like(a), a, method, bl.optim.SGD(0.5), 60)
    torch.testing.assert_close(found, a, rtol=1e-12, atol=0)


@every_method
def test_a_zero_dimensional_inner_variable(method):
    # Elsewhere: -0.0, or an exception.
    problem = bl.BilevelProblem(lambda w, a, batch: (w - a) ** 2, lambda w, a, batch: w**3)
    a = torch.tensor(0.7, dtype=torch.float64)
    found = gradient(problem, torch.tensor(0.0).double(), a, method, bl.optim.SGD(0.4), 60)
    torch.testing.assert_close(found, 3 * a**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("linear", LINEAR, ids=repr)
@pytest.mark.parametrize("d", [1, 2])
def test_every_linear_solver_returns_its_last_iterate_and_no_nan(linear, d):
    # One peer's CG reports the iterate before the last; others go on until 0 / 0.
    case = ridge(d)
    method = bl.Implicit(linear)
    optimizer = bl.optim.SGD(case.step_size)
    found = gradient(case.problem, case.params, case.control, method, optimizer, case.steps)
    torch.testing.assert_close(found, case.exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize("damping", [0.1, 10.0])
def test_damping_solves_the_damped_system_and_no_scaled_one(damping):
    case = ridge(3)
    optimizer = bl.optim.SGD(case.step_size)
    method = bl.Implicit(bl.linear.CG(rtol=1e-12, damping=damping))
    found = gradient(case.problem, case.params, case.control, method, optimizer, case.steps)
    w, a = case.minimiser, case.control
    H = torch.autograd.functional.hessian(lambda v: case.problem.inner(v, a, None), w)
    b = torch.func.grad(lambda v: case.problem.outer(v, a, None))(w)
    q = torch.linalg.solve(H + damping * torch.eye(3, dtype=torch.float64), b)
    torch.testing.assert_close(found, -q * a.exp() * w, rtol=1e-9, atol=0)


@every_method
def test_a_value_that_is_not_finite_is_an_error_and_never_replaced_by_zero(method):
    # The root of 0 has an infinite derivative: NaN in the hypergradient, which one peer zeroes.
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - a), lambda w, a, batch: (w - w.detach()).abs().sqrt().sum()
    )
    a = real(1, 3)
    with pytest.raises(DivergenceError, match=r"not finite|inf|nan"):
        gradient(problem, torch.zeros_like(a), a, method, bl.optim.SGD(0.4), 3)


@every_method
def test_a_diverging_inner_iteration_names_the_step_where_it_ends(method):
    problem = bl.BilevelProblem(
        lambda w, a, batch: (w**4).sum() + a * w.sum(), lambda w, a, batch: w.sum()
    )
    a = torch.tensor(1.0, dtype=torch.float64)
    w, steps = torch.tensor([2.0], dtype=torch.float64), 0
    while bool(w.isfinite().all()):
        w, steps = w - 1.0 * (4 * w**3 + a), steps + 1
    with pytest.raises(DivergenceError, match=f"not finite after step {steps} of 50"):
        start = torch.tensor([2.0], dtype=torch.float64)
        gradient(problem, start, a, method, bl.optim.SGD(1.0), 50)


@every_method
def test_buffers_of_a_module_stay_as_they_are(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    params, call = bl.functional(model)
    x, y = real(1, 8, 3), real(2, 8, 1)
    problem = bl.BilevelProblem(
        lambda p, a, batch: square(call(p, x) - y) + a.exp() * sum(square(v) for v in p.values()),
        lambda p, a, batch: square(call(p, x) - 1),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a = torch.tensor(0.0, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.ConvergenceWarning)  # five steps end at no minimum
        gradient(problem, params, a, method, bl.optim.SGD(0.01), 5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@every_method
def test_real_params_of_a_complex_state(method):
    # w real, the residual complex; one peer raises.
    A, b = cplx(1, 5, 3), cplx(2, 5)
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(A @ w.to(A.dtype) - b) / 10 + a.exp() * square(w) / 2,
        lambda w, a, batch: square(A @ (w + 1).to(A.dtype) - b),
    )
    a = torch.tensor(-0.5, dtype=torch.float64)
    H = (A.mH @ A).real / 5 + a.exp() * torch.eye(3, dtype=torch.float64)
    w = torch.linalg.solve(H, (A.mH @ b).real / 5)
    outer = 2 * (A.mH @ (A @ (w + 1).to(A.dtype) - b)).real
    exact = -(torch.linalg.solve(H, outer) @ w) * a.exp()
    start = torch.zeros(3, dtype=torch.float64)
    found = gradient(problem, start, a, method, bl.optim.SGD(0.3), 400)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=0)


HIDDEN = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


@every_method
@pytest.mark.parametrize(
    ("problem", "where"),
    [
        (
            bl.BilevelProblem(
                lambda w, a, batch: square(w - a) * HIDDEN, lambda w, a, batch: square(w)
            ),
            "inner objective",
        ),
        (
            bl.BilevelProblem(
                lambda w, a, batch: square(w - a), lambda w, a, batch: square(w) * HIDDEN
            ),
            "outer objective",
        ),
        (
            bl.BilevelProblem(
                lambda w, a, batch: square(w - a),
                lambda w, a, batch: square(w),
                start=lambda w, a: w + HIDDEN,
            ),
            "start|init",
        ),
        (
            bl.BilevelProblem(
                lambda w, a, batch: square(w - a) * batch, lambda w, a, batch: square(w)
            ),
            "inner objective",
        ),
    ],
    ids=["inner", "outer", "start", "batch"],
)
def test_a_tensor_whose_gradient_would_be_lost_is_refused(method, problem, where):
    a = real(1, 2)
    with pytest.raises(LostGradientError, match=where):
        gradient(problem, real(2, 2), a, method, bl.optim.SGD(0.1), 3, inner_batch=HIDDEN)


@every_method
def test_params_and_control_are_left_as_they_are(method):
    case = ridge(3)
    params, control = case.params.clone().requires_grad_(), case.control.clone().requires_grad_()
    before = params.detach().clone(), control.detach().clone()
    optimizer = bl.optim.SGD(case.step_size)
    found = gradient(case.problem, params, control, method, optimizer, 5)
    assert torch.equal(params, before[0])
    assert torch.equal(control, before[1])
    assert params.grad is None
    assert control.grad is None
    assert not found.requires_grad


@every_method
def test_a_hypergradient_under_no_grad_is_the_same(method):
    case = ridge(3)
    optimizer = bl.optim.SGD(case.step_size)
    expected = gradient(case.problem, case.params, case.control, method, optimizer, 5)
    with torch.no_grad():
        found = gradient(case.problem, case.params, case.control, method, optimizer, 5)
    assert torch.equal(found, expected)


def test_an_implicit_hypergradient_before_convergence_does_not_pass_for_the_limit():
    # 9.5 % wrong and no word said, elsewhere.
    case = ridge(20)
    solver = bl.BilevelSolver(case.problem, bl.optim.SGD(case.step_size / 3), 10, bl.Implicit())
    with pytest.warns(bl.ConvergenceWarning, match="not trustworthy"):
        found = solver.hypergradient(case.params, case.control)
    true = float((found.gradient - case.exact).norm() / case.exact.norm())
    assert true > 0.02
    assert not found.certificate.trustworthy
    assert found.certificate.error_estimate == pytest.approx(true, rel=0.01)


def test_a_linear_solve_that_did_not_converge_warns_without_a_certificate_too():
    case = ridge(20)
    method = bl.Implicit(bl.linear.CG(max_steps=2))
    solver = bl.BilevelSolver(
        case.problem, bl.optim.SGD(case.step_size), 50, method, certificate=None
    )
    with pytest.warns(bl.ConvergenceWarning, match="linear solve did not converge"):
        found = solver.hypergradient(case.params, case.control)
    assert not found.linear.converged


def test_cg_at_a_saddle_says_indefinite_and_names_what_to_use():
    problem = bl.BilevelProblem(
        lambda w, a, batch: a * (w[0] ** 2 - w[1] ** 2) / 2, lambda w, a, batch: w[1] + w[0]
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 0, bl.Implicit(), certificate=None)
    start = torch.ones(2, dtype=torch.float64)
    with pytest.warns(bl.ConvergenceWarning, match="singular or indefinite. Use NormalCG"):
        solver.hypergradient(start, torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("inner", "outer", "error", "message"),
    [
        (
            lambda w, a, b: w - a,
            lambda w, a, b: square(w),
            StructureError,
            "inner objective",
        ),
        (
            lambda w, a, b: square(w - a),
            lambda w, a, b: w,
            StructureError,
            "outer objective",
        ),
        (
            lambda w, a, b: square(w - a) * 1j,
            lambda w, a, b: square(w),
            StructureError,
            "inner objective must return a real scalar",
        ),
        (
            lambda w, a, b: square(w - a),
            lambda w, a, b: square(w) * 1j,
            StructureError,
            "outer objective must return a real scalar",
        ),
        (
            lambda w, a, b: square(w),
            lambda w, a, b: square(w),
            LostGradientError,
            "control reaches no objective, neither directly nor through the inner steps",
        ),
        (
            lambda w, a, b: square(a),
            lambda w, a, b: square(w),
            LostGradientError,
            "does not depend on the params",
        ),
        (
            lambda w, a, b: square(w.detach() - a),
            lambda w, a, b: square(w),
            LostGradientError,
            "does not depend on the params",
        ),
        (
            lambda w, a, b: square(w - a) * math.inf,
            lambda w, a, b: square(w),
            DivergenceError,
            "not finite after step 1",
        ),
    ],
)
@every_method
def test_a_wrong_objective_is_refused(method, inner, outer, error, message):
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(error, match=message):
        gradient(problem, real(1, 2), real(2, 2), method, bl.optim.SGD(0.1), 3)


@every_method
def test_a_control_that_only_sets_step_sizes_or_the_start(method):
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - 1) / 2,
        lambda w, a, batch: square(w),
        start=lambda w, a: w + a["start"],
    )
    control = {"rate": torch.tensor(-1.0).double(), "start": real(1, 2)}
    optimizer = bl.optim.SGD(lambda c: c["rate"].exp())
    arguments = problem, torch.zeros(2, dtype=torch.float64), control, method, optimizer, 2
    if isinstance(method, bl.Implicit):
        with pytest.raises(LostGradientError, match="neither on step sizes nor on the start"):
            gradient(*arguments)
        return
    # The params end at 1 + (1 - e^rate)^2 (start - 1).
    found = gradient(*arguments)
    e = control["rate"].exp()
    w = 1 + (1 - e) ** 2 * (control["start"] - 1)
    torch.testing.assert_close(found["start"], 2 * w * (1 - e) ** 2, rtol=1e-13, atol=0)
    slope = (2 * w * (control["start"] - 1)).sum() * -2 * (1 - e) * e
    torch.testing.assert_close(found["rate"], slope, rtol=1e-13, atol=0)


def test_a_control_per_step_is_refused_with_the_way_to_write_it():
    case = ridge(2)
    with pytest.raises(ArgumentError, match="ByStep"):
        gradient(
            case.problem,
            case.params,
            bl.PerStep([case.control]),
            bl.MLM(),
            bl.optim.SGD(1.0),
            1,
        )


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            lambda w, a: w[:1],
            r"start must return params like those given: params must be float64\[2\]",
        ),
        (lambda w, a: {"w": w}, "start must return params like those given"),
        (lambda w, a: w.float(), r"got float32\[2\]"),
    ],
)
@every_method
def test_a_start_of_another_structure_is_refused(method, start, message):
    problem = bl.BilevelProblem(lambda w, a, b: square(w - a), lambda w, a, b: square(w), start)
    with pytest.raises(StructureError, match=message):
        gradient(problem, real(1, 2), real(2, 2), method, bl.optim.SGD(0.1), 2)


@every_method
def test_a_step_that_changes_the_dtype_is_refused(method):
    problem = bl.BilevelProblem(lambda w, a, b: square(w - a), lambda w, a, b: square(w))
    optimizer = bl.optim.SGD(lambda a: 0.1 * a.abs())  # float64 sizes for float32 params
    with pytest.raises(StructureError, match=r"must be float32\[2\]"):
        gradient(problem, real(1, 2).float(), real(2, 2), method, optimizer, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem": 3}, "problem must be a BilevelProblem, got int"),
        ({"optimizer": torch.optim.SGD}, "inner optimiser such as bilevel.optim.SGD"),
        ({"method": bl.MLM}, "method must be a method such as MLM"),
        ({"certificate": True}, "certificate must be AgainstMinimiser"),
        ({"certificate": 3}, "certificate must be AgainstMinimiser"),
        ({"inner_steps": -1}, "inner_steps must be a whole number >= 0"),
        ({"inner_steps": 2.0}, "inner_steps must be a whole number >= 0"),
        ({"on_failure": "never"}, "on_failure must be"),
    ],
)
def test_a_solver_of_wrong_parts_is_refused(settings, message):
    given = {"problem": ridge(1).problem, "optimizer": bl.optim.SGD(0.1), **settings}
    with pytest.raises(ArgumentError, match=message):
        bl.BilevelSolver(**given)
