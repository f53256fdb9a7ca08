"""Dynamics, controls and costs: the control problem (1).

Read `dynamics`, `per_step`, `steps`, `problem`; then `compiled` and `modules`, two ways to a
step, and `closures`: modules that a step reaches without being given them.
"""

from bilevel.dynamics.compiled import Compiled
from bilevel.dynamics.dynamics import Dynamics, Map
from bilevel.dynamics.modules import ModuleFunction, Phases, functional
from bilevel.dynamics.per_step import PerStep
from bilevel.dynamics.problem import ControlProblem

__all__ = ["Compiled", "ControlProblem", "Dynamics", "Map", "ModuleFunction", "PerStep", "Phases"]
__all__ += ["functional"]
