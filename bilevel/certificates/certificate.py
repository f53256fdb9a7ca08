"""What is known of the error of a hypergradient, and what makes such a judgement."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from bilevel.methods.base import Found
from bilevel.methods.instance import Instance
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far a hypergradient may be from its target. It prints as a sentence.

    Attributes:
        target: whose hypergradient it is compared with, in words.
        error_estimate: norm of its error relative to the hypergradient of the target: an estimate,
            not a bound. Infinite where no estimate is sound.
        trustworthy: whether the estimate is small enough, of the whole and of each leaf.
        error_by_leaf: relative error of each leaf of the control by its name, and of each column of
            a matrix of weights; empty without a sound estimate.
        curvature: least eigenvalue of the inner problem as a probe met it; None if nothing looked.
        directions: along which the probe looked.
        inner_residual: norm of the residual of the inner problem at the last params, for descent
            methods the gradient of its objective; None where it was not looked at.
        linear_residual: relative residual of the linear system, that of `Implicit`, or else of the
            certificate's own; None without one.
        correction: what `corrected()` gives.
        products: passes with second derivatives that the certificate took, Hessian and mixed.
        bound: bound of the relative error, where constants were given; it may be infinite.
        batch: which inner batch the residual and the estimate are of.
        reason: why it is not trustworthy; empty if it is.
        error: norm of its error, as estimated; infinite where no estimate is sound. Near an outer
            optimum it tells what the relative one cannot.

    Example:
        >>> import dataclasses, torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,  # w(a) = a
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=4)
        >>> solver = dataclasses.replace(solver, on_failure="ignore")
        >>> found = solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0))
        >>> found.gradient, found.certificate.corrected()  # 2 (a - 1) is 4
        (tensor(3.3984), tensor(4.))
        >>> found.certificate.trustworthy, round(found.certificate.error_estimate, 2)
        (False, 0.15)
    """

    target: str
    error_estimate: float
    trustworthy: bool
    error_by_leaf: dict[str, float] = field(default_factory=dict)
    curvature: float | None = None
    directions: int = 0
    inner_residual: float | None = None
    linear_residual: float | None = None
    correction: Tree = field(default=None, repr=False)
    products: int = 0
    bound: float | None = None
    batch: str = ""
    reason: str = ""
    error: float = math.inf

    def corrected(self) -> Tree:
        """A better hypergradient, found on the way; None without a sound estimate."""
        return self.correction

    def __str__(self) -> str:
        """One sentence."""
        if self.error_estimate == 0:
            error = "no error but rounding"
        elif math.isfinite(self.error_estimate):
            error = f"estimated relative error {self.error_estimate:.1e} (an estimate, not a bound)"
        else:
            error = "unknown relative error"
        parts = [f"{error} against {self.target}"]
        if self.bound is not None and math.isfinite(self.bound):
            parts.append(f"at most {self.bound:.1e} by the constants given")
        if self.inner_residual is not None:
            parts.append(f"inner residual {self.inner_residual:.1e} with {self.batch}")
        if self.linear_residual is not None:
            parts.append(f"linear residual {self.linear_residual:.1e}")
        if self.curvature is not None:
            looked = f"curvature {self.curvature:.1e} or more along {self.directions} directions"
            parts.append(looked)
        if self.products:
            parts.append(f"{self.products} products with second derivatives")
        parts.append("trustworthy" if self.trustworthy else f"not trustworthy: {self.reason}")
        return "; ".join(parts) + "."


class Certifier(ABC):
    """How a certificate is made, and against what; a frozen dataclass.

    Example:
        A certifier of one's own, here one that trusts what is small:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Small(Certifier):
        ...     most: float
        ...
        ...     def certify(self, instance, found):
        ...         size = float(found.gradient.abs())
        ...         return Certificate(
        ...             f"a gradient of at most {self.most}", size, size < self.most
        ...         )
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.5), inner_steps=40, certificate=Small(10.0)
        ... )
        >>> found = solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0))
        >>> found.certificate.trustworthy
        True
    """

    @abstractmethod
    def certify(self, instance: Instance, found: Found) -> Certificate:
        """Judge a hypergradient.

        Args:
            instance: the problem, the point and the batches.
            found: what a method answered.

        Returns:
            The certificate. A value that is not finite, or a residual that is not defined, is a
            reason in it and no error.
        """
