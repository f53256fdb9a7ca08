"""Newton-CG as a torch optimiser: Hessian products instead of a Hessian."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
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
from bilevel.linear.singular import random_like
from bilevel.linear.steihaug import Truncated, steihaug
from bilevel.outer.descent import StandstillError
from bilevel.outer.leaves import Leaves
from bilevel.parallel import Replicas
from bilevel.sweeps.checkpointing import Budget, Checkpointing
from bilevel.sweeps.randomness import RandomState
from bilevel.tree import Tree

LOOKS = 20  # products that look for negative curvature where an iteration ends
Product = Callable[[list[Tensor]], list[Tensor]]  # direction -> Hessian times direction


@final
@dataclass(frozen=True)
class NewtonCG:
    """Newton's method with a line search, its systems solved by conjugate gradients.

    An iteration solves H p = -grad J and takes the first of p, p/2, p/4, ... that lowers J enough.
    It costs a Hessian product for each step of CG, which is a forward and a backward sweep of the
    tangent system (`hvp`) under the solver's checkpointing, and one gradient for each trial; that
    of the step taken serves the next iteration. Where CG meets non-positive curvature it goes on
    along that direction to the edge of a trust region (Steihaug 1983), which grows where the model
    foretells the decrease and shrinks where it does not. Once a step shows that J is no quadratic,
    systems are solved no better than their gradients are small (Eisenstat & Walker 1996). The
    solution counts the products. For states and controls of up to some hundreds of numbers a step,
    `Riccati` finds the same in one sweep.

    Where it ends, up to 20 products more look for negative curvature along directions at random: a
    stationary point that has some, as a saddle to start from, is reported as no minimum.

    A linear-quadratic problem takes one iteration. J never rises, but for its rounding, and the
    iteration ends by itself where no step lowers it. Steps that draw at random draw the same
    numbers at every evaluation of a solve. With batches, each update is an iteration on its batch.

    Attributes:
        linear: solver of H p = -grad J. `CG(rtol=0.1)` is an inexact Newton method: more
            iterations, each cheaper. `CG(max_steps=20)` bounds the products of one. A solver that
            is not a plain `CG` has no trust region: its solution is the direction if J falls along
            it, else the steepest descent.
        decrease: share of the predicted decrease that a step must reach (Armijo), in (0, 1/2).
        halvings: of the step at most, before the iteration stands still.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> idle = bl.PerStep([torch.tensor(0.0), torch.tensor(0.0)])
        >>> found = bl.ControlSolver(walk, bl.NewtonCG()).solve(
        ...     idle, torch.tensor(3.0), steps=1
        ... )
        >>> [round(u.item(), 4) for u in found.control.steps]
        [-1.0, -1.0]
    """

    linear: LinearSolver = field(default_factory=lambda: CG(rtol=1e-12))
    decrease: float = 1e-4
    halvings: int = 30

    def __post_init__(self) -> None:
        check_kind(self.linear, LinearSolver, "linear", "a linear solver such as CG()")
        check_range(self.decrease, "decrease", above=0, below=0.5)
        check_whole(self.halvings, "halvings")


class _TrustRegion:
    """How far the model of second derivatives has been right, and how well it is worth solving."""

    def __init__(self) -> None:
        self._radius = math.inf  # until a direction of negative curvature asks for one
        self._quadratic = True  # as long as every decrease was the one foretold
        self._norm: float | None = None  # of the last gradient

    def numbers(self) -> Tensor:
        """What a run that goes on has to know."""
        norm = math.nan if self._norm is None else self._norm
        numbers = [self._radius, float(self._quadratic), norm]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def take(self, numbers: Tensor) -> None:
        """Go on from these."""
        self._radius, quadratic, norm = numbers.tolist()
        self._quadratic, self._norm = bool(quadratic), None if math.isnan(norm) else norm

    def forcing(self, norm: float) -> float:
        """The share of a gradient of this norm that the residual may have."""
        before, self._norm = self._norm, norm
        if self._quadratic or before is None:
            return 0.0
        return min(1e-3, norm / before)

    def radius(self, norm: float, size: float, curvature: float, length: float) -> float:
        """Of the ball, at a gradient of this norm and a control of this size."""
        if not curvature and not length:
            return norm  # of a model that is flat there is nothing to learn: steepest descent
        if curvature <= 0 and math.isinf(self._radius):
            self._quadratic = False
            newton = norm / abs(curvature) if curvature else norm
            self._radius = max(2 * length, newton, 0.1 * size, 1e-3)
        return self._radius

    def learn(self, found: Truncated, length: float, change: float) -> None:
        """From the decrease of a step of the direction found."""
        distance = length * tree.norm(found.x)
        # Of a shorter step the model foretells another decrease: it was wrong in any case.
        share = change / found.predicted if found.predicted and length == 1 else 0.0
        self._quadratic &= abs(share - 1) < 1e-6
        if math.isinf(self._radius):
            return
        if share < 0.25:
            self._radius = distance if length < 1 else distance / 2
        elif share > 0.75 and found.boundary:
            self._radius = 2 * self._radius


class NewtonSteps(Optimizer):
    """`NewtonCG` on given tensors. The `lr` of its one group is the first trial step, 1."""

    def __init__(
        self,
        parameters: list[Tensor],
        settings: NewtonCG,
        product: Product,
        region: _TrustRegion,
        products: list[int],
    ) -> None:
        # `product` is with the Hessian where the cost was last evaluated; `products` gathers how
        # many each iteration took.
        super().__init__(parameters, {"lr": 1.0})
        self._settings, self._product = settings, product
        self._region, self._products = region, products

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
            start = [p.detach().clone() for p in parameters]
            found = self._direction(gradient, tree.norm(start))
            length = group["lr"]
            for _ in range(self._settings.halvings + 1):
                # From the start each time: halving a step in place would add up rounding.
                for p, x, d in zip(parameters, start, found.x, strict=True):
                    p.copy_(x + length * d)
                trial = self._accepted(closure, parameters, cost, gradient, length, found.x)
                if trial is not None:
                    self._region.learn(found, length, trial - cost)
                    return cost
                length /= 2
            for p, x in zip(parameters, start, strict=True):
                p.copy_(x)  # nothing lowered the cost: leave the control as it was
        raise StandstillError

    def _direction(self, gradient: list[Any], size: float) -> Truncated:
        linear, region = self._settings.linear, self._region
        if isinstance(linear, CG) and not (linear.damping or linear.probes):
            numbers = sum(x.numel() * (2 if x.is_complex() else 1) for x in gradient)
            limit = min(10 * numbers, 1000) if linear.max_steps is None else linear.max_steps
            norm = tree.norm(gradient)
            resolution = max(torch.finfo(x.dtype).eps for x in gradient)
            rtol = max(linear.rtol, resolution, region.forcing(norm))
            found = steihaug(
                self._product, gradient, partial(region.radius, norm, size), rtol, limit
            )
        else:
            downhill = tree.negative(gradient)
            operator = Operator(self._product, symmetric=True)
            solved = linear.solve(operator, downhill)
            x = solved.solution
            falls = tree.norm(x) and float(tree.inner(x, gradient)) < 0
            x = x if falls else downhill
            slope = float(tree.inner(x, gradient))
            found = Truncated(x, slope / 2, solved.products, False, 1.0)
        self._products.append(found.products)
        return found

    def _accepted(
        self,
        closure: Callable[[], float],
        parameters: list[Tensor],
        cost: float,
        gradient: list[Any],
        length: float,
        direction: list[Tensor],
    ) -> float | None:
        """The cost of the trial that the parameters hold, if it is low enough."""
        try:
            trial = closure()
        except DivergenceError:  # too far
            return None
        change = length * float(tree.inner(gradient, direction))
        resolution = max(torch.finfo(p.dtype).eps for p in parameters) * abs(cost)
        if -change > 100 * resolution:
            return trial if trial <= cost + self._settings.decrease * change else None
        # The cost cannot show so small a decrease any more; the gradient can.
        fallen = tree.norm([p.grad for p in parameters]) <= 0.7 * tree.norm(gradient)
        return trial if fallen and trial <= cost + 4 * resolution else None


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
        self._region, self.products = _TrustRegion(), list[int]()
        self._leaves: Leaves | None = None
        self._problem: tuple[ControlProblem, Tree] | None = None
        self._known: tuple[list[int], Tree, Adjoint] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The draws of all evaluations; the problem and its derivatives are found again."""
        return {"random": self.random.tensors(), "region": self._region.numbers()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these draws."""
        self.random = self.random.like(state["random"])
        self._region.take(state["region"])
        self._problem = self._known = None

    def optimizer(self, leaves: Leaves) -> Optimizer:
        """Makes the optimiser of the control."""
        self._leaves = leaves
        return NewtonSteps(leaves, self._settings, self._product, self._region, self.products)

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

    def negative_curvature(self) -> float:
        """Of J where the control stands, relative to the largest curvature seen; 0 for none."""
        if self._leaves is None or self._known is None:
            return 0.0
        largest = 0.0

        def product(direction: list[Tensor]) -> list[Tensor]:
            nonlocal largest
            found = self._product(direction)
            largest = max(largest, tree.norm(found) / tree.norm(direction))
            return found

        b: Any = random_like([x.detach() for x in self._leaves])
        with autodiff.paused():
            found = steihaug(
                product, b, lambda curvature, _: 1.0 if curvature <= 0 else math.inf, 1e-6, LOOKS
            )
        resolution = max(torch.finfo(x.dtype).eps for x in b) ** 0.5
        share = found.curvature / largest if largest and math.isfinite(found.curvature) else 0.0
        return share if share < -resolution else 0.0

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
