"""A hypergradient as it is kept in a checkpoint, and what it is made of again."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from bilevel.certificates.certificate import Certificate
from bilevel.linear.operator import LinearResult
from bilevel.methods.base import Truncation
from bilevel.methods.instance import Warm
from bilevel.optim.rules import InnerOptimizer
from bilevel.outer.encoding import Records, Trees
from bilevel.solution import Hypergradient
from bilevel.tree import Tree

RECORDS: Records = {
    kind.__name__: kind for kind in (Certificate, Hypergradient, LinearResult, Truncation, Warm)
}


class KeptSolution:
    """Takes apart what a descent along hypergradients goes on from, and puts it together."""

    def __init__(self, optimizer: InnerOptimizer, params: Tree, control: Tree) -> None:
        """Of trees like these."""
        state = optimizer.begin(params)
        self._optimizer = optimizer
        self._trees = Trees(params=params, control=control, state=state)

    def of_warm(self, warm: Warm | None) -> Any:
        """Inner state, steps and linear solution."""
        if warm is None:
            return None
        kept = self._trees.kept
        return replace(warm, state=kept(warm.state), linear=kept(warm.linear))

    def warm(self, kept: Any) -> Warm | None:
        """The inverse of `of_warm`."""
        if kept is None:
            return None
        restored = self._trees.restored
        return replace(kept, state=restored(kept.state), linear=restored(kept.linear))

    def of_hypergradient(self, found: Hypergradient | None) -> Any:
        """All of it; its params are in its inner state."""
        if found is None:
            return None
        kept, linear, certificate = self._trees.kept, found.linear, found.certificate
        if linear is not None:
            linear = replace(linear, solution=kept(linear.solution), find_ritz=None)
        if certificate is not None:
            certificate = replace(certificate, correction=kept(certificate.correction))
        changed = {
            "gradient": kept(found.gradient),
            "params": None,
            "certificate": certificate,
            "warm": self.of_warm(found.warm),
            "linear": linear,
        }
        return {f.name: getattr(found, f.name) for f in fields(found)} | changed

    def hypergradient(self, kept: Mapping[str, Any] | None) -> Hypergradient | None:
        """The inverse of `of_hypergradient`."""
        if kept is None:
            return None
        restored, warm = self._trees.restored, self.warm(kept["warm"])
        linear, certificate = kept["linear"], kept["certificate"]
        if linear is not None:
            linear = replace(linear, solution=restored(linear.solution))
        if certificate is not None:
            certificate = replace(certificate, correction=restored(certificate.correction))
        assert warm is not None  # every hypergradient has one
        changed = {
            "gradient": restored(kept["gradient"]),
            "params": self._optimizer.params(warm.state),
            "certificate": certificate,
            "warm": warm,
            "linear": linear,
        }
        return Hypergradient(**{**kept, **changed})
