"""Bilevel optimisation and discrete optimal control by the Method of Lagrangian Multipliers."""

from bilevel.adaptation import adapt
from bilevel.certificate import Certificate, Certifier, Constants, Iterate, Minimiser, Target
from bilevel.checkpointing import Budget, Checkpointing, plan
from bilevel.compiled import Compiled
from bilevel.control import ControlProblem
from bilevel.control_solver import ControlSolution, ControlSolver
from bilevel.correlation import Correlation
from bilevel.descent import Progress
from bilevel.dynamics import Dynamics, Map, PerStep
from bilevel.errors import (
    ArgumentError,
    BilevelError,
    CompileWarning,
    ConvergenceError,
    ConvergenceWarning,
    DivergenceError,
    LostGradientError,
    StorageError,
    StructureError,
    UnsupportedError,
)
from bilevel.estimate import Newton
from bilevel.gmres import GMRES
from bilevel.inverses import Dense, Nystrom
from bilevel.kkt import KKT, kkt
from bilevel.krylov import CG
from bilevel.lagrangian import Adjoint, Swept, adjoint, lagrangian
from bilevel.linear import LinearResult, LinearSolver, Operator
from bilevel.methods.base import Found, HypergradientMethod, Instance, Truncation, Warm
from bilevel.methods.implicit import Implicit
from bilevel.methods.mlm import MLM, Bounds
from bilevel.methods.one_step import OneStep
from bilevel.methods.unrolled import Unrolled
from bilevel.modules import Phases, functional
from bilevel.neumann import Neumann
from bilevel.newton import NewtonCG
from bilevel.normal_cg import NormalCG
from bilevel.normalisers import NormalisedSigmoid, Normaliser, Softmax, Sparsemax
from bilevel.optimizers import Adam, GradientDescent, HeavyBall, InnerOptimizer, ProximalGradient
from bilevel.problem import BilevelProblem, ByStep
from bilevel.prox import L1, L2, Box, Prox
from bilevel.rollout import rollout, total_cost
from bilevel.second_order import HessianProduct, hvp
from bilevel.solution import Hypergradient, Solution
from bilevel.solver import BilevelSolver
from bilevel.storage import InMemory, OnDisk, OnHost
from bilevel.sweep import Measurement, measure
from bilevel.task_weights import TaskWeights
from bilevel.testing import (
    DotProductTest,
    HypergradientCheck,
    MethodCheck,
    TaylorTest,
    check_hypergradient,
    dot_product_test,
    taylor_test,
)
from bilevel.weighting import Columns, Looped, Vmapped, weighted_problem

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "KKT",
    "L1",
    "L2",
    "MLM",
    "Adam",
    "Adjoint",
    "ArgumentError",
    "BilevelError",
    "BilevelProblem",
    "BilevelSolver",
    "Bounds",
    "Box",
    "Budget",
    "ByStep",
    "Certificate",
    "Certifier",
    "Checkpointing",
    "Columns",
    "CompileWarning",
    "Compiled",
    "Constants",
    "ControlProblem",
    "ControlSolution",
    "ControlSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "Correlation",
    "Dense",
    "DivergenceError",
    "DotProductTest",
    "Dynamics",
    "Found",
    "GradientDescent",
    "HeavyBall",
    "HessianProduct",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientMethod",
    "Implicit",
    "InMemory",
    "InnerOptimizer",
    "Instance",
    "Iterate",
    "LinearResult",
    "LinearSolver",
    "Looped",
    "LostGradientError",
    "Map",
    "Measurement",
    "MethodCheck",
    "Minimiser",
    "Neumann",
    "Newton",
    "NewtonCG",
    "NormalCG",
    "NormalisedSigmoid",
    "Normaliser",
    "Nystrom",
    "OnDisk",
    "OnHost",
    "OneStep",
    "Operator",
    "PerStep",
    "Phases",
    "Progress",
    "Prox",
    "ProximalGradient",
    "Softmax",
    "Solution",
    "Sparsemax",
    "StorageError",
    "StructureError",
    "Swept",
    "Target",
    "TaskWeights",
    "TaylorTest",
    "Truncation",
    "Unrolled",
    "UnsupportedError",
    "Vmapped",
    "Warm",
    "adapt",
    "adjoint",
    "check_hypergradient",
    "dot_product_test",
    "functional",
    "hvp",
    "kkt",
    "lagrangian",
    "measure",
    "plan",
    "rollout",
    "taylor_test",
    "total_cost",
    "weighted_problem",
]
