r"""The error of a hypergradient against the exact inner minimiser, by Newton's method.

R is the residual of the inner problem at the last params, J and C its derivatives in params and
control (for descent methods J is the Hessian), b and d the gradients of F in params and control; a
plus marks the same at the corrected params. With :math:`p \approx -J^{-1} R`,

.. math::
    \theta_+ = \theta + p, \qquad J_+^* q_+ \approx b_+, \qquad h_+ = d_+ - C_+^* q_+,

where :math:`h_+` is itself a hypergradient, of error :math:`O(|p|^2)`: so :math:`e = |h - h_+|`.
What e misses is estimated from :math:`\epsilon = |R_+| / \mu`, the residual :math:`r_+` of the
system for :math:`q_+` and the changes :math:`D_x` of x from params to corrected params, J and C
applied to :math:`q_+`; mu is the smallest Ritz value met, which is not below the true one:

.. math::
    E_1 = (D_d + D_C) \frac{\epsilon}{|p|}
          + \frac{|C_+|}{\mu} \Big((D_b + D_J) \frac{\epsilon}{|p|} + |r_+|\Big), \qquad
    \text{estimate} = \frac{e + E_1}{|h_+| - E_1} .

For quadratic f and F one correction is exact, and the estimate is the error. Else the correction is
repeated while it pays.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import final

from bilevel import tree
from bilevel.certificates.certificate import Certificate, Certifier
from bilevel.certificates.correction import (
    Correction,
    Point,
    correct,
    distance,
    flaw_of,
    ratio,
    smallest,
    solve,
)
from bilevel.checks import check_range, check_whole
from bilevel.errors import ArgumentError, DivergenceError, UnsupportedError
from bilevel.linear.operator import LinearResult
from bilevel.methods.base import Found, Instance
from bilevel.methods.mlm import relative
from bilevel.settings import ByStep
from bilevel.tree import Tree

MINIMISER = "the exact inner minimiser"
OTHER = 5  # products besides those of the linear systems


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
        check_range(self.convexity, "convexity", above=0)
        for field in fields(self):
            check_range(getattr(self, field.name), field.name, least=0)

    def bound(self, gradient: float, adjoint: float, residual: float) -> float:
        """Bound of the norm of the error."""
        eps = gradient / self.convexity
        through = (self.coupling + self.mixed * eps) / self.convexity
        return (self.outer_control + self.mixed * adjoint) * eps + through * (
            (self.outer + self.hessian * adjoint) * eps + residual
        )


@final
@dataclass(frozen=True)
class AgainstMinimiser(Certifier):
    """Against the outer objective at the exact minimiser of the inner one: the problem (3).

    It corrects the inner solution by Newton's method, and takes the hypergradient there.

    Attributes:
        trust: largest estimate of the relative error that is trustworthy.
        max_products: products with second derivatives that a certificate may take, Hessian and
            mixed; at least 8.
        constants: of the problem; the certificate then has a rigorous bound as well, usually a
            loose one.

    Raises:
        ArgumentError: if a setting is out of range.
    """

    trust: float = 2e-2
    max_products: int = 50
    constants: Constants | None = None

    def __post_init__(self) -> None:
        check_range(self.trust, "trust", above=0)
        check_whole(self.max_products, "max_products", OTHER + 3)

    def certify(self, instance: Instance, found: Found) -> Certificate:
        """See `Certifier`."""
        if self.constants is not None and not instance.optimizer.symmetric:
            raise ArgumentError(
                "constants= bound the error where the residual is the gradient of the inner "
                f"objective, got {type(instance.optimizer).__name__}: leave them out."
            )
        known = Certificate(MINIMISER, math.inf, trustworthy=False, batch=_batch(instance))
        if found.linear is not None:
            known = replace(known, linear_residual=found.linear.residual)
        try:
            return self._correct(instance, found, known)
        except (DivergenceError, UnsupportedError) as error:
            return replace(known, reason=str(error))

    def _correct(self, instance: Instance, found: Found, known: Certificate) -> Certificate:
        params = instance.dynamics.readout(found.warm.state)
        residual = found.linearisation or instance.linearised(params)
        here = Point(instance, params, residual, found.outer)
        budget = self.max_products - OTHER
        moved = correct(here, budget)
        known = replace(known, inner_residual=here.size, products=moved.products)
        if moved.flaw and self.constants is None:
            return replace(known, reason=moved.flaw)
        there, start = moved.point, found.linear.solution if found.linear else None
        limit = budget - moved.products - (start is not None)
        solved = solve(there.transposed, there.outer[0], 1e-8, limit, start)
        known = replace(
            known,
            linear_residual=(found.linear or solved).residual,
            products=moved.products + solved.products + OTHER,
        )
        judged = _judge(here, moved, solved, tree.filled(found.gradient, instance.control))
        if self.constants is not None:
            known = replace(known, bound=judged.bound(self.constants, here.size))
        if flaw := moved.flaw or flaw_of(solved, "the adjoint system"):
            return replace(known, reason=flaw)
        return replace(
            known,
            error_estimate=judged.estimate,
            error=judged.error + judged.missed,
            trustworthy=judged.estimate <= self.trust,
            corrected=judged.corrected if math.isfinite(judged.estimate) else None,
            reason=self._too_large(judged, _remedy(found)),
        )

    def _too_large(self, judged: "_Judged", remedy: str) -> str:
        if judged.estimate <= self.trust:
            return ""
        if math.isfinite(judged.estimate):
            return (
                f"the error is above trust={self.trust:g}; {remedy}, or take the corrected "
                "hypergradient"
            )
        if not math.isfinite(judged.size):
            return "the hypergradient is not finite"
        if not judged.corrected_size:
            return (
                "the hypergradient of the minimiser is zero: the control does not move it, as a "
                "learning rate or a start does not (then take certificate=AgainstSteps()), or the "
                "outer objective is stationary"
            )
        return (
            f"what the correction may miss, {judged.missed:.1e}, is not below the corrected "
            f"hypergradient, {judged.corrected_size:.1e}; make more inner steps or raise "
            "max_products"
        )


@dataclass(frozen=True, eq=False)
class _Judged:
    """Norms that the certificate is made of."""

    size: float  # of h
    error: float  # e
    missed: float  # E1
    corrected: Tree
    adjoint: float  # of q+
    unsolved: float  # b - J^* q+ at the params
    beside: float  # h - (d - C^* q+) there

    @property
    def corrected_size(self) -> float:
        return tree.norm(self.corrected)

    @property
    def estimate(self) -> float:
        return ratio(self.error + self.missed, self.corrected_size - self.missed)

    def bound(self, constants: Constants, gradient: float) -> float:
        absolute = constants.bound(gradient, self.adjoint, self.unsolved) + self.beside
        return relative(absolute, self.size)


def _judge(here: Point, moved: Correction, solved: LinearResult, h: Tree) -> _Judged:
    """The estimate of this file's equations, from h and its correction."""
    there, q = moved.point, solved.solution
    (b, d), (b_new, d_new) = here.outer, there.outer
    applied, pulled, pulled_new = here.transposed.apply(q), here.mixed(q), there.mixed(q)
    corrected = tree.subtract(d_new, pulled_new)
    # J_+^* q_+ is b_+ but for the residual, which is counted beside it.
    change = distance(b_new, b) + distance(b_new, applied)
    mu = min(moved.convexity, smallest(solved, b_new))
    length = distance(there.params, here.params)
    further = ratio(there.size, mu * length) if length else 0.0
    through = ratio(there.coupling(pulled_new), mu)
    missed = further * (distance(d_new, d) + distance(pulled_new, pulled)) + through * (
        further * change + solved.residual * tree.norm(b_new)
    )
    return _Judged(
        tree.norm(h),
        distance(h, corrected),
        missed,
        corrected,
        tree.norm(q),
        distance(b, applied),
        distance(h, tree.subtract(d, pulled)),
    )


def _remedy(found: Found) -> str:
    """What brings a hypergradient nearer to that of the minimiser."""
    more = "make more inner steps"
    if found.truncation is not None:
        return f"{more} and reverse more of them"
    return more if found.linear is None else f"{more}, solve the linear system further"


def _batch(instance: Instance) -> str:
    if isinstance(instance.inner_batch, ByStep):
        return f"the inner batch of step {instance.last_step} alone"
    return "the inner batch given"
