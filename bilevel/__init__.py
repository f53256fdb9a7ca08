"""Bilevel optimisation and discrete optimal control by the Method of Lagrangian Multipliers."""

from bilevel.checkpointing import Checkpointing
from bilevel.control import ControlProblem
from bilevel.control_solver import ControlSolution, ControlSolver, Progress
from bilevel.dynamics import Dynamics, Map, PerStep
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    ConvergenceError,
    ConvergenceWarning,
    DivergenceError,
    LostGradientError,
    StructureError,
    UnsupportedError,
)
from bilevel.gmres import GMRES
from bilevel.inverses import Dense, Neumann, Nystrom
from bilevel.krylov import CG, NormalCG
from bilevel.lagrangian import KKT, Adjoint, adjoint, kkt, lagrangian
from bilevel.linear import LinearResult, LinearSolver, Operator
from bilevel.modules import Phases, functional
from bilevel.rollout import rollout

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "KKT",
    "Adjoint",
    "ArgumentError",
    "BilevelError",
    "Checkpointing",
    "ControlProblem",
    "ControlSolution",
    "ControlSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "Dense",
    "DivergenceError",
    "Dynamics",
    "LinearResult",
    "LinearSolver",
    "LostGradientError",
    "Map",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Operator",
    "PerStep",
    "Phases",
    "Progress",
    "StructureError",
    "UnsupportedError",
    "adjoint",
    "functional",
    "kkt",
    "lagrangian",
    "rollout",
]
