"""What the outer loop moves: each tensor once, by name, and never to a value that is not finite."""

import math

import pytest
import torch
from problems import real, square
from torch import nn

import bilevel as bl
from bilevel.errors import ArgumentError, DivergenceError, StructureError

ONE = torch.ones((), dtype=torch.float64)


def sgd(rate):
    return lambda leaves: torch.optim.SGD(leaves, rate)


def pulled_two_ways():
    """J = (a - 1)^2 / 2 + 3 (b - 2)^2 / 2; with a = b: slope 4 w - 7, minimum 7 / 4."""
    return bl.ControlProblem(
        bl.Map(lambda u, c, t: u),
        lambda u, c: square(c["a"] - 1) / 2 + 3 * square(c["b"] - 2) / 2 + 0 * u,
        1,
    )


@pytest.mark.parametrize("project", [None, lambda c: {k: v.clamp(max=9) for k, v in c.items()}])
@pytest.mark.parametrize("optimizer", [sgd(0.1), bl.NewtonCG()], ids=["SGD", "NewtonCG"])
def test_a_tensor_in_two_places_of_the_control_moves_as_one(optimizer, project):
    w = torch.zeros((), dtype=torch.float64)
    solver = bl.ControlSolver(pulled_two_ways(), optimizer)
    seen = []
    first = solver.solve(
        {"a": w, "b": w},
        ONE,
        steps=1,
        project=project,
        callback=lambda p: seen.append(p.control["a"] is p.control["b"]),
    )
    newton = isinstance(optimizer, bl.NewtonCG)
    assert float(first.control["a"]) == pytest.approx(1.75 if newton else 0.7)
    assert first.gradient_norms == pytest.approx([7.0])
    found = solver.solve({"a": w, "b": w}, ONE, steps=60, project=project, tolerance=1e-6)
    assert found.control["a"] is found.control["b"]
    assert float(found.control["a"]) == pytest.approx(1.75, abs=1e-6)
    assert found.converged
    assert found.kkt.stationarity <= 1e-6
    assert seen == [True]


def test_a_tensor_at_every_step_stays_one_tensor():
    # u(3) = 1 + 3 w: J = u(3)^2 / 2 has slope 3 (1 + 3 w).
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: u**2 / 2, 3)
    w = torch.zeros((), dtype=torch.float64)
    found = bl.ControlSolver(problem, sgd(0.1)).solve(bl.PerStep([w, w, w]), ONE, steps=1)
    assert [float(x) for x in found.control.steps] == pytest.approx([-0.3] * 3)
    assert found.control.steps[0] is found.control.steps[2]
    apart = bl.ControlSolver(problem, sgd(0.1)).solve(
        bl.PerStep([w, w.clone(), w.clone()]), ONE, steps=1
    )
    assert [float(x) for x in apart.control.steps] == pytest.approx([-0.1] * 3)


def test_tied_leaves_of_a_bilevel_problem_move_as_one():
    # w(a, b) = a + 2 b, F = (w - 6)^2 / 2: slope of the one variable 3 (3 x - 6).
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(w - c["a"] - 2 * c["b"]) / 2,
        lambda w, c, batch: square(w - 6) / 2,
    )
    x = torch.zeros((), dtype=torch.float64)
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, certificate=None)
    one = solver.solve(x, {"a": x, "b": x}, sgd(0.1), steps=1)
    assert float(one.control["a"]) == pytest.approx(1.8)
    assert one.control["a"] is one.control["b"]
    assert one.gradient_norms == pytest.approx([18.0])


def test_aliases_of_one_tensor_are_one_variable_too():
    # state_dict gives the tied weights of a module as two tensors that share memory.
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(1, 1, bias=False, dtype=torch.float64)
            self.second = nn.Linear(1, 1, bias=False, dtype=torch.float64)
            self.second.weight = self.first.weight

    given = dict(Tied().state_dict())
    assert given["first.weight"] is not given["second.weight"]
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u),
        lambda u, c: 2 * c["first.weight"].sum() + 3 * c["second.weight"].sum() + 0 * u,
        1,
    )
    found = bl.ControlSolver(problem, sgd(1.0)).solve(given, ONE, steps=1)
    torch.testing.assert_close(found.control["first.weight"], given["first.weight"] - 5)
    assert found.control["first.weight"] is found.control["second.weight"]


def test_a_view_in_another_shape_beside_its_tensor_is_refused():
    w = real(1, 2, 3)
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: u), lambda u, c: (c["a"] @ c["b"]).sum() + u, 1
    )
    with pytest.raises(StructureError, match=r"control\['b'\] shares memory with control\['a'\]"):
        bl.ControlSolver(problem).solve({"a": w, "b": w.T}, ONE, steps=1)
    # Rows of one tensor lie side by side, and are variables of their own.
    rows = bl.PerStep.unstack(torch.zeros(2, 1, dtype=torch.float64))
    each = bl.ControlProblem(bl.Map(lambda u, c, t: u + t * c.sum()), lambda u, c: u, 2)
    found = bl.ControlSolver(each, sgd(1.0)).solve(rows, ONE, steps=1)
    assert [float(x) for x in found.control.steps] == [-1.0, -2.0]


def test_a_projection_that_parts_tied_leaves_is_refused():
    w = torch.zeros((), dtype=torch.float64)
    with pytest.raises(StructureError, match=r"project gave control\['b'\] another value than"):
        bl.ControlSolver(pulled_two_ways(), sgd(0.1)).solve(
            {"a": w, "b": w}, ONE, steps=1, project=lambda c: {"a": c["a"], "b": c["b"] + 1}
        )


def weights_and_decay():
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(w - c["weights"]) / 2 + c["decay"] * square(w) / 2,
        lambda w, c, batch: w.sum() + c["decay"] + c["weights"].sum(),
    )
    control = {"weights": torch.zeros(2, dtype=torch.float64), "decay": 0 * ONE}
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, certificate=None)
    return lambda optimizer: solver.solve(control["weights"], control, optimizer, steps=1)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(
            [
                {"params": p.control["weights"], "lr": 0.25},
                {"params": p.control["decay"], "lr": 0.0},
            ]
        ),
        lambda p: torch.optim.SGD(
            [
                {"params": [x], "lr": 0.25 if name == "control['weights']" else 0.0}
                for name, x in p.named
            ]
        ),
        lambda p: torch.optim.SGD([{"params": [p[1]], "lr": 0.25}, {"params": [p[0]], "lr": 0.0}]),
    ],
    ids=["tree", "names", "positions"],
)
def test_rates_of_leaves_are_given_by_name(optimizer):
    found = weights_and_decay()(optimizer).control
    # dF/dweights = 2; decay stands still.
    torch.testing.assert_close(found["weights"], torch.full((2,), -0.5, dtype=torch.float64))
    assert float(found["decay"]) == 0


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p.named, 0.25),
        lambda p: torch.optim.LBFGS(p.named, lr=0.25, max_iter=1),
        lambda p: torch.optim.AdamW(p.named, 0.25),
    ],
)
def test_named_leaves_are_taken_by_torch(optimizer):
    seen = []
    found = weights_and_decay()(lambda p: seen.append(optimizer(p)) or seen[0])
    assert seen[0].param_groups[0]["param_names"] == ["control['decay']", "control['weights']"]
    assert float(found.control["weights"].max()) < 0


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            torch.optim.SGD([torch.zeros(1)], 0.1),
            "optimizer must be a function that makes .* got torch.optim.SGD",
        ),
        (bl.optim.SGD(0.1), "optimizer must be a function that makes"),
        (lambda: None, r"optimizer is called as optimizer\(leaves\)"),
        (lambda p: None, "what optimizer returns must be a torch.optim.Optimizer, got NoneType"),
        (lambda p: torch.optim.SGD([torch.zeros(1)], 0.1), "moves tensors that are not those of"),
    ],
    ids=["instance", "inner rule", "no argument", "returns nothing", "other tensors"],
)
def test_what_makes_no_optimiser_of_the_control_is_refused(optimizer, message):
    with pytest.raises(ArgumentError, match=message):
        weights_and_decay()(optimizer)
    with pytest.raises(ArgumentError, match=message):
        bl.ControlSolver(pulled_two_ways(), optimizer).solve({"a": ONE, "b": 2 * ONE}, ONE, steps=1)


def linear(rate, **settings):
    """One update along a constant slope of 1e10, so that a rate of 1e300 ends at infinity."""
    kept = []
    problem = bl.BilevelProblem(
        lambda w, a, batch: square(w - a) / 2, lambda w, a, batch: 1e10 * w.sum() * (batch or 1)
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 60, certificate=None)
    try:
        solver.solve(
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            sgd(rate),
            callback=lambda p: kept.append(p.control.clone()),
            **settings,
        )
    except DivergenceError as error:
        return error, kept
    raise AssertionError


@pytest.mark.parametrize("batches", [None, [(None, 1.0)]], ids=["alone", "batches"])
def test_the_last_update_is_checked_before_a_callback_sees_it(batches):
    error, kept = linear(1e300, steps=1, batches=batches)
    assert "iteration 1: control is not finite after the update" in str(error)
    assert kept == []
    assert float(error.progress.control) == 1
    assert error.progress.steps == 0


def test_a_projection_to_infinity_is_caught_at_its_iteration():
    times = []
    error, kept = linear(
        1e-12,
        steps=5,
        project=lambda a: times.append(0) or (a * math.inf if len(times) == 3 else a),
    )
    assert "iteration 3: control is not finite" in str(error)
    assert len(kept) == 2
    assert torch.equal(error.progress.control, kept[-1])


def test_float32_at_the_largest_rate_is_caught_with_build():
    problem = bl.ControlProblem(bl.Map(lambda u, c, t: u + c), lambda u, c: 10 * u, 1)
    solver = bl.ControlSolver(lambda batch: (problem, batch), sgd(3e38))
    seen = []
    with pytest.raises(DivergenceError, match="iteration 1: control is not finite") as caught:
        solver.solve(torch.ones(()), batches=[torch.ones(())], steps=1, callback=seen.append)
    assert seen == []
    assert float(caught.value.progress.control) == 1


@pytest.mark.parametrize(
    ("project", "message"),
    [
        (
            lambda c: c["a"].clamp_(max=0) is None or None,
            "must return the projected control",
        ),
        (lambda c: 0.0, "project must return a control like its own"),
        (lambda c: {"a": c["a"]}, "project must return a control like its own"),
        (lambda c: {"a": c["a"].expand(3), "b": c["b"]}, r"control\['a'\] must be float64\[\]"),
    ],
    ids=["in place", "scalar", "other tree", "other shape"],
)
def test_a_projection_that_returns_no_control_is_refused(project, message):
    solver = bl.ControlSolver(pulled_two_ways(), sgd(0.1))
    with pytest.raises(StructureError, match=message) as caught:
        solver.solve({"a": 0 * ONE, "b": 0 * ONE}, ONE, steps=2, project=project)
    assert float(caught.value.progress.control["a"]) == 0


def test_a_projection_in_place_that_returns_its_control_is_used():
    def project(c):
        c["a"].clamp_(max=0.05)
        return c

    solver = bl.ControlSolver(pulled_two_ways(), sgd(0.1))
    found = solver.solve({"a": 0 * ONE, "b": 0 * ONE}, ONE, steps=2, project=project)
    assert float(found.control["a"]) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (nn.Linear(1, 1), r"got Linear; bilevel.functional\(module\)"),
        (nn.Linear(1, 1).parameters(), r"got generator; .*bilevel.functional\(module\)"),
        ({"a": 0.5}, r"control\['a'\] must be a tensor .* wrap it with torch.as_tensor"),
    ],
    ids=["module", "generator", "number"],
)
def test_modules_and_generators_are_refused_with_their_remedy(control, message):
    with pytest.raises(StructureError, match=message):
        bl.ControlSolver(pulled_two_ways()).solve(control, ONE)
    solver = bl.BilevelSolver(
        bl.BilevelProblem(lambda w, a, batch: square(w), lambda w, a, batch: square(w)),
        bl.optim.SGD(0.1),
    )
    with pytest.raises(StructureError, match=message.replace("control", "params")):
        solver.solve(control if not isinstance(control, dict) else {"a": 0.5}, ONE)


def test_a_control_without_variables_is_refused():
    with pytest.raises(ArgumentError, match="control must hold a floating-point or complex tensor"):
        bl.ControlSolver(pulled_two_ways()).solve({"a": torch.tensor(1)}, ONE)
