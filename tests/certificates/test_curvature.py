"""Certificates at saddles, along symmetries, leaf by leaf, on flat directions and on kinks."""

import math

import pytest
import torch
from problems import real, square

import bilevel as bl
from bilevel.certificates.curvature import DIRECTIONS, probe
from bilevel.linear import CG, GMRES, Dense, NormalCG, Operator

F64 = torch.float64
ce = torch.nn.functional.cross_entropy


def tensor(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=F64)


def certified(problem, params, control, steps, lr=0.1, method=None, **settings):
    rule = settings.pop("optimizer", None) or bl.optim.SGD(lr)
    solver = bl.BilevelSolver(
        problem, rule, steps, method or bl.MLM(), on_failure="ignore", **settings
    )
    return solver.hypergradient(params, control)


# --- saddles and maxima

MAXIMUM = bl.BilevelProblem(lambda w, a, b: -((w - a) ** 2), lambda w, a, b: 2 * w)
DOUBLE_WELL = bl.BilevelProblem(
    lambda w, a, b: w[0] ** 2 - w[1] ** 2 + w[1] ** 4 + a * w[1], lambda w, a, b: (w[1] - 1) ** 2
)


@pytest.mark.parametrize("linear", [CG(), Dense(), GMRES(), NormalCG()], ids=repr)
def test_a_maximum_is_no_minimiser_whatever_solves_the_system(linear):
    found = certified(MAXIMUM, tensor(1.0), tensor(1.0), 0, method=bl.Implicit(linear))
    assert not found.certificate.trustworthy
    assert found.certificate.curvature == pytest.approx(-2)
    assert "saddle or a maximum" in found.certificate.reason


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (bl.MLM(), bl.optim.SGD(0.1)),
        (bl.Unrolled(), bl.optim.SGD(0.1, momentum=0.5)),
        (bl.Implicit(GMRES()), bl.optim.SGD(0.1)),
        (bl.Implicit(GMRES()), bl.optim.ProximalGradient(0.1, bl.prox.L2(0.0))),
        (bl.MLM(), bl.optim.ProximalGradient(0.1, bl.prox.Box(-5.0, 5.0))),
    ],
    ids=str,
)
def test_a_start_on_a_symmetry_ends_on_a_saddle_that_is_not_trusted(method, rule):
    found = certified(
        DOUBLE_WELL, tensor(1.0, 0.0), tensor(0.0), 200, method=method, optimizer=rule
    )
    assert not found.certificate.trustworthy
    assert found.certificate.curvature < -0.1
    # Beside the symmetry the descent finds a minimiser.
    found = certified(
        DOUBLE_WELL, tensor(1.0, 0.3), tensor(0.0), 400, method=method, optimizer=rule
    )
    assert found.certificate.trustworthy
    assert abs(float(found.params[1])) == pytest.approx(0.5**0.5, abs=1e-6)


def test_a_descent_along_a_saddle_is_not_trusted():
    solver = bl.BilevelSolver(DOUBLE_WELL, bl.optim.SGD(0.1), 50)
    with pytest.warns(bl.ConvergenceWarning, match="saddle or a maximum"):
        found = solver.solve(tensor(1.0, 0.0), tensor(0.0), steps=3)
    assert not found.certificates[0].trustworthy


def net(start, seed):
    """A tanh net with decay; `start` is the value of every weight, None draws them."""
    X, y, V, z = (
        real(seed, 30, 5),
        real(seed + 1, 30, 1),
        real(seed + 2, 30, 5),
        real(seed + 3, 30, 1),
    )
    shapes = {"a": (5, 4), "b": (4,), "c": (4, 1), "d": (1,)}
    params = {
        name: 0.5 * real(seed + i, *shape) if start is None else torch.full(shape, start, dtype=F64)
        for i, (name, shape) in enumerate(shapes.items())
    }

    def fit(w, X):
        return torch.tanh(X @ w["a"] + w["b"]) @ w["c"] + w["d"]

    problem = bl.BilevelProblem(
        lambda w, decay, b: square(fit(w, X) - y) / 30 + decay.exp() * sum(map(square, w.values())),
        lambda w, decay, b: square(fit(w, V) - z) / 30,
    )
    return problem, params


@pytest.mark.parametrize(
    ("start", "steps", "seed"),
    [
        *((0.0, 200, 10), (0.3, 1500, 20)),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0.0, 200, 20), (0.3, 1500, 10))),
    ],
)
def test_nets_with_equal_weights_end_on_saddles(start, steps, seed):
    problem, params = net(start, seed)
    found = certified(problem, params, tensor(-4.0), steps, 0.2, bl.Implicit())
    assert not found.certificate.trustworthy


def test_a_factorisation_from_zeros_is_not_trusted():
    target = torch.arange(12, dtype=F64).reshape(3, 4)
    problem = bl.BilevelProblem(
        lambda w, a, b: (
            square(torch.outer(w["u"], w["v"]) - a * target)
            + 0.1 * (square(w["u"]) + square(w["v"]))
        ),
        lambda w, a, b: (w["u"].sum() - 1) ** 2 + a**2,
    )
    zeros = {"u": torch.zeros(3, dtype=F64), "v": torch.zeros(4, dtype=F64)}
    found = certified(problem, zeros, tensor(1.0), 50, 0.01, bl.Implicit())
    assert not found.certificate.trustworthy


def test_a_saddle_in_one_column_is_found_among_others():
    weights = bl.TaskWeights(2, 3)
    centre = tensor([[1.0, 0.0], [1.0, 0.5], [-1.0, 0.5]])

    def losses(w, batch):
        well = w[0] ** 2 - w[1] ** 2 + w[1] ** 4
        return torch.stack([well, well + 0.1 * w[0] ** 2])

    problem = bl.weighted_problem(
        losses, lambda w, b: (w - tensor(0.0, 1.0)).square().sum()[None].expand(3), weights
    )
    found = certified(problem, centre, weights.initial(F64), 300, 0.05, bl.Implicit())
    assert "saddle" in found.certificate.reason


@pytest.mark.parametrize("seed", range(4))
def test_a_shallow_descent_among_many_unknowns_is_met_beside_many_steps(seed):
    generator = torch.Generator().manual_seed(seed)
    d = 300
    values = 0.1 + 0.9 * torch.rand(d, generator=generator, dtype=F64)
    values[0] = -0.03
    seen = torch.zeros(d, dtype=F64)
    seen[5:] = real(seed, d - 5)
    problem = bl.BilevelProblem(
        lambda w, a, b: w @ (values * w) / 2 - a * (seen @ w), lambda w, a, b: square(w - seen)
    )
    found = certified(problem, torch.zeros(d, dtype=F64), tensor(1.0), 300, 1.0)
    assert "saddle" in found.certificate.reason


@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled(), bl.Implicit(), bl.OneStep()], ids=str)
def test_an_inner_objective_that_draws_is_not_trusted_and_its_draws_are_its_own(method):
    X, y = real(1, 60, 8), real(2, 60)
    problem = bl.BilevelProblem(
        lambda w, c, b: (
            square(torch.nn.functional.dropout(X, 0.3) @ w - y) / 60 + c.exp() * square(w)
        ),
        lambda w, c, b: square(X[:20] @ w - y[:20]),
    )
    found, after = [], []
    for certificate in (bl.AgainstMinimiser(), None):
        torch.manual_seed(1)
        start = torch.zeros(8, dtype=F64)
        found.append(
            certified(problem, start, tensor(-2.0), 50, 0.05, method, certificate=certificate)
        )
        after.append(torch.rand(1))
    assert "draws at random" in found[0].certificate.reason
    assert torch.equal(found[0].gradient, found[1].gradient)
    assert torch.equal(*after)


MINIBATCH = bl.BilevelProblem(
    lambda w, c, b: (
        square((real(1, 60, 8) @ w - real(2, 60))[torch.randint(0, 60, (8,))]) / 8
        + c.exp() * square(w)
    ),
    lambda w, c, b: square(real(1, 60, 8)[:20] @ w - real(2, 60)[:20]),
)


@pytest.mark.parametrize("method", [bl.Implicit(), bl.Penalty()], ids=str)
def test_a_method_of_one_point_says_that_the_inner_objective_draws_uncertified_too(
    method,
):
    solver = bl.BilevelSolver(MINIBATCH, bl.optim.SGD(0.05), 50, method, certificate=None)
    with pytest.warns(bl.ConvergenceWarning, match=r"draws at random.*take MLM\(\)"):
        solver.hypergradient(torch.zeros(8, dtype=F64), tensor(-2.0))


def test_a_penalty_sees_draws_from_elsewhere():
    generator = torch.Generator().manual_seed(1)

    def inner(w, c, b):
        rows = torch.randint(0, 60, (8,), generator=generator)
        return square(real(1, 60, 8)[rows] @ w) / 8 + c.exp() * square(w - 1)

    problem = bl.BilevelProblem(inner, MINIBATCH.outer)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.05), 50, bl.Penalty(), certificate=None)
    with pytest.warns(bl.ConvergenceWarning, match="draws at random, and Penalty multiplies"):
        solver.hypergradient(torch.zeros(8, dtype=F64), tensor(-2.0))


@pytest.mark.parametrize("method", [bl.MLM(), bl.Unrolled(), bl.OneStep()], ids=str)
def test_methods_that_replay_the_steps_need_say_nothing(method):
    solver = bl.BilevelSolver(MINIBATCH, bl.optim.SGD(0.05), 50, method, certificate=None)
    solver.hypergradient(torch.zeros(8, dtype=F64), tensor(-2.0))


@pytest.mark.parametrize("method", [bl.MLM(), bl.Implicit()], ids=str)
def test_a_certificate_leaves_the_buffers_of_a_module_as_they_are(method):
    net = torch.nn.BatchNorm1d(8).double().requires_grad_(requires_grad=False)
    X, y = real(1, 60, 8), real(2, 60)
    problem = bl.BilevelProblem(
        lambda w, c, b: square(net(X) @ w - y) / 60 + c.exp() * square(w),
        lambda w, c, b: square(net(X) @ w - y),
    )
    counts = []
    for certificate in (bl.AgainstMinimiser(), None):
        net.reset_running_stats()
        certified(
            problem,
            torch.zeros(8, dtype=F64),
            tensor(-2.0),
            20,
            0.05,
            method,
            certificate=certificate,
        )
        counts.append(int(net.num_batches_tracked))
    assert counts[0] == counts[1]


# --- flat directions


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_a_bias_without_decay_is_no_saddle(seed):
    X, V = real(seed, 40, 4), real(seed + 50, 40, 4)
    y, z = (real(seed + 60, 40, 3).argmax(1), real(seed + 70, 40, 3).argmax(1))
    problem = bl.BilevelProblem(
        lambda w, a, b: ce(X @ w["W"] + w["b"], y) + a.exp() * square(w["W"]),
        lambda w, a, b: ce(V @ w["W"] + w["b"], z),
    )
    start = {"W": torch.zeros(4, 3, dtype=F64), "b": torch.zeros(3, dtype=F64)}
    assert certified(problem, start, tensor(-2.0), 600, 0.5).certificate.trustworthy


@pytest.mark.parametrize("steps", [10, 30, 50, 200])
def test_three_logits_are_trusted_at_every_number_of_steps(steps):
    labels = [torch.tensor([k]) for k in range(3)]
    problem = bl.BilevelProblem(
        lambda w, a, b: (
            a * ce(w[None], labels[1]) + ce(w[None], labels[0]) + ce(w[None], labels[2])
        ),
        lambda w, a, b: ce(w[None], labels[1]),
    )
    found = certified(problem, torch.zeros(3, dtype=F64), tensor(1.5), steps, 1.0)
    assert found.certificate.trustworthy
    # p_1 = a / (a + 2), F = -log p_1
    assert float(found.gradient) == pytest.approx(1 / 3.5 - 1 / 1.5, rel=2e-2)


@pytest.mark.parametrize("steps", [100, 300])
@pytest.mark.parametrize(
    ("invariant", "start"),
    [(square, (0.5, 0.3, 0.2)), (lambda w: w[0] * w[1], (0.5, 1.3, 0.0))],
    ids=["rotation", "scale"],
)
def test_symmetries_are_flat_and_no_saddle(invariant, start, steps):
    problem = bl.BilevelProblem(
        lambda w, a, b: (invariant(w) - a) ** 2 + w[2] ** 2 * (invariant is not square),
        lambda w, a, b: (invariant(w) - 2) ** 2,
    )
    found = certified(problem, tensor(*start), tensor(1.5), steps, 0.02)
    true = abs(float(found.gradient) - 2 * (1.5 - 2))  # F = (a - 2)^2
    assert true <= 2e-2
    assert found.certificate.trustworthy or true > 1e-6


@pytest.mark.parametrize("unknowns", [3, 70])  # with a matrix, and by products
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_params_that_lie_along_a_flat_direction_themselves_are_trusted(unknowns, size):
    # J w = 0: of a residual of rounding nothing is left that J w would tell the size of.
    first, second, goal = torch.eye(unknowns, dtype=F64)[:3]

    def unit(w):
        return w / w.norm()

    problem = bl.BilevelProblem(
        lambda w, a, b: -unit(w) @ (a * first + second),
        lambda w, a, b: square(unit(w) - second - goal),
    )
    start = size * unit(real(3, unknowns) + first + second)
    found = certified(problem, start, tensor(0.7), 1000, 0.5 * size**2, bl.Implicit())
    # unit(w) -> (a, 1) / sqrt(1 + a^2), so F = 3 - 2 / sqrt(1 + a^2)
    assert float(found.gradient) == pytest.approx(2 * 0.7 / (1 + 0.7**2) ** 1.5, rel=1e-8)
    assert found.certificate.trustworthy, found.certificate.reason


# --- leaf by leaf


def test_a_small_leaf_that_is_wrong_is_not_hidden_by_a_large_one():
    problem = bl.BilevelProblem(
        lambda w, c, b: ((w[0] - c["a"]) ** 2 + 0.05 * (w[1] - c["b"]) ** 2) / 2,
        lambda w, c, b: 100 * w[0] ** 2 + 0.1 * w[1] ** 2,
    )
    control = {"a": tensor(1.0), "b": tensor(-1.0)}
    found = certified(problem, torch.zeros(2, dtype=F64), control, 30, 0.5)
    certificate = found.certificate
    assert certificate.error_estimate < 2e-2
    assert not certificate.trustworthy
    assert "control['b'] alone" in certificate.reason
    true = abs(float(found.gradient["b"]) + 0.2) / 0.2
    assert certificate.error_by_leaf["control['b']"] == pytest.approx(true, rel=1e-6)
    assert certificate.error_by_leaf["control['a']"] < 1e-6


def test_a_column_that_is_wrong_is_not_hidden_by_another():
    weights = bl.TaskWeights(2, 2)
    goals = tensor([[0.0, 3.0], [1.0, -2.0]])
    stiff = tensor(1.0, 0.02)

    def losses(w, batch):
        return (stiff * (w - goals) ** 2).sum(1)

    def validation(w, batch):
        return torch.stack([100 * (w[0] - 1) ** 2, 0.1 * (w[1] - 1) ** 2])

    problem = bl.weighted_problem(losses, validation, weights)
    params = weights.stacked(torch.zeros(2, dtype=F64))
    found = certified(problem, params, weights.initial(F64), 20, 0.45)
    errors = found.certificate.error_by_leaf
    assert errors["control[..., 0]"] < 1e-2 < errors["control[..., 1]"]
    assert not found.certificate.trustworthy
    whole = certified(problem, params, weights.initial(F64), 1500, 0.45, bl.Implicit())
    assert whole.certificate.trustworthy


def test_a_leaf_whose_derivative_is_zero_spoils_no_trust():
    problem = bl.BilevelProblem(
        lambda w, c, b: square(w - c["a"]) + square(w) * (1 + 0 * c["b"]),
        lambda w, c, b: square(w - 1),
    )
    control = {"a": tensor(0.5), "b": tensor(2.0)}
    found = certified(problem, torch.zeros(2, dtype=F64), control, 100)
    assert float(found.gradient["b"]) == 0
    assert found.certificate.trustworthy


# --- ill-conditioned systems, kinks


@pytest.mark.parametrize("condition", [1e5, 1e6])
@pytest.mark.parametrize("coupling", [1e3, 1e4])
def test_a_small_residual_in_a_flat_direction_is_followed_through(condition, coupling):
    H, b, C = (
        tensor(1.0, 0.7, 0.5, 1 / condition),
        tensor(1.0, 1.0, 1.0, 1e-8),
        tensor(1.0, 1, 1, coupling),
    )
    problem = bl.BilevelProblem(
        lambda w, a, batch: (H * w**2).sum() / 2 - a * (C * w).sum(),
        lambda w, a, batch: (b * w).sum(),
    )
    found = certified(problem, C / H, tensor(1.0), 0, method=bl.Implicit())
    exact = float((b * C / H).sum())
    true = abs(float(found.gradient) - exact) / exact
    certificate = found.certificate
    assert certificate.error_estimate == pytest.approx(true, rel=1e-2, abs=1e-4)
    assert certificate.trustworthy == (true <= 2e-2)
    assert float(certificate.corrected()) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("prox", [bl.prox.Box(0.0, 1.0), bl.prox.L1(0.6)], ids=repr)
def test_a_component_on_a_kink_is_not_trusted_and_one_beside_it_is(prox):
    problem = bl.BilevelProblem(lambda w, a, b: square(w - a), lambda w, a, b: 2 * w.sum())
    rule = bl.optim.ProximalGradient(0.4, prox)
    kink = 0.0 if isinstance(prox, bl.prox.Box) else 0.3
    for distance, trusted in ((0.0, False), (0.1, True), (-0.1, True)):
        control = tensor(kink + distance)
        found = certified(
            problem, tensor([0.5]), control, 200, method=bl.Implicit(GMRES()), optimizer=rule
        )
        assert found.certificate.trustworthy == trusted
        assert trusted or "kink" in found.certificate.reason
        if trusted:  # w = a - kink', or constant
            assert float(found.gradient) == pytest.approx(2.0 if distance > 0 else 0.0, abs=1e-9)


def test_a_box_takes_the_derivative_from_inside_at_its_bound():
    w = torch.tensor([0.0, 1.0, 0.5], dtype=F64, requires_grad=True)
    bl.prox.Box(0.0, 1.0)(w, 0.1, None).sum().backward()
    assert w.grad.tolist() == [1.0, 1.0, 1.0]


# --- the probe


@pytest.mark.parametrize("n", [1, 2, 8, 40])
@pytest.mark.parametrize("negative", [0.0, -0.3])
def test_the_probe_finds_the_ends_of_a_spectrum(n, negative):
    Q = torch.linalg.qr(real(n, n, n))[0]
    values = torch.linspace(0.5, 2, n, dtype=F64)
    values[0] = negative or values[0]
    A = Q @ torch.diag(values) @ Q.T
    found = probe(Operator(lambda v: A @ v, symmetric=True), torch.ones(n, dtype=F64), 8, 3)
    assert found.negative(2e-16) == (negative < 0)
    assert found.directions == min(8, n)
    if n <= 8:
        assert found.smallest == pytest.approx(float(values.min()), abs=1e-12)
        residual = A @ found.vector - found.smallest * found.vector
        assert float(residual.norm()) < 1e-10
    assert found.smallest >= float(values.min()) - 1e-12


def test_the_probe_of_an_asymmetric_operator_wants_its_finding_to_stay():
    # Eigenvalues 1 and 0.01, but a field of values that reaches below zero.
    A = torch.eye(20, dtype=F64)
    A[0, 0], A[0, 1:] = 0.01, 0.4
    found = probe(
        Operator(lambda v: A @ v, adjoint=lambda v: A.T @ v), torch.ones(20, dtype=F64), 8, 1
    )
    assert not found.negative(2e-16)
    A[0, 0] = -0.2
    found = probe(
        Operator(lambda v: A @ v, adjoint=lambda v: A.T @ v), torch.ones(20, dtype=F64), 8, 1
    )
    assert found.smallest == pytest.approx(-0.2, abs=1e-6)
    assert math.isfinite(found.largest)


@pytest.mark.parametrize("seed", range(5))
def test_one_negative_direction_among_many_is_met(seed):
    values = torch.linspace(0.01, 1, 500, dtype=F64)
    values[seed] = -0.1
    found = probe(Operator(lambda v: values * v, symmetric=True), values, DIRECTIONS, seed)
    assert found.negative(2e-16)
