"""Newton-CG as a torch optimiser: Hessian products instead of a Hessian."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel import autodiff, tree
from bilevel.errors import ArgumentError
from bilevel.krylov import CG
from bilevel.linear import LinearSolver, Operator

Product = Callable[[list[Tensor]], list[Tensor]]  # direction -> Hessian times direction


@final
@dataclass(frozen=True)
class NewtonCG:
    """Newton's method with a line search, its systems solved by conjugate gradients.

    One iteration costs a gradient, a Hessian product (one tangent sweep, `hvp`) for each step of
    CG, and a gradient for each trial of the line search. Where CG meets negative curvature, the
    iterate it has is the direction, or the steepest descent if it has none (Nocedal & Wright 2006,
    algorithm 7.1). A linear-quadratic problem takes one iteration.

    Attributes:
        linear: solver of H p = -grad J. `CG(rtol=0.1)` is an inexact Newton method: more
            iterations, each cheaper.
        decrease: share of the predicted decrease that a step must reach (Armijo), in (0, 1/2).
        halvings: of the step at most, before the iteration stands still.

    Raises:
        ArgumentError: if a setting is out of range.
    """

    linear: LinearSolver = field(default_factory=lambda: CG(rtol=1e-10))
    decrease: float = 1e-4
    halvings: int = 30

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.linear, LinearSolver):
            raise ArgumentError(
                f"linear must be a linear solver such as CG(), got {type(self.linear).__name__}."
            )
        if not 0 < self.decrease < 0.5:
            raise ArgumentError(f"decrease must be > 0 and < 1/2, got {self.decrease}.")
        if not isinstance(self.halvings, int) or self.halvings < 0:
            raise ArgumentError(f"halvings must be a whole number >= 0, got {self.halvings!r}.")


class NewtonSteps(Optimizer):
    """`NewtonCG` on given tensors. The `lr` of its one group is the first trial step, 1."""

    def __init__(self, parameters: list[Tensor], settings: NewtonCG, product: Product) -> None:
        """Prepare.

        Args:
            parameters: what is moved.
            settings: the method.
            product: Hessian of the last evaluated cost, at the present parameters.
        """
        super().__init__(parameters, {"lr": 1.0})
        self._settings, self._product = settings, product

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One iteration.

        Args:
            closure: sets the gradients and returns the cost.

        Returns:
            The cost before.

        Raises:
            ArgumentError: without a closure.
        """
        if closure is None:
            raise ArgumentError("NewtonCG needs a closure that evaluates cost and gradient.")
        settings, (group,) = self._settings, self.param_groups
        parameters: list[Tensor] = group["params"]
        cost = closure()
        gradient = [p.grad for p in parameters]
        with autodiff.paused():
            direction = self._direction(gradient)
            slope = float(tree.inner(gradient, direction))
            if not slope < 0:
                return cost
            start = [p.detach().clone() for p in parameters]
            length = group["lr"]
            # Near the minimum the decrease is less than the rounding of the cost.
            rounding = 4 * max(torch.finfo(p.dtype).eps for p in parameters) * abs(cost)
            for _ in range(settings.halvings + 1):
                for p, x, d in zip(parameters, start, direction, strict=True):
                    p.copy_(x + length * d)
                if closure() <= cost + settings.decrease * length * slope + rounding:
                    return cost
                length /= 2
            for p, x in zip(parameters, start, strict=True):
                p.copy_(x)
        return cost

    def _direction(self, gradient: list[Any]) -> list[Tensor]:
        downhill = tree.negative(gradient)
        operator = Operator(self._product, symmetric=True)
        found = self._settings.linear.solve(operator, downhill).solution
        # CG that met negative curvature at once has moved nowhere.
        return found if tree.norm(found) and float(tree.inner(found, gradient)) < 0 else downhill
