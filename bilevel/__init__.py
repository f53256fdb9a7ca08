"""Bilevel optimisation and discrete optimal control by the Method of Lagrangian Multipliers.

The names here are the front door. What they are built of is in the packages: `optim`, `prox`,
`linear`, `errors`, `testing`, and records and base classes in `dynamics`, `sweeps`, `outer`,
`control`, `inner`, `methods`, `certificates`, `tasks`, `solver`.
"""

from bilevel import (
    certificates as certificates,
    control as control,
    dynamics as dynamics,
    errors as errors,
    implicit_function as implicit_function,
    inner as inner,
    linear as linear,
    methods as methods,
    optim as optim,
    outer as outer,
    parallel as parallel,
    prox as prox,
    settings as settings,
    solution as solution,
    solver as solver,
    sweeps as sweeps,
    tasks as tasks,
    testing as testing,
    tree as tree,
)
from bilevel.certificates import AgainstMinimiser, AgainstSteps
from bilevel.control import (
    ControlSolver,
    NewtonCG,
    Riccati,
    adjoint,
    hvp,
    kkt,
    lagrangian,
    rollout,
    total_cost,
)
from bilevel.dynamics import Compiled, ControlProblem, Dynamics, Map, PerStep, Phases, functional
from bilevel.errors import BilevelError, ConvergenceWarning
from bilevel.implicit_function import implicit
from bilevel.inner import BilevelProblem, Minibatches
from bilevel.methods import MLM, FirstOrder, Implicit, OneStep, Penalty, Unrolled
from bilevel.optim import Given
from bilevel.outer import Keep, Restore
from bilevel.parallel import Replicas
from bilevel.settings import ByStep
from bilevel.solver import BilevelSolver
from bilevel.sweeps import Budget, Checkpointing, InMemory, OnDisk, OnHost, plan
from bilevel.tasks import (
    Looped,
    Softmax,
    Sparsemax,
    TaskWeights,
    Vmapped,
    adapt,
    weighted_problem,
)
from bilevel.testing import check_hypergradient

__version__ = "0.1.0"

__all__ = ["MLM", "AgainstMinimiser", "AgainstSteps", "BilevelError", "BilevelProblem"]
__all__ += ["BilevelSolver", "Budget", "ByStep", "Checkpointing", "Compiled", "ControlProblem"]
__all__ += ["ControlSolver", "ConvergenceWarning", "Dynamics", "FirstOrder", "Given", "Implicit"]
__all__ += ["InMemory", "Keep", "Looped", "Map", "Minibatches", "NewtonCG", "OnDisk", "OnHost"]
__all__ += ["OneStep", "Penalty", "PerStep", "Phases", "Replicas", "Restore", "Riccati", "Softmax"]
__all__ += ["Sparsemax", "TaskWeights", "Unrolled", "Vmapped", "adapt", "adjoint"]
__all__ += ["check_hypergradient", "functional", "hvp", "implicit"]
__all__ += ["kkt", "lagrangian", "plan", "rollout", "total_cost", "weighted_problem"]
