r"""The error of a hypergradient that took first derivatives alone, by first derivatives alone.

The method tells a hypergradient of the next order of its extrapolation, and what further inner
steps would still change, as the last ones tell: the estimate is the sum of both. The curvature is
probed by differences of the inner residual.
"""

import math
from dataclasses import replace

from bilevel import tree
from bilevel.certificates.certificate import Certificate
from bilevel.certificates.correction import SOLVED, eps_of, ratio
from bilevel.certificates.curvature import Curvature, probe
from bilevel.certificates.judgement import NEGLIGIBLE, parts
from bilevel.linear.operator import Operator
from bilevel.methods.base import Comparison, Found
from bilevel.methods.instance import Instance
from bilevel.tree import Tree

ROUNDED = (
    "the penalty moves the params by hardly more than their rounding, so that nothing is known of "
    "the multiplier: lower the strength, or leave it out, or take a dtype of more digits"
)


def compared(
    instance: Instance, found: Found, comparison: Comparison, known: Certificate, trust: float
) -> Certificate:
    """The certificate of a comparison.

    Args:
        instance: the problem, the point and the batches.
        found: what the method answered.
        comparison: what it knows of its error.
        known: a certificate, so far as it is known.
        trust: largest relative error that is trustworthy.

    Returns:
        The certificate.
    """
    if not comparison.rounding <= max(SOLVED, trust):
        return replace(known, reason=found.flaw or ROUNDED)
    control, better = instance.control, tree.filled(comparison.better, instance.control)
    beyond = tree.subtract(tree.filled(found.gradient, control), better)
    left = tree.filled(comparison.unsettled, control)
    errors, by_part, small = [], {}, set()
    whole = tree.norm(better)
    for name, part in [("", lambda vector: vector), *parts(instance)]:
        error, own = tree.norm(part(beyond)) + tree.norm(part(left)), tree.norm(part(better))
        errors.append(error)
        if name:
            by_part[name] = ratio(error, own) if error else 0.0
            if own + error <= NEGLIGIBLE * whole:
                small.add(name)
    estimate = ratio(errors[0], whole) if errors[0] else 0.0
    bad = {n: e for n, e in by_part.items() if not e <= trust and n not in small}
    reason = found.flaw or _reason(comparison, estimate, bad, trust)
    return replace(
        known,
        error_estimate=estimate,
        error=errors[0],
        error_by_leaf=by_part,
        trustworthy=not reason,
        correction=better if math.isfinite(estimate) else None,
        reason=reason,
    )


def _reason(comparison: Comparison, estimate: float, bad: dict[str, float], trust: float) -> str:
    # What is left of the differences is in the estimate, as far as it falls from here.
    if not comparison.residual <= max(SOLVED, trust):
        return (
            f"the inner problems with penalty have relative residual {comparison.residual:.1e}; "
            "make more inner steps"
        )
    if not estimate <= trust:
        if not math.isfinite(estimate):
            return (
                "the hypergradient of the minimiser is zero: the control does not move it, or the "
                "outer objective is stationary"
            )
        return (
            f"the error is above trust={trust:g}; make more inner steps, raise the strength or the "
            "order, or take the corrected hypergradient"
        )
    if not bad:
        return ""
    name = max(bad, key=lambda n: bad[n])
    return (
        f"the error of {name} alone is {bad[name]:.1e}, above trust={trust:g}; make more inner "
        "steps, raise the strength or the order, or take the corrected hypergradient"
    )


def curvature_of(instance: Instance, params: Tree, directions: int, seed: int) -> Curvature:
    """The curvature of the inner problem, by central differences of its residual."""
    dynamics = replace(instance.dynamics, batch=instance.judging_batch)
    size = tree.norm(params) or 1.0
    step = eps_of(params) ** (1 / 3) * size

    def apply(vector: Tree) -> Tree:
        length = tree.norm(vector)
        if not length:
            return vector
        h = step / length
        up, down = (
            dynamics.residual(tree.moved(params, vector, way), instance.control, 1)
            for way in (-h, h)
        )
        difference = tree.subtract(up, down)
        return tree.map_leaves(lambda d: None if d is None else d / (2 * h), difference)

    operator = Operator(
        apply, symmetric=instance.optimizer.symmetric, columns=instance.problem.columns
    )
    like = tree.map_leaves(lambda x: x if tree.is_variable(x) else None, params)
    return probe(operator, like, directions, seed)
