"""The settings of the Riccati optimiser."""

from dataclasses import dataclass
from typing import Any, final

from bilevel.checks import check_kind, check_range, check_whole
from bilevel.control.riccati.constraints import Constraints
from bilevel.errors import ArgumentError


@final
@dataclass(frozen=True)
class Riccati:
    """Newton's method by the Riccati sweep: all second derivatives in one pass over the steps.

    An iteration linearises every step at once, sweeps (P_t, s_t) backwards in O(T (n + m)^3), and
    rolls out the nonlinear dynamics under the feedback that the sweep finds (differential dynamic
    programming), with several step lengths at once where the full step is too long. A
    linear-quadratic problem takes one iteration. Where the Hessian of a step's control is not
    positive definite, a shift is added, that grows until it is and shrinks afterwards. A point
    whose gradient vanishes is called converged only if it is a minimum.

    It is for states and controls of up to some hundreds of numbers a step; beyond, `NewtonCG` needs
    no matrix. A control shared by all steps counts as a part of the state.

    Attributes:
        gauss_newton: leave the second derivatives of the dynamics out: more iterations, each
            cheaper, and fewer shifts.
        bounds: (low, high) of the control, kept by projected Newton steps. Each is a number for
            every step's control, a tree like it, or a `PerStep`; None is no bound. A start outside
            is moved to the bound.
        constraints: what a solution must meet besides; their multipliers and the violation are in
            the solution.
        batched: every leaf of observation and control has a leading axis, one entry a problem;
            functions are still written for one. Each has its own shift, step length and end.
        decrease: share of the predicted decrease that a step must reach (Armijo), in (0, 1/2).
        lengths: step lengths 1/2, 1/4, ... that are tried at once.
        tolerance: for the norm of the gradient where `solve` is given none; None is 1e-9 in
            float64 and 1e-4 in float32, times the terms that cancel in it where these are below 1,
            or what rounding leaves.
        largest: numbers of a state, or of a step's control, that are taken at most.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda state, control, t: state + control),
        ...     terminal=lambda state, control: state**2 / 2,
        ...     running=lambda state, control, t: control**2 / 2,
        ...     horizon=3,
        ... )
        >>> start = bl.PerStep.unstack(torch.zeros(3))
        >>> found = bl.ControlSolver(problem, bl.Riccati()).solve(start, torch.tensor(4.0))
        >>> found.steps, [round(float(x), 5) for x in found.control.steps]
        (1, [-1.0, -1.0, -1.0])
    """

    gauss_newton: bool = False
    bounds: Any = None
    constraints: Constraints | None = None
    batched: bool = False
    decrease: float = 1e-4
    lengths: int = 10
    tolerance: float | None = None
    largest: int = 400

    def __post_init__(self) -> None:
        check_kind(self.gauss_newton, bool, "gauss_newton", "True or False")
        check_kind(self.batched, bool, "batched", "True or False")
        wanted = "Constraints(inequality=..., ...) of bilevel.control, or None"
        check_kind(self.constraints, Constraints | None, "constraints", wanted)
        check_range(self.decrease, "decrease", above=0, below=0.5)
        check_whole(self.lengths, "lengths", 1)
        check_whole(self.largest, "largest", 1)
        if self.tolerance is not None:
            check_range(self.tolerance, "tolerance", above=0)
        pair = isinstance(self.bounds, tuple | list) and len(self.bounds) == 2
        if self.bounds is not None and not pair:
            raise ArgumentError(f"bounds must be a pair (low, high), got {self.bounds!r}.")
