"""Newton-CG as a torch optimiser: Hessian products instead of a Hessian."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel import autodiff, tree
from bilevel.checks import check_kind, check_range, check_whole
from bilevel.control.adjoint import Adjoint
from bilevel.control.tangent import hvp
from bilevel.dynamics.per_step import Look
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import ArgumentError, DivergenceError
from bilevel.linear.cg import CG
from bilevel.linear.operator import LinearSolver, Operator
from bilevel.outer.descent import StandstillError
from bilevel.outer.leaves import Leaves
from bilevel.parallel import Replicas
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import RandomState
from bilevel.tree import Tree

Product = Callable[[list[Tensor]], list[Tensor]]  # direction -> Hessian times direction


@final
@dataclass(frozen=True)
class NewtonCG:
    """Newton's method with a line search, its systems solved by conjugate gradients.

    An iteration solves H p = -grad J and takes the first of p, p/2, p/4, ... that lowers J enough.
    It costs a Hessian product for each step of CG, which is a forward and a backward sweep of the
    tangent system (`hvp`) under the solver's checkpointing, and one gradient for each trial; that
    of the step taken serves the next iteration. Where CG meets non-positive curvature, the iterate
    it has is the direction, or the steepest descent if it has none (Nocedal & Wright 2006,
    algorithm 7.1).

    A linear-quadratic problem takes one iteration. J never rises, but for its rounding, and the
    iteration ends by itself where no step lowers it. Steps that draw at random draw the same
    numbers at every evaluation of a solve. With batches, each update is an iteration on its batch.

    Attributes:
        linear: solver of H p = -grad J. `CG(rtol=0.1)` is an inexact Newton method: more
            iterations, each cheaper. `CG(max_steps=20)` bounds the products of one.
        decrease: share of the predicted decrease that a step must reach (Armijo), in (0, 1/2).
        halvings: of the step at most, before the iteration stands still.

    Raises:
        ArgumentError: if a setting is out of range.
    """

    linear: LinearSolver = field(default_factory=lambda: CG(rtol=1e-12))
    decrease: float = 1e-4
    halvings: int = 30

    def __post_init__(self) -> None:
        check_kind(self.linear, LinearSolver, "linear", "a linear solver such as CG()")
        check_range(self.decrease, "decrease", above=0, below=0.5)
        check_whole(self.halvings, "halvings")


class NewtonSteps(Optimizer):
    """`NewtonCG` on given tensors. The `lr` of its one group is the first trial step, 1."""

    def __init__(self, parameters: list[Tensor], settings: NewtonCG, product: Product) -> None:
        # `product` is with the Hessian where the cost was last evaluated.
        super().__init__(parameters, {"lr": 1.0})
        self._settings, self._product = settings, product

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One iteration."""
        if closure is None:
            raise ArgumentError("NewtonCG needs a closure that evaluates cost and gradient.")
        (group,) = self.param_groups
        parameters: list[Tensor] = group["params"]
        # The first trial of an iteration is the point where it stands: its gradient, and then the
        # Hessian products of CG, are taken there.
        cost = closure()
        gradient = [p.grad for p in parameters]
        if not tree.norm(gradient):
            raise StandstillError
        with autodiff.paused():
            direction = self._direction(gradient)
            start = [p.detach().clone() for p in parameters]
            length = group["lr"]
            for _ in range(self._settings.halvings + 1):
                # From the start each time: halving a step in place would add up rounding.
                for p, x, d in zip(parameters, start, direction, strict=True):
                    p.copy_(x + length * d)
                if self._accepted(closure, parameters, cost, gradient, length, direction):
                    return cost
                length /= 2
            for p, x in zip(parameters, start, strict=True):
                p.copy_(x)  # nothing lowered the cost: leave the control as it was
        raise StandstillError

    def _direction(self, gradient: list[Any]) -> list[Tensor]:
        downhill = tree.negative(gradient)
        operator = Operator(self._product, symmetric=True)
        found = self._settings.linear.solve(operator, downhill).solution
        # CG that met negative curvature at once has moved nowhere.
        return found if tree.norm(found) and float(tree.inner(found, gradient)) < 0 else downhill

    def _accepted(
        self,
        closure: Callable[[], float],
        parameters: list[Tensor],
        cost: float,
        gradient: list[Any],
        length: float,
        direction: list[Tensor],
    ) -> bool:
        """Whether the trial that the parameters hold lowers the cost enough."""
        try:
            trial = closure()
        except DivergenceError:  # too far
            return False
        change = length * float(tree.inner(gradient, direction))
        resolution = max(torch.finfo(p.dtype).eps for p in parameters) * abs(cost)
        if -change > 100 * resolution:
            return trial <= cost + self._settings.decrease * change
        # The cost cannot show so small a decrease any more; the gradient can.
        fallen = tree.norm([p.grad for p in parameters]) <= 0.7 * tree.norm(gradient)
        return fallen and trial <= cost + 4 * resolution


class NewtonRun:
    """A problem as Newton-CG sees it: evaluations under the same draws, and Hessian products.

    Attributes:
        random: where the generators stand at each evaluation: every one draws the same.
    """

    def __init__(
        self,
        settings: NewtonCG,
        given: Callable[[Any], tuple[ControlProblem, Tree]],
        evaluate: Callable[[ControlProblem, Tree, Tree, int], Adjoint],
        checkpointing: Checkpointing | Budget | None,
        random: RandomState,
        look: Look,
        replicas: Replicas | None = None,
    ) -> None:
        self._look, self._replicas = look, replicas
        self._settings, self._given, self._evaluate = settings, given, evaluate
        self._checkpointing, self.random = checkpointing, random
        self._step = 0
        self._leaves: Leaves | None = None
        self._problem: tuple[ControlProblem, Tree] | None = None
        self._known: tuple[list[int], Tree, Adjoint] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The draws of all evaluations; the problem and its derivatives are found again."""
        return {"random": self.random.tensors()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these draws."""
        self.random = self.random.like(state["random"])
        self._problem = self._known = None

    def optimizer(self, leaves: Leaves) -> Optimizer:
        """Makes the optimiser of the control."""
        self._leaves = leaves
        return NewtonSteps(leaves, self._settings, self._product)

    def evaluate(self, control: Tree, batch: Any, step: int) -> tuple[float, Adjoint]:
        """Cost and gradient; again only where control or batch have changed."""
        if self._problem is None or (batch is not None and step != self._step):
            self._problem, self._known = self._given(batch), None
        self._step = step
        # The line search and CG ask again where they stand: a version counter tells a change.
        versions = [x._version for x in tree.leaves_of(control) if tree.is_variable(x)]
        if self._known is None or self._known[0] != versions:
            self.random.restore()
            found = self._evaluate(*self._problem, control, step)
            self._known = versions, control, found
        found = self._known[2]
        return float(found.cost), found

    def _product(self, direction: list[Tensor]) -> list[Tensor]:
        """The Hessian where `evaluate` was last, times a direction of the variables."""
        if self._problem is None or self._known is None or self._leaves is None:
            raise ArgumentError("a Hessian product needs an evaluation before it.")
        _, control, _ = self._known
        self.random.restore()
        along = self._leaves.spread(direction)
        with self._look.on():
            found = hvp(*self._problem, control, along, checkpointing=self._checkpointing)
        product = self._leaves.gathered(found.product)
        return product if self._replicas is None else self._replicas.mean_of(product)
