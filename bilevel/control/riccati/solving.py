"""A control problem, checked and laid out, and Newton's method run on it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.riccati.bounds import Limits, limits_of
from bilevel.control.riccati.constraints import (
    NAMES,
    Constraints,
    Duals,
    Values,
    check_constraint,
)
from bilevel.control.riccati.controls import Controls
from bilevel.control.riccati.linearisation import Linearisation, Swept
from bilevel.control.riccati.newton import (
    CONVERGED,
    ROUNDED,
    STANDSTILL,
    Iterates,
    Newton,
    Rules,
    Watch,
)
from bilevel.control.riccati.settings import Riccati
from bilevel.control.riccati.stages import Plan, Stages
from bilevel.dynamics.compiled import plain
from bilevel.dynamics.per_step import check_control, step_control
from bilevel.dynamics.problem import ControlProblem
from bilevel.dynamics.steps import walk
from bilevel.errors import DivergenceError, StructureError, UnsupportedError
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Laid:
    """A problem in numbers.

    Attributes:
        controls: the layout of the control.
        stages: the functions of the problem.
        limits: of the control; None without bounds.
        start: the control to begin with, and where it leads.
        first: observation and control of the first problem.
    """

    controls: Controls
    stages: Stages
    limits: Limits | None
    start: Swept
    first: tuple[Tree, Tree]


@dataclass(frozen=True, eq=False)
class Met:
    """How constraints were met.

    Attributes:
        duals: their multipliers.
        values: what they are.
        infeasible: problems for which no weight was enough, ``(B,)``.
        cost: J, without what the augmented Lagrangian adds, ``(B,)``.
    """

    duals: Duals
    values: Values
    infeasible: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class Solved:
    """What Newton's method came to.

    Attributes:
        laid: the problem.
        iterates: where each problem ended.
        final: the linearisation there, of all problems.
        tolerance: that the norm of the gradient was compared with.
        met: how constraints were met, if there are any.
    """

    laid: Laid
    iterates: Iterates
    final: Linearisation
    tolerance: float
    met: Met | None = None


def laid_out(settings: Riccati, problem: ControlProblem, observation: Tree, control: Tree) -> Laid:
    """Check a problem, lay it out, and roll its start out.

    Args:
        settings: bounds, and whether there is a batch.
        problem: of one member of the batch.
        observation: f.
        control: to begin with.

    Returns:
        The problem in numbers.

    Raises:
        StructureError: if trees, shapes or the batch do not fit.
        UnsupportedError: if it is too large, or draws at random.
        DivergenceError: if a state is not finite.
    """
    observation = tree.detach(observation)
    check_control(control, problem.horizon)
    batch = _batch(observation, control) if settings.batched else None
    controls = Controls(control, problem.horizon, batch)
    first = (observation, control) if batch is None else _first(observation, control)
    states = _walked(problem, *first)
    stages = Stages(problem, observation, controls, states[0], settings.constraints)
    _check_size(settings, stages)
    if settings.constraints is not None:
        _check_constraints(settings.constraints, problem, states, first[1])
    limits = None if settings.bounds is None else limits_of(settings.bounds, control, controls)
    point = controls.point(control)
    point = type(point)(point.own.to(stages.dtype), point.shared.to(stages.dtype))
    if limits is not None:
        point = limits.projected(point)
    problems = torch.arange(stages.size, device=stages.device)
    with autodiff.paused():
        if batch is None and limits is None:
            own = point.own
            rolled = torch.stack([stages.state.vector(u) for u in states]).unsqueeze(0)
        else:
            begun = stages.start(point.shared, problems)
            rolled, own = stages.rollout(begun, Plan(point.own, point.shared), problems)
    _check_states(rolled, stages.size)
    start = Swept(problems, type(point)(own.clone(), point.shared.clone()), rolled.clone())
    return Laid(controls, stages, limits, start, first)


def stages_of(
    problem: ControlProblem, observation: Tree, laid: Laid, constraints: Constraints | None
) -> Stages:
    """The functions of another problem of the same layout."""
    n, stages = laid.stages.n, laid.stages
    example = stages.state.tree(laid.start.states.new_zeros(n), stages.state.fixed)
    return Stages(problem, observation, laid.controls, example, constraints)


def solved(laid: Laid, settings: Riccati, steps: int, tolerance: float, watch: Watch) -> Solved:
    """Newton's method on a problem.

    Args:
        laid: the problem.
        settings: how to go.
        steps: iterations at most.
        tolerance: for the norm of the gradient; 0 for that of the settings.
        watch: called after each iteration; True ends it.

    Returns:
        Where it came to.
    """
    asked = tolerance or settings.tolerance
    usual = 1e-9 if laid.stages.dtype == torch.float64 else 1e-4
    rules = Rules(
        settings.gauss_newton,
        settings.decrease,
        settings.lengths,
        steps,
        torch.full_like(laid.start.states[:, 0].sum(1), asked or usual),
        rounding=not asked,
        relative=not asked,
    )
    if settings.constraints is not None:
        return constrained(laid, settings.constraints, rules, asked or usual, watch)
    newton = Newton(laid.stages, rules, laid.limits, laid.start)
    iterates = newton.run(watch)
    final = newton.point
    if len(final.where.problems) < laid.stages.size:
        final = Linearisation(laid.stages, iterates.where)
    return Solved(laid, iterates, final, asked or usual)


def constrained(
    laid: Laid, constraints: Constraints, rules: Rules, target: float, watch: Watch
) -> Solved:
    """The method of multipliers, Newton's method for each estimate of them."""
    stages, start = laid.stages, laid.start
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    values = _values(stages, start)
    weight = torch.full_like(rules.tolerance, constraints.weight)
    begun: list[Any] = [*(torch.zeros_like(getattr(values, name)) for name in NAMES), weight]
    duals = Duals(*begun)
    before = torch.full_like(weight, torch.inf)
    infeasible = over = torch.zeros_like(weight, dtype=torch.bool)
    status = torch.zeros_like(weight, dtype=torch.long)
    updates = torch.zeros(stages.size, dtype=torch.long, device=stages.device)
    eps = torch.finfo(stages.dtype).eps
    tolerance, enough = max(constraints.tolerance, 1e3 * eps), max(constraints.tolerance, eps**0.5)
    rules = replace(rules, rounding=True)  # that of a weight of its own is no fault
    while True:
        stages.duals = duals
        # The first estimates of the multipliers are not worth an exact solution.
        enough_now = (before / 10).clamp(max=1e-2).clamp(min=target)
        enough_now = torch.where(before <= enough, target, enough_now)
        # A problem that is given up stays where it is while others go on.
        enough_now = torch.where(over, torch.inf, enough_now)
        newton = Newton(stages, replace(rules, tolerance=enough_now), laid.limits, start)
        now = newton.run(watch)
        now.status = torch.where(over, status, now.status)
        start, updates = now.where, updates + now.steps
        history += now.history[:-1]
        values = _values(stages, start)
        unmet = values.unmet(duals)
        fine = (now.status == CONVERGED) | (now.status == ROUNDED)
        # Where rounding ends the convergence of the multipliers, they are as good as they get.
        near = (unmet <= enough) & (unmet > before / 2)
        heavy = duals.weight / constraints.weight
        lost = fine & (heavy >= HEAVIEST)
        lost |= (now.status == STANDSTILL) & (heavy >= HEAVIEST**0.5)
        infeasible = infeasible | (lost & (unmet > enough))
        # What Newton's method did not solve is not made better by other multipliers.
        over, status = ~fine | infeasible, now.status
        left = ~over & (unmet > tolerance) & ~near & (heavy < HEAVIEST)
        rough = ~over & ~left & (enough_now > target)
        if not bool((left | rough).any()):
            break
        duals = values.updated(duals, left, unmet > before / 4)
        before = torch.where(left, unmet, torch.where(rough, 0.0, before))
    final = Linearisation(stages, start)
    now.history[:-1] = history
    now.steps = updates
    met = Met(duals, values, infeasible, _plain(stages, start))
    return Solved(laid, now, final, target, met)


HEAVIEST = 1e8  # weight of a violation, of the first one


def _values(stages: Stages, where: Swept) -> Values:
    with autodiff.paused():
        return stages.constrained(*_parts(where), where.point.own, where.problems)


def _plain(stages: Stages, where: Swept) -> Tensor:
    """J without what the augmented Lagrangian adds."""
    duals, stages.duals = stages.duals, None
    with autodiff.paused():
        parts, end = _parts(where)
        _, running = stages.steps(parts, where.problems)
        n = stages.n
        last = stages.terminal(end[:, :n], end[:, n:], where.point.own, where.problems)
    stages.duals = duals
    return running.sum(1) + last


def _parts(where: Swept) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    own, shared = where.point.own, where.point.shared
    w = shared.unsqueeze(1).expand(-1, own.shape[1], -1)
    return (where.states[:, :-1], w, own), torch.cat([where.states[:, -1], shared], 1)


def _check_constraints(
    constraints: Constraints, problem: ControlProblem, states: list[Tree], control: Tree
) -> None:
    """Refuse constraints that return no real tensor, or another shape at another t."""
    readout = problem.dynamics.readout
    control = tree.detach(control)
    for name in NAMES[:2]:
        function, shape = getattr(constraints, name), None
        if function is None:
            continue
        for t in range(1, problem.horizon + 1):
            value = function(readout(states[t - 1]), step_control(control, t), t)
            shape = check_constraint(value, f"{name} at t = {t}", shape)
    for name in NAMES[2:]:
        function = getattr(constraints, name)
        if function is not None:
            check_constraint(function(readout(states[-1]), control), name)


def _batch(observation: Tree, control: Tree) -> int:
    """How many problems there are."""
    leaves = [x for x in tree.leaves_of(observation) if isinstance(x, Tensor)]
    leaves = leaves or [x for x in tree.leaves_of(control) if isinstance(x, Tensor)]
    lengths = {x.shape[0] if x.ndim else None for x in leaves}
    if len(lengths) != 1 or None in lengths or lengths == {0}:
        raise StructureError(
            "batched=True: every leaf of the observation must have the same leading axis, one "
            f"entry a problem, got lengths {sorted(lengths, key=str)}."
        )
    return lengths.pop() or 0


def _first(observation: Tree, control: Tree) -> tuple[Tree, Tree]:
    return tree.map_leaves(
        lambda x: x[0] if isinstance(x, Tensor) and x.ndim else x, (observation, control)
    )


def _walked(problem: ControlProblem, observation: Tree, control: Tree) -> list[Tree]:
    """The states of one problem, with every check that a sweep makes."""
    random = torch.get_rng_state()
    with autodiff.paused():
        states = list(
            walk(plain(problem.dynamics), observation, tree.detach(control), problem.horizon)
        )
        _try_costs(problem, states, control)
    if not torch.equal(random, torch.get_rng_state()):
        torch.set_rng_state(random)
        raise UnsupportedError(
            "Riccati needs steps and costs that draw nothing at random: a shorter step could not "
            "be told from another draw. Draw before, and keep what was drawn in the dynamics; or "
            "take NewtonCG."
        )
    # Steps were found to return states of one structure.
    constants = [_tensors(state) for state in states] if _tensors(states[0]) else []
    for t, now in enumerate(constants):
        if not all(map(torch.equal, now, constants[0])):
            raise UnsupportedError(
                f"Riccati needs integer and boolean leaves of a state to stay as they are, got "
                f"others at t = {t}: steps are given t to count with; or take NewtonCG."
            )
    return states


def _try_costs(problem: ControlProblem, states: list[Tree], control: Tree) -> None:
    """Costs are called once, as a user would: what is wrong with them is said as everywhere."""
    problem.final_cost(states[-1], control)
    if problem.horizon:
        problem.step_costs(states[0], step_control(control, 1), 1)


def _tensors(state: Tree) -> list[Any]:
    leaves = tree.leaves_of(state)
    return [x for x in leaves if isinstance(x, Tensor) and not tree.is_variable(x)]


def _check_size(settings: Riccati, stages: Stages) -> None:
    n, m = stages.n + stages.controls.q, stages.controls.m
    if max(n, m) > settings.largest:
        raise UnsupportedError(
            f"Riccati keeps matrices of the size of a state, shared controls with it, and of a "
            f"step's control: {n} and {m} numbers here, where at most {settings.largest} are taken "
            "(its setting `largest`). NewtonCG finds the same with Hessian products."
        )


def _check_states(states: Tensor, size: int) -> None:
    if bool(torch.isfinite(states.sum())) or bool(torch.isfinite(states).all()):
        return
    i, t = (~torch.isfinite(states)).any(2).nonzero()[0].tolist()
    problem = f" of problem {i}" if size > 1 else ""
    raise DivergenceError(
        f"u({t}){problem} is the first state that is not finite under the control to begin with: "
        "begin with another one."
    )
