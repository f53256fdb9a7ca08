"""The bilevel problem (3), and its inner iteration as a dynamics: `problem`, `iteration`."""

from bilevel.inner.iteration import InnerIteration
from bilevel.inner.problem import BilevelProblem

__all__ = ["BilevelProblem", "InnerIteration"]
