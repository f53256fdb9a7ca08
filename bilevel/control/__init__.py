"""Discrete optimal control by Lagrangian multipliers: (4) to (8), and what is built on them.

Read `lagrangian` (4), `adjoint` (6) to (8), `many`, of several costs at once, `tangent` (their
derivatives); then `rollout`, which makes a differentiable function of them, `newton_cg`, the room
`riccati`, and `solver`.
"""

from bilevel.control.adjoint import Adjoint, Swept, adjoint
from bilevel.control.lagrangian import KKT, kkt, lagrangian
from bilevel.control.many import adjoints
from bilevel.control.newton_cg import NewtonCG
from bilevel.control.optimum import Optimum
from bilevel.control.riccati import Constraints, Riccati
from bilevel.control.rollout import rollout, total_cost
from bilevel.control.solution import BatchSolution, ConstraintReport, ControlSolution
from bilevel.control.solver import ControlSolver
from bilevel.control.tangent import HessianProduct, hvp

__all__ = ["KKT", "Adjoint", "BatchSolution", "ConstraintReport", "Constraints", "ControlSolution"]
__all__ += ["ControlSolver", "HessianProduct", "NewtonCG", "Optimum", "Riccati", "Swept"]
__all__ += ["adjoint", "adjoints", "hvp", "kkt", "lagrangian", "rollout", "total_cost"]
