"""Linear systems on trees, real vector spaces under Re<a, b>, and their solvers.

Read `operator` (what a system and a solver are), `flat` and `system` (trees as flat vectors); then
any solver: `cg`, `normal_cg`, `gmres`, `neumann`, `direct`; `singular`, what went wrong.
"""

from bilevel.linear.cg import CG
from bilevel.linear.direct import Dense, Nystrom
from bilevel.linear.gmres import GMRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.operator import LinearResult, LinearSolver, Operator

__all__ = ["CG", "GMRES", "Dense", "LinearResult", "LinearSolver", "Neumann", "NormalCG"]
__all__ += ["Nystrom", "Operator"]
