"""Inner solutions that come from elsewhere."""

import math

import pytest
import torch
from bilevel_cases import CASES, by_newton, logistic, ridge
from problems import real, square

import bilevel as bl
from bilevel.errors import ArgumentError, DivergenceError, StructureError, UnsupportedError

F64 = torch.float64


def given(case, **settings):
    return bl.BilevelSolver(
        case.problem, bl.Given(lambda w, a, batch: case.minimiser), method=bl.Implicit(), **settings
    )


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_its_hypergradient_is_that_of_the_minimiser_and_is_trusted(case):
    found = given(case, on_failure="raise").hypergradient(case.params, case.control)
    assert found.certificate.trustworthy
    leaves = zip(bl.tree.leaves_of(found.gradient), bl.tree.leaves_of(case.exact), strict=True)
    for one, other in leaves:
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_it_is_called_once_with_plain_tensors_and_begins_where_it_ended():
    case, starts = ridge(2), []

    def solve(w, a, batch):
        starts.append((w.clone(), batch))
        assert torch.is_grad_enabled()
        assert not (w.requires_grad or a.requires_grad)
        w += 1  # its own to write to
        return torch.linalg.solve(
            torch.autograd.functional.hessian(lambda v: case.problem.inner(v, a, None), 0 * w),
            -torch.autograd.functional.jacobian(lambda v: case.problem.inner(v, a, None), 0 * w),
        )

    solver = bl.BilevelSolver(case.problem, bl.Given(solve), 50, bl.Implicit())
    first = case.params.clone()
    solution = solver.solve(first, case.control, steps=3, batches=[("inner", "outer")])
    assert torch.equal(first, case.params)
    assert len(starts) == 3
    assert all(batch == "inner" for _, batch in starts)
    assert torch.equal(starts[0][0], case.params)
    assert not torch.equal(starts[1][0], case.params)
    assert solution.certificates[-1].trustworthy


def test_what_is_no_minimiser_is_not_trusted():
    case = logistic()
    solver = bl.BilevelSolver(
        case.problem, bl.Given(lambda w, a, batch: case.minimiser + 0.3), method=bl.Implicit()
    )
    with pytest.warns(bl.ConvergenceWarning, match="solve the inner problem further"):
        solver.hypergradient(case.params, case.control)
    saddle = bl.BilevelProblem(
        lambda w, a, batch: w[0] ** 2 - w[1] ** 2 + w[1] ** 4 - a * w[0],
        lambda w, a, batch: (w - 1).square().sum(),
    )
    solver = bl.BilevelSolver(
        saddle,
        bl.Given(lambda w, a, batch: torch.stack([a / 2, 0 * a])),
        method=bl.Implicit(bl.linear.NormalCG()),
    )
    with pytest.warns(bl.ConvergenceWarning, match="saddle"):
        solver.hypergradient(torch.zeros(2, dtype=F64), torch.tensor(1.0, dtype=F64))


def soft(x, threshold):
    return torch.sign(x) * (x.abs() - threshold).clamp_min(0)


def test_with_a_rule_it_solves_what_the_rule_solves():
    # The lasso of an identity: w = soft(a, e^c), and the support decides what moves.
    problem = bl.BilevelProblem(
        lambda w, c, batch: square(w - c["a"]) / 2, lambda w, c, batch: square(w - 1)
    )
    rule = bl.optim.ProximalGradient(0.7, bl.prox.L1(lambda c: c["log"].exp()))
    solve = bl.Given(lambda w, c, batch: soft(c["a"], c["log"].exp()), rule)
    solver = bl.BilevelSolver(
        problem, solve, method=bl.Implicit(bl.linear.GMRES()), on_failure="raise"
    )
    a, log = 2 * real(1, 6), torch.tensor(-0.5, dtype=F64)
    found = solver.hypergradient(torch.zeros(6, dtype=F64), {"a": a, "log": log})
    a.requires_grad_(), log.requires_grad_()
    square(soft(a, log.exp()) - 1).backward()
    torch.testing.assert_close(found.gradient["a"], a.grad)
    torch.testing.assert_close(found.gradient["log"], log.grad)
    assert found.certificate.trustworthy
    decay = bl.Given(lambda w, c, batch: c / 3, bl.optim.SGD(weight_decay=2.0))
    shrunk = bl.BilevelProblem(lambda w, c, b: square(w - c) / 2, lambda w, c, b: square(w) / 2)
    at = bl.BilevelSolver(shrunk, decay, method=bl.Implicit()).hypergradient(
        0 * a.detach(), real(2, 6)
    )
    torch.testing.assert_close(at.gradient, real(2, 6) / 9)


@pytest.mark.parametrize(
    ("solve", "error", "message"),
    [
        (lambda w, a, b: None, StructureError, "got None: is a return missing"),
        (lambda w, a, b: w.numpy(), StructureError, r"got ndarray; wrap it with torch.as_tensor"),
        (lambda w, a, b: {"w": w}, StructureError, "must return params like those given"),
        (lambda w, a, b: w[:1], StructureError, r"must be float64\[2\] on cpu, got float64\[1\]"),
        (lambda w, a, b: w.float(), StructureError, r"got float32\[2\]"),
        (
            lambda w, a, b: w * math.nan,
            DivergenceError,
            "returned 2 of 2 entries of params that are",
        ),
    ],
)
def test_a_solver_that_returns_something_else(solve, error, message):
    case = ridge(2)
    solver = bl.BilevelSolver(case.problem, bl.Given(solve), method=bl.Implicit())
    with pytest.raises(error, match=message):
        solver.hypergradient(case.params, case.control)


@pytest.mark.parametrize(
    "method",
    [bl.MLM(), bl.Unrolled(), bl.OneStep(), bl.Penalty(), bl.FirstOrder()],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_reverse_steps_are_refused_by_name(method):
    name = type(method).__name__
    with pytest.raises(
        ArgumentError, match=rf"{name} differentiates.*Given has none.*Implicit\(\)"
    ):
        bl.BilevelSolver(ridge(2).problem, bl.Given(lambda w, a, b: w), method=method)


def test_settings():
    with pytest.raises(ArgumentError, match="solve must be a function"):
        bl.Given(3)
    with pytest.raises(ArgumentError, match=r"solve is called as solve\(params, control, batch\)"):
        bl.Given(lambda w: w)
    with pytest.raises(ArgumentError, match="rule must be a rule such as ProximalGradient"):
        bl.Given(lambda w, a, b: w, "l1")
    with pytest.raises(ArgumentError, match="makes its steps by itself"):
        bl.optim.Clipped(bl.Given(lambda w, a, b: w), max_norm=1.0)
    with pytest.raises(UnsupportedError, match="no learning rate to scale"):
        bl.adapt(bl.Given(lambda w, a, b: w), real(1, 2), square, 3)


def test_the_table_of_methods_has_those_that_apply():
    case = ridge(2)

    def solve(w, a, batch):
        return by_newton(case.problem, w, a)[0]

    solver = bl.BilevelSolver(case.problem, bl.Given(solve), method=bl.Implicit())
    table = bl.check_hypergradient(solver, case.params, case.control, n_directions=1)
    assert [type(row.method) for row in table.rows] == [bl.Implicit]
    assert table.rows[0].error < 1e-7
