"""The ways of finding the multipliers of an inner iteration, and so its hypergradient.

Read `instance`, what a method is asked, and `base`, what it answers; then `unrolled`, `mlm`,
`implicit`, `one_step`; and those without second derivatives, `penalty` and `first_order`.
"""

from bilevel.methods.base import Comparison, Found, HypergradientMethod, Truncation
from bilevel.methods.first_order import FirstOrder
from bilevel.methods.implicit import Implicit
from bilevel.methods.instance import Instance, Warm
from bilevel.methods.mlm import MLM, Bounds
from bilevel.methods.one_step import OneStep
from bilevel.methods.penalty import Penalty
from bilevel.methods.unrolled import Unrolled

__all__ = ["MLM", "Bounds", "Comparison", "FirstOrder", "Found", "HypergradientMethod", "Implicit"]
__all__ += ["Instance", "OneStep", "Penalty", "Truncation", "Unrolled", "Warm"]
