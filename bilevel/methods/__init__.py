"""The ways of finding the multipliers of an inner iteration, and so its hypergradient.

Read `base`, what a method is asked and answers; then `unrolled`, `mlm`, `implicit`, `one_step`, `penalty`,
`first_order`.
"""

from bilevel.methods.base import Found, HypergradientMethod, Instance, Truncation, Warm
from bilevel.methods.first_order import FirstOrder
from bilevel.methods.implicit import Implicit
from bilevel.methods.mlm import MLM, Bounds
from bilevel.methods.one_step import OneStep
from bilevel.methods.penalty import Penalty
from bilevel.methods.unrolled import Unrolled

__all__ = [
    "MLM",
    "Bounds",
    "FirstOrder",
    "Found",
    "HypergradientMethod",
    "Implicit",
    "Instance",
    "OneStep",
]
__all__ += ["Penalty", "Truncation", "Unrolled", "Warm"]
