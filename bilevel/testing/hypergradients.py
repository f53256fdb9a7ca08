"""All methods for a hypergradient against differences, and which one to take."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_range, check_whole
from bilevel.errors import BilevelError
from bilevel.linear.gmres import GMRES
from bilevel.methods.base import HypergradientMethod
from bilevel.methods.implicit import Implicit
from bilevel.methods.mlm import MLM
from bilevel.methods.one_step import OneStep
from bilevel.methods.unrolled import Unrolled
from bilevel.solver import BilevelSolver
from bilevel.sweeps.randomness import RandomState, devices_of, preserved
from bilevel.testing.vectors import difference_step, unit_like
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class MethodCheck:
    """One method on the problem at hand.

    Attributes:
        method: which.
        gradient: its hypergradient; None if it does not apply.
        error: of its slopes along the directions, relative to the finite differences.
        seconds: of one hypergradient, the second of two, without certificate.
        estimate: relative error against the exact inner minimiser, as the certificate estimates
            it; NaN without certificate.
        note: why it does not apply, or what the linear solver said.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=40)
        >>> found = check_hypergradient(solver, torch.tensor(0.0), torch.tensor(3.0))
        >>> row = next(one for one in found.rows if one.method == bl.MLM())
        >>> type(row.method).__name__, row.gradient, row.error < 1e-3
        ('MLM', tensor(4.), True)
    """

    method: HypergradientMethod
    gradient: Tree
    error: float
    seconds: float
    estimate: float
    note: str


@dataclass(frozen=True, eq=False)
class HypergradientCheck:
    """All methods against finite differences of the k-step value; prints as a table.

    Attributes:
        rows: one a method.
        difference_error: of the finite differences, relative: what doubling their step changes.
        recommendation: which method to take, and why.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.5), inner_steps=40)
        >>> found = check_hypergradient(solver, torch.tensor(0.0), torch.tensor(3.0))
        >>> found.recommendation.split()[0], str(found).splitlines()[0].split()[0]
        ('Take', 'method')
    """

    rows: tuple[MethodCheck, ...]
    difference_error: float
    recommendation: str

    def __str__(self) -> str:
        """The table."""
        lines = [
            f"{'method':10} {'error to differences':>21} {'seconds':>9} {'to exact minimiser':>19}"
        ]
        for row in self.rows:
            numbers = f"{row.error:21.1e} {row.seconds:9.3g} {row.estimate:19.1e}"
            if row.gradient is None:
                numbers = f"{'-':>21} {'-':>9} {'-':>19}"
            lines.append(f"{type(row.method).__name__:10} {numbers}  {row.note}".rstrip())
        lines.append(
            f"Differences are central, of the k-step value, and good to {self.difference_error:.1e}"
            "; the last column is the estimate of the certificate."
        )
        return "\n".join([*lines, self.recommendation])


CUT = (
    "they agree with each other, so a gradient is cut on the way. Look in the objectives and the "
    "steps for detach(), .data, .item(), float(), NumPy, no_grad(), torch.tensor([...]) of tensors "
    "or torch.autograd.grad without create_graph=True. What differs on purpose, as a "
    "straight-through estimate does, cannot be checked by differences."
)


def check_hypergradient(
    solver: BilevelSolver,
    params: Tree,
    control: Tree,
    inner_batch: Any = None,
    outer_batch: Any = None,
    *,
    methods: Sequence[HypergradientMethod] | None = None,
    n_directions: int = 3,
    step: float | None = None,
    seed: int = 0,
) -> HypergradientCheck:
    """Compare all methods with central finite differences on one's own problem.

    The differences are of the value after the solver's inner steps, so that `Unrolled` and `MLM`
    must agree with them; `Implicit` does as far as the inner iteration has converged. Objectives
    that draw, a dropout mask or a minibatch, draw the same in every evaluation.

    Args:
        solver: whose problem, optimiser and number of inner steps are used.
        params: where the inner iteration starts.
        control: the outer variable.
        inner_batch: as in `BilevelSolver.hypergradient`.
        outer_batch: as in `BilevelSolver.hypergradient`.
        methods: to compare; None takes all four and the solver's own.
        n_directions: random directions, each four solves.
        step: of the differences; None is the cube root of the rounding, times the size of the
            control.
        seed: of the directions.

    Returns:
        A table with errors and times, and a recommendation.

    Raises:
        ArgumentError: if `n_directions` or `step` is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 60)
        >>> point = torch.tensor(0.0, dtype=torch.float64)
        >>> bl.check_hypergradient(solver, point, point).recommendation[:13]
        'Take Implicit'
    """
    check_whole(n_directions, "n_directions", 1)
    if step is not None:
        check_range(step, "step", above=0)
    quiet = replace(solver, certificate=None, on_failure="ignore")
    control = tree.detach(control)
    generator = torch.Generator().manual_seed(seed)
    directions = [unit_like(control, generator) for _ in range(n_directions)]
    h = step or difference_step(control)

    batches = inner_batch, outer_batch
    devices = devices_of((params, control))
    start = RandomState.capture(devices)

    def value(direction: Tree, h: float) -> float:
        start.restore()
        return float(quiet.value(params, tree.moved(control, direction, -h), *batches))

    def slopes(h: float) -> Tensor:
        found = [(value(d, h) - value(d, -h)) / (2 * h) for d in directions]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    with preserved(devices):
        fine, coarse = slopes(h), slopes(2 * h)
        rows = [
            _row(replace(quiet, method=method), solver, params, control, batches, start)
            for method in (_all_methods(solver) if methods is None else methods)
        ]
    size = float(fine.norm()) or 1.0
    judged = []
    for row in rows:
        if row.gradient is not None:
            along = [float(tree.inner(row.gradient, d)) for d in directions]
            error = (
                float((torch.tensor(along, dtype=torch.float64, device="cpu") - fine).norm()) / size
            )
            row = replace(row, error=error)
        judged.append(row)
    own = float((fine - coarse).norm()) / size
    return HypergradientCheck(tuple(judged), own, _recommend(judged, own))


def _all_methods(solver: BilevelSolver) -> list[HypergradientMethod]:
    by_objective = solver.problem.residual is None
    implicit = Implicit() if solver.optimizer.symmetric and by_objective else Implicit(GMRES())
    reversible = solver.optimizer.reversible
    standard = {
        type(m): m for m in (Unrolled(), MLM(), implicit, OneStep()) if reversible or not m.steps
    }
    return list({**standard, type(solver.method): solver.method}.values())


def _row(
    quiet: BilevelSolver,
    solver: BilevelSolver,
    params: Tree,
    control: Tree,
    batches: tuple[Any, Any],
    start: RandomState,
) -> MethodCheck:
    try:
        quiet.hypergradient(params, control, *batches)
        start.restore()
        begun = time.perf_counter()
        found = quiet.hypergradient(params, control, *batches)
        seconds = time.perf_counter() - begun
    except BilevelError as error:
        return MethodCheck(quiet.method, None, math.nan, math.nan, math.nan, str(error))
    estimate = math.nan
    if solver.certificate is not None:
        judged = replace(quiet, certificate=solver.certificate)
        start.restore()
        certificate = judged.hypergradient(params, control, *batches).certificate
        estimate = math.nan if certificate is None else certificate.error_estimate
    return MethodCheck(
        quiet.method, found.gradient, math.nan, seconds, estimate, found.complaint or ""
    )


def _recommend(rows: Sequence[MethodCheck], difference_error: float) -> str:
    by = {type(row.method): row for row in rows if row.gradient is not None}
    if not difference_error <= 0.1:
        return (
            "The differences do not settle, so no method can be judged by them: the objectives are "
            "not smooth here, not deterministic, or computed in too low a precision, or the "
            "hypergradient is zero. Try float64, another step=, or another point."
        )
    allowed = max(10 * difference_error, 1e-6)
    for kind in (Unrolled, MLM):
        if kind in by and not by[kind].error <= allowed:
            differs = f"{kind.__name__} differs from the differences by {by[kind].error:.1e}: "
            if difference_error <= 1e-2 < by[kind].error:
                return differs + CUT
            return differs + (
                "the objectives are not smooth here, not deterministic, or computed in too low a "
                "precision. Try float64, another step=, or another point, before any method."
            )
    implicit = by.get(Implicit)
    if implicit is not None and not implicit.note and implicit.error <= max(1e-2, allowed):
        return (
            f"Take Implicit: it agrees to {implicit.error:.1e}, so the inner iteration has "
            "converged, and it keeps no trajectory."
        )
    why = "does not apply" if implicit is None else f"is {implicit.error:.0%} off"
    return (
        f"Take MLM, exact for these inner steps in the memory you choose: Implicit {why}. If you "
        "want the hypergradient at the exact inner minimiser, make more inner steps and look again."
    )
