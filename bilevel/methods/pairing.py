"""Which methods go with which inner optimisers and problems."""

from bilevel.errors import ArgumentError, UnsupportedError
from bilevel.inner.problem import BilevelProblem
from bilevel.methods.base import HypergradientMethod
from bilevel.optim.rules import InnerOptimizer


def check_pairing(
    problem: BilevelProblem, optimizer: InnerOptimizer, method: HypergradientMethod
) -> None:
    """Refuse what does not go together.

    Args:
        problem: by an objective, or by a residual.
        optimizer: of it.
        method: of finding hypergradients.

    Raises:
        ArgumentError: naming the two, and what goes.
    """
    rule, how = type(optimizer).__name__, type(method).__name__
    if problem.residual is not None and not optimizer.of_roots:
        raise ArgumentError(
            f"{rule} descends on an objective, and a problem by its residual has none: take "
            "bilevel.optim.FixedPoint(), Anderson() or NewtonKrylov(), or bilevel.Given(solve)."
        )
    if not optimizer.reversible and method.steps:
        raise ArgumentError(
            f"{how} differentiates or makes inner steps, and {rule} has none for it: take "
            "method=bilevel.Implicit(), which needs the solution alone."
        )
    if problem.residual is not None and method.needs_objective:
        raise ArgumentError(
            f"{how} needs an inner objective, and a problem by its residual has none: take "
            "method=bilevel.Implicit()."
        )


def check_shared(problem: BilevelProblem, optimizer: InnerOptimizer) -> None:
    """Refuse what is not split over processes, or over micro-batches.

    Args:
        problem: by an objective, or by a residual.
        optimizer: of it.

    Raises:
        UnsupportedError: naming what is split.
    """
    if problem.residual is not None:
        raise UnsupportedError(
            "replicas= and micro_batches= split objectives, means over samples, and this problem "
            "is by its residual=: leave them out, or give BilevelProblem(inner=...)."
        )
    if not optimizer.reversible:
        raise UnsupportedError(
            f"{type(optimizer).__name__} solves the inner problem by itself, on one process and "
            "whole batches: leave replicas= and micro_batches= out, or take an inner optimiser "
            "that makes steps, as bilevel.optim.SGD()."
        )
