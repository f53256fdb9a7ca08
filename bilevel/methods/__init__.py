"""The ways of finding the multipliers of an inner iteration, and so its hypergradient.

Read `base`, what a method is asked and answers; then `unrolled`, `mlm`, `implicit`, `one_step`.
"""

from bilevel.methods.base import Found, HypergradientMethod, Instance, Truncation, Warm
from bilevel.methods.implicit import Implicit
from bilevel.methods.mlm import MLM, Bounds
from bilevel.methods.one_step import OneStep
from bilevel.methods.unrolled import Unrolled

__all__ = ["MLM", "Bounds", "Found", "HypergradientMethod", "Implicit", "Instance", "OneStep"]
__all__ += ["Truncation", "Unrolled", "Warm"]
