"""Gradients that a function cuts, and recipes that look as if they did."""

import pytest
import torch
from choices import CHECKPOINTINGS
from problems import real, square
from torch.autograd.function import once_differentiable

import bilevel as bl
from bilevel.errors import LostGradientError, UnsupportedError


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


HALVE = bl.Map(lambda u, c, t: u * c)
ONCE = {
    "step": bl.ControlProblem(bl.Map(lambda u, c, t: Once.apply(u * c)), lambda u, c: square(u), 3),
    "terminal": bl.ControlProblem(HALVE, lambda u, c: Once.apply(u * c).sum(), 3),
    "running": bl.ControlProblem(
        HALVE, lambda u, c: square(u), 3, lambda u, c, t: Once.apply(u * c).sum()
    ),
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)
@pytest.mark.parametrize("place", ONCE)
def test_a_second_derivative_of_a_once_differentiable_function_is_refused(place, checkpointing):
    u, c = real(1, 3), real(2, 3)
    bl.adjoint(ONCE[place], u, c, checkpointing=checkpointing)
    with pytest.raises(UnsupportedError, match="once_differentiable"):
        bl.hvp(ONCE[place], u, c, c, checkpointing=checkpointing)


TWICE = [(method, 5) for method in (bl.Unrolled(), bl.MLM(), bl.OneStep(), bl.Implicit())]
TWICE += [(bl.Implicit(linear), 0) for linear in (bl.linear.CG(), bl.linear.Dense())]


@pytest.mark.parametrize(("method", "inner_steps"), TWICE, ids=repr)
def test_an_inner_objective_that_is_differentiable_once_is_refused(method, inner_steps):
    problem = bl.BilevelProblem(
        lambda w, a, b: (Once.apply(w) * a).sum() + square(w - a), lambda w, a, b: square(w)
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), inner_steps, method, certificate=None)
    with pytest.raises(UnsupportedError, match="marked with once_differentiable"):
        solver.hypergradient(real(1, 3), real(2, 3))


@pytest.mark.parametrize(
    "rule", [bl.optim.Adam(0.1), bl.optim.ProximalGradient(0.1, bl.prox.L1(0.1))], ids=repr
)
def test_so_it_is_beside_other_rules(rule):
    problem = bl.BilevelProblem(
        lambda w, a, b: square(w - a) + Once.apply(w * a).sum(), lambda w, a, b: square(w)
    )
    linear = bl.linear.CG() if isinstance(rule, bl.optim.Adam) else bl.linear.GMRES()
    solver = bl.BilevelSolver(problem, rule, 5, bl.Implicit(linear))
    with pytest.raises(UnsupportedError, match="marked with once_differentiable"):
        solver.hypergradient(real(1, 3), real(2, 3))


def test_a_given_solution_and_its_objective_are_looked_at_too():
    problem = bl.BilevelProblem(
        lambda w, a, b: (Once.apply(w) - a * w).sum(), lambda w, a, b: square(w)
    )
    solver = bl.BilevelSolver(
        problem, bl.Given(lambda w, a, b: (a / 3) ** 0.5), method=bl.Implicit()
    )
    with pytest.raises(UnsupportedError, match="marked with once_differentiable"):
        solver.hypergradient(real(1, 3), real(2, 3).abs())
    root = bl.implicit(
        lambda a: (a / 3) ** 0.5, objective=lambda w, a: (Once.apply(w) - a * w).sum()
    )
    with pytest.raises(UnsupportedError, match="marked with once_differentiable"):
        root(real(2, 3).abs().requires_grad_())


def test_functions_with_a_constant_derivative_have_a_second_one():
    step = bl.Map(lambda u, c, t: torch.relu(u * c) + (u * c).sign() + (u * c).round())
    problem = bl.ControlProblem(step, lambda u, c: square(u), 2)
    u, c = real(1, 3), real(2, 3).requires_grad_()
    loss = square(step.step(step.step(u, c, 1), c, 2))
    (gradient,) = torch.autograd.grad(loss, c, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.sum(), c)
    found = bl.hvp(problem, u, c, torch.ones_like(c)).product
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS, ids=repr)
@pytest.mark.parametrize("draws", [False, True])
def test_a_gradient_inside_a_step_keeps_its_dependence(checkpointing, draws):
    def step(u, c, t):
        with torch.enable_grad():
            x = u if u.requires_grad else u.clone().requires_grad_()
            noise = torch.rand(3, dtype=x.dtype) if draws else 1.0
            energy = (c * noise * x**4).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return u - 0.1 * force

    problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u), 4)
    u, c = 0.5 * real(1, 3), 0.5 * real(2, 3)
    leaf, state = c.clone().requires_grad_(), u
    torch.manual_seed(1)
    for t in range(1, 5):
        state = step(state, leaf, t)
    (expected,) = torch.autograd.grad(square(state), leaf)
    torch.manual_seed(1)
    found = bl.adjoint(problem, u, c, checkpointing=checkpointing)
    torch.testing.assert_close(found.gradient, expected)


def test_a_gradient_inside_a_step_that_lost_its_dependence_is_refused():
    def step(u, c, t):
        x = u.detach().requires_grad_()
        (force,) = torch.autograd.grad((c * x**4).sum(), x, create_graph=True)
        return u - 0.1 * force

    problem = bl.ControlProblem(bl.Map(step), lambda u, c: square(u), 4)
    with pytest.raises(LostGradientError, match="uses a tensor"):
        bl.adjoint(problem, real(1, 3), real(2, 3))


def cutting(cut):
    """The cube, whose backward detaches what it has saved, or does not; a class of its own."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 3 * (x.detach() if cut else x) ** 2 * g

    return Cube.apply


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def asked_twice(cube, place):
    u, c = real(1, 3), real(2, 3)
    if place == "step":
        return bl.hvp(
            bl.ControlProblem(bl.Map(lambda u, c, t: cube(u * c)), lambda u, c: square(u), 3),
            u,
            c,
            c,
        )
    problem = bl.BilevelProblem(
        lambda w, a, b: square(w - a) + cube(w * a).sum() / 10, lambda w, a, b: square(w)
    )
    method = bl.Implicit() if place == "implicit" else bl.MLM()
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, method, certificate=None)
    start = torch.zeros(3, dtype=u.dtype) if place == "from zero" else u
    return solver.hypergradient(start, c)


@pytest.mark.parametrize("place", ["step", "mlm", "from zero", "implicit"])
def test_a_backward_that_detaches_is_told_by_a_difference(place):
    torch.manual_seed(3)
    cube = cutting(True)
    for _ in range(2):
        with pytest.warns(bl.ConvergenceWarning, match="backward of Cube loses terms, as by a det"):
            asked_twice(cube, place)
    for right in (cutting(False), StraightThrough.apply):
        asked_twice(right, place)  # a warning is an error
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_a_backward_whose_derivative_nothing_needs_is_no_fault():
    cube = cutting(True)
    problem = bl.BilevelProblem(
        lambda w, a, b: square(w - a) + (cube(a) * w).sum(), lambda w, a, b: square(w)
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 5, certificate=None)
    solver.hypergradient(real(1, 3), real(2, 3))
