"""The Riccati optimiser as `ControlSolver` runs it, and its answer as the records of this room."""

from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.adjoint import Adjoint, adjoint
from bilevel.control.lagrangian import KKT
from bilevel.control.riccati.constraints import NAMES
from bilevel.control.riccati.newton import (
    CONVERGED,
    NOWHERE,
    ROUNDED,
    RUNNING,
    SADDLE,
    STANDSTILL,
    STOPPED,
    UNBOUNDED_BELOW,
    Iterates,
)
from bilevel.control.riccati.settings import Riccati
from bilevel.control.riccati.solving import Laid, Solved, laid_out, solved
from bilevel.control.solution import BatchSolution, ConstraintReport, ControlSolution
from bilevel.dynamics.problem import ControlProblem
from bilevel.errors import ArgumentError, DivergenceError
from bilevel.outer.descent import Loop
from bilevel.outer.watching import OnFailure, Progress, carrying, progress_bar, report, told
from bilevel.tree import Tree


def converged(found: Solved) -> Tensor:
    """Which problems ended at a minimum, shape ``(B,)``."""
    status = found.iterates.status
    solved = (status == CONVERGED) | (status == ROUNDED)
    return solved if found.met is None else solved & ~found.met.infeasible


def lost(found: Solved) -> Tensor:
    """Which problems have no minimum, or no finite cost to begin with, shape ``(B,)``."""
    status = found.iterates.status
    return (status == UNBOUNDED_BELOW) | (status == NOWHERE)


def reason(found: Solved, i: int, tolerance: float) -> str:
    """How problem `i` ended, in words."""
    now = found.iterates
    if found.met is not None and bool(found.met.infeasible[i]):
        return (
            f"the constraints look infeasible: {found.met.values.worst(i)}, whatever the weight of "
            "violations."
        )
    t, norm = int(now.failed[i]), float(now.residual[i])
    place = "of what is shared" if t == 0 else f"of the control at t = {t}"
    tolerance *= float(now.scale[i])
    within = f"the gradient norm {norm:.3g} is within the tolerance {tolerance:.3g}"
    above = f"the gradient norm {norm:.3g} is above the tolerance {tolerance:.3g}"
    return {
        CONVERGED: f"{within}; the Hessian is positive definite.",
        ROUNDED: f"the gradient norm {norm:.3g} is what rounding leaves: no step lowers the cost.",
        SADDLE: f"{within}, but this stationary point is no minimum: the Hessian {place} is not "
        "positive definite; begin elsewhere.",
        STANDSTILL: f"{above}, and no step lowers the cost, with shift {float(now.shift[i]):.3g}.",
        UNBOUNDED_BELOW: "the problem looks unbounded below: no shift within the limit makes the "
        f"Hessian positive definite, or the cost falls without end (to {float(now.cost[i]):.3g}); "
        "give the control a cost, or bounds.",
        NOWHERE: f"the cost ({float(now.cost[i]):.3g}) or its gradient is not finite at the "
        "control to begin with: look for a root, a logarithm or a division at zero, or begin "
        "elsewhere.",
        STOPPED: "the callback ended it.",
        RUNNING: f"{above} after {int(now.steps[i])} updates: give it more steps.",
    }[int(now.status[i])]


def report_of(found: Solved) -> ConstraintReport | None:
    """How constraints are met, if there are any."""
    if found.met is None:
        return None
    duals = found.met.duals
    parts = [*(getattr(duals, name) for name in NAMES), found.met.values.violation(), duals.weight]
    return ConstraintReport(
        *parts if found.laid.controls.batch is not None else (x[0] for x in parts)
    )


def adjoint_of(found: Solved, observation: Tree) -> Adjoint:
    """Cost, gradient, states and multipliers where it ended; with a batch, of every problem."""
    final, stages, controls = found.final, found.laid.stages, found.laid.controls
    batched, n = controls.batch is not None, stages.n
    states, costates = final.where.states, final.costates[..., :n]
    nothing = [None] * len(stages.state.fixed)

    def trees(vectors: Tensor, fixed: list[Any]) -> list[Tree]:
        if batched:
            return [stages.state.trees(x, fixed) for x in vectors.unbind(1)]
        return [stages.state.tree(x, fixed) for x in vectors[0].unbind(0)]

    each = trees(states, stages.state.fixed)
    cost = final.cost if found.met is None else found.met.cost
    return Adjoint(
        cost=cost if batched else cost[0],
        gradient=controls.control(final.gradient, spread=True),
        observation_gradient=_in_observation(found, observation),
        final_state=each[-1],
        states=each,
        multipliers=trees(-costates, nothing),
        forward_steps=stages.problem.horizon * len(found.iterates.history),
    )


def _in_observation(found: Solved, observation: Tree) -> Tree:
    """grad_f J, (dg0/df)^* p_0."""
    where, stages = found.final.where, found.laid.stages
    f = autodiff.variables(observation)
    if not any(map(tree.is_variable, tree.leaves_of(f))):
        return tree.zeros_like(observation)
    with autodiff.recording():
        leaves = tree.leaves_of(f)
        first = stages.start(where.point.shared, where.problems, leaves)
        found_ = autodiff.pull(first, found.final.costates[:, 0, : stages.n], f)
    return tree.filled(found_, observation)


def kkt_of(found: Solved) -> KKT:
    """Residuals of the optimality conditions; with bounds, of what they leave free."""
    final = found.final
    return KKT(
        float(torch.linalg.vector_norm(final.defects)),
        float(torch.linalg.vector_norm(final.costate_defects)),
        float(torch.linalg.vector_norm(found.iterates.residual)),
    )


def by_riccati(
    settings: Riccati,
    problem: Any,
    control: Tree,
    observation: Tree,
    loop: Loop,
    on_failure: OnFailure,
) -> ControlSolution | BatchSolution:
    """What `ControlSolver.solve` is by the Riccati sweep, which moves all steps at once."""
    if not isinstance(problem, ControlProblem):
        raise ArgumentError(
            "Riccati solves one ControlProblem, or several with batched=True; for problems "
            "that come in batches take NewtonCG, for a function of parameters `optimum`."
        )
    if loop.keep is not None or loop.on_divergence != "raise":
        raise ArgumentError(
            "Riccati takes few iterations and keeps none of them: leave keep and on_divergence "
            "out; the control that it found is a start to go on from."
        )
    if loop.scheduler is not None or loop.project is not None:
        raise ArgumentError(
            "Riccati has no learning rate to schedule and projects by itself: leave scheduler "
            "and project out, and give it bounds=(low, high)."
        )
    laid = laid_out(settings, problem, observation, control)
    return iterated(settings, laid, observation, loop, on_failure)[1]


def iterated(
    settings: Riccati, laid: Laid, observation: Tree, loop: Loop, on_failure: OnFailure
) -> tuple[Solved, ControlSolution | BatchSolution]:
    """Newton's method, and what is to be said of where it ended."""
    seen: list[Iterates] = []
    with (
        carrying(lambda error: _so_far(laid, seen, told(error))),
        progress_bar(loop.steps, show=loop.progress) as advance,
    ):

        def watch(now: Iterates) -> bool:
            seen[:] = [now]
            cost, norm = float(now.cost.mean()), float(now.residual.amax())
            advance(f"cost {cost:.4g}, gradient {norm:.2g}")
            if loop.callback is None:
                return False
            there: Any = laid.controls.control(now.where.point)
            step = len(now.history) - 1
            chosen: Any = settings  # there is no torch optimiser
            return bool(loop.callback(Progress(step, cost, norm, there, chosen, now)))

        found = solved(laid, settings, loop.steps, loop.tolerance, watch)
        if found.final.suspects():
            # What nothing reads is refused as everywhere: a sweep of one problem tells.
            adjoint(laid.stages.problem, *laid.first)
    solution = _second_order(found, observation, loop.tolerance or found.tolerance)
    if isinstance(solution, ControlSolution) and bool(lost(found).any()):
        error = DivergenceError(solution.reason)
        error.progress = solution
        raise error
    if said := shortcoming(found, solution):
        with carrying(lambda _: solution):
            report(said, on_failure, level=5)
    return found, solution


def shortcoming(found: Solved, solution: ControlSolution | BatchSolution) -> str:
    """What to say where a problem did not converge; nothing if all did."""
    failed = (~converged(found)).nonzero().flatten().tolist()
    said = solution.reason
    if failed and isinstance(said, list):
        first = f"the first is problem {failed[0]}: {said[failed[0]]}"
        return f"{len(failed)} of {len(said)} problems did not converge; {first}"
    return str(said) if failed else ""


def _so_far(laid: Laid, seen: list[Iterates], ended: str) -> ControlSolution | BatchSolution:
    """The record of a run that something ended, after the last whole update."""
    point = seen[0].where.point if seen else laid.start.point
    control, size = laid.controls.control(point), laid.stages.size
    nothing = torch.full((size,), torch.nan, dtype=laid.stages.dtype, device=laid.stages.device)
    cost, norm = (seen[0].cost, seen[0].residual) if seen else (nothing, nothing)
    costs, norms, shifts = zip(*seen[0].history[:-1], strict=True) if seen else ((), (), ())
    steps = seen[0].steps if seen else torch.zeros(size, dtype=torch.long, device="cpu")
    if laid.controls.batch is not None:
        none = torch.zeros(size, dtype=torch.bool, device="cpu")
        said = size * [ended]
        before = [*costs], [*norms], steps, none, said
        return BatchSolution(control, cost, norm, *before, None, None, [*shifts], None)
    return ControlSolution(
        control,
        float(cost),
        float(norm),
        [float(x) for x in costs],
        [float(x) for x in norms],
        int(steps),
        converged=False,
        reason=ended,
        adjoint=None,
        kkt=None,
    )


def _second_order(
    found: Solved, observation: Tree, tolerance: float
) -> ControlSolution | BatchSolution:
    """The record of a run of the Riccati optimiser."""
    now, controls = found.iterates, found.laid.controls
    control, swept = controls.control(found.final.where.point), adjoint_of(found, observation)
    costs, norms, shifts = (list(x) for x in zip(*now.history, strict=True))
    ended = [reason(found, i, tolerance) for i in range(found.laid.stages.size)]
    if controls.batch is not None:
        return BatchSolution(
            control,
            swept.cost,
            now.residual,
            costs[:-1],
            norms[:-1],
            now.steps,
            converged(found),
            ended,
            swept,
            kkt_of(found),
            shifts[:-1],
            report_of(found),
        )
    return ControlSolution(
        control,
        float(swept.cost),
        float(now.residual),
        [float(x) for x in costs[:-1]],
        [float(x) for x in norms[:-1]],
        int(now.steps),
        bool(converged(found)),
        ended[0],
        swept,
        kkt_of(found),
        None,
        [float(x) for x in shifts[:-1]],
        report_of(found),
    )
