"""Control problems of several sizes, and loops of plain torch to measure against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bilevel as bl

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Case:
    """A problem with a tensor as state; its control is one tensor, or one per step."""

    name: str
    problem: bl.ControlProblem
    start: Tensor
    control: Tensor | bl.PerStep

    @property
    def horizon(self) -> int:
        return self.problem.horizon

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors of the control."""
        return list(self.control.steps) if isinstance(self.control, bl.PerStep) else [self.control]

    def received(self, leaves: list[Tensor]) -> list[Tensor]:
        """What each step receives."""
        return leaves if isinstance(self.control, bl.PerStep) else leaves * self.horizon


def ridge(d: int, horizon: int) -> Case:
    """Gradient descent on a ridge regression of d entries; the control is its penalty."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, b, A_new, b_new = draw(2 * d, d), draw(2 * d), draw(2 * d, d), draw(2 * d)

    def loss(x: Tensor, alpha: Tensor) -> Tensor:
        return (A @ x - b).square().mean() / 2 + alpha.exp() * x.square().sum() / 2

    def step(x: Tensor, alpha: Tensor, t: int) -> Tensor:
        recorded = x.requires_grad or alpha.requires_grad
        point = x if x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(point, alpha), point, create_graph=recorded)
        return x - 0.1 * slope

    def terminal(x: Tensor, alpha: Tensor) -> Tensor:
        return (A_new @ x - b_new).square().mean() / 2

    alpha = torch.tensor(-1.0, dtype=torch.float64)
    problem = bl.ControlProblem(bl.Map(step), terminal, horizon)
    return Case(f"descent, d = {d}, T = {horizon}", problem, draw(d), alpha)


def layers(
    rows: int, size: int, horizon: int, activation: str = "tanh", *, shared: bool = False
) -> Case:
    """Residual layers with weights of their own or shared ones; a state of rows x size entries."""
    function = ACTIVATIONS[activation]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def step(state: Tensor, theta: Tensor, t: int) -> Tensor:
        return function(state @ theta) + 0.5 * state

    def terminal(state: Tensor, control: bl.PerStep) -> Tensor:
        return state.square().sum() / 2

    start = draw(rows, size)
    weights = [draw(size, size) / (2 * size**0.5) for _ in range(1 if shared else horizon)]
    problem = bl.ControlProblem(bl.Map(step), terminal, horizon)
    name = f"{activation} layers, {rows} x {size}, T = {horizon}"
    return Case(name, problem, start, weights[0] if shared else bl.PerStep(weights))


def autograd(case: Case) -> list[Tensor]:
    """Gradient by the plain loop and one call of autograd."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    return list(torch.autograd.grad(_cost(case, leaves), leaves))


def segments(case: Case) -> list[Tensor]:
    """Gradient by `torch.utils.checkpoint`, sqrt(T) segments."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    received = case.received(leaves)
    length = -(-case.horizon // round(case.horizon**0.5))
    step = case.problem.dynamics.step

    def segment(state: Tensor, a: int) -> Tensor:
        for t in range(a + 1, min(a + length, case.horizon) + 1):
            state = step(state, received[t - 1], t)
        return state

    state = case.start
    for a in range(0, case.horizon, length):
        state = checkpoint(segment, state, a, use_reentrant=False)
    return list(torch.autograd.grad(case.problem.terminal(state, leaves), leaves))


def multipliers(
    case: Case, checkpointing: bl.Checkpointing | bl.Budget | None = None
) -> list[Tensor]:
    """Gradient by `adjoint`."""
    found = bl.adjoint(case.problem, case.start, case.control, checkpointing=checkpointing)
    gradient = found.gradient
    return list(gradient.steps) if isinstance(gradient, bl.PerStep) else [gradient]


def through_rollout(
    case: Case, checkpointing: bl.Checkpointing | bl.Budget | None = None
) -> list[Tensor]:
    """Gradient by a `rollout` and the backward of torch."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    control = bl.PerStep(leaves) if isinstance(case.control, bl.PerStep) else leaves[0]
    final = bl.rollout(
        case.problem.dynamics, case.start, control, case.horizon, checkpointing=checkpointing
    )
    return list(torch.autograd.grad(case.problem.terminal(final, control), leaves))


def double_backward(case: Case, direction: list[Tensor]) -> list[Tensor]:
    """Hessian-vector product by two calls of autograd on the plain loop."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    first = torch.autograd.grad(_cost(case, leaves), leaves, create_graph=True)
    slope = sum(((g * d).sum() for g, d in zip(first, direction, strict=True)), torch.zeros(()))
    return list(torch.autograd.grad(slope, leaves))


def tangent_sweep(
    case: Case,
    direction: list[Tensor],
    checkpointing: bl.Checkpointing | bl.Budget | None = None,
) -> list[Tensor]:
    """Hessian-vector product by `hvp`."""
    along = bl.PerStep(direction) if isinstance(case.control, bl.PerStep) else direction[0]
    found = bl.hvp(case.problem, case.start, case.control, along, checkpointing=checkpointing)
    product = found.product
    return list(product.steps) if isinstance(product, bl.PerStep) else [product]


def _cost(case: Case, leaves: list[Tensor]) -> Tensor:
    state, step = case.start, case.problem.dynamics.step
    for t, theta in enumerate(case.received(leaves), 1):
        state = step(state, theta, t)
    return case.problem.terminal(state, leaves)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry of its tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
        for a, b in zip(found, expected, strict=True)
    )


Run = Callable[[], list[Tensor]]
