"""Several outer objectives of one inner iteration, and an outer objective at every step."""

import pytest
import torch
from bilevel_cases import logistic, ridge, trees
from problems import real

import bilevel as bl
from bilevel import errors, tree
from bilevel.control import adjoints

F64 = torch.float64


def outers(case):
    first = case.problem.outer
    return [
        first,
        lambda w, a, batch: 3 - first(w, a, batch) / 2,
        lambda w, a, batch: sum(
            (x.abs() ** 2).sum() for x in tree.leaves_of(w) if tree.is_variable(x)
        ),
    ]


METHODS = [bl.MLM(), bl.Unrolled(), bl.Implicit(), bl.OneStep()]
# How much of a sweep is kept or made does not depend on what stands in the params.
SWEEPS = [
    bl.MLM(bl.Checkpointing(snapshots=2, block=4)),
    bl.MLM(bl.Checkpointing(block=None)),
    bl.MLM(last=7),
    bl.MLM(tolerance=1e-3, bounds=bl.methods.Bounds(0.9, 1.0)),
]
RIDGE, TREES = ridge(4, complex_=True), trees()


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, method) for case in (RIDGE, TREES) for method in METHODS),
        *((RIDGE, method) for method in SWEEPS),
        *(pytest.param(TREES, method, marks=pytest.mark.slow) for method in SWEEPS),
        *(pytest.param(c, bl.Penalty(64.0), marks=pytest.mark.slow) for c in (RIDGE, TREES)),
    ],
    ids=repr,
)
def test_each_is_what_it_is_alone(case, method):
    def solver(problem):
        return bl.BilevelSolver(
            problem, bl.optim.SGD(case.step_size, 0.3), 20, method, on_failure="ignore"
        )

    each = solver(case.problem).hypergradients(case.params, case.control, outers(case))
    for outer, found in zip(outers(case), each, strict=True):
        if isinstance(method, bl.OneStep) and case.name.startswith("trees"):
            continue
        alone = solver(bl.BilevelProblem(case.problem.inner, outer))
        try:
            expected = alone.hypergradient(case.params, case.control)
        except errors.LostGradientError:
            continue
        assert float(found.value) == pytest.approx(float(expected.value), rel=1e-12)
        close = {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(found.gradient, expected.gradient, **close)
        assert found.certificate.error_estimate == pytest.approx(
            expected.certificate.error_estimate, rel=1e-2, abs=1e-9
        )
        torch.testing.assert_close(found.params, expected.params)


def test_a_start_is_learned_for_each():
    X = real(1, 6, 3)
    problem = bl.BilevelProblem(
        lambda w, a, batch: ((X @ w) ** 2).mean() / 2, lambda w, a, batch: w.sum(), lambda w, a: a
    )
    solver = bl.BilevelSolver(problem, bl.optim.Adam(0.1), 6, certificate=bl.AgainstSteps())
    goals = [real(10 + i, 3) for i in range(4)]
    each = solver.hypergradients(
        torch.zeros(3, dtype=F64),
        real(2, 3),
        [lambda w, a, batch, g=g: ((w - g) ** 2).sum() * batch for g in goals],
        outer_batch=2.0,
    )
    for goal, found in zip(goals, each, strict=True):
        alone = bl.BilevelProblem(
            problem.inner, lambda w, a, batch, g=goal: 2 * ((w - g) ** 2).sum(), problem.start
        )
        expected = bl.BilevelSolver(alone, bl.optim.Adam(0.1), 6, certificate=None)
        torch.testing.assert_close(
            found.gradient,
            expected.hypergradient(torch.zeros(3, dtype=F64), real(2, 3)).gradient,
            rtol=1e-12,
            atol=1e-14,
        )


@pytest.mark.parametrize(
    "method", [bl.MLM(), bl.Unrolled(), bl.Implicit()], ids=lambda m: type(m).__name__
)
def test_a_leaf_that_one_does_not_reach_is_zero_there_and_one_that_none_does_is_refused(method):
    problem = bl.BilevelProblem(
        lambda w, c, batch: ((w - c["a"]) ** 2).sum() / 2, lambda w, c, batch: w.sum()
    )
    control = {"a": real(1, 2), "b": real(2, 2)}
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), 40, method, certificate=None)
    both = [lambda w, c, batch: w.sum(), lambda w, c, batch: (w * c["b"]).sum()]
    plain, scaled = solver.hypergradients(torch.zeros(2, dtype=F64), control, both)
    assert torch.equal(plain.gradient["b"], torch.zeros(2, dtype=F64))
    torch.testing.assert_close(scaled.gradient["b"], control["a"])
    with pytest.raises(errors.LostGradientError, match=r"control\['b'\]"):
        solver.hypergradients(torch.zeros(2, dtype=F64), control, both[:1])


class Looped(torch.autograd.Function):
    """The square, with a backward that vmap does not go through."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        if float(slope.abs().sum()) < 0:
            return None
        return 2 * x * slope


def test_a_kernel_that_refuses_many_cotangents_gets_one_at_a_time():
    problem = bl.BilevelProblem(
        lambda w, a, batch: Looped.apply(w - a).sum() / 2, lambda w, a, batch: w.sum()
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 5, certificate=None)
    costs = [lambda w, a, batch: w[0], lambda w, a, batch: w[1] * 2]
    found = solver.hypergradients(torch.zeros(2, dtype=F64), real(1, 2), costs)
    share = 1 - 0.8**5
    torch.testing.assert_close(
        found[0].gradient, torch.tensor([share, 0.0], dtype=F64), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        found[1].gradient, torch.tensor([0.0, 2 * share], dtype=F64), rtol=1e-12, atol=0
    )


def test_adjoints_are_those_of_each_cost_with_a_running_cost_and_steps_of_their_own():
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(c[0] * u + c[1])),
        lambda u, c: u.sum(),
        5,
        lambda u, c, t: 0.1 * t * (u**2).sum() + c[1] ** 2,
    )
    control = bl.PerStep([(real(t, 3), real(10 + t)) for t in range(5)])
    costs = [lambda u, c: (u**2).sum(), lambda u, c: (u * c.steps[1][0]).sum()]
    for checkpointing in (bl.Checkpointing(), bl.Checkpointing(snapshots=2, block=2)):
        each = adjoints(problem, costs, real(30, 3), control, checkpointing=checkpointing)
        for cost, found in zip(costs, each, strict=True):
            alone = bl.ControlProblem(problem.dynamics, cost, 5, problem.running)
            expected = bl.adjoint(alone, real(30, 3), control)
            torch.testing.assert_close(found.cost, expected.cost)
            for a, b in zip(
                tree.leaves_of(found.gradient), tree.leaves_of(expected.gradient), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(
                found.observation_gradient, expected.observation_gradient, rtol=1e-12, atol=1e-14
            )


@pytest.mark.parametrize("outers", [[], None, len, [3]], ids=repr)
def test_what_is_no_list_of_functions_is_refused(outers):
    case = ridge(2)
    solver = bl.BilevelSolver(case.problem, bl.optim.SGD(0.1), 5)
    with pytest.raises(errors.ArgumentError, match="outers"):
        solver.hypergradients(case.params, case.control, outers)


# An outer objective at every inner step.

GOAL = real(40, 3)
EACH = bl.BilevelProblem(
    lambda w, a, batch: ((w - a.sin()) ** 2).sum() / 2 + (w**4).sum() / 4,
    lambda w, a, batch: ((w - GOAL) ** 2).sum() * batch,
    outer_each=lambda w, a, batch, t: 0.1 * t * ((w - GOAL) ** 2).sum() * batch + (a**2).sum(),
)


def of_steps(a, steps=6):
    w, total = torch.zeros(3, dtype=F64), torch.zeros((), dtype=F64)
    for t in range(1, steps + 1):
        total = total + EACH.outer_each(w, a, 2.0, t)
        w = w - 0.2 * (w - a.sin() + w**3)
    return total + EACH.outer(w, a, 2.0)


@pytest.mark.parametrize(
    "method",
    [bl.MLM(), bl.MLM(bl.Checkpointing(snapshots=2, block=2)), bl.Unrolled()],
    ids=repr,
)
def test_an_outer_objective_at_every_step_is_added_and_differentiated(method):
    a = real(41, 3).requires_grad_()
    (expected,) = torch.autograd.grad(of_steps(a), a)
    solver = bl.BilevelSolver(
        EACH, bl.optim.SGD(0.2), 6, method, certificate=bl.AgainstSteps(), on_failure="raise"
    )
    start = torch.zeros(3, dtype=F64)
    found = solver.hypergradient(start, a.detach(), outer_batch=2.0)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.value, of_steps(a).detach())
    value = solver.value(start, a.detach(), outer_batch=2.0)
    torch.testing.assert_close(value, found.value)
    many = solver.hypergradients(
        start, a.detach(), [EACH.outer, lambda w, a, b: w.sum()], None, 2.0
    )
    torch.testing.assert_close(many[0].gradient, expected, rtol=1e-12, atol=1e-14)


def test_it_may_leave_out_the_number_of_the_step():
    problem = bl.BilevelProblem(
        EACH.inner, EACH.outer, outer_each=lambda w, a, batch: batch * w.sum()
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 1, certificate=None)
    one = torch.ones(3, dtype=F64)
    found = solver.value(one, one, outer_batch=2.0)
    later = one - 0.2 * (one - one.sin() + 1)
    torch.testing.assert_close(found, 6 + EACH.outer(later, one, 2.0))


@pytest.mark.parametrize(
    "method",
    [bl.Implicit(), bl.OneStep(), bl.MLM(last=2), bl.Penalty(), bl.FirstOrder()],
    ids=lambda m: type(m).__name__,
)
def test_methods_that_do_not_see_the_steps_refuse_it(method):
    solver = bl.BilevelSolver(EACH, bl.optim.SGD(0.2), 6, method)
    with pytest.raises(errors.ArgumentError, match="outer_each counts every inner step"):
        solver.hypergradient(torch.zeros(3), torch.ones(3), outer_batch=1.0)


def test_the_minimiser_does_not_tell_of_the_steps():
    solver = bl.BilevelSolver(EACH, bl.optim.SGD(0.2), 6)
    with pytest.warns(bl.ConvergenceWarning, match="outer_each counts the inner steps"):
        solver.hypergradient(torch.zeros(3), torch.ones(3), outer_batch=1.0)


@pytest.mark.parametrize("each", [3, lambda w: w], ids=["number", "one argument"])
def test_what_is_no_function_of_the_three_is_refused(each):
    with pytest.raises(errors.ArgumentError, match="outer_each"):
        bl.BilevelProblem(EACH.inner, EACH.outer, outer_each=each)


def test_the_descent_of_a_problem_with_it_goes_down():
    solver = bl.BilevelSolver(EACH, bl.optim.SGD(0.2), 6, certificate=None)
    found = solver.solve(
        torch.zeros(3, dtype=F64),
        real(41, 3),
        lambda p: torch.optim.SGD(p, 0.05),
        steps=20,
        batches=[(None, 1.0)],
        warm_start=False,
    )
    assert found.values[-1] < found.values[0]


def test_logistic_regression_has_many_validation_losses_at_once():
    case = logistic()
    solver = bl.BilevelSolver(case.problem, bl.optim.SGD(case.step_size), 100, bl.Implicit())
    found = solver.hypergradients(case.params, case.control, [case.problem.outer] * 3)
    assert all(h.certificate.trustworthy for h in found)
    torch.testing.assert_close(found[2].gradient, case.exact, rtol=1e-6, atol=1e-9)
