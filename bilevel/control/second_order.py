"""The Riccati optimiser as `ControlSolver` runs it, and its answer as the records of this room."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.adjoint import Adjoint
from bilevel.control.lagrangian import KKT
from bilevel.control.riccati.constraints import NAMES
from bilevel.control.riccati.newton import (
    CONVERGED,
    ROUNDED,
    RUNNING,
    SADDLE,
    STANDSTILL,
    STOPPED,
    UNBOUNDED_BELOW,
)
from bilevel.control.riccati.solving import Solved
from bilevel.records import Record
from bilevel.tree import Tree


def converged(found: Solved) -> Tensor:
    """Which problems ended at a minimum, shape ``(B,)``."""
    status = found.iterates.status
    solved = (status == CONVERGED) | (status == ROUNDED)
    return solved if found.met is None else solved & ~found.met.infeasible


def unbounded(found: Solved) -> Tensor:
    """Which problems have no minimum, shape ``(B,)``."""
    return found.iterates.status == UNBOUNDED_BELOW


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
        STOPPED: "the callback ended it.",
        RUNNING: f"{above} after {int(now.steps[i])} updates: give it more steps.",
    }[int(now.status[i])]


@dataclass(frozen=True, eq=False, repr=False)
class ConstraintReport(Record):
    """How constraints are met; with a batch, with a leading axis.

    At a solution the derivative of J and the multipliers times the constraints vanishes. A
    multiplier says by how much J falls if its constraint is loosened by one.

    Attributes:
        inequality: multipliers, shape ``(T, k)``, not negative.
        equality: multipliers, ``(T, k)``.
        end_inequality: multipliers, ``(k,)``.
        end_equality: multipliers, ``(k,)``.
        violation: the largest.
        weight: of squared violations, at the end.
    """

    inequality: Tensor
    equality: Tensor
    end_inequality: Tensor
    end_equality: Tensor
    violation: Tensor
    weight: Tensor


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
