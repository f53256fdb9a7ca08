"""Learned weights of training tasks, the bilevel problem (3), and adaptation to one task.

Read `normalisers`, `weights`, `problem`, `over_ranks`, `adaptation`; `stacked` has tasks side by
side.
"""

from bilevel.tasks.adaptation import adapt
from bilevel.tasks.normalisers import NormalisedSigmoid, Normaliser, Softmax, Sparsemax
from bilevel.tasks.over_ranks import OverRanks
from bilevel.tasks.problem import Evaluation, Looped, Vmapped, weighted_problem
from bilevel.tasks.weights import Correlation, TaskWeights

__all__ = ["Correlation", "Evaluation", "Looped", "NormalisedSigmoid", "Normaliser", "OverRanks"]
__all__ += ["Softmax", "Sparsemax", "TaskWeights", "Vmapped", "adapt", "weighted_problem"]
