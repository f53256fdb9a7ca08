"""Discrete optimal control by Lagrangian multipliers: (4) to (8), and what is built on them.

Read `lagrangian` (4), `adjoint` (6) to (8), `tangent` (their derivatives); then `rollout`, which
makes a differentiable function of them, `newton_cg`, the room `riccati`, and `solver`.
"""

from bilevel.control.adjoint import Adjoint, Swept, adjoint
from bilevel.control.lagrangian import KKT, kkt, lagrangian
from bilevel.control.newton_cg import NewtonCG
from bilevel.control.optimum import Optimum
from bilevel.control.riccati import Constraints, Riccati
from bilevel.control.rollout import rollout, total_cost
from bilevel.control.solution import BatchSolution, ConstraintReport, ControlSolution
from bilevel.control.solver import ControlSolver
from bilevel.control.tangent import HessianProduct, hvp

__all__ = ["KKT", "Adjoint", "BatchSolution", "ConstraintReport", "Constraints", "ControlSolution"]
__all__ += ["ControlSolver"]
__all__ += ["HessianProduct", "NewtonCG", "Optimum", "Riccati", "Swept", "adjoint", "hvp"]
__all__ += ["kkt", "lagrangian", "rollout", "total_cost"]
