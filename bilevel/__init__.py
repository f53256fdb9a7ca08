"""Bilevel optimisation and discrete optimal control by the Method of Lagrangian Multipliers."""

from bilevel.certificates.against_minimiser import Newton
from bilevel.certificates.certificate import (
    Certificate,
    Certifier,
    Constants,
    Iterate,
    Minimiser,
    Target,
)
from bilevel.control.kkt import KKT, kkt
from bilevel.control.lagrangian import Adjoint, Swept, adjoint, lagrangian
from bilevel.control.newton_cg import NewtonCG
from bilevel.control.rollout import rollout, total_cost
from bilevel.control.solver import ControlSolution, ControlSolver
from bilevel.control.tangent import HessianProduct, hvp
from bilevel.dynamics.compiled import Compiled
from bilevel.dynamics.dynamics import Dynamics, Map, PerStep
from bilevel.dynamics.modules import Phases, functional
from bilevel.dynamics.problem import ControlProblem
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
from bilevel.inner.problem import BilevelProblem, ByStep
from bilevel.linear.cg import CG
from bilevel.linear.direct import Dense, Nystrom
from bilevel.linear.gmres import GMRES
from bilevel.linear.neumann import Neumann
from bilevel.linear.normal_cg import NormalCG
from bilevel.linear.operator import LinearResult, LinearSolver, Operator
from bilevel.methods.base import Found, HypergradientMethod, Instance, Truncation, Warm
from bilevel.methods.implicit import Implicit
from bilevel.methods.mlm import MLM, Bounds
from bilevel.methods.one_step import OneStep
from bilevel.methods.unrolled import Unrolled
from bilevel.optim.rules import Adam, GradientDescent, HeavyBall, InnerOptimizer, ProximalGradient
from bilevel.outer.descent import Progress
from bilevel.prox.operators import L1, L2, Box, Prox
from bilevel.solution import Hypergradient, Solution
from bilevel.solver import BilevelSolver
from bilevel.sweeps.checkpointing import Budget, Checkpointing, plan
from bilevel.sweeps.storage import InMemory, OnDisk, OnHost
from bilevel.sweeps.sweep import Measurement, measure
from bilevel.tasks.adaptation import adapt
from bilevel.tasks.correlation import Correlation
from bilevel.tasks.normalisers import NormalisedSigmoid, Normaliser, Softmax, Sparsemax
from bilevel.tasks.problem import Columns, Looped, Vmapped, weighted_problem
from bilevel.tasks.weights import TaskWeights
from bilevel.testing import (
    DotProductTest,
    HypergradientCheck,
    MethodCheck,
    TaylorTest,
    check_hypergradient,
    dot_product_test,
    taylor_test,
)

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
