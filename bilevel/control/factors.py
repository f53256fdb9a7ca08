"""Where Newton's method ended, as a point of its conditions, with the factors for derivatives."""

import torch
from torch import Tensor

from bilevel import autodiff
from bilevel.control.conditions import Multipliers, Optimal
from bilevel.control.riccati.constraints import NAMES, Duals
from bilevel.control.riccati.linearisation import Hessians, Linearisation
from bilevel.control.riccati.solving import Solved
from bilevel.control.riccati.sweep import Gains, Model, backward, model_of
from bilevel.control.sensitivity import Factors, Jacobian
from bilevel.errors import ConvergenceError, UnsupportedError

MOST_ACTIVE = 2000  # constraints, whose matrix is dense
HEAVIER = 10  # times that the weight of violations is tried, each time ten times as large


def factors_of(found: Solved, weight: float, which: int) -> tuple[Optimal, Factors, list[str]]:
    """The optimum that was found, and the inverse of the derivative of its conditions.

    Args:
        found: by Newton's method.
        weight: of squared violations to begin with.
        which: number of this evaluation.

    Returns:
        The point, the factors there, and what makes derivatives those of one side alone.

    Raises:
        ConvergenceError: if the optimum is no strict minimum.
        UnsupportedError: if too many constraints are active.
    """
    with autodiff.paused():
        derivatives = None if found.met is None else _derivatives(found)
        mu, active, weak = _active(found, derivatives)
        final, model, gains, weight = _convex(found, mu, active, weight)
        jacobian = None if derivatives is None else Jacobian(*derivatives, active)
        if jacobian is not None and jacobian.active.shape[1] > MOST_ACTIVE:
            raise UnsupportedError(
                f"optimum forms a matrix of the active constraints, of which there are "
                f"{jacobian.active.shape[1]} here, where at most {MOST_ACTIVE} are taken: take "
                "bounds= for those of one number of the control, or a shorter horizon."
            )
        factors = Factors(model, gains, jacobian, weight)
        where, n = final.where, found.laid.stages.n
        own, shared = where.point.own, where.point.shared
        every = torch.ones_like(own, dtype=torch.bool), torch.ones_like(shared, dtype=torch.bool)
        free = (
            every[0] if gains.free is None else gains.free,
            every[1] if gains.shared_free is None else gains.shared_free,
        )
    complaints = []
    if said := weak or _weak_bound(found, final):
        complaints.append(
            f"{said} is weakly active: it holds, and its multiplier is zero. The optimum has a "
            "derivative to each side there; the one of its not being active is taken."
        )
    if factors.dependent is not None and jacobian is not None:
        i, row = factors.dependent
        complaints.append(
            f"the active constraints{_of(found, i)} depend on each other, or on no control: among "
            f"them {_named(found, *jacobian.place(row))}. Their multipliers are not unique, and "
            "derivatives are right only along changes that keep all of them; leave one out."
        )
    point = Optimal(
        own.clone(),
        shared.clone(),
        where.states.clone(),
        final.costates[..., :n].clone(),
        mu,
        (final.cost if found.met is None else found.met.cost).clone(),
        free,
        active,
        torch.tensor(which, device="cpu"),
    )
    return point, factors, complaints


def _of(found: Solved, i: int) -> str:
    return f" of problem {i}" if found.laid.stages.size > 1 else ""


def _named(found: Solved, t: int, row: int) -> str:
    """A constraint, of those of a step or (t = 0) of the end, inequalities first."""
    assert found.met is not None
    values = found.met.values
    first = (values.end_inequality if t == 0 else values.inequality).shape[-1]
    name = "inequality" if row < first else "equality"
    row = row if row < first else row - first
    return f"{name}[{row}] at t = {t}" if t else f"end_{name}[{row}]"


def _active(
    found: Solved, derivatives: tuple[Tensor, Tensor] | None
) -> tuple[Multipliers, Multipliers, str]:
    """Multipliers, which constraints are active, and a name if one is so weakly."""
    met, stages = found.met, found.laid.stages
    if met is None or derivatives is None:
        b, horizon = found.final.where.point.own.shape[:2]
        none = torch.zeros(b, horizon, 0, dtype=stages.dtype, device=stages.device)
        nothing = Multipliers(none, none, none[:, 0], none[:, 0]) if horizon else _empty(none)
        return nothing, Multipliers(*(x.bool() for x in nothing)), ""
    every = torch.ones(stages.size, dtype=torch.bool, device=stages.device)
    now = met.values.updated(met.duals, every, ~every)
    near = 10 * torch.finfo(stages.dtype).eps ** 0.5
    largest = torch.stack([getattr(now, name).flatten(1).abs().sum(1) for name in NAMES]).sum(0)
    # One that nothing moves, as a row that is there to fill a shape, holds or does not for ever.
    moves = [(x != 0).any(x.ndim - 1) for x in derivatives]
    mus, active, weak = [], [], ""
    for name in NAMES:
        mu, c = getattr(now, name), getattr(met.values, name)
        is_active = torch.ones_like(mu, dtype=torch.bool)
        if name.endswith("inequality"):
            least = near * (1 + largest).view(-1, *[1] * (mu.ndim - 1))
            is_active = mu > least
            first = moves[name.startswith("end")][..., : c.shape[-1]]
            both = (~is_active & (c > -near) & first).nonzero().tolist()
            if both and not weak:
                i, *at = both[0]
                place = _named(found, at[0] + 1 if len(at) > 1 else 0, at[-1])
                weak = f"the constraint {place}{_of(found, i)}"
        mus.append(torch.where(is_active, mu, 0.0))
        active.append(is_active)
    return Multipliers(*mus), Multipliers(*active), weak


def _empty(none: Tensor) -> Multipliers:
    last = none.new_zeros(len(none), 0)
    return Multipliers(none, none, last, last)


def _convex(
    found: Solved, mu: Multipliers, active: Multipliers, weight: float
) -> tuple[Linearisation, Model, Gains, float]:
    """The sweep at the optimum, with a weight of violations that makes it convex."""
    laid, final = found.laid, found.final
    bad: list[int] = []
    for k in range(1 if found.met is None else HEAVIER):
        rho = weight * 10.0**k
        if found.met is None:
            second = final.hessians(gauss_newton=False)
        else:
            final, second = _augmented(found, mu, active, rho)
        model = model_of(final, second, laid.limits and laid.limits.around(final.where))
        gains = backward(model, torch.zeros_like(final.cost))
        bad = _flat(model, gains)
        if not bad:
            return final, model, gains, rho
    raise ConvergenceError(
        f"the optimum{_of(found, bad[0])} has no derivative: its Hessian is not positive definite, "
        "so that it is no minimum, or not the only one near; give the control a cost of its own, "
        "or begin elsewhere."
    )


def _augmented(
    found: Solved, mu: Multipliers, active: Multipliers, rho: float
) -> tuple[Linearisation, Hessians]:
    """The linearisation of the augmented Lagrangian of what is active."""
    stages = found.laid.stages
    assert found.met is not None
    # A negative multiplier switches off what is not active.
    off = Multipliers(
        *(torch.where(is_active, x, -1.0) for x, is_active in zip(mu, active, strict=True))
    )
    weight = torch.full_like(found.met.duals.weight, rho)
    before, stages.duals = stages.duals, Duals(*off, weight)
    final = Linearisation(stages, found.final.where)
    second = final.hessians(gauss_newton=False)
    stages.duals = before
    return final, second


def _flat(model: Model, gains: Gains) -> list[int]:
    """Problems whose optimum is no strict minimum: its derivative would be rounding, or nothing."""
    flat = 100 * torch.finfo(model.terminal.dtype).eps * model.scale()
    pivots = [
        factor.diagonal(dim1=-2, dim2=-1).square().flatten(1)
        for factor in (gains.factors, gains.shared_factor)
    ]
    least = torch.cat([flat.unsqueeze(1) * 2, *pivots], 1).amin(1)
    return ((gains.failed >= 0) | (least <= flat)).nonzero().flatten().tolist()


def _weak_bound(found: Solved, final: Linearisation) -> str:
    """A number of the control that a bound holds without force, if there is one."""
    limits = found.laid.limits
    if limits is None:
        return ""
    near = 10 * torch.finfo(final.cost.dtype).eps ** 0.5
    low, high, low_shared, high_shared = limits.around(final.where)
    point, gradient = final.where.point, final.gradient
    sizes = [x.abs().flatten(1).sum(1) for x in (gradient.own, gradient.shared)]
    least = near * (1 + sizes[0] + sizes[1])
    parts = (
        (low, high, point.own, gradient.own, least.view(-1, 1, 1)),
        (low_shared, high_shared, point.shared, gradient.shared, least.view(-1, 1)),
    )
    for a, b, x, slope, smallest in parts:
        at = torch.minimum(-a, b) <= near * (1 + x.abs())
        weak = (at & (slope.abs() <= smallest) & (b > a)).nonzero().tolist()
        if weak:
            i, *place = weak[0]
            which = (
                f"number {place[1]} at t = {place[0] + 1}" if len(place) > 1 else "what is shared"
            )
            return f"a bound of the control, {which}{_of(found, i)},"
    return ""


def _derivatives(found: Solved) -> tuple[Tensor, Tensor]:
    """Of the constraints of steps in (u, w, theta), and of those of the end in (u(T), w)."""
    stages, where = found.laid.stages, found.final.where
    own, shared = where.point.own, where.point.shared
    b, horizon, m = own.shape
    w = shared.unsqueeze(1).expand(-1, horizon, -1)
    z, end = autodiff.variables(
        (
            torch.cat([where.states[:, :-1], w, own], 2).flatten(0, 1),
            torch.cat([where.states[:, -1], shared], 1),
        )
    )
    sizes = [stages.n, shared.shape[1], m]
    with autodiff.recording():
        parts = z.unflatten(0, (b, horizon)).split(sizes, 2)
        values = stages.constrained(parts, end, own, where.problems)
        steps = torch.cat([values.inequality, values.equality], 2).flatten(0, 1)
        last = torch.cat([values.end_inequality, values.end_equality], 1)
        of_steps = autodiff.rows(steps, z, keep=True).unflatten(0, (b, horizon))
        of_end = autodiff.rows(last, end, keep=True)
    return of_steps, of_end
