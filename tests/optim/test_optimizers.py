"""Inner optimisers against torch.optim, and their derivatives against finite differences."""

import pytest
import torch
from bilevel_cases import ridge, trees
from problems import real, square

import bilevel as bl

RULES = {
    "GradientDescent": (bl.GradientDescent(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "HeavyBall": (bl.HeavyBall(0.03, 0.8), lambda p: torch.optim.SGD(p, 0.03, momentum=0.8)),
    "Adam": (
        bl.Adam(0.02, (0.8, 0.95), 1e-6),
        lambda p: torch.optim.Adam(p, 0.02, (0.8, 0.95), 1e-6),
    ),
    "AdamW": (
        bl.Adam(0.02, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3),
    ),
}
TEN_STEPS = [
    bl.GradientDescent(0.05),
    bl.GradientDescent(lambda c: 0.04 * c.exp().mean()),
    bl.GradientDescent(bl.ByStep(lambda t: 0.1 / t)),
    bl.GradientDescent(bl.ByStep(lambda t: lambda c: c.exp() / (30 + t))),
    bl.HeavyBall(0.03, 0.8),
    bl.HeavyBall(0.03, lambda c: torch.sigmoid(c[0])),
    bl.HeavyBall(0.03, bl.ByStep(lambda t: t / (t + 3))),
    bl.Adam(0.05),
    bl.Adam(lambda c: 0.05 * c.exp()[0], (0.5, 0.7), weight_decay=0.1),
    bl.ProximalGradient(0.05, bl.L2(lambda c: c.exp()[0])),
    bl.ProximalGradient(lambda c: 0.05 * c.exp()[1], bl.L1(0.1)),
]


def iterate(problem, optimizer, params, control, steps, batch=None, offset=0):
    """The params after inner steps, by hand."""
    state = optimizer.begin(params)
    for t in range(1, steps + 1):
        point = bl.tree.map_leaves(
            lambda x: x.detach().requires_grad_() if bl.tree.is_variable(x) else x,
            optimizer.params(state),
        )
        leaves = [x for x in bl.tree.leaves_of(point) if bl.tree.is_variable(x)]
        each = iter(torch.autograd.grad(problem.inner(point, control, batch), leaves))
        gradient = bl.tree.map_leaves(
            lambda x, each=each: next(each) if bl.tree.is_variable(x) else None, point
        )
        state = optimizer.update(state, gradient, control, offset + t)
    return optimizer.params(state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", [ridge(4), ridge(4, complex_=True), trees()], ids=repr)
def test_a_rule_makes_the_steps_of_torch_optim(rule, case):
    ours, theirs = RULES[rule]
    params = bl.tree.map_leaves(
        lambda x: x.clone().requires_grad_() if bl.tree.is_variable(x) else x, case.params
    )
    leaves = [x for x in bl.tree.leaves_of(params) if bl.tree.is_variable(x)]
    optimizer = theirs(leaves)
    for _ in range(12):
        optimizer.zero_grad()
        case.problem.inner(params, case.control, None).backward()
        optimizer.step()
    solver = bl.BilevelSolver(case.problem, ours, 12, bl.Unrolled(), certificate=None)
    found = solver.hypergradient(case.params, case.control).params
    for a, b in zip(bl.tree.leaves_of(found), bl.tree.leaves_of(params), strict=True):
        if bl.tree.is_variable(a):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", TEN_STEPS, ids=lambda o: f"{TEN_STEPS.index(o)}")
@pytest.mark.parametrize("method", [bl.Unrolled(), bl.MLM()], ids=lambda m: type(m).__name__)
def test_the_hypergradient_through_a_rule_is_that_of_finite_differences(optimizer, method):
    case = ridge(3)

    def value(control):
        return case.problem.outer(
            iterate(case.problem, optimizer, case.params, control, 10), control, None
        )

    solver = bl.BilevelSolver(case.problem, optimizer, 10, method, certificate=None)
    found = solver.hypergradient(case.params, case.control)
    torch.testing.assert_close(found.value, value(case.control), rtol=1e-13, atol=0)
    h = 1e-6
    for i, unit in enumerate(torch.eye(3, dtype=torch.float64)):
        slope = (value(case.control + h * unit) - value(case.control - h * unit)) / (2 * h)
        # Central differences lose 1e-16 / h of the value, and are wrong by h^2.
        assert float(found.gradient[i]) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


LEARNED = {
    "step_size": lambda f: bl.GradientDescent(f),
    "momentum": lambda f: bl.HeavyBall(0.1, f),
    "weight": lambda f: bl.ProximalGradient(0.1, bl.L1(f)),
    "bound": lambda f: bl.ProximalGradient(0.1, bl.Box(upper=f)),
}
SWEPT = [bl.Unrolled(), bl.MLM(), bl.MLM(last=2)]


@pytest.mark.parametrize("setting", LEARNED)
@pytest.mark.parametrize("method", SWEPT, ids=repr)
def test_a_setting_may_be_a_leaf_of_the_control_as_it_is(setting, method):
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(w - c["centre"]), lambda w, c, batch: square(w)
    )
    control = {"centre": real(1, 2).abs() + 1, "rate": torch.tensor(0.1, dtype=torch.float64)}
    leaf, copy = (
        bl.BilevelSolver(problem, LEARNED[setting](f), 4, method, certificate=None).hypergradient(
            torch.zeros(2, dtype=torch.float64), control
        )
        for f in (lambda c: c["rate"], lambda c: 1 * c["rate"])
    )
    assert float(leaf.gradient["rate"]) != 0
    assert torch.equal(leaf.gradient["rate"], copy.gradient["rate"])


HIDDEN = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("setting", LEARNED)
@pytest.mark.parametrize("method", [*SWEPT, bl.Implicit(bl.GMRES())], ids=repr)
def test_a_setting_that_closes_over_a_tensor_that_requires_grad_is_refused(setting, method):
    case = ridge(2)
    for hidden in (lambda c: HIDDEN, lambda c: 2 * HIDDEN):
        solver = bl.BilevelSolver(case.problem, LEARNED[setting](hidden), 3, method)
        with pytest.raises(bl.ArgumentError, match=f"{setting} is a tensor that requires grad"):
            solver.hypergradient(case.params, case.control)


@pytest.mark.parametrize("warm", [False, True])
def test_a_learned_momentum_out_of_range_is_refused_after_a_warm_start_too(warm):
    case = ridge(2)
    solver = bl.BilevelSolver(
        case.problem, bl.HeavyBall(0.1, lambda c: c[0]), 3, bl.MLM(), certificate=None
    )
    good = torch.tensor([0.5, 0.1], dtype=torch.float64)
    state = solver.hypergradient(case.params, good).warm if warm else None
    with pytest.raises(bl.ArgumentError, match=r"momentum must be >= 0 and < 1, got 1\.5"):
        solver.hypergradient(case.params, good + 1, warm=state)


def test_a_step_size_may_be_a_tree_like_the_params():
    case = trees()
    sizes = {"z": torch.tensor(0.1), "pair": (torch.tensor(0.02), {"count": None})}
    solver = bl.BilevelSolver(
        case.problem, bl.GradientDescent(lambda c: sizes), 1, certificate=None, method=bl.Unrolled()
    )
    found = solver.hypergradient(case.params, case.control).params
    for size in (0.1, 0.02):
        same = iterate(case.problem, bl.GradientDescent(size), case.params, case.control, 1)
        part = (lambda p: p["z"]) if size == 0.1 else (lambda p: p["pair"][0])
        torch.testing.assert_close(part(found), part(same), rtol=1e-7, atol=0)


def test_adam_with_a_dead_feature_has_a_finite_hypergradient():
    # The third feature is zero, so is its gradient, and the root in Adam has no derivative there.
    X, y = real(1, 6, 3) * torch.tensor([1.0, 1.0, 0.0]), real(2, 6)
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(X @ w - y) + a.exp() * (w[:2] ** 2).sum(),
        lambda w, a, batch: square(w - 1),
    )
    solver = bl.BilevelSolver(problem, bl.Adam(0.1), 20, bl.Unrolled(), certificate=None)
    found = solver.hypergradient(
        torch.zeros(3, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    )
    alive = bl.BilevelProblem(
        lambda w, a, batch: square(X[:, :2] @ w - y) + a.exp() * (w**2).sum(),
        lambda w, a, batch: square(w - 1),
    )
    expected = bl.BilevelSolver(
        alive, bl.Adam(0.1), 20, bl.Unrolled(), certificate=None
    ).hypergradient(torch.zeros(2, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.GradientDescent(0.0), "step_size must be > 0, got 0"),
        (lambda: bl.GradientDescent(-1.0), "step_size must be > 0, got -1"),
        (lambda: bl.GradientDescent(float("nan")), "step_size must be > 0, got nan"),
        (lambda: bl.GradientDescent(float("inf")), "step_size must be > 0, got inf"),
        (lambda: bl.GradientDescent(torch.tensor(1.0, requires_grad=True)), "part of the control"),
        (lambda: bl.HeavyBall(0.1, 1.0), "momentum must be >= 0 and < 1, got 1"),
        (lambda: bl.Adam(betas=(0.9, 1.0)), "each of betas must be >= 0 and < 1"),
        (lambda: bl.Adam(eps=0.0), "eps must be > 0"),
        (lambda: bl.Adam(weight_decay=-1.0), "weight_decay must be >= 0"),
        (lambda: bl.ProximalGradient(0.1, "l1"), "prox must be L1"),
        (lambda: bl.ByStep(3), "takes a function of the step"),
    ],
)
def test_a_setting_out_of_range_is_refused(make, message):
    with pytest.raises(bl.ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    "optimizer",
    [
        bl.GradientDescent(lambda c: -c.exp().mean()),
        bl.GradientDescent(bl.ByStep(lambda t: t - 1.0)),
        bl.Adam(lambda c: 0 * c[0]),
    ],
    ids=["function", "by step", "Adam"],
)
def test_a_learned_step_size_that_is_not_positive_is_refused_when_it_is_used(optimizer):
    case = ridge(2)
    with pytest.raises(bl.ArgumentError, match="step_size must be > 0"):
        bl.BilevelSolver(case.problem, optimizer, 3).hypergradient(case.params, case.control)


@pytest.mark.parametrize("optimizer", TEN_STEPS, ids=lambda o: f"{TEN_STEPS.index(o)}")
def test_a_scaled_rule_has_its_step_size_scaled(optimizer):
    case = ridge(3)
    half = iterate(case.problem, optimizer.scaled(0.5), case.params, case.control, 1)
    whole = iterate(case.problem, optimizer, case.params, case.control, 1)
    if not isinstance(optimizer, bl.ProximalGradient):  # there the prox is scaled too
        torch.testing.assert_close(
            2 * (half - case.params), whole - case.params, rtol=1e-12, atol=1e-15
        )
    else:
        assert not torch.equal(half, whole)
