"""Checks for a user's own problem: hypergradients, gradients and adjoints.

Read `vectors`, `maps`, `gradients`, `hypergradients`.
"""

from bilevel.testing.gradients import GradientCheck, check_gradient, check_product
from bilevel.testing.hypergradients import HypergradientCheck, MethodCheck, check_hypergradient
from bilevel.testing.maps import DotProductTest, TaylorTest, dot_product_test, taylor_test

__all__ = [
    "DotProductTest",
    "GradientCheck",
    "HypergradientCheck",
    "MethodCheck",
    "TaylorTest",
    "check_gradient",
    "check_hypergradient",
    "check_product",
    "dot_product_test",
    "taylor_test",
]
