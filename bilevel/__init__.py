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
from bilevel.lagrangian import KKT, Adjoint, adjoint, kkt, lagrangian
from bilevel.modules import Phases, functional
from bilevel.rollout import rollout
from bilevel.second_order import HessianProduct, hvp
from bilevel.storage import InMemory, OnDisk, OnHost
from bilevel.sweep import Measurement, measure

__version__ = "0.1.0"

__all__ = [
    "KKT",
    "Adjoint",
    "ArgumentError",
    "BilevelError",
    "Budget",
    "Checkpointing",
    "ControlProblem",
    "ControlSolution",
    "ControlSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "DivergenceError",
    "Dynamics",
    "HessianProduct",
    "InMemory",
    "LostGradientError",
    "Map",
    "Measurement",
    "OnDisk",
    "OnHost",
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
