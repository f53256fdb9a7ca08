"""The error of a hypergradient against the inner steps made."""

import math
from dataclasses import dataclass
from typing import final

from bilevel.certificates.certificate import Certificate, Certifier
from bilevel.checks import check_range
from bilevel.methods.base import Found
from bilevel.methods.instance import Instance

STEPS = "the inner steps made"


@final
@dataclass(frozen=True)
class AgainstSteps(Certifier):
    """Against the outer objective after the inner steps made, however far they came.

    The choice for learned initialisations and learning rates, which no minimiser depends on. The
    reverse of all steps is exact for it; of some, the method knows what it left out, or does not.
    It costs nothing.

    Attributes:
        trust: largest relative error that is trustworthy.

    Raises:
        ArgumentError: if it is not positive.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.2), 3, certificate=bl.AgainstSteps()
        ... )
        >>> zero = torch.tensor(0.0)
        >>> print(solver.hypergradient(zero, zero).certificate)
        no error but rounding against the inner steps made; trustworthy.
    """

    trust: float = 2e-2

    def __post_init__(self) -> None:
        check_range(self.trust, "trust", above=0)

    def certify(self, instance: Instance, found: Found) -> Certificate:  # noqa: ARG002
        """See `Certifier`."""
        left, reason = found.truncation, ""
        error = 0.0 if left is None else math.inf if left.error is None else left.error
        if found.linear is not None or found.compare is not None:
            error = math.inf
            method = "implicit differentiation" if found.linear else "the penalty path"
            reason = (
                f"{method} gives the derivative of the minimiser, not of the steps "
                "made; take MLM() or Unrolled(), or certificate=AgainstMinimiser()"
            )
        elif left is not None and left.error is None:
            reason = (
                f"nothing is known of the {left.steps} inner steps left out; reverse them all, or "
                "give MLM bounds"
            )
        elif error > self.trust:
            reason = f"the error is above trust={self.trust:g}; reverse more of the inner steps"
        return Certificate(
            STEPS,
            error,
            trustworthy=not reason,
            linear_residual=found.linear.residual if found.linear else None,
            bound=None if left is None or left.error is None else left.error,
            reason=reason,
        )
