"""What a bilevel descent has seen, and whether it may end."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bilevel import tree
from bilevel.certificates.certificate import Certificate
from bilevel.methods.instance import Warm
from bilevel.optim.rules import InnerOptimizer
from bilevel.outer.descent import Descent
from bilevel.outer.encoding import columns, rows
from bilevel.outer.watching import OnFailure, report
from bilevel.solution import Hypergradient, Solution
from bilevel.tree import Tree
from bilevel.updates.kept_solution import KeptSolution

NEGLIGIBLE = 1e-6  # error relative to trust and the largest hypergradient of a descent


class History:
    """What `solve` carries from one update to the next."""

    def __init__(
        self, descent: Descent, on_failure: OnFailure, trust: float, warm: Warm | None = None
    ) -> None:
        """Nothing has been seen yet."""
        self.warm = warm
        self._kept: KeptSolution | None = None  # where the run is kept
        self.certificates: list[Certificate] = []
        self.complaints: list[tuple[int, str]] = []
        self._descent, self._on_failure, self._trust = descent, on_failure, trust
        self.last: Hypergradient | None = None
        self._largest = 0.0  # norm of a hypergradient so far

    def judge(self, found: Hypergradient, step: int) -> None:
        """Note a hypergradient that is not trustworthy; raise at once if asked to."""
        self.last, self._largest = found, max(self._largest, self._norm(found))
        trusted, complaint = self._verdict(found)
        if trusted:
            return
        if self._on_failure == "raise":
            report(f"iteration {step}: {complaint}", self._on_failure)
        self.complaints.append((step, complaint))

    def accept(self, found: Hypergradient) -> None:
        """Start the next update from here: all evaluations of one update start at the same."""
        self.warm = found.warm
        self.keep(found)

    def keep(self, found: Hypergradient | None) -> None:
        """Keep what its certificate says."""
        if found is not None and found.certificate is not None:
            # Without what is of the control's size: there is one an update.
            self.certificates.append(replace(found.certificate, correction=None))

    def keeps(self, optimizer: InnerOptimizer, params: Tree) -> bool:
        """Whether states are asked for; makes ready to give them."""
        loop = self._descent.loop
        if loop.keep is None and loop.on_divergence == "raise":
            return False
        self._kept = KeptSolution(optimizer, params, self._descent.control)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the next update goes on from."""
        kept, last = self._kept, self.last
        assert kept is not None  # `keeps` was asked
        same = last is not None and self.warm is last.warm
        return {
            "last": kept.of_hypergradient(last),
            "warm": "that of the last" if same else kept.of_warm(self.warm),
            "certificates": columns(self.certificates),
            "complaints": self.complaints[:1],
            "complained": len(self.complaints),
            "largest": self._largest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        kept, warm = self._kept, state["warm"]
        assert kept is not None
        self.last = kept.hypergradient(state["last"])
        own = None if isinstance(warm, str) else kept.warm(warm)
        self.warm = self.last.warm if self.last and isinstance(warm, str) else own
        self.certificates = rows(Certificate, state["certificates"])
        # One sentence tells of all of them, and quotes the first.
        self.complaints = [tuple(one) for one in state["complaints"]] * state["complained"]
        self._largest = state["largest"]

    def trusted(self, found: Hypergradient) -> bool:
        """Whether its small norm may end the descent."""
        return self._verdict(found)[0]

    def _norm(self, found: Hypergradient) -> float:
        return tree.norm(self._descent.leaves.gathered(found.gradient))

    def _verdict(self, found: Hypergradient) -> tuple[bool, str]:
        """Whether it may be trusted, and who says so, or why not."""
        if found.complaint is None:
            judged = found.certificate is not None
            return (
                True,
                "its certificate trusts it" if judged else "nobody judged it: no certificate",
            )
        # Near an outer optimum the hypergradient goes to zero and its relative error means nothing.
        # Where the terms that cancel in it are rounded, no more can be asked for.
        rounding = 16 * max(torch.finfo(x.dtype).eps for x in self._descent.leaves)
        share = max(NEGLIGIBLE * self._trust, min(rounding, self._trust))
        error = _error(found, self._norm(found))
        if error <= max(share * self._largest, self._descent.loop.tolerance):
            return True, f"its error, {error:.1e}, is negligible in this descent"
        return False, found.complaint

    def summary(self) -> str:
        """One sentence for all complaints."""
        first, complaint = self.complaints[0]
        return (
            f"{len(self.complaints)} hypergradients of {len(self._descent.costs)} updates are not "
            f"trustworthy; the first, of iteration {first}: {complaint}"
        )

    def solution(self, params: Tree, reason: str = "") -> Solution:
        """The record of what was reached; `reason` is what ended it early, if anything."""
        descent, found = self._descent, self.last
        value, norm, converged, judged = math.nan, math.nan, False, "nothing was evaluated"
        if found is not None:
            value, norm = float(found.value), self._norm(found)
            trusted, judged = self._verdict(found)
            converged = trusted and not reason and norm <= descent.loop.tolerance > 0
        return Solution(
            descent.control,
            params if found is None else found.params,
            value,
            norm,
            found,
            descent.costs,
            descent.gradient_norms,
            self.certificates,
            len(descent.costs),
            converged,
            reason or descent.ending(norm, converged=converged, judged=judged),
        )


def _error(found: Hypergradient, norm: float) -> float:
    """Norm of the error of a hypergradient, as its certificate estimates it."""
    if found.certificate is None:
        return math.inf
    relative = found.certificate.error_estimate  # to the true one, of norm at most |h| / (1 - e)
    return min(
        found.certificate.error, relative / (1 - relative) * norm if relative < 1 else math.inf
    )
