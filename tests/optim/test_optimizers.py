"""Inner optimisers against torch.optim, and their derivatives against finite differences."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from bilevel_cases import ridge, trees
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError, UnsupportedError

RULES = {
    "SGD": (bl.optim.SGD(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "SGD with decay": (
        bl.optim.SGD(0.05, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.3),
    ),
    "momentum": (
        bl.optim.SGD(0.03, momentum=0.8),
        lambda p: torch.optim.SGD(p, 0.03, momentum=0.8),
    ),
    "dampening": (
        bl.optim.SGD(0.03, 0.8, 0.4, 0.1),
        lambda p: torch.optim.SGD(p, 0.03, 0.8, 0.4, 0.1),
    ),
    "Nesterov": (
        bl.optim.SGD(0.03, 0.8, weight_decay=0.2, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.03, 0.8, weight_decay=0.2, nesterov=True),
    ),
    "Adam": (
        bl.optim.Adam(0.02, (0.8, 0.95), 1e-6),
        lambda p: torch.optim.Adam(p, 0.02, (0.8, 0.95), 1e-6),
    ),
    "Adam with decay": (
        bl.optim.Adam(0.02, weight_decay=0.3),
        lambda p: torch.optim.Adam(p, 0.02, weight_decay=0.3),
    ),
    "AdamW": (
        bl.optim.AdamW(0.02, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3),
    ),
}
TEN_STEPS = [
    bl.optim.SGD(0.05),
    bl.optim.SGD(lambda c: 0.04 * c.exp().mean()),
    bl.optim.SGD(bl.ByStep(lambda t: 0.1 / t)),
    bl.optim.SGD(bl.ByStep(lambda t: lambda c: c.exp() / (30 + t))),
    bl.optim.SGD(0.03, momentum=0.8),
    bl.optim.SGD(0.03, lambda c: torch.sigmoid(c[0])),
    bl.optim.SGD(0.03, bl.ByStep(lambda t: t / (t + 3))),
    bl.optim.Adam(0.05),
    bl.optim.SGD(0.03, 0.8, lambda c: torch.sigmoid(c[1]), lambda c: c.exp()),
    bl.optim.SGD(0.03, lambda c: torch.sigmoid(c[0]), weight_decay=0.1, nesterov=True),
    bl.optim.AdamW(lambda c: 0.05 * c.exp()[0], (0.5, 0.7), weight_decay=0.1),
    bl.optim.AdamW(0.05, weight_decay=lambda c: c.exp()[1]),
    bl.optim.Adam(
        0.05,
        (lambda c: torch.sigmoid(c[0]), lambda c: torch.sigmoid(c[1] + 2)),
        lambda c: 1e-3 * c[2].exp(),
        lambda c: c.exp()[0],
    ),
    bl.optim.ProximalGradient(0.05, bl.prox.L2(lambda c: c.exp()[0])),
    bl.optim.ProximalGradient(lambda c: 0.05 * c.exp()[1], bl.prox.L1(0.1)),
    bl.optim.ProximalGradient(0.05, bl.prox.L1(lambda c: 0.1 * c.exp()[0]), accelerated=True),
    bl.optim.Clipped(bl.optim.SGD(0.1, lambda c: torch.sigmoid(c[0])), max_norm=0.3),
    bl.optim.Clipped(bl.optim.Adam(0.05), clip_value=0.2),
]


def iterate(problem, optimizer, params, control, steps, batch=None, offset=0):
    """The params after inner steps, by hand."""
    state = optimizer.begin(params)
    for t in range(1, steps + 1):
        point = bl.tree.map_leaves(
            lambda x: x.detach().requires_grad_() if bl.tree.is_variable(x) else x,
            optimizer.point(state),
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
    "lr": lambda f: bl.optim.SGD(f),
    "momentum": lambda f: bl.optim.SGD(0.1, momentum=f),
    "dampening": lambda f: bl.optim.SGD(0.1, 0.5, f),
    "weight_decay": lambda f: bl.optim.SGD(0.1, weight_decay=f),
    "betas": lambda f: bl.optim.Adam(0.1, (f, 0.9)),
    "weight": lambda f: bl.optim.ProximalGradient(0.1, bl.prox.L1(f)),
    "bound": lambda f: bl.optim.ProximalGradient(0.1, bl.prox.Box(upper=f)),
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
@pytest.mark.parametrize("method", [*SWEPT, bl.Implicit(bl.linear.GMRES())], ids=repr)
def test_a_setting_that_closes_over_a_tensor_that_requires_grad_is_refused(setting, method):
    case = ridge(2)
    for hidden in (lambda c: HIDDEN, lambda c: 2 * HIDDEN):
        solver = bl.BilevelSolver(case.problem, LEARNED[setting](hidden), 3, method)
        with pytest.raises(ArgumentError, match=f"{setting} is a tensor that requires grad"):
            solver.hypergradient(case.params, case.control)


@pytest.mark.parametrize("warm", [False, True])
def test_a_learned_momentum_out_of_range_is_refused_after_a_warm_start_too(warm):
    case = ridge(2)
    solver = bl.BilevelSolver(
        case.problem, bl.optim.SGD(0.1, momentum=lambda c: c[0]), 3, bl.MLM(), certificate=None
    )
    good = torch.tensor([0.5, 0.1], dtype=torch.float64)
    state = solver.hypergradient(case.params, good).warm if warm else None
    with pytest.raises(ArgumentError, match=r"momentum must be >= 0 and < 1, got 1\.5"):
        solver.hypergradient(case.params, good + 1, warm=state)


def test_a_step_size_may_be_a_tree_like_the_params():
    case = trees()
    sizes = {"z": torch.tensor(0.1), "pair": (torch.tensor(0.02), {"count": None})}
    solver = bl.BilevelSolver(
        case.problem, bl.optim.SGD(lambda c: sizes), 1, certificate=None, method=bl.Unrolled()
    )
    found = solver.hypergradient(case.params, case.control).params
    for size in (0.1, 0.02):
        same = iterate(case.problem, bl.optim.SGD(size), case.params, case.control, 1)
        part = (lambda p: p["z"]) if size == 0.1 else (lambda p: p["pair"][0])
        torch.testing.assert_close(part(found), part(same), rtol=1e-7, atol=0)


def test_adam_with_a_dead_feature_has_a_finite_hypergradient():
    # The third feature is zero, so is its gradient, and the root in Adam has no derivative there.
    X, y = real(1, 6, 3) * torch.tensor([1.0, 1.0, 0.0]), real(2, 6)
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(X @ w - y) + a.exp() * (w[:2] ** 2).sum(),
        lambda w, a, batch: square(w - 1),
    )
    solver = bl.BilevelSolver(problem, bl.optim.Adam(0.1), 20, bl.Unrolled(), certificate=None)
    found = solver.hypergradient(
        torch.zeros(3, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    )
    alive = bl.BilevelProblem(
        lambda w, a, batch: square(X[:, :2] @ w - y) + a.exp() * (w**2).sum(),
        lambda w, a, batch: square(w - 1),
    )
    expected = bl.BilevelSolver(
        alive, bl.optim.Adam(0.1), 20, bl.Unrolled(), certificate=None
    ).hypergradient(torch.zeros(2, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.optim.SGD(0.0), "lr must be > 0 and finite, got 0"),
        (lambda: bl.optim.SGD(-1.0), "lr must be > 0 and finite, got -1"),
        (lambda: bl.optim.SGD(float("nan")), "lr must be > 0 and finite, got nan"),
        (lambda: bl.optim.SGD(float("inf")), "lr must be > 0 and finite, got inf"),
        (lambda: bl.optim.SGD(torch.tensor(1.0, requires_grad=True)), "part of the control"),
        (lambda: bl.optim.SGD(0.1, momentum=1.0), "momentum must be >= 0 and < 1, got 1"),
        (lambda: bl.optim.Adam(betas=(0.9, 1.0)), "betas must be >= 0 and < 1"),
        (lambda: bl.optim.Adam(eps=0.0), "eps must be > 0"),
        (lambda: bl.optim.Adam(weight_decay=-1.0), "weight_decay must be >= 0"),
        (lambda: bl.optim.SGD(0.1, 0.5, 1.5), "dampening must be >= 0 and <= 1, got 1.5"),
        (lambda: bl.optim.SGD(0.1, nesterov=True), "nesterov=True needs a momentum > 0"),
        (lambda: bl.optim.SGD(0.1, 0.9, 0.1, nesterov=True), "and dampening=0, got"),
        (lambda: bl.optim.SGD("0.1"), "lr must be a number, a tensor or a function"),
        (lambda: bl.optim.ProximalGradient(0.1, "l1"), "prox must be an operator such as L1"),
        (lambda: bl.ByStep(3), "takes a function of the step"),
    ],
)
def test_a_setting_out_of_range_is_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    "optimizer",
    [
        bl.optim.SGD(lambda c: -c.exp().mean()),
        bl.optim.SGD(bl.ByStep(lambda t: t - 1.0)),
        bl.optim.Adam(lambda c: 0 * c[0]),
    ],
    ids=["function", "by step", "Adam"],
)
def test_a_learned_step_size_that_is_not_positive_is_refused_when_it_is_used(optimizer):
    case = ridge(2)
    with pytest.raises(ArgumentError, match="lr must be > 0"):
        bl.BilevelSolver(case.problem, optimizer, 3).hypergradient(case.params, case.control)


@pytest.mark.parametrize("optimizer", TEN_STEPS, ids=lambda o: f"{TEN_STEPS.index(o)}")
def test_a_scaled_rule_has_its_step_size_scaled(optimizer):
    case = ridge(3)
    half = iterate(case.problem, optimizer.scaled(0.5), case.params, case.control, 1)
    whole = iterate(case.problem, optimizer, case.params, case.control, 1)
    if not isinstance(optimizer, bl.optim.ProximalGradient):  # there the prox is scaled too
        torch.testing.assert_close(
            2 * (half - case.params), whole - case.params, rtol=1e-12, atol=1e-15
        )
    else:
        assert not torch.equal(half, whole)


@pytest.mark.parametrize("rule", [bl.optim.SGD, bl.optim.Adam])
def test_a_coupled_decay_is_a_term_of_the_inner_objective(rule):
    """The decay of `SGD` and `Adam` enters the minimiser, and `Implicit` differentiates it."""
    case = ridge(3)
    decay = torch.tensor(0.3, dtype=torch.float64)
    problem = bl.BilevelProblem(
        lambda w, c, b: case.problem.inner(w, c["a"], b),
        lambda w, c, b: case.problem.outer(w, c["a"], b),
    )
    explicit = bl.BilevelProblem(
        lambda w, c, b: case.problem.inner(w, c["a"], b) + c["decay"] * square(w) / 2,
        problem.outer,
    )
    control = {"a": case.control, "decay": decay}
    lr, steps = (0.3, 200) if rule is bl.optim.SGD else (0.05, 600)
    found, expected = (
        bl.BilevelSolver(p, rule(lr, weight_decay=d), steps, bl.Implicit()).hypergradient(
            case.params, control
        )
        for p, d in ((problem, lambda c: c["decay"]), (explicit, 0.0))
    )
    assert found.certificate.trustworthy
    for name in control:
        torch.testing.assert_close(
            found.gradient[name], expected.gradient[name], rtol=1e-6, atol=1e-9
        )


def test_a_decoupled_decay_has_no_residual():
    case = ridge(2)
    solver = bl.BilevelSolver(case.problem, bl.optim.AdamW(0.1), 3, bl.Implicit())
    with pytest.raises(UnsupportedError, match="use Adam, whose weight_decay is part of"):
        solver.hypergradient(case.params, case.control)


@pytest.mark.parametrize("rule", [bl.optim.SGD, bl.optim.Adam, bl.optim.AdamW])
@pytest.mark.parametrize("given", ["parameters", "list", "named", "module"])
def test_params_where_torch_takes_them_are_refused_by_name(rule, given):
    model = torch.nn.Linear(2, 1)
    params = {
        "parameters": model.parameters(),
        "list": list(model.parameters()),
        "named": dict(model.named_parameters()),
        "module": model,
    }[given]
    for settings in ({}, {"lr": 0.1}):
        with pytest.raises(ArgumentError, match="takes no params"):
            rule(params, **settings)


def test_a_rule_of_ones_own_may_begin_with_what_it_likes():
    @dataclass(frozen=True)
    class Learned(bl.optim.InnerOptimizer):
        net: torch.nn.Module
        lr: float = 0.1

        def update(self, state, gradient, control, t):
            return state - self.lr * self.net(gradient)

    rule = Learned(torch.nn.Identity(), lr=0.2)
    assert copy.deepcopy(rule).lr == pickle.loads(pickle.dumps(bl.optim.SGD(0.2))).lr == 0.2
