r"""Multipliers by the sweep (7), whole or stopped early.

Stopping with :math:`\lambda_j` in hand leaves out
:math:`R_j = -\sum_{s \le j} B_s^* \lambda_s`, where A_s and B_s are the derivatives of inner step s
in params and control. If :math:`|A_s| \le \rho` and :math:`|B_s| \le \beta`,

.. math::
    |R_j| \le \beta\, |\lambda_j|\, \frac{1 - \rho^j}{1 - \rho}
    \qquad (\rho = 1: \; j \beta |\lambda_j|).

Multipliers alone give no bound: their observed ratios understate rho.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from bilevel import tree
from bilevel.checks import check_kind, check_range, check_whole
from bilevel.control.adjoint import Adjoint, Swept, adjoint
from bilevel.control.many import adjoints
from bilevel.dynamics.per_step import GradientSum
from bilevel.errors import ArgumentError
from bilevel.methods.base import Found, HypergradientMethod, Truncation
from bilevel.methods.instance import Draws, Instance
from bilevel.outer.keep import Keep, Stateful
from bilevel.sweeps.checkpointing import Budget, Checkpointing


@final
@dataclass(frozen=True)
class Bounds:
    r"""Constants of the inner step that bound what an early stop leaves out.

    Attributes:
        rate: rho, with :math:`|\partial\Phi/\partial\theta| \le \rho` on the trajectory. Gradient
            descent and proximal gradient with mu-strongly convex, L-smooth f have 1 - eta mu for
            eta <= 2 / (L + mu), and 1 for convex f with eta <= 2 / L.
        coupling: beta, with :math:`|\partial\Phi/\partial\alpha| \le \beta`; for gradient descent
            eta times a bound of the mixed derivative.

    Raises:
        ArgumentError: if one is negative.

    Example:
        >>> Bounds(rate=0.5, coupling=2.0).left_out(multiplier=1.0, steps=2)
        3.0
    """

    rate: float
    coupling: float

    def __post_init__(self) -> None:
        check_range(self.rate, "rate", least=0)
        check_range(self.coupling, "coupling", least=0)

    def left_out(self, multiplier: float, steps: int) -> float:
        """Bound of the norm of R_j."""
        size = self.coupling * multiplier
        if size == 0 or self.rate == 1:
            return size * steps
        try:
            return size * (1 - self.rate**steps) / (1 - self.rate)
        except OverflowError:
            return math.inf


@final
@dataclass(frozen=True)
class MLM(HypergradientMethod):
    """The Method of Lagrangian Multipliers; equal to `Unrolled`, in the memory that one chooses.

    Attributes:
        checkpointing: what is kept of the inner trajectory; None keeps the states.
        last: reverse the last so many inner steps only, and keep nothing of the others (truncated
            back-propagation; Shaban et al. 2019).
        tolerance: stop the sweep where what is left out is at most this, relative to the whole, by
            the `bounds`.
        bounds: constants of the inner step.

    Raises:
        ArgumentError: if a setting is out of range, or a tolerance comes without bounds.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.2), 60, bl.MLM(bl.Budget("1 MiB"))
        ... )
        >>> zero = torch.tensor(0.0)
        >>> hyper = solver.hypergradient(zero, zero)
        >>> round(hyper.gradient.item(), 4)
        -0.6667
    """

    checkpointing: Checkpointing | Budget | None = None
    last: int | None = None
    tolerance: float | None = None
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        kept = "Checkpointing(...), Budget(...) or None"
        check_kind(self.checkpointing, Checkpointing | Budget | None, "checkpointing", kept)
        check_whole(self.last, "last", 1, optional=True)
        if self.tolerance is None:
            return
        check_range(self.tolerance, "tolerance", above=0, below=1)
        if self.last is not None:
            raise ArgumentError("last and tolerance both say where to stop: give one of them.")
        if self.bounds is None:
            raise ArgumentError(
                "tolerance= needs bounds=Bounds(rate, coupling): multipliers alone do not tell "
                "what is left out. Give the bounds, or use last=."
            )

    def find(self, instance: Instance) -> Found:  # noqa: D102
        if self.last is not None and self.last < instance.horizon:
            return self._last(instance, self.last)
        rule = None
        if self.tolerance is not None and self.bounds is not None:
            if instance.problem.start is not None:
                raise ArgumentError(
                    "tolerance= cannot judge what the start contributes: use last=, or the whole "
                    "sweep."
                )
            rule = _Rule(self.tolerance, self.bounds)
        found = self._adjoint(instance, rule)
        return self._found(instance, found, rule.truncation if rule else None)

    def find_each(self, instances: Sequence[Instance]) -> list[Found]:
        """See `HypergradientMethod`; the multipliers of all are swept together."""
        if self.tolerance is not None:
            return super().find_each(instances)
        first, early = instances[0], 0
        if self.last is not None and self.last < first.horizon:
            early = first.horizon - self.last
            begun = first.iterate(early)
            instances = [instance.after(begun) for instance in instances]
        problem = instances[0].control_problem()
        each = adjoints(
            problem,
            [instance.outer for instance in instances],
            instances[0].observation,
            first.control,
            checkpointing=self.checkpointing,
        )
        answers = []
        for instance, found in zip(instances, each, strict=True):
            gradient = GradientSum(first.control)
            gradient.add(first.control, found.gradient)
            found = replace(found, gradient=gradient.total())
            truncation = self._truncation(instance, found, early) if early else None
            answers.append(self._found(instance, found, truncation))
        return answers

    @property
    def sees_steps(self) -> bool:  # noqa: D102
        return self.last is None and self.tolerance is None

    def _last(self, instance: Instance, last: int) -> Found:
        early = instance.horizon - last
        found = self._adjoint(instance.after(instance.iterate(early)))
        return self._found(instance, found, self._truncation(instance, found, early))

    def _truncation(self, instance: Instance, found: Adjoint, early: int) -> Truncation:
        error = None
        if self.bounds is not None and instance.problem.start is None:
            multiplier = tree.norm(found.observation_gradient)  # -lambda_j
            error = relative(self.bounds.left_out(multiplier, early), tree.norm(found.gradient))
        return Truncation(early, error)

    def _adjoint(self, instance: Instance, rule: "_Rule | None" = None) -> Adjoint:
        return adjoint(
            instance.control_problem(),
            instance.observation,
            instance.control,
            checkpointing=self.checkpointing,
            stop=rule,
            keep=self._keep(instance),
            resume=instance.resume,
        )

    def _keep(self, instance: Instance) -> Keep | None:
        """What keeps the sweep; beside it, what a certificate has to know of it."""
        keep = instance.keep
        if keep is None:
            return None
        told = {**keep.conditions, "method": self}  # of which the sweep knows nothing
        return replace(keep, also=_Beside(keep.also, instance.draws), conditions=told)

    def _found(self, instance: Instance, found: Adjoint, truncation: Truncation | None) -> Found:
        instance.check_finite(found.final_state)
        warm = instance.reached(found.final_state, instance.horizon)
        return Found(found.cost, found.gradient, warm, truncation=truncation)


@dataclass(frozen=True)
class _Beside:
    """What the user keeps beside a sweep, and the draws of the outer objective."""

    also: Stateful | None
    draws: Draws

    def state_dict(self) -> Any:
        also = None if self.also is None else self.also.state_dict()
        return {"also": also, "draws": self.draws.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.draws.load_state_dict(state["draws"])
        if self.also is not None:
            self.also.load_state_dict(state["also"])


@dataclass
class _Rule:
    """Where to stop, and what was left out."""

    tolerance: float
    bounds: Bounds
    truncation: Truncation | None = None

    def __call__(self, swept: Swept) -> bool:
        steps, multiplier = swept.steps.start, tree.norm(swept.multiplier)
        if not steps:
            return False
        error = relative(self.bounds.left_out(multiplier, steps), tree.norm(swept.gradient))
        if error <= self.tolerance:
            self.truncation = Truncation(steps, error)
        return self.truncation is not None


def relative(left: float, size: float) -> float:
    """Bound of |R| / |h + R| where |R| <= left and |h| = size."""
    return left / (size - left) if left < size else 0.0 if left == 0 else math.inf
