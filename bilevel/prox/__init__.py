"""Proximal operators: the part of an inner objective that need not be smooth, and constraints.

Read `operators`, what one is; then `sets`, projections, and `groups`.
"""

from bilevel.prox.groups import ElasticNet, GroupL1, Product
from bilevel.prox.operators import L1, L2, Box, Prox
from bilevel.prox.sets import Affine, Ball, NonNegative, Simplex

__all__ = ["L1", "L2", "Affine", "Ball", "Box", "ElasticNet", "GroupL1", "NonNegative", "Product"]
__all__ += ["Prox", "Simplex"]
