"""What a hypergradient is compared with, and what is known of its error."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import final

from bilevel.errors import ArgumentError
from bilevel.methods.base import Found, Instance
from bilevel.tree import Tree


class Target(ABC):
    """What the hypergradient is meant to be the gradient of."""

    @property
    @abstractmethod
    def described(self) -> str:
        """The inner solution meant, in words."""


@final
@dataclass(frozen=True)
class Minimiser(Target):
    """The outer objective at the exact minimiser of the inner one: the bilevel problem (3)."""

    @property
    def described(self) -> str:
        """See `Target`."""
        return "the exact inner minimiser"


@final
@dataclass(frozen=True)
class Iterate(Target):
    """The outer objective after the inner steps made, however far they came.

    The target for learned initialisations and step sizes, which no minimiser depends on. The
    reverse of all steps is exact for it; of some, the method knows what it left out, or does not.
    """

    @property
    def described(self) -> str:
        """See `Target`."""
        return "the inner steps made"


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far a hypergradient may be from its target. It prints as a sentence.

    Attributes:
        target: what the hypergradient is compared with.
        error_estimate: norm of its error relative to the hypergradient of the target: an estimate,
            not a bound. Infinite where no estimate is sound.
        trustworthy: whether the estimate is small enough.
        inner_residual: norm of the residual of the inner problem at the last params, for descent
            methods the gradient of its objective; None where it was not looked at.
        linear_residual: relative residual of the linear system, that of `Implicit`, or else of the
            certificate's own; None without one.
        corrected: a better hypergradient, found on the way; None without a sound estimate.
        products: products with second derivatives that the certificate took, Hessian and mixed.
        bound: bound of the relative error, where constants were given; it may be infinite.
        batch: which inner batch the residual and the estimate are of.
        reason: why it is not trustworthy; empty if it is.
    """

    target: Target
    error_estimate: float
    trustworthy: bool
    inner_residual: float | None = None
    linear_residual: float | None = None
    corrected: Tree = None
    products: int = 0
    bound: float | None = None
    batch: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """One sentence."""
        if self.error_estimate == 0:
            error = "no error but rounding"
        elif math.isfinite(self.error_estimate):
            error = f"estimated relative error {self.error_estimate:.1e} (an estimate, not a bound)"
        else:
            error = "unknown relative error"
        parts = [f"{error} against {self.target.described}"]
        if self.bound is not None and math.isfinite(self.bound):
            parts.append(f"at most {self.bound:.1e} by the constants given")
        if self.inner_residual is not None:
            parts.append(f"inner residual {self.inner_residual:.1e} with {self.batch}")
        if self.linear_residual is not None:
            parts.append(f"linear residual {self.linear_residual:.1e}")
        if self.products:
            parts.append(f"{self.products} products with second derivatives")
        parts.append("trustworthy" if self.trustworthy else f"not trustworthy: {self.reason}")
        return "; ".join(parts) + "."


class Certifier(ABC):
    """How a certificate is made; a frozen dataclass."""

    @abstractmethod
    def certify(self, instance: Instance, found: Found, target: Target) -> Certificate:
        """Judge a hypergradient.

        Args:
            instance: the problem, the point and the batches.
            found: what a method answered.
            target: what to compare with.

        Returns:
            The certificate. A value that is not finite, or a residual that is not defined, is a
            reason in it and no error.
        """


@final
@dataclass(frozen=True)
class Constants:
    r"""Constants of the problem that bound the error of a hypergradient rigorously.

    For an inner gradient g and :math:`\epsilon = |g| / \mu`, any q, :math:`r = b - H q` and
    :math:`\hat h = d - C^* q`,

    .. math::
        |\hat h - h_*| \le (L_d + L_C |q|)\, \epsilon
        + \frac{|C| + L_C \epsilon}{\mu} \big((L_b + L_H |q|)\, \epsilon + |r|\big) .

    Lipschitz constants are those in the params, in a ball of radius :math:`\epsilon`. Related:
    Ehrhardt & Roberts 2024, Analyzing inexact hypergradients for bilevel learning.

    Attributes:
        convexity: mu > 0, of the inner objective.
        coupling: bound of \|C\|, the mixed derivative of the inner objective.
        outer: L_b, of the gradient of the outer objective in the params.
        outer_control: L_d, of its gradient in the control.
        hessian: L_H, of the Hessian of the inner objective; 0 for quadratics.
        mixed: L_C, of the mixed derivative.

    Raises:
        ArgumentError: if one is out of range.

    Example:
        >>> Constants(convexity=2.0, coupling=1.0, outer=4.0).bound(0.1, 1.0, 0.0)
        0.1
    """

    convexity: float
    coupling: float
    outer: float
    outer_control: float = 0.0
    hessian: float = 0.0
    mixed: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.convexity > 0:
            raise ArgumentError(f"convexity must be > 0, got {self.convexity}.")
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ArgumentError(f"{field.name} must be >= 0, got {getattr(self, field.name)}.")

    def bound(self, gradient: float, adjoint: float, residual: float) -> float:
        """Bound of the norm of the error.

        Args:
            gradient: norm of the gradient of the inner objective.
            adjoint: norm of q.
            residual: norm of r.

        Returns:
            The bound.
        """
        eps = gradient / self.convexity
        through = (self.coupling + self.mixed * eps) / self.convexity
        return (self.outer_control + self.mixed * adjoint) * eps + through * (
            (self.outer + self.hessian * adjoint) * eps + residual
        )


def of_steps(found: Found, trust: float) -> Certificate:
    """The certificate against `Iterate`, which needs no evaluation.

    Args:
        found: what a method answered.
        trust: largest error that is trustworthy.

    Returns:
        The certificate.
    """
    left, reason = found.truncation, ""
    error = 0.0 if left is None else math.inf if left.error is None else left.error
    if found.linear is not None:
        error = math.inf
        reason = (
            "implicit differentiation gives the derivative of the minimiser, not of the steps "
            "made; take MLM() or Unrolled(), or target=Minimiser()"
        )
    elif left is not None and left.error is None:
        reason = (
            f"nothing is known of the {left.steps} inner steps left out; reverse them all, or give "
            "MLM a tolerance or bounds"
        )
    elif error > trust:
        reason = f"the error is above trust={trust:g}; reverse more of the inner steps"
    return Certificate(
        Iterate(),
        error,
        trustworthy=not reason,
        linear_residual=found.linear.residual if found.linear else None,
        bound=error if left is not None and left.rigorous else None,
        reason=reason,
    )
