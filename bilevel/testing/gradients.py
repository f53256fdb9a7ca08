"""Gradients and Hessian products of control problems against differences of the cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel import autodiff, tree
from bilevel.control.adjoint import adjoint
from bilevel.control.rollout import total_cost
from bilevel.control.tangent import hvp
from bilevel.dynamics.problem import ControlProblem
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import RandomState, devices_of, preserved
from bilevel.testing.vectors import difference_step, eps_of, unit_like
from bilevel.tree import Tree


@dataclass(frozen=True)
class GradientCheck:
    """A derivative of a control problem and the difference that it should be, along a direction.

    Attributes:
        slope: Re<gradient, direction>, by `adjoint`; or Re<e, H d>, by `hvp`.
        difference: the central difference of J, or of Re<e, gradient>.
        noise: what doubling the step changes, and rounding.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u * c), lambda u, c: u, horizon=3
        ... )
        >>> found = check_gradient(problem, torch.tensor(1.0), torch.tensor(2.0))
        >>> abs(found.slope), found.agrees  # 3 c^2
        (12.0, True)
    """

    slope: float
    difference: float
    noise: float

    @property
    def agrees(self) -> bool:
        """Whether both are the same, to a thousandth and to what the difference is good for."""
        size = max(abs(self.slope), abs(self.difference))
        return abs(self.slope - self.difference) <= 1e-3 * size + 4 * self.noise


def check_gradient(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
    seed: int = 0,
) -> GradientCheck:
    """Whether the gradient that `adjoint` finds is that of the cost, along a random direction.

    It sees what no sweep can: a `detach()`, an `.item()` or an `autograd.grad` without
    `create_graph` inside a step or a cost, a wrong backward of one's own, a straight-through
    estimate, draws from a generator of one's own, a cost that is not smooth. Steps that draw from
    torch's default generators draw the same in every evaluation. It costs a sweep and four costs.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        checkpointing: as in `adjoint`.
        seed: of the direction.

    Returns:
        Both numbers; `agrees` compares them.

    Example:
        >>> import bilevel as bl
        >>> terminal = lambda state, control: state**2
        >>> whole = bl.ControlProblem(bl.Map(lambda u, c, t: u * c), terminal, horizon=3)
        >>> cut = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u * c.detach() + c), terminal, horizon=3
        ... )
        >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
        >>> check_gradient(whole, one, two).agrees, check_gradient(cut, one, two).agrees
        (True, False)
    """
    direction = unit_like(control, torch.Generator().manual_seed(seed))

    def cost(moved: Tree) -> float:
        with autodiff.paused():
            return float(total_cost(problem, observation, moved, checkpointing=checkpointing))

    def slope(there: Tree) -> tuple[float, float]:
        found = adjoint(problem, observation, there, checkpointing=checkpointing)
        return float(tree.inner(found.gradient, direction)), float(found.cost)

    return _compared(observation, control, direction, slope, cost)


def check_product(
    problem: ControlProblem,
    observation: Tree,
    control: Tree,
    *,
    checkpointing: Checkpointing | Budget | None = None,
    seed: int = 0,
) -> GradientCheck:
    """Whether `hvp` is the derivative of the gradient, between two random directions.

    It sees second derivatives that are lost: a backward of one's own that detaches what it saved,
    or an `autograd.grad` without `create_graph` inside a step, although the gradient is right. It
    costs five sweeps.

    Args:
        problem: dynamics, horizon and costs.
        observation: f.
        control: Theta.
        checkpointing: as in `hvp`.
        seed: of the directions d and e.

    Returns:
        Re<e, H d> and the difference of Re<e, gradient> along d; `agrees` compares them.

    Example:
        >>> import bilevel as bl
        >>> step = bl.Map(lambda u, c, t: u * c)
        >>> problem = bl.ControlProblem(step, lambda state, control: state**2, horizon=3)
        >>> check_product(problem, torch.tensor(1.0), torch.tensor(2.0)).agrees
        True
    """
    generator = torch.Generator().manual_seed(seed)
    direction, other = unit_like(control, generator), unit_like(control, generator)

    def slope(there: Tree) -> tuple[float, float]:
        found = hvp(problem, observation, there, direction, checkpointing=checkpointing)
        return float(tree.inner(found.product, other)), tree.norm(found.gradient)

    def along(moved: Tree) -> float:
        found = adjoint(problem, observation, moved, checkpointing=checkpointing)
        return float(tree.inner(found.gradient, other))

    return _compared(observation, control, direction, slope, along)


def _compared(
    observation: Tree,
    control: Tree,
    direction: Tree,
    slope: Callable[[Tree], tuple[float, float]],
    value: Callable[[Tree], float],
) -> GradientCheck:
    """A slope, given with the size of what it is one of, and the differences of that."""
    control = tree.detach(control)
    devices = devices_of((observation, control))
    start = RandomState.capture(devices)

    def at(h: float) -> float:
        start.restore()
        return value(tree.moved(control, direction, -h))

    with preserved(devices):
        found, size = slope(control)
        h = difference_step(control)
        fine, coarse = ((at(k) - at(-k)) / (2 * k) for k in (h, 2 * h))
    rounding = 4 * eps_of(control) * abs(size) / h
    return GradientCheck(found, fine, abs(fine - coarse) + rounding)
