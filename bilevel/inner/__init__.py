"""The bilevel problem (3), its inner iteration as a dynamics, and batches for the steps.

Read `problem`, `iteration`, `batches`.
"""

from bilevel.inner.batches import Minibatches
from bilevel.inner.iteration import InnerIteration
from bilevel.inner.problem import BilevelProblem

__all__ = ["BilevelProblem", "InnerIteration", "Minibatches"]
