"""Discrete optimal control by Lagrangian multipliers: (4) to (8), and what is built on them.

Read `lagrangian` (4), `adjoint` (6) to (8), `many`, of several costs at once, `tangent` (their
derivatives); then `rollout`, which makes a differentiable function of them, `newton_cg`, `solver`.
"""

from bilevel.control.adjoint import Adjoint, Swept, adjoint
from bilevel.control.lagrangian import KKT, kkt, lagrangian
from bilevel.control.many import adjoints
from bilevel.control.newton_cg import NewtonCG
from bilevel.control.rollout import rollout, total_cost
from bilevel.control.solver import ControlSolution, ControlSolver
from bilevel.control.tangent import HessianProduct, hvp

__all__ = ["KKT", "Adjoint", "ControlSolution", "ControlSolver", "HessianProduct", "NewtonCG"]
__all__ += ["Swept", "adjoint", "adjoints", "hvp", "kkt", "lagrangian", "rollout", "total_cost"]
