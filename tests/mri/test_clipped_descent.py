"""How task weights move: lengths and directions of steps, by hand."""

import pytest
import torch

import bilevel as bl
from applications.mri.clipped_descent import ClippedDescent


def moved(gradient, value, lr=0.5, clip=0.1):
    x = torch.zeros_like(gradient).requires_grad_()
    optimizer = ClippedDescent([x], lr, clip)

    def closure():
        x.grad = gradient
        return value

    assert optimizer.step(closure) == value
    return x.detach()


@pytest.mark.parametrize(
    ("relative", "length"), [(0.0, 0.0), (0.01, 0.05), (0.1, 0.5), (0.2, 0.5), (1e6, 0.5)]
)
def test_a_step_is_in_proportion_up_to_the_learning_rate(relative, length):
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    found = moved(3.0 * relative * direction, value=3.0)
    torch.testing.assert_close(found, -length * direction, rtol=1e-12, atol=0)


def test_columns_are_clipped_one_by_one_against_their_share_of_the_objective():
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    gradient = torch.stack([7.0 * direction, 0.05 * direction], 1)
    found = moved(gradient, value=4.0)  # a share of 2, of which 0.2 is the relative 0.1
    torch.testing.assert_close(found[:, 0], -0.5 * direction, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[:, 1], -0.125 * direction, rtol=1e-12, atol=0)


def test_nothing_moves_where_objective_and_gradient_are_zero():
    assert torch.equal(moved(torch.zeros(3), value=0.0), torch.zeros(3))


def test_an_objective_below_zero_does_not_turn_the_step_around():
    gradient = torch.tensor([0.01, 0.0], dtype=torch.float64)
    assert torch.equal(moved(gradient, value=-1.0), moved(gradient, value=1.0))
    assert float(moved(gradient, value=-1.0)[0]) == pytest.approx(-0.05)


def test_a_hypergradient_out_of_scale_is_one_step_and_no_more():
    x = torch.zeros(2, requires_grad=True)
    optimizer = ClippedDescent([x], 0.5, 0.1)
    for gradient in ([1e9, 0.0], [0.0, 1.0], [0.0, 1.0]):

        def closure(gradient=gradient):
            x.grad = torch.tensor(gradient)
            return 1.0

        optimizer.step(closure)
    torch.testing.assert_close(x.detach(), torch.tensor([-0.5, -1.0]))


def test_it_solves_a_bilevel_problem():
    problem = bl.BilevelProblem(
        inner=lambda w, a, _: ((w - a) ** 2).sum() / 2,
        outer=lambda w, a, _: ((w - 1) ** 2).sum() + 1,
    )
    solver = bl.BilevelSolver(problem, bl.GradientDescent(1.0), 1)
    found = solver.solve(
        torch.zeros(2), torch.zeros(2), lambda leaves: ClippedDescent(leaves, 0.1, 0.5), steps=60
    )
    torch.testing.assert_close(found.control, torch.ones(2), rtol=0, atol=1e-4)
