"""Several tasks an update: the mean of their hypergradients, judged by the worst of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

from bilevel import tree
from bilevel.certificates.certificate import Certificate
from bilevel.solution import Hypergradient
from bilevel.tree import Tree


def mean_of(found: Sequence[Hypergradient]) -> Hypergradient:
    """The mean of values and gradients; the rest is of the last, or of the worst.

    Args:
        found: one a task, all of one control.

    Returns:
        The record.
    """
    last, n = found[-1], len(found)
    if n == 1:
        return last
    unsolved = [h.linear for h in found if h.linear is not None and not h.linear.converged]
    truncated = [h.truncation for h in found if h.truncation is not None]
    return replace(
        last,
        value=sum((h.value for h in found[1:]), found[0].value) / n,
        gradient=_mean([h.gradient for h in found]),
        certificate=_worst([h.certificate for h in found if h.certificate is not None]),
        linear=unsolved[0] if unsolved else last.linear,
        truncation=max(truncated, key=_left_out) if truncated else None,
        flaw=next((h.flaw for h in found if h.flaw), ""),
    )


def _left_out(truncation: object) -> float:
    error = getattr(truncation, "error", None)
    return math.inf if error is None else error


def _mean(gradients: list[Tree]) -> Tree:
    return tree.map_leaves(
        lambda *x: None if x[0] is None else sum(x[1:], x[0]) / len(x), *gradients
    )


def _worst(certificates: list[Certificate]) -> Certificate | None:
    """The certificate that trusts least; its `error` is a bound of that of the mean."""
    if not certificates:
        return None
    worst = min(certificates, key=lambda c: (c.trustworthy, -c.error_estimate))
    corrections = [c.correction for c in certificates]
    return replace(
        worst,
        error=sum(c.error for c in certificates) / len(certificates),
        correction=None if any(c is None for c in corrections) else _mean(corrections),
        products=sum(c.products for c in certificates),
    )
