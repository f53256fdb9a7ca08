"""Bilevel optimisation and discrete optimal control by the Method of Lagrangian Multipliers."""

from bilevel.checkpointing import Budget, Checkpointing, plan
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
    StorageError,
    StructureError,
    UnsupportedError,
)
from bilevel.gmres import GMRES
from bilevel.inverses import Dense, Neumann, Nystrom
from bilevel.krylov import CG, NormalCG
from bilevel.lagrangian import KKT, Adjoint, adjoint, kkt, lagrangian
from bilevel.linear import LinearResult, LinearSolver, Operator
from bilevel.modules import Phases, functional
from bilevel.problem import BilevelProblem, ByStep
from bilevel.rollout import rollout
from bilevel.second_order import HessianProduct, hvp
from bilevel.storage import InMemory, OnDisk, OnHost
from bilevel.sweep import Measurement, measure

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "KKT",
    "Adjoint",
    "ArgumentError",
    "BilevelError",
    "BilevelProblem",
    "Budget",
    "ByStep",
    "Checkpointing",
    "ControlProblem",
    "ControlSolution",
    "ControlSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "Dense",
    "DivergenceError",
    "Dynamics",
    "HessianProduct",
    "InMemory",
    "LinearResult",
    "LinearSolver",
    "LostGradientError",
    "Map",
    "Measurement",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "OnDisk",
    "OnHost",
    "Operator",
    "PerStep",
    "Phases",
    "Progress",
    "StorageError",
    "StructureError",
    "UnsupportedError",
    "adjoint",
    "functional",
    "hvp",
    "kkt",
    "lagrangian",
    "measure",
    "plan",
    "rollout",
]
