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
    adjoint,
    hvp,
    kkt,
    lagrangian,
    rollout,
    total_cost,
)
from bilevel.dynamics import Compiled, ControlProblem, Dynamics, Map, PerStep, Phases, functional
from bilevel.errors import BilevelError, ConvergenceWarning
from bilevel.inner import BilevelProblem, Minibatches
from bilevel.methods import MLM, FirstOrder, Implicit, OneStep, Penalty, Unrolled
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
__all__ += ["ControlSolver", "ConvergenceWarning", "Dynamics", "FirstOrder", "Implicit", "InMemory"]
__all__ += ["Keep", "Looped", "Map", "Minibatches", "NewtonCG", "OnDisk", "OnHost", "OneStep"]
__all__ += ["Penalty", "PerStep", "Phases", "Replicas", "Restore", "Softmax", "Sparsemax"]
__all__ += ["TaskWeights", "Unrolled", "Vmapped", "adapt", "adjoint", "check_hypergradient"]
__all__ += ["functional", "hvp", "kkt", "lagrangian", "plan", "rollout", "total_cost"]
__all__ += ["weighted_problem"]
