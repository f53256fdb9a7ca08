"""Certificates: the estimate against the true error, what is trusted, and every reason not to."""

import math

import pytest
import torch
from bilevel_cases import logistic, ridge, scalar, trees
from problems import real, square

import bilevel as bl
from bilevel import ByStep
from bilevel.autodiff import Linearisation
from bilevel.errors import ArgumentError

QUADRATICS = [
    ridge(1),
    ridge(2),
    ridge(20),
    ridge(2, complex_=True),
    ridge(20, complex_=True),
    ridge(20, scalar_control=True),
    scalar(),
    trees(),
]


def judged(problem, params, control, steps, step_size=0.1, batch=None, **settings):
    """A hypergradient by `Unrolled` and gradient descent, unless set otherwise; no warnings."""
    chosen = {"optimizer": bl.optim.SGD(step_size), "method": bl.Unrolled(), **settings}
    solver = bl.BilevelSolver(problem, inner_steps=steps, on_failure="ignore", **chosen)
    return solver.hypergradient(params, control, inner_batch=batch)


def of_case(case, steps, slower=1.0, **settings):
    return judged(
        case.problem, case.params, case.control, steps, slower * case.step_size, **settings
    )


def distance(found, exact):
    """Relative distance of two hypergradients."""
    zero = bl.tree.zeros_like(exact)
    whole = bl.tree.map_leaves(lambda z, x: z if x is None else x, zero, found)
    return bl.tree.norm(bl.tree.subtract(whole, exact)) / bl.tree.norm(exact)


# --- the estimate against the truth


@pytest.mark.parametrize("case", QUADRATICS, ids=repr)
def test_on_quadratics_the_estimate_is_the_error(case):
    errors, steps, true = [], 1, 1.0
    while true > 1e-3:
        found = of_case(case, steps, slower=0.25)
        true, steps = distance(found.gradient, case.exact), int(1.25 * steps) + 1
        if 1e-4 <= true <= 0.9:
            errors.append(true)
            assert found.certificate.error_estimate == pytest.approx(true, rel=1e-2)
            leaves = found.certificate.error_by_leaf.values()
            assert found.certificate.trustworthy == (max([true, *leaves]) <= 2e-2)
            assert distance(found.certificate.corrected(), case.exact) <= 1e-2 * true
    assert max(errors) > 0.3
    assert min(errors) < 1e-3


@pytest.mark.parametrize(
    "method", [bl.MLM(), bl.MLM(last=3), bl.OneStep(), bl.Implicit()], ids=repr
)
@pytest.mark.parametrize("case", [ridge(20), ridge(2, complex_=True), trees()], ids=repr)
def test_the_estimate_covers_what_a_method_leaves_out(method, case):
    found = of_case(case, 12, slower=0.5, method=method)
    true = distance(found.gradient, case.exact)
    assert true > 1e-3
    assert found.certificate.error_estimate == pytest.approx(true, rel=1e-2)


@pytest.mark.parametrize(
    "optimizer",
    [bl.optim.SGD(0.05, momentum=0.8), bl.optim.Adam(0.03)],
    ids=lambda o: type(o).__name__,
)
def test_the_estimate_does_not_ask_which_rule_made_the_steps(optimizer):
    case = ridge(20)
    found = of_case(case, 25, optimizer=optimizer)
    true = distance(found.gradient, case.exact)
    assert true > 1e-3
    assert found.certificate.error_estimate == pytest.approx(true, rel=1e-2)


def classification(seed, d, decay, vector):
    """Logistic regression with one or d weight decays, and a step size of one over L."""
    draw = torch.Generator().manual_seed(seed)
    X, V = (torch.randn(n, d, generator=draw, dtype=torch.float64) for n in (50, 40))
    truth = torch.randn(d, generator=draw, dtype=torch.float64)
    y, z = (
        torch.sign(A @ truth + torch.randn(len(A), generator=draw, dtype=torch.float64))
        for A in (X, V)
    )

    def loss(w, A, labels):
        return torch.nn.functional.softplus(-labels * (A @ w)).mean()

    problem = bl.BilevelProblem(
        lambda w, a, batch: loss(w, X, y) + (a.exp() * w * w).sum() / 2,
        lambda w, a, batch: loss(w, V, z),
    )
    control = torch.full((d,) if vector else (), decay, dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(X.T @ X)[-1]) / 200 + math.exp(decay)

    def exact(w):
        """The hypergradient at the minimiser, by damped Newton steps from w, in closed form."""
        strength = math.exp(decay) * torch.eye(d, dtype=torch.float64)

        def slope(w, A, labels):
            return A.T @ (-labels * torch.sigmoid(-labels * (A @ w))) / len(A)

        def step(w):
            p = torch.sigmoid(y * (X @ w))
            H = X.T @ (X * (p * (1 - p))[:, None]) / len(X) + strength
            return H, torch.linalg.solve(H, slope(w, X, y) + strength @ w)

        for _ in range(25):
            _, p = step(w)
            w = w - p / max(1.0, float(p.norm()))
        q = torch.linalg.solve(step(w)[0], slope(w, V, z))
        each = -math.exp(decay) * q * w
        return each if vector else each.sum()

    return problem, torch.zeros(d, dtype=torch.float64), control, 1 / largest, exact


DECAYS = ((-1.0, False), (-2.5, True), (-3.5, False), (-4.5, True), (-6.0, False))
LOGISTICS = [
    (steps, d, *decay)
    for grid, sizes in (((10, 20, 45, 100), (2, 6, 12, 30)), ((15, 300), (4, 20)))
    for steps in grid
    for d in sizes
    for decay in DECAYS
]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_on_a_hundred_logistic_regressions_no_trust_is_wrong(every):
    ratios, trusted, sound = [], 0, 0
    chosen = [*enumerate(LOGISTICS)][::every]  # every third has each size, decay and step count
    for seed, (steps, d, decay, vector) in chosen:
        problem, start, control, step_size, exact = classification(seed, d, decay, vector)
        found = judged(problem, start, control, steps, step_size)
        certificate, truth = found.certificate, exact(found.params)
        true = distance(found.gradient, truth)
        assert true <= 2e-2 or not certificate.trustworthy
        trusted += certificate.trustworthy
        sound += certificate.corrected() is not None
        if certificate.corrected() is not None and true > 1e-7:
            ratios.append(certificate.error_estimate / true)
            assert distance(certificate.corrected(), truth) < true
        assert certificate.trustworthy == (true <= 2e-2)  # nothing is distrusted without need
    assert len(LOGISTICS) == 100
    assert trusted >= 0.45 * len(chosen)
    assert sound >= 0.9 * len(chosen)
    assert min(ratios) > 0.99
    assert max(ratios) < 3


def lasso():
    """Lasso with one penalty; its hypergradient on the active set in closed form."""
    X, V = real(21, 40, 12), real(22, 30, 12)
    sparse = real(23, 12) * (real(24, 12) > 0)
    y, z = X @ sparse + 0.3 * real(25, 40), V @ sparse + 0.3 * real(26, 30)
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(X @ w - y) / 80, lambda w, a, batch: square(V @ w - z) / 60
    )
    control = torch.tensor(-2.0, dtype=torch.float64)
    step_size = 40 / float(torch.linalg.eigvalsh(X.T @ X)[-1])
    w = torch.zeros_like(sparse)
    for _ in range(1500):
        w = w - step_size * X.T @ (X @ w - y) / 40
        w = w.sign() * (w.abs() - step_size * control.exp()).relu()
    on = w != 0
    q = torch.linalg.solve(X[:, on].T @ X[:, on] / 40, V[:, on].T @ (V @ w - z) / 30)
    rule = bl.optim.ProximalGradient(step_size, bl.prox.L1(lambda a: a.exp()))
    return problem, torch.zeros_like(sparse), control, rule, -control.exp() * (q @ w[on].sign())


def test_the_estimate_holds_for_proximal_gradient_on_the_lasso():
    problem, start, control, rule, exact = lasso()
    for steps in (3, 8, 20, 60, 150):
        found = judged(problem, start, control, steps, optimizer=rule)
        true = distance(found.gradient, exact)
        # Steps that meet other kinks than the minimiser cost some of the sharpness.
        assert found.certificate.error_estimate == pytest.approx(true, rel=0.06, abs=1e-8)
        assert found.certificate.trustworthy == (true <= 2e-2)


def test_in_single_precision_the_estimate_is_as_good_as_the_numbers():
    case = ridge(20)
    problem = bl.BilevelProblem(
        lambda w, a, batch: case.problem.inner(w.double(), a.double(), None).float(),
        lambda w, a, batch: case.problem.outer(w.double(), a.double(), None).float(),
    )
    found = judged(problem, case.params.float(), case.control.float(), 60, 0.1)
    true = distance(found.gradient.double(), case.exact)
    assert found.certificate.error_estimate == pytest.approx(true, rel=2e-2)
    converged = judged(
        problem, case.params.float(), case.control.float(), case.steps, case.step_size
    )
    assert distance(converged.gradient.double(), case.exact) < 1e-5
    assert converged.certificate.trustworthy


def test_a_residual_of_rounding_errors_is_trusted():
    case = logistic()
    for method, steps in ((bl.Implicit(bl.linear.CG(rtol=1e-12)), 1200), (bl.Unrolled(), 600)):
        found = of_case(case, steps, method=method)
        assert distance(found.gradient, case.exact) < 1e-9
        assert found.certificate.error_estimate < 1e-6
        assert found.certificate.trustworthy


def test_columns_are_judged_together():
    centres, goals = real(31, 3, 4), real(32, 2, 4)
    weights = bl.TaskWeights(n_tasks=3, n_validations=2)
    problem = bl.weighted_problem(
        lambda w, batch: (w - centres).square().sum(-1),
        lambda w, batch: (w - goals).square().sum(-1),
        weights,
    )
    start = weights.stacked(torch.zeros(4, dtype=torch.float64))
    alpha = real(33, 3, 2)
    # theta_j = sum_i s_ij c_i, and dF_j / ds_ij = 2 <theta_j - g_j, c_i>.
    sigma = alpha.softmax(0)
    slopes = 2 * centres @ (sigma.T @ centres - goals).T
    exact = sigma * (slopes - (sigma * slopes).sum(0))
    for steps in (2, 6, 12):
        found = judged(problem, start, alpha, steps, 0.15)
        true = distance(found.gradient, exact)
        assert found.certificate.error_estimate == pytest.approx(true, rel=1e-2)


# --- what is in a certificate


def test_the_record_says_what_was_measured():
    case = ridge(20)
    found = of_case(case, 12, slower=0.5)
    certificate = found.certificate
    w = found.params.clone().requires_grad_()
    (g,) = torch.autograd.grad(case.problem.inner(w, case.control, None), w)
    assert certificate.inner_residual == pytest.approx(float(g.norm()), rel=1e-12)
    assert 0 < certificate.linear_residual < 1e-7
    assert certificate.bound is None
    assert certificate.target == "the exact inner minimiser"
    torch.testing.assert_close(certificate.corrected(), case.exact, rtol=1e-5, atol=1e-8)


def test_the_linear_residual_is_that_of_implicit():
    case = ridge(20)
    found = of_case(case, case.steps, method=bl.Implicit(bl.linear.CG(rtol=1e-2)))
    assert found.certificate.linear_residual == found.linear.residual > 1e-4
    true = distance(found.gradient, case.exact)
    assert found.certificate.error_estimate == pytest.approx(true, rel=1e-2)


@pytest.mark.parametrize("method", [bl.MLM(), bl.Implicit()], ids=repr)
@pytest.mark.parametrize("case", [ridge(20), logistic(), trees()], ids=repr)
def test_products_are_counted(method, case, monkeypatch):
    made = 0

    def counted(plain):
        def counting(*arguments):
            nonlocal made
            made += 1
            return plain(*arguments)

        return counting

    for name in ("pull", "pull_all", "push"):
        monkeypatch.setattr(Linearisation, name, counted(getattr(Linearisation, name)))
    quiet = of_case(case, 12, slower=0.5, method=method, certificate=None)
    without, made = made, 0
    found = of_case(case, 12, slower=0.5, method=method)
    assert quiet.certificate is None
    assert found.certificate.products == made - without <= 50


def test_a_certificate_prints_as_a_sentence():
    found = of_case(ridge(20), 12, slower=0.5)
    certificate = found.certificate
    assert str(certificate) == (
        f"estimated relative error {certificate.error_estimate:.1e} (an estimate, not a bound) "
        f"against the exact inner minimiser; inner residual {certificate.inner_residual:.1e} with "
        f"the inner batch given; linear residual {certificate.linear_residual:.1e}; "
        f"curvature {certificate.curvature:.1e} or more along 20 directions; "
        f"{certificate.products} products with second derivatives; not trustworthy: the error is "
        "above trust=0.02; make more inner steps, or take the corrected hypergradient."
    )
    good = of_case(ridge(20), 400)
    assert str(good.certificate).endswith("products with second derivatives; trustworthy.")


def test_with_batches_the_last_one_is_judged_and_named():
    def inner(w, a, batch):
        return square(w - a * batch) / 2 + square(w) / 2

    problem = bl.BilevelProblem(inner, lambda w, a, batch: square(w - 1))
    start, a = torch.zeros(2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    batches = ByStep(lambda t: float(t))
    for method in (bl.MLM(), bl.Implicit()):
        solver = bl.BilevelSolver(
            problem, bl.optim.SGD(0.3), 30, method, bl.AgainstMinimiser(), on_failure="ignore"
        )
        found = solver.hypergradient(start, a, batches)
        assert not found.certificate.trustworthy
        assert "pass linear_batch=, all data or a large batch" in found.complaint
        # The problem of the batch t: w = a t / 2, h = <2 (w - 1), t / 2> over two entries.
        found = solver.hypergradient(start, a, batches, linear_batch=30.0)
        assert "with the linear batch given" in str(found.certificate)
        torch.testing.assert_close(found.certificate.corrected(), 2 * 30 * (a * 15 - 1))


def test_implicit_warns_of_batches_that_nothing_judges():
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - a * batch) / 2, lambda w, a, batch: square(w - 1)
    )
    start, a = torch.zeros(2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.3), 5, bl.Implicit(), certificate=None)
    batches = ByStep(lambda t: float(t))
    with pytest.warns(bl.ConvergenceWarning, match="is that of the last inner batch alone"):
        solver.hypergradient(start, a, batches)
    solver.hypergradient(start, a, batches, linear_batch=3.0)


# --- settings


def test_trust_decides_what_is_trusted():
    case = ridge(20)
    estimate = of_case(case, 60, slower=0.5).certificate.error_estimate
    for trust, trusted in ((0.5 * estimate, False), (1.1 * estimate, True)):
        found = of_case(case, 60, slower=0.5, certificate=bl.AgainstMinimiser(trust=trust))
        assert found.certificate.trustworthy == trusted
        assert f"trust={trust:g}" in str(found.certificate) or trusted


def test_max_products_limits_the_work():
    case = ridge(300)
    small = of_case(case, 15, certificate=bl.AgainstMinimiser(max_products=24))
    large = of_case(case, 15, certificate=bl.AgainstMinimiser(max_products=200))
    assert small.certificate.products <= 24 < large.certificate.products <= 200
    assert small.certificate.error_estimate == math.inf
    assert "raise max_products" in small.certificate.reason
    true = distance(large.gradient, case.exact)
    assert large.certificate.error_estimate == pytest.approx(true, rel=1e-2)


CONSTANTS = bl.certificates.Constants(
    convexity=math.exp(-1.0), coupling=6.0, outer=4.0, outer_control=0.0, hessian=0.0, mixed=1.0
)


@pytest.mark.parametrize("method", [bl.MLM(), bl.Implicit(), bl.OneStep()], ids=repr)
@pytest.mark.parametrize("steps", [5, 60, 300])
def test_constants_give_a_bound(method, steps):
    # |X w - y|^2 / 2n + e^a |w|^2 / 2 has mu = e^a, C = e^a w, L_C = e^a, L_H = 0.
    case = ridge(20, scalar_control=True)
    mu = float(case.control.exp())
    constants = bl.certificates.Constants(
        convexity=mu,
        coupling=mu * 2 * float(case.minimiser.norm() + case.params.norm()),
        outer=10.0,  # the largest eigenvalue of V^T V / n is 2.6
        mixed=mu,
    )
    settings = {"method": method, "certificate": bl.AgainstMinimiser(constants=constants)}
    found = of_case(case, steps, **settings)
    true = distance(found.gradient, case.exact)
    assert true <= found.certificate.bound
    if steps == 300 and not isinstance(method, bl.OneStep):
        assert found.certificate.bound < 1e-3
        assert "by the constants given" in str(found.certificate)
    without = of_case(case, steps, method=method).certificate
    assert without.bound is None
    assert without.error_estimate == found.certificate.error_estimate


def test_the_bound_is_the_formula():
    found = bl.certificates.Constants(2.0, 3.0, 5.0, 7.0, 11.0, 13.0).bound(0.1, 1.5, 0.2)
    eps = 0.1 / 2
    expected = (7 + 13 * 1.5) * eps + (3 + 13 * eps) / 2 * ((5 + 11 * 1.5) * eps + 0.2)
    assert found == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.AgainstMinimiser(trust=0.0), "trust must be > 0 and finite, got 0"),
        (lambda: bl.AgainstMinimiser(max_products=7), "whole number >= 22, or None, got 7"),
        (lambda: bl.AgainstMinimiser(max_products=2.5), "whole number >= 22, or None, got 2.5"),
        (
            lambda: bl.certificates.Constants(0.0, 1.0, 1.0),
            "convexity must be > 0 and finite, got 0",
        ),
        (
            lambda: bl.certificates.Constants(1.0, -1.0, 1.0),
            "coupling must be >= 0 and finite, got -1",
        ),
        (
            lambda: bl.certificates.Constants(1.0, 1.0, 1.0, mixed=math.nan),
            "mixed must be >= 0 and finite, got nan",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


# --- reasons not to trust


def reason_of(problem, params, control, steps=20, step_size=0.1, **settings):
    found = judged(problem, params, control, steps, step_size, **settings)
    assert not found.certificate.trustworthy
    assert found.certificate.error_estimate == math.inf
    assert found.certificate.corrected() is None
    assert str(found.certificate).startswith("unknown relative error against")
    assert str(found.certificate).endswith(f"not trustworthy: {found.certificate.reason}.")
    return found.certificate.reason


one = torch.tensor(1.0, dtype=torch.float64)
line = torch.ones(3, dtype=torch.float64)


def outer_square(w, a, batch):
    return square(w - 2)


def test_an_inner_objective_without_minimum_is_said():
    for curvature, reason in ((0.0, "the inner objective is flat"), (-0.1, "negative curvature")):
        problem = bl.BilevelProblem(
            lambda w, a, batch, c=curvature: (w * a).sum() + c * square(w) / 2, outer_square
        )
        assert reason in reason_of(problem, line, one)


def test_a_saddle_is_told_from_a_minimum():
    # At zero steps from a point with gradients of both signs of curvature.
    signs = torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64)
    problem = bl.BilevelProblem(lambda w, a, batch: (signs * (w - a) ** 2).sum(), outer_square)
    assert "near no minimum of the inner objective" in reason_of(problem, line * 3, one)


def test_a_minimiser_that_is_not_unique_is_not_trusted():
    # Fewer data than params: the outer gradient leaves the range of the Hessian.
    X, y = real(41, 3, 6), real(42, 3)
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(X @ w - a * y) / 2, lambda w, a, batch: square(w - 2)
    )
    found = judged(problem, real(43, 6), one, 400, 0.05)
    assert not found.certificate.trustworthy
    assert found.certificate.reason


def test_a_start_too_far_for_newton_is_told():
    problem = bl.BilevelProblem(
        lambda w, a, batch: (1 + (w - a) ** 2).sqrt().sum(), lambda w, a, batch: square(w - 2)
    )
    assert "no minimiser is near enough" in reason_of(problem, line * 5, one, 1, 1e-3)
    near = judged(problem, line * 2, one, 1, 1e-3).certificate  # here repeated steps arrive
    torch.testing.assert_close(near.corrected(), -6 * one, rtol=1e-5, atol=0)


def test_a_correction_that_may_miss_too_much_is_told():
    # A minimum of fourth order: Newton's method creeps, and the Hessian ends near singular.
    problem = bl.BilevelProblem(
        lambda w, a, batch: ((w - a) ** 4).sum() / 4 + 1e-9 * square(w - a), outer_square
    )
    reason = reason_of(problem, line * 2, one, 5)
    assert "what the correction may miss" in reason
    assert "not below the corrected hypergradient" in reason


@pytest.mark.parametrize(
    ("max_products", "system"), [(24, "system of the Newton correction"), (28, "adjoint system")]
)
def test_systems_left_unsolved_are_told(max_products, system):
    case = ridge(300)
    certifier = bl.AgainstMinimiser(max_products=max_products)
    found = of_case(case, 30, certificate=certifier).certificate
    assert f"the {system} has relative residual" in found.reason
    assert found.error_estimate == math.inf


def of_found(problem, params, control, **changes):
    """The certificate of a hypergradient made up."""
    instance = bl.methods.Instance(problem, bl.optim.SGD(0.1), 1, params, control)
    made_up = {"value": one, "gradient": one, "warm": bl.methods.Warm(params, 1), **changes}
    return bl.AgainstMinimiser().certify(instance, bl.methods.Found(**made_up))


def test_values_that_are_not_finite_are_reasons():
    # |w|^1.5 has a gradient at zero, and no Hessian there.
    root = bl.BilevelProblem(lambda w, a, batch: (w.abs() ** 1.5).sum() * a, outer_square)
    certificate = of_found(root, torch.zeros_like(line), one)
    assert "is not finite" in certificate.reason
    assert certificate.error_estimate == math.inf
    plain = bl.BilevelProblem(lambda w, a, batch: square(w - a), outer_square)
    certificate = of_found(plain, line * 2, one, gradient=one * math.nan)
    assert certificate.reason == "the hypergradient is not finite"
    assert not certificate.trustworthy


def test_kinks_are_not_smoothed_over():
    # Gradient descent on |w - a| hops around the kink: no curvature there.
    problem = bl.BilevelProblem(
        lambda w, a, batch: (w - a).abs().sum() + 0.1 * square(w), outer_square
    )
    reason = reason_of(problem, line * 3, one, steps=101, step_size=0.05)
    assert "no minimiser is near enough to judge by" in reason


def test_a_zero_hypergradient_of_the_minimiser_is_explained():
    # Step sizes and starts: exact for the steps made, nothing to the minimiser.
    problem = bl.BilevelProblem(lambda w, a, batch: square(w - 1), outer_square)
    rule = bl.optim.SGD(lambda a: 0.1 * a)
    assert "take certificate=AgainstSteps()" in reason_of(
        problem, line * 2, one, steps=5, optimizer=rule
    )
    start = bl.BilevelProblem(problem.inner, problem.outer, start=lambda w, a: w * a)
    assert "take certificate=AgainstSteps()" in reason_of(start, line, one, steps=5)
    exact = judged(start, line, one, 5, certificate=bl.AgainstSteps()).certificate
    assert exact.trustworthy


def test_decoupled_decay_has_no_minimiser_to_compare_with():
    problem = bl.BilevelProblem(lambda w, a, batch: square(w - a), outer_square)
    rule = bl.optim.AdamW(0.1, weight_decay=0.01)
    assert "use Adam, whose weight_decay is part" in reason_of(problem, line, one, optimizer=rule)


def test_a_correction_out_of_the_domain_is_a_reason_not_an_error():
    # Far out the root is nearly straight: the Newton step ends where it is not defined.
    problem = bl.BilevelProblem(
        lambda w, a, batch: (a * w - w.sqrt()).sum(), lambda w, a, batch: square(w)
    )
    assert "to nan only" in reason_of(problem, line * 5, one, steps=1, step_size=1e-3)


def test_errors_of_the_objectives_are_not_swallowed():
    calls = []

    def outer(w, a, batch):
        calls.append(None)
        if len(calls) > 1:
            raise KeyError("my own mistake")
        return square(w - 2)

    problem = bl.BilevelProblem(lambda w, a, batch: square(w - a), outer)
    with pytest.raises(KeyError, match="my own mistake"):
        judged(problem, line, one, 5)


def test_constants_of_a_smooth_problem_do_not_bound_a_proximal_one():
    problem, start, control, rule, _ = lasso()
    certifier = bl.AgainstMinimiser(constants=CONSTANTS)
    with pytest.raises(ArgumentError, match="got ProximalGradient: leave them out"):
        judged(problem, start, control, 5, optimizer=rule, certificate=certifier)


def test_inner_objectives_without_third_derivatives_are_judged():
    # A rollout with states kept has two derivatives, which is all that is needed.
    growth = bl.Map(lambda x, w, t: x + 0.1 * (w - x))
    data = real(51, 4)

    def inner(w, a, batch):
        return square(bl.rollout(growth, data, w, 3) - a) / 2 + square(w) / 2

    problem = bl.BilevelProblem(inner, outer_square)
    found = judged(problem, torch.zeros(4, dtype=torch.float64), one, 10, 0.4)
    # x_3 = .729 data + .271 w: H = .271^2 + 1, C = -.271, q = 2 (w - 2) / H.
    H = 0.271**2 + 1
    w = 0.271 * (one - 0.729 * data) / H
    exact = (0.271 * 2 * (w - 2) / H).sum()
    true = distance(found.gradient, exact)
    assert found.certificate.error_estimate == pytest.approx(true, rel=1e-2)


# --- against the steps made


def test_whole_sweeps_are_exact_for_the_steps_made():
    case = ridge(20)
    for method in (bl.MLM(), bl.Unrolled(), bl.MLM(last=9)):
        found = of_case(case, 9, method=method, certificate=bl.AgainstSteps())
        certificate = found.certificate
        assert certificate.trustworthy
        assert (certificate.error_estimate, certificate.products) == (0.0, 0)
        assert str(certificate) == (
            "no error but rounding against the inner steps made; trustworthy."
        )


def test_truncated_sweeps_say_that_nothing_is_known():
    case = ridge(20)
    for method in (bl.MLM(last=4), bl.OneStep()):
        certificate = of_case(case, 9, method=method, certificate=bl.AgainstSteps()).certificate
        assert certificate.error_estimate == math.inf
        assert "nothing is known of the" in certificate.reason
        assert not certificate.trustworthy


def test_implicit_is_not_the_derivative_of_the_steps_made():
    case = ridge(20)
    found = of_case(case, case.steps, method=bl.Implicit(), certificate=bl.AgainstSteps())
    assert not found.certificate.trustworthy
    assert found.certificate.linear_residual == found.linear.residual
    assert "take MLM() or Unrolled(), or certificate=AgainstMinimiser()" in found.certificate.reason


def test_a_stopped_sweep_tells_its_bound():
    case = ridge(20)
    mu = float(case.control.exp().min())
    bounds = bl.methods.Bounds(1 - 0.1 * mu, 1.0)
    whole = judged(case.problem, case.params, case.control, 150, 0.1, certificate=bl.AgainstSteps())
    for tolerance, trusted in ((1e-3, True), (0.3, False)):
        method = bl.MLM(tolerance=tolerance, bounds=bounds)
        found = judged(
            case.problem,
            case.params,
            case.control,
            150,
            0.1,
            method=method,
            certificate=bl.AgainstSteps(),
        )
        certificate = found.certificate
        assert certificate.error_estimate == found.truncation.error <= tolerance
        assert certificate.trustworthy == (certificate.error_estimate <= 2e-2)
        assert distance(found.gradient, whole.gradient) <= certificate.error_estimate
        assert certificate.bound == certificate.error_estimate
        assert "by the constants given" in str(certificate)
        assert trusted or "reverse more of the inner steps" in certificate.reason
