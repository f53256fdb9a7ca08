"""Rules around rules, and rules equal to optimisers of torch."""

import inspect

import pytest
import torch
from bilevel_cases import ridge
from problems import real

import bilevel as bl
from bilevel import errors, tree

F64 = torch.float64
PROBLEM = bl.BilevelProblem(
    lambda p, a, batch: (
        ((p["w"] - a) ** 2).sum() / 2 + (p["w"] * p["b"]).sum() + 2 * p["b"] ** 4 + p["b"] ** 2
    ),
    lambda p, a, batch: (p["w"] ** 2).sum() / 2 + p["b"] ** 2,
)
PARAMS = {"w": 3 * real(1, 4), "b": torch.tensor(1.5, dtype=F64)}
CONTROL = real(2, 4)


def of_torch(make, steps, clip=None):
    params = tree.map_leaves(lambda x: x.clone().requires_grad_(), PARAMS)
    optimizer = make(params)
    for _ in range(steps):
        optimizer.zero_grad()
        PROBLEM.inner(params, CONTROL, None).backward()
        if clip is not None:
            clip(params.values())
        optimizer.step()
    return tree.detach(params)


def ours(rule, steps=12):
    solver = bl.BilevelSolver(PROBLEM, rule, steps, certificate=None)
    return solver.hypergradient(PARAMS, CONTROL).params


def assert_same(found, expected):
    for name in ("w", "b"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [0.5, 1e3])
def test_clipping_is_that_of_torch(size):
    inside = bl.optim.SGD(0.05, 0.9, weight_decay=0.1)

    def make(params):
        return torch.optim.SGD(params.values(), 0.05, 0.9, weight_decay=0.1)

    expected = of_torch(make, 12, lambda p: torch.nn.utils.clip_grad_norm_(p, size))
    assert_same(ours(bl.optim.Clipped(inside, max_norm=size)), expected)
    expected = of_torch(make, 12, lambda p: torch.nn.utils.clip_grad_value_(p, size))
    assert_same(ours(bl.optim.Clipped(inside, clip_value=size)), expected)


def test_clipping_leaves_the_limit_as_it_is():
    plain, clipped = (
        bl.BilevelSolver(PROBLEM, rule, 300, bl.Implicit()).hypergradient(PARAMS, CONTROL)
        for rule in (bl.optim.SGD(0.08), bl.optim.Clipped(bl.optim.SGD(0.08), max_norm=1.0))
    )
    torch.testing.assert_close(plain.gradient, clipped.gradient, rtol=1e-4, atol=0)
    assert clipped.certificate.trustworthy


def test_a_gradient_of_zero_is_clipped_to_zero():
    control = torch.zeros(3, dtype=F64, requires_grad=True)
    rule = bl.optim.Clipped(bl.optim.SGD(0.1), max_norm=1.0)
    (slope,) = torch.autograd.grad(rule.update(control, control * 2, None, 1).sum(), control)
    assert bool(slope.isfinite().all())


def test_a_part_of_complex_numbers_is_clipped_by_value():
    rule = bl.optim.Clipped(bl.optim.SGD(1.0), clip_value=1.0)
    found = rule.update(torch.zeros(1, dtype=torch.complex64), torch.tensor([3 - 0.5j]), None, 1)
    assert found.tolist() == [-1 + 0.5j]


GROUPS = {"w": bl.optim.Adam(0.1), "b": bl.optim.SGD(0.02, momentum=0.8)}


def test_rules_by_leaf_are_parameter_groups():
    w, b = (
        of_torch(make, 1)
        for make in (
            lambda p: torch.optim.Adam([p["w"]], 0.1),
            lambda p: torch.optim.SGD([p["b"]], 0.02, 0.8),
        )
    )
    assert_same(ours(bl.optim.ByLeaf(GROUPS), 1), {"w": w["w"], "b": b["b"]})
    groups = bl.optim.ByLeaf({"w": bl.optim.SGD(0.1), "b": bl.optim.SGD(0.02)})

    def make(p):
        return torch.optim.SGD([{"params": [p["w"]]}, {"params": [p["b"]], "lr": 0.02}], 0.1)

    assert_same(ours(groups), of_torch(make, 12))


@pytest.mark.parametrize("method", [bl.Implicit(), bl.Penalty()], ids=lambda m: type(m).__name__)
def test_rules_by_leaf_have_the_limit_of_the_objective(method):
    rule = bl.optim.ByLeaf({"w": bl.optim.SGD(0.1, 0.5), "b": bl.optim.SGD(0.05)})
    found = bl.BilevelSolver(PROBLEM, rule, 400, method).hypergradient(PARAMS, CONTROL)
    exact = bl.BilevelSolver(PROBLEM, bl.optim.SGD(0.05), 800, bl.Implicit())
    torch.testing.assert_close(
        found.gradient, exact.hypergradient(PARAMS, CONTROL).gradient, rtol=1e-6, atol=1e-9
    )
    assert found.certificate.trustworthy


def test_a_rule_for_a_part_may_be_proximal():
    parts = {
        "w": bl.optim.ProximalGradient(0.1, bl.prox.NonNegative(), accelerated=True),
        "b": bl.optim.SGD(0.05),
    }
    rule = bl.optim.ByLeaf(parts)
    assert not rule.symmetric
    solver = bl.BilevelSolver(PROBLEM, rule, 400, bl.Implicit(bl.linear.GMRES()))
    found = solver.hypergradient(PARAMS, CONTROL)
    assert bool((found.params["w"] >= 0).all())
    assert found.certificate.trustworthy


def test_rules_around_rules_are_scaled_for_adaptation():
    rule = bl.optim.Clipped(bl.optim.ByLeaf({"w": bl.optim.SGD(0.1), "b": bl.optim.SGD(0.2)}), 1.0)
    found = rule.scaled(0.5).rule.rules
    assert (found["w"].lr, found["b"].lr) == (0.05, 0.1)


def test_learned_settings_by_leaf_are_differentiated():
    rule = bl.optim.ByLeaf(
        {"w": bl.optim.SGD(lambda c: c["rates"][0]), "b": bl.optim.SGD(lambda c: c["rates"][1])}
    )
    problem = bl.BilevelProblem(lambda p, c, batch: PROBLEM.inner(p, CONTROL, batch), PROBLEM.outer)
    control = {"rates": torch.tensor([0.1, 0.05], dtype=F64)}
    solver = bl.BilevelSolver(problem, rule, 5, certificate=bl.AgainstSteps())
    found = solver.hypergradient(PARAMS, control).gradient["rates"]
    for i in range(2):
        h = 1e-6 * torch.eye(2, dtype=F64)[i]
        up, down = (float(solver.value(PARAMS, {"rates": control["rates"] + d})) for d in (h, -h))
        assert float(found[i]) == pytest.approx((up - down) / 2e-6, rel=1e-6)


LIKE = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "dampening": (
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "foreach": False},
    ),
    "defaults": (torch.optim.SGD, {}),
    "Adam": (torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6}),
    "Adam by default": (torch.optim.Adam, {}),
    "Adam with decay": (torch.optim.Adam, {"weight_decay": 0.2, "amsgrad": False}),
    "Adam, decoupled": (torch.optim.Adam, {"weight_decay": 0.2, "decoupled_weight_decay": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "AdamW with decay": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
}
if "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters:  # torch 2.6
    del LIKE["Adam, decoupled"]


@pytest.mark.parametrize("name", LIKE)
def test_a_rule_like_an_optimiser_makes_its_steps(name):
    optimizer, settings = LIKE[name]
    expected = of_torch(lambda p: optimizer(p.values(), **settings), 12)
    assert_same(ours(bl.optim.like(optimizer, **settings)), expected)


def test_a_rule_like_an_optimiser_may_have_learned_settings():
    case = ridge(3)
    rule = bl.optim.like(torch.optim.SGD, lr=lambda c: 0.04 * c.exp().mean())
    solver = bl.BilevelSolver(case.problem, rule, 10, certificate=None)
    other = bl.BilevelSolver(
        case.problem, bl.optim.SGD(lambda c: 0.04 * c.exp().mean()), 10, certificate=None
    )
    given = case.params, case.control
    assert torch.equal(solver.hypergradient(*given).gradient, other.hypergradient(*given).gradient)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: bl.optim.like(torch.optim.RMSprop, lr=0.1),
            errors.UnsupportedError,
            "no rule equal to RMSprop",
        ),
        (
            lambda: bl.optim.like(torch.optim.Adam, amsgrad=True),
            errors.UnsupportedError,
            "with amsgrad=True",
        ),
        (
            lambda: bl.optim.like(torch.optim.SGD, maximize=True),
            errors.UnsupportedError,
            "with maximize=True",
        ),
        (
            lambda: bl.optim.like(torch.optim.SGD, betas=(0.9, 0.9)),
            errors.ArgumentError,
            "SGD has no setting betas",
        ),
        (
            lambda: bl.optim.like(torch.optim.SGD([torch.ones(1)])),
            errors.ArgumentError,
            "got a SGD",
        ),
        (lambda: bl.optim.like(torch.nn.Linear), errors.ArgumentError, "must be a class such as"),
        (lambda: bl.optim.like("AdamW"), errors.ArgumentError, "must be a class such as"),
        (lambda: bl.optim.like(torch.optim.SGD, lr=-1.0), errors.ArgumentError, "lr must be > 0"),
        (lambda: bl.optim.Clipped(bl.optim.SGD(0.1)), errors.ArgumentError, "got neither"),
        (
            lambda: bl.optim.Clipped(bl.optim.SGD(0.1), 1.0, 1.0),
            errors.ArgumentError,
            "got both",
        ),
        (
            lambda: bl.optim.Clipped(bl.optim.SGD(0.1), 0.0),
            errors.ArgumentError,
            "max_norm must be > 0",
        ),
        (
            lambda: bl.optim.Clipped(bl.optim.SGD, 1.0),
            errors.ArgumentError,
            "got the class SGD",
        ),
        (lambda: bl.optim.ByLeaf({"w": None}), errors.ArgumentError, "a part of rules must be"),
        (
            lambda: bl.optim.ByLeaf(
                {"w": bl.optim.ProximalGradient(0.1, bl.prox.L1(0.1), line_search=True)}
            ),
            errors.UnsupportedError,
            "a line search needs the value",
        ),
        (
            lambda: ours(bl.optim.ByLeaf({"w": bl.optim.SGD(0.1)})),
            errors.StructureError,
            "structure of the params",
        ),
    ],
)
def test_bad_input_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
