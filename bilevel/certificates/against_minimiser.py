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
import struct
import zlib
from dataclasses import dataclass, fields, replace
from typing import final

from bilevel import tree
from bilevel.certificates.certificate import Certificate, Certifier
from bilevel.certificates.correction import FAR, Point, correct, eps_of, flaw_of, solve
from bilevel.certificates.curvature import (
    DIRECTIONS,
    MOST_DIRECTIONS,
    STEPS_EACH,
    Curvature,
    probe,
    rayleigh,
    spectrum,
)
from bilevel.certificates.judgement import Judged, judge
from bilevel.certificates.orders import compared, curvature_of
from bilevel.checks import check_range, check_whole
from bilevel.dynamics.closures import buffers_kept
from bilevel.errors import ArgumentError, DivergenceError, UnsupportedError
from bilevel.methods.base import Comparison, Found
from bilevel.methods.instance import Instance
from bilevel.methods.mlm import relative
from bilevel.optim.given import Given
from bilevel.sweeps.randomness import devices_of, preserved

MINIMISER = "the exact inner minimiser"
ROOT = "the exact root of the inner residual"
OTHER = 7  # products besides those of the linear systems and of the probe
SADDLE = (
    "negative curvature was met: the params are a saddle or a maximum of the inner objective, no "
    "minimiser, as from a symmetric start; begin elsewhere, at random, or "
    + FAR.removeprefix("make more inner steps, or ")
)
RANDOM = (
    "the inner objective draws at random, so that no evaluation of it tells its minimiser; draw "
    "outside and pass what was drawn as the batch, or take certificate=AgainstSteps()"
)
ON_THE_WAY = (
    "outer_each counts the inner steps, of which no minimiser tells; take "
    "certificate=AgainstSteps(), which judges the steps made"
)
KINK = (
    "a component stands on a kink of the penalty, where the hypergradient jumps and has only "
    "one-sided values; move the control a little"
)


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
            mixed; at least 22. None is 62, or twice what the method itself took if that is more;
            and a tenth of the inner steps, 48 at most, to probe the curvature. The matrix of at
            most 64 unknowns comes in one pass, which counts as one.
        constants: of the problem; the certificate then has a rigorous bound as well, usually a
            loose one.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> judge = bl.AgainstMinimiser(trust=1e-3)
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 60, certificate=judge)
        >>> zero = torch.tensor(0.0)
        >>> solver.hypergradient(zero, zero).certificate.trustworthy
        True
    """

    trust: float = 2e-2
    max_products: int | None = None
    constants: Constants | None = None

    def __post_init__(self) -> None:
        check_range(self.trust, "trust", above=0)
        check_whole(self.max_products, "max_products", OTHER + DIRECTIONS + 3, optional=True)

    def certify(self, instance: Instance, found: Found) -> Certificate:
        """See `Certifier`."""
        by_residual = instance.problem.residual is not None
        if self.constants is not None and not instance.symmetric:
            raise ArgumentError(
                "constants= bound the error where the residual is the gradient of the inner "
                f"objective, got {_residual_of(instance)}: leave them out."
            )
        if self.constants is not None and found.compare is not None:
            raise ArgumentError(
                "constants= bound an error by the residual of a linear system, which Penalty does "
                "not have: leave them out, or take Implicit()."
            )
        target = ROOT if by_residual else MINIMISER
        known = Certificate(target, math.inf, trustworthy=False, batch=_batch(instance))
        if found.linear is not None:
            known = replace(known, linear_residual=found.linear.residual)
        if instance.problem.outer_each is not None:
            return replace(known, reason=ON_THE_WAY)
        if instance.by_batches:
            reason = (
                "the steps saw other batches than the one that the inner residual is of, and "
                "nothing tells their objective; pass linear_batch=, all data or a large batch"
            )
            return replace(known, reason=reason)
        given = instance.params, instance.control, instance.judging_batch
        kept = buffers_kept(instance.problem.equation, instance.problem.outer)
        with preserved(devices_of(given)) as start, kept:
            try:
                judged = (
                    self._correct(instance, found, known)
                    if found.compare is None
                    else self._compare(instance, found, found.compare(), known)
                )
            except (DivergenceError, UnsupportedError) as error:
                judged = replace(known, reason=str(error))
            drawn = not start.stands()
        if by_residual:
            judged = replace(judged, reason=judged.reason.replace("minimiser", "root"))
        if isinstance(instance.optimizer, Given):
            more = "make more inner steps", "solve the inner problem further"
            judged = replace(judged, reason=judged.reason.replace(*more))
        # Draws of the outer objective were repeated; those of the inner one are new each time.
        return replace(known, reason=RANDOM) if drawn else judged

    def _correct(self, instance: Instance, found: Found, known: Certificate) -> Certificate:
        params = instance.dynamics.readout(found.warm.state)
        residual = found.linearisation or instance.linearised(params)
        before = residual.passes
        here = Point(instance, params, residual, found.outer)
        judged = self._judged(here, found, known)
        return replace(judged, products=sum(each.passes for each in here.linearised) - before)

    def _judged(self, here: Point, found: Found, known: Certificate) -> Certificate:
        instance = here.instance
        directions, limit = self._budgets(here, found)
        moved = correct(here, limit)
        known = replace(known, inner_residual=here.size)
        if moved.flaw and self.constants is None:
            return replace(known, reason=found.flaw or moved.flaw)
        there, start = moved.point, found.linear.solution if found.linear else None
        curvature = _curvature(there, directions, _seed(here.size, found))
        # A root need not be a stable one, and is no minimiser of anything.
        judges = instance.problem.residual is None
        if judges:
            known = replace(known, curvature=curvature.smallest, directions=curvature.directions)
        if judges and not moved.flaw and _is_saddle(here, there, curvature):
            return replace(known, reason=SADDLE)
        if not moved.flaw and instance.on_kink(there.params):
            return replace(known, reason=KINK)
        limit = max(limit - moved.products - (start is not None), 1)
        solved = solve(there.transposed, there.outer[0], 1e-8, limit, start)
        h = tree.filled(found.gradient, instance.control)
        judged = judge(here, moved, solved, curvature, h)
        left = limit - solved.products
        if judged.unsolved_effect > self.trust / 10 and left > 0:
            # What is left of the system weighs more than a small residual tells: solve on, down to
            # rounding.
            solved = solve(there.transposed, there.outer[0], 0.0, left, solved.solution)
            judged = judge(here, moved, solved, curvature, h)
        known = replace(known, linear_residual=(found.linear or solved).residual)
        if self.constants is not None:
            absolute = self.constants.bound(here.size, judged.adjoint, judged.unsolved)
            known = replace(known, bound=relative(absolute + judged.beside, judged.size))
        if flaw := moved.flaw or flaw_of(solved, "the adjoint system"):
            return replace(known, reason=found.flaw or flaw)
        reason = found.flaw or self._too_large(judged, _remedy(found))
        return replace(
            known,
            error_estimate=judged.estimate,
            error=judged.error + judged.missed,
            error_by_leaf=judged.by_part,
            trustworthy=not reason,
            correction=judged.corrected if math.isfinite(judged.estimate) else None,
            reason=reason,
        )

    def _compare(
        self, instance: Instance, found: Found, comparison: Comparison, known: Certificate
    ) -> Certificate:
        params = instance.dynamics.readout(found.warm.state)
        judging = replace(instance.dynamics, batch=instance.judging_batch)
        size = tree.norm(judging.residual(params, instance.control, 1))
        known = replace(known, inner_residual=size, linear_residual=comparison.residual)
        curvature = curvature_of(
            instance, params, _directions(instance.horizon), _seed(size, found)
        )
        known = replace(known, curvature=curvature.smallest, directions=curvature.directions)
        if curvature.negative(eps_of(params)):
            return replace(known, reason=SADDLE)
        if instance.on_kink(params):
            return replace(known, reason=KINK)
        return compared(instance, found, comparison, known, self.trust)

    def _budgets(self, here: Point, found: Found) -> tuple[int, int]:
        """Products of the probe, and of the linear systems."""
        horizon = here.instance.horizon
        if self.max_products is not None:
            return DIRECTIONS, self.max_products - OTHER - DIRECTIONS
        used = found.linear.products if found.linear is not None else horizon
        directions = _directions(max(used, horizon))
        limit = max(50, 2 * used - directions) - OTHER
        # Products with a matrix that is there cost nothing.
        free = 0 if here.matrix is None else 8 * len(here.matrix)
        return directions, max(limit, free)

    def _too_large(self, judged: Judged, remedy: str) -> str:
        if judged.estimate <= self.trust:
            bad = judged.untrusted(self.trust)
            if not bad:
                return ""
            name, error = bad
            return (
                f"the error of {name} alone is {error:.1e}, above trust={self.trust:g}; {remedy}, "
                "or take the corrected hypergradient"
            )
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


def _curvature(there: Point, directions: int, seed: int) -> Curvature:
    like, symmetric = there.residual.value, there.operator.symmetric
    if there.matrix is not None:
        return spectrum(there.matrix, like, symmetric=symmetric)
    return probe(there.operator, like, directions, seed)


def _directions(steps: int) -> int:
    """Of the probe, beside so many steps or products that were made anyway."""
    return min(max(steps // STEPS_EACH, DIRECTIONS), MOST_DIRECTIONS)


def _is_saddle(here: Point, there: Point, curvature: Curvature) -> bool:
    """Whether negative curvature was met that the distance to a minimiser does not explain."""
    if not curvature.negative(here.eps):
        return False
    if curvature.vector is None or there is here:
        return True
    # Along the orbit of a symmetry the curvature is that of the gradient's remainder, and falls
    # with it: the correction took both down. That of a saddle stays.
    return curvature.smallest <= 0.5 * rayleigh(here.operator, curvature.vector)


def _seed(size: float, found: Found) -> int:
    """Another start for each certificate, the same for the same point."""
    numbers = struct.pack("ddq", size, float(found.value), found.warm.steps)
    return zlib.crc32(numbers)


def _remedy(found: Found) -> str:
    """What brings a hypergradient nearer to that of the minimiser."""
    more = "make more inner steps"
    if found.truncation is not None:
        return f"{more} and reverse more of them"
    return more if found.linear is None else f"{more}, solve the linear system further"


def _residual_of(instance: Instance) -> str:
    """What the residual is of, where it is no gradient."""
    by_residual = instance.problem.residual is not None
    return "a problem by its residual" if by_residual else type(instance.optimizer).__name__


def _batch(instance: Instance) -> str:
    if instance.linear_batch is not None:
        return "the linear batch given"
    if instance.by_batches:
        return f"the inner batch of step {instance.last_step} alone"
    return "the inner batch given"
