"""How task weights move: lengths and directions of steps, by hand."""

import pytest
import torch

import bilevel as bl
from applications.mri.meta.agreeing_descent import AgreeingDescent

ALONG = torch.tensor([0.6, -0.8], dtype=torch.float64)
ACROSS = torch.tensor([0.8, 0.6], dtype=torch.float64)


def moved(*gradients, value=3.0, lr=0.5, clip=0.1):
    """Where steps along these gradients lead, from zero."""
    x = torch.zeros_like(gradients[0]).requires_grad_()
    optimizer = AgreeingDescent([x], lr, clip)
    for gradient in gradients:

        def closure(gradient=gradient):
            x.grad = gradient
            return value

        assert optimizer.step(closure) == value
    return x.detach()


def test_the_first_step_only_looks():
    assert torch.equal(moved(ALONG), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("relative", "length"), [(0.0, 0.0), (0.01, 0.05), (0.1, 0.5), (0.2, 0.5), (1e6, 0.5)]
)
def test_a_step_is_in_proportion_up_to_the_learning_rate(relative, length):
    found = moved(ALONG, 3.0 * relative * ALONG)
    torch.testing.assert_close(found, -length * ALONG, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cosine", [1.0, 0.5, 0.0, -0.5, -1.0])
@pytest.mark.parametrize("before", [1e-6, 1e6])
def test_a_step_is_as_long_as_the_gradient_agrees_with_the_one_before(cosine, before):
    gradient = cosine * ALONG + (1 - cosine**2) ** 0.5 * ACROSS
    found = moved(before * ALONG, gradient)
    torch.testing.assert_close(found, -0.5 * max(cosine, 0) * gradient, rtol=1e-12, atol=1e-15)


def test_gradients_that_agree_add_up_and_those_that_do_not_change_nothing():
    length = torch.linalg.vector_norm(moved(*[ALONG] * 5))
    assert float(length) == pytest.approx(4 * 0.5)
    assert torch.equal(moved(*[ALONG, -ALONG] * 5), torch.zeros(2, dtype=torch.float64))


def test_columns_are_clipped_and_compared_one_by_one_against_their_share_of_the_objective():
    before = torch.stack([ALONG, 1e3 * ALONG, ALONG], 1)
    gradient = torch.stack([7.0 * ALONG, 0.05 * ALONG, -ALONG], 1)
    found = moved(before, gradient, value=6.0)  # a share of 2, of which 0.2 is the relative 0.1
    expected = torch.stack([-0.5 * ALONG, -0.125 * ALONG, 0 * ALONG], 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_nothing_moves_where_objective_and_gradient_are_zero():
    zero = torch.zeros(3)
    assert torch.equal(moved(zero, zero, value=0.0), zero)


def test_an_objective_below_zero_does_not_turn_the_step_around():
    found = moved(ALONG, 0.01 * ALONG, value=-1.0)
    torch.testing.assert_close(found, -0.05 * ALONG, rtol=1e-12, atol=0)


def test_a_hypergradient_out_of_scale_moves_nothing_unless_others_agree_with_it():
    found = moved(ALONG, 1e9 * ACROSS, ALONG, ALONG)
    torch.testing.assert_close(found, -0.5 * ALONG, rtol=1e-12, atol=1e-15)


def test_it_solves_a_bilevel_problem():
    problem = bl.BilevelProblem(
        inner=lambda w, a, _: ((w - a) ** 2).sum() / 2,
        outer=lambda w, a, _: ((w - 1) ** 2).sum() + 1,
    )
    solver = bl.BilevelSolver(problem, bl.optim.SGD(1.0), 1)
    found = solver.solve(
        torch.zeros(2), torch.zeros(2), lambda leaves: AgreeingDescent(leaves, 0.1, 0.5), steps=60
    )
    torch.testing.assert_close(found.control, torch.ones(2), rtol=0, atol=1e-4)
