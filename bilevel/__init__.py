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
from bilevel.lagrangian import KKT, Adjoint, adjoint, kkt, lagrangian
from bilevel.modules import Phases, functional
from bilevel.rollout import rollout

__version__ = "0.1.0"

__all__ = [
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
    "DivergenceError",
    "Dynamics",
    "LostGradientError",
    "Map",
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
