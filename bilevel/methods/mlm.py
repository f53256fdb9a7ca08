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
from dataclasses import dataclass
from typing import final

from bilevel import tree
from bilevel.checks import is_whole
from bilevel.control.lagrangian import Swept, adjoint
from bilevel.errors import ArgumentError
from bilevel.inner.problem import ByStep
from bilevel.methods.base import Found, HypergradientMethod, Instance, Truncation
from bilevel.optim.rules import GradientDescent, ProximalGradient
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
        """Check the fields."""
        if not (self.rate >= 0 and self.coupling >= 0):
            raise ArgumentError(
                f"rate and coupling must be >= 0, got {self.rate} and {self.coupling}."
            )

    def left_out(self, multiplier: float, steps: int) -> float:
        """Bound of the norm of R_j.

        Args:
            multiplier: norm of lambda_j.
            steps: j.

        Returns:
            The bound; infinite if it is beyond every number.
        """
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
        tolerance: stop the sweep where what is left out is at most this, relative to the whole.
            With `bounds` that is rigorous. Without, only plain and proximal gradient descent with
            a constant step size and batch are accepted; the objective is taken to be convex
            (rho = 1) and beta the largest seen: an estimate, which the certificate says.
        bounds: constants of the inner step.

    Raises:
        ArgumentError: if a setting is out of range.
    """

    checkpointing: Checkpointing | Budget | None = None
    last: int | None = None
    tolerance: float | None = None
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.last is not None and not is_whole(self.last, 1):
            raise ArgumentError(f"last must be a whole number of steps >= 1, got {self.last!r}.")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ArgumentError(f"tolerance must be > 0 and < 1, got {self.tolerance}.")
        if self.last is not None and self.tolerance is not None:
            raise ArgumentError("last and tolerance both say where to stop: give one of them.")

    def find(self, instance: Instance) -> Found:
        """See `HypergradientMethod`."""
        if self.last is not None and self.last < instance.horizon:
            return self._last(instance, self.last)
        rule = None
        if self.tolerance is not None:
            self._check_judged(instance)
            rule = _Rule(self.tolerance, self.bounds)
        found = adjoint(
            instance.control_problem(),
            instance.observation,
            instance.control,
            checkpointing=self.checkpointing,
            stop=rule,
        )
        instance.check_finite(found.final_state)
        return Found(
            found.cost,
            found.gradient,
            found.final_state,
            instance.horizon,
            truncation=rule.truncation if rule else None,
        )

    def _last(self, instance: Instance, last: int) -> Found:
        early = instance.horizon - last
        rest = instance.after(instance.iterate(early))
        found = adjoint(
            rest.control_problem(),
            rest.observation,
            instance.control,
            checkpointing=self.checkpointing,
        )
        instance.check_finite(found.final_state)
        error = None
        if self.bounds is not None and instance.problem.start is None:
            multiplier = tree.norm(found.observation_gradient)  # -lambda_j
            error = relative(self.bounds.left_out(multiplier, early), tree.norm(found.gradient))
        truncation = Truncation(early, error, rigorous=error is not None)
        return Found(
            found.cost, found.gradient, found.final_state, instance.horizon, truncation=truncation
        )

    def _check_judged(self, instance: Instance) -> None:
        """Refuse what an early stop cannot be judged for."""
        if instance.problem.start is not None:
            raise ArgumentError(
                "tolerance= cannot judge what the start contributes: use last=, or the whole sweep."
            )
        if self.bounds is not None:
            return
        optimizer = instance.optimizer
        constant = isinstance(optimizer.step_size, float | int) and not isinstance(
            instance.inner_batch, ByStep
        )
        if not isinstance(optimizer, GradientDescent | ProximalGradient) or not constant:
            raise ArgumentError(
                "tolerance= needs bounds=Bounds(rate, coupling) unless the inner optimiser is "
                "GradientDescent or ProximalGradient with a number as step size and one batch, "
                f"got {type(optimizer).__name__}: nothing then tells what is left out. Give the "
                "bounds, or use last=."
            )
        checkpointing = self.checkpointing
        if not (checkpointing is None or getattr(checkpointing, "block", None) == 1):
            raise ArgumentError(
                "tolerance= without bounds looks at the multiplier of every step, so it needs "
                f"blocks of one step: Checkpointing(..., block=1), got {checkpointing}."
            )


@dataclass
class _Rule:
    """Where to stop, and what was left out."""

    tolerance: float
    bounds: Bounds | None
    seen: float = 0.0  # largest |B_s^* lambda_s| / |lambda_s|
    truncation: Truncation | None = None

    def __call__(self, swept: Swept) -> bool:
        steps, multiplier = swept.steps.start, tree.norm(swept.multiplier)
        if not steps:
            return False
        if self.bounds is None and (following := tree.norm(swept.following)):
            self.seen = max(self.seen, tree.norm(swept.part) / following)
        bounds = self.bounds or Bounds(1.0, self.seen)
        error = relative(bounds.left_out(multiplier, steps), tree.norm(swept.gradient))
        if error > self.tolerance:
            return False
        self.truncation = Truncation(steps, error, rigorous=self.bounds is not None)
        return True


def relative(left: float, size: float) -> float:
    """Bound of |R| / |h + R| where |R| <= left and |h| = size."""
    return left / (size - left) if left < size else 0.0 if left == 0 else math.inf
