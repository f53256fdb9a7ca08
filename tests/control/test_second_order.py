"""Hessian-vector products by one sweep, against double backward through the plain loop."""

import pytest
import torch
from choices import PATHS, covering
from problems import CASES, TELLING, Custom, case_named, real, square
from reference import (
    assert_same,
    assert_same_vector,
    autograd,
    fresh,
    plain_cost,
    plain_gradients,
    random_like,
    wanted,
)

import bilevel as bl
from bilevel import tree
from bilevel.errors import ArgumentError, LostGradientError, StructureError

every_path = pytest.mark.parametrize("checkpointing", PATHS, ids=repr)
every_pair = pytest.mark.parametrize(("case", "checkpointing"), covering(CASES, TELLING[-1:]))
C, U = 0.5 * real(1, 3), real(2, 3)


def double_backward(case, direction):
    control = fresh(case.control)
    cost = plain_cost(case.problem, case.observation, control)
    gradients = torch.autograd.grad(cost, wanted(control), create_graph=True, allow_unused=True)
    vectors = [d for d in tree.leaves_of(direction) if d is not None]
    slope = sum(
        (
            (d.conj() * g).real.sum()
            for d, g in zip(vectors, gradients, strict=True)
            if g is not None
        ),
        torch.zeros((), dtype=torch.float64),
    )
    return autograd(slope, control)[0]


@every_pair
def test_the_product_is_that_of_double_backward_and_cost_and_gradient_come_with_it(
    case, checkpointing
):
    direction = random_like(case.control, torch.Generator().manual_seed(1))
    arguments = (case.problem, case.observation, case.control)
    found = bl.hvp(*arguments, direction, checkpointing=checkpointing)
    cost, gradient, _ = plain_gradients(*arguments)
    assert_same(found.cost, cost, rtol=1e-14)
    # A bias before a normalisation has derivatives that are zero but for rounding.
    assert_same_vector(found.gradient, gradient)
    assert_same_vector(found.product, double_backward(case, direction))
    leaves = tree.leaves_of((found.product, found.gradient, found.cost))
    assert not any(x.requires_grad for x in leaves if x is not None)


def test_the_product_with_a_complex_control_is_linear_over_the_reals():
    case = case_named("complex state, complex and real control")
    arguments = (case.problem, case.observation, case.control)
    generator = torch.Generator().manual_seed(2)
    a, b = (random_like(case.control, generator) for _ in "ab")
    both = tree.map_leaves(lambda x, y: None if x is None else 2 * x + y, a, b)
    first, second = (bl.hvp(*arguments, d).product for d in (a, b))
    truth = tree.map_leaves(lambda x, y: None if x is None else 2 * x + y, first, second)
    assert_same(bl.hvp(*arguments, both).product, truth)
    # Symmetric under Re<., .>.
    assert float(tree.inner(first, b)) == pytest.approx(float(tree.inner(a, second)), rel=1e-12)


def tanh_problem(step=lambda u, c, t: torch.tanh(c * u + t), **costs):
    return bl.ControlProblem(
        Custom(step), horizon=4, **{"terminal": lambda u, c: square(u), **costs}
    )


def test_a_budget_measures_the_tangent_system():
    case = case_named("shared control read by everything, T = 5")
    direction = random_like(case.control, torch.Generator().manual_seed(1))
    arguments = (case.problem, case.observation, case.control, direction)
    found = bl.hvp(*arguments, checkpointing=bl.Budget("1 MiB"))
    assert_same(found.product, double_backward(case, direction))
    with pytest.raises(ArgumentError, match="too small"):
        bl.hvp(*arguments, checkpointing=bl.Budget("1 KiB"))


def test_a_direction_with_none_is_zero_there():
    case = case_named("shared control read by everything, T = 5")
    b = real(7, 4)
    arguments = (case.problem, case.observation, case.control)
    found = bl.hvp(*arguments, {"A": None, "b": b}).product
    assert_same(found, bl.hvp(*arguments, {"A": torch.zeros(4, 4).double(), "b": b}).product)


def test_a_cost_that_is_linear_in_a_part_of_the_control_has_a_zero_product_there():
    problem = tanh_problem(lambda u, c, t: u + c, terminal=lambda u, c: u.sum())
    assert_same(bl.hvp(problem, U, C, U).product, torch.zeros(3, dtype=torch.float64), rtol=0)


def test_dropout_keeps_its_masks():
    step = torch.nn.functional.dropout
    problem = tanh_problem(
        lambda u, c, t: torch.tanh(c * step(u)), running=lambda u, c, t: square(c * u)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        control = fresh(C)
        cost = plain_cost(problem, U, control)
        after = torch.get_rng_state()
        (g,) = torch.autograd.grad(cost, control, create_graph=True)
        (truth,) = torch.autograd.grad((g * U).sum(), control)
        torch.manual_seed(3)
        found = bl.hvp(problem, U, C, U, checkpointing=bl.Checkpointing(snapshots=1))
        assert torch.equal(torch.get_rng_state(), after)
    assert_same(found.product, truth)
    assert_same(found.cost, cost.detach(), rtol=1e-14)


HIDDEN = real(3, 3).requires_grad_()


@pytest.mark.parametrize(
    "problem",
    [
        tanh_problem(lambda u, c, t: u * c + HIDDEN),
        tanh_problem(lambda u, c, t: u * c * (HIDDEN if t == 2 else 1)),
        tanh_problem(lambda u, c, t: u * c * (HIDDEN if t == 4 else 1)),
        tanh_problem(terminal=lambda u, c: (u * HIDDEN).sum()),
        tanh_problem(running=lambda u, c, t: (u * HIDDEN).sum()),
        bl.ControlProblem(
            Custom(lambda u, c, t: u * c, lambda f, c: f * HIDDEN), lambda u, c: square(u), 4
        ),
    ],
)
@every_path
def test_a_hidden_tensor_that_requires_grad_is_refused(problem, checkpointing):
    with pytest.raises(LostGradientError, match="that requires grad but is not among"):
        bl.hvp(problem, U, C, U, checkpointing=checkpointing)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(LostGradientError, match=r"control\['idle'\] reaches no cost"):
        both = {"c": C, "idle": U}
        bl.hvp(tanh_problem(lambda u, c, t: u * c["c"]), U, both, both)
    with pytest.raises(StructureError, match="direction must be like the control"):
        bl.hvp(tanh_problem(), U, C, {"c": C})
    with pytest.raises(StructureError, match=r"direction must be float64\[3\].*got float64\[2\]"):
        bl.hvp(tanh_problem(), U, C, C[:2])
    with pytest.raises(StructureError, match="terminal cost must return a real scalar"):
        bl.hvp(tanh_problem(terminal=lambda u, c: u), U, C, C)
    with pytest.raises(StructureError, match="running cost at t = 1 must return a real scalar"):
        bl.hvp(tanh_problem(running=lambda u, c, t: u), U, C, C)
