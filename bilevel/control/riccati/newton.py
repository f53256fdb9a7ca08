"""Newton's method on the Riccati sweep, for many problems side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bilevel import autodiff
from bilevel.control.riccati.blocks import affine, block_of
from bilevel.control.riccati.bounds import Limits
from bilevel.control.riccati.controls import Point
from bilevel.control.riccati.linearisation import Linearisation, Swept
from bilevel.control.riccati.stages import Plan, Stages
from bilevel.control.riccati.sweep import Gains, Model, backward, model_of
from bilevel.errors import DivergenceError

LEAST_SHIFT, MOST_SHIFT = 1e-10, 1e10  # of the largest second derivative
RATIO, TRIED = 10**1.5, 8  # shifts tried at once
UNBOUNDED = 1e12  # of the cost at the start

RUNNING, CONVERGED, ROUNDED, SADDLE, STANDSTILL, UNBOUNDED_BELOW, STOPPED, NOWHERE = range(8)


@dataclass(frozen=True)
class Rules:
    """How an iteration goes.

    Attributes:
        gauss_newton: leave out p . g''.
        decrease: share of the predicted decrease that a step must reach.
        lengths: step lengths below 1 tried at once.
        steps: iterations at most.
        tolerance: for the norm of the gradient, of each problem: ``(B,)``.
        rounding: whether a gradient within its own rounding is enough.
        relative: whether the tolerance is times the terms that cancel in the gradient, where these
            are small.
    """

    gauss_newton: bool
    decrease: float
    lengths: int
    steps: int
    tolerance: Tensor
    rounding: bool
    relative: bool


@dataclass(eq=False)
class Iterates:
    """Where every problem has come to.

    Attributes:
        where: controls and states.
        cost: J, ``(B,)``.
        residual: norm of the gradient, of what bounds leave free.
        shift: that the next sweep begins with.
        swept: the shift of the last step made; infinite before the first.
        status: one of the constants above.
        failed: t where a Hessian was not positive definite.
        steps: updates made.
        begun: J at the start.
        scale: what the tolerance is multiplied by, at most 1.
        history: of each iteration, the costs, residuals and shifts of all.
    """

    where: Swept
    cost: Tensor
    residual: Tensor
    shift: Tensor
    swept: Tensor
    status: Tensor
    failed: Tensor
    steps: Tensor
    begun: Tensor
    scale: Tensor
    history: list[tuple[Tensor, Tensor, Tensor]]


_Some = TypeVar("_Some", Model, Gains, Swept)
Watch = Callable[[Iterates], bool]


def _some(all_of: _Some, i: Tensor, n: int) -> _Some:
    """The problems i of n, in their order; no copy where they are all."""
    return all_of if len(i) == n else all_of.at(i)


class Newton:
    """One iteration after another; a problem that is done takes no further part."""

    def __init__(self, stages: Stages, rules: Rules, limits: Limits | None, start: Swept) -> None:
        """Begin at a point."""
        self._stages, self._rules, self._limits = stages, rules, limits
        b = stages.size
        zero = torch.zeros(b, dtype=stages.dtype, device=stages.device)
        whole = torch.zeros(b, dtype=torch.long, device=stages.device)
        self.now = Iterates(
            start,
            zero.clone(),
            zero.clone(),
            zero.clone(),
            zero + torch.inf,
            whole.clone(),
            whole - 1,
            whole.clone(),
            zero,
            zero + 1,
            [],
        )
        self._least = zero.clone()
        # Whether the dynamics may be linear, and calls cost more than what is computed in vain if
        # they are not.
        few = block_of(stages.problem.horizon, b * stages.n**2) > 1
        self._straight = few and limits is None and not stages.controls.q and stages.at_once
        self.point = Linearisation(stages, start)
        self._note(self.point)
        self.now.begun = self.now.cost.clone()
        if rules.relative:
            self.now.scale = self._terms()
        self.now.status[~torch.isfinite(self.now.cost + self.now.residual)] = NOWHERE
        left = (self.now.status == RUNNING).nonzero().squeeze(1)
        if 0 < len(left) < b:
            self._linearise(left)

    def run(self, watch: Watch = lambda _: False) -> Iterates:
        """Until every problem is done."""
        now, rules = self.now, self._rules
        if not bool((now.status == RUNNING).any()):
            return now
        for k in range(rules.steps + 1):
            active = self.point.where.problems
            reached = self._reached(active)
            # The last step came from a convex model of all second derivatives: no saddle is there.
            sure = reached & (now.swept[active] == 0) & (not rules.gauss_newton)
            now.status[active[sure]] = CONVERGED
            if bool(sure.all()):
                break
            with autodiff.paused():
                self._iterate(active, reached, last=k == rules.steps)
            left = (now.status == RUNNING).nonzero().squeeze(1)
            if not len(left):
                break
            if len(left) < len(self.point.where.problems):
                self._linearise(left)
            if k < rules.steps and watch(now):
                now.status[left] = STOPPED
                break
        return now

    def _reached(self, active: Tensor) -> Tensor:
        """Which gradients are small enough."""
        now, rules = self.now, self._rules
        residual, tolerance = now.residual[active], rules.tolerance[active]
        between = (residual <= tolerance) & (residual > tolerance * now.scale[active])
        if rules.relative and bool(between.any()):
            # From a start where hardly anything is there to cancel, the terms may have grown.
            now.scale[active] = torch.maximum(now.scale[active], self._terms())
        return residual <= tolerance * now.scale[active]

    def _terms(self) -> Tensor:
        """Of the gradient at the point, at most 1."""
        return self.point.terms().nan_to_num(1.0).clamp(max=1)

    def _iterate(self, active: Tensor, reached: Tensor, *, last: bool) -> None:
        """A sweep and a step of the active problems."""
        now = self.now
        model = self._model(gauss_newton=self._rules.gauss_newton)
        self._least[active] = LEAST_SHIFT * model.scale()
        small, exact = now.residual[active] <= self._rules.tolerance[active], model
        if self._rules.gauss_newton and bool(small.any()):
            exact = self._model(gauss_newton=False)
        if bool(reached.any()):
            self._certify(active, reached, exact)
        going = (now.status[active] == RUNNING).nonzero().squeeze(1)
        if last or not len(going):
            return
        gains, shift = self._swept(_some(model, going, len(active)), now.shift[active[going]])
        lost = torch.isinf(shift)
        now.status[active[going[lost]]] = UNBOUNDED_BELOW
        now.failed[active[going[lost]]] = gains.failed[lost]
        fine = (~lost).nonzero().squeeze(1)
        if len(fine):
            now.shift[active[going[fine]]] = shift[fine]
            self._step(going[fine], _some(gains, fine, len(going)))
            # So near to a saddle that rounding hides the way down, no step is found.
            stood = small & (now.status[active] == STANDSTILL)
            if bool(stood.any()):
                now.status[active[stood]] = RUNNING
                self._certify(active, stood, exact, least=ROUNDED)

    def _model(self, *, gauss_newton: bool) -> Model:
        point, limits = self.point, self._limits
        second = point.hessians(gauss_newton=gauss_newton)
        return model_of(point, second, limits and limits.around(point.where))

    def _certify(
        self, active: Tensor, reached: Tensor, model: Model, least: int = CONVERGED
    ) -> None:
        """Tell minima from other stationary points, where that is not known."""
        now = self.now
        i = (reached & (now.status[active] == RUNNING)).nonzero().squeeze(1)
        if not len(i):
            return
        one = model.at(i)
        found = backward(one, LEAST_SHIFT * one.scale())
        now.status[active[i]] = torch.where(found.failed < 0, least, SADDLE)
        now.failed[active[i]] = found.failed

    def _swept(self, model: Model, shift: Tensor) -> tuple[Gains, Tensor]:
        """Sweeps with the least shift tried that makes the problem convex; inf for none."""
        gains = backward(model, shift)
        shift = shift.clone()
        scale = model.scale()
        first = None
        while True:
            bad = ((gains.failed >= 0) & ~torch.isinf(shift)).nonzero().squeeze(1)
            if not len(bad):
                return gains, shift
            # Several shifts side by side; each stands for a problem of its own.
            first = torch.maximum(shift[bad] * RATIO, LEAST_SHIFT * scale[bad])
            powers = RATIO ** torch.arange(TRIED, dtype=shift.dtype, device=shift.device)
            trials = first.unsqueeze(1) * powers
            found = backward(model.at(bad).repeated(TRIED), trials.flatten())
            good = (found.failed < 0).view(-1, TRIED)
            best = good.int().argmax(1)
            rows = torch.arange(len(bad), device=shift.device)
            gains = gains.replaced(bad, found.at(rows * TRIED + best))
            beyond = ~good.any(1) & (trials[:, -1] > MOST_SHIFT * scale[bad])
            chosen = torch.where(good.any(1), trials[rows, best], trials[:, -1])
            shift[bad] = torch.where(beyond, torch.inf, chosen)

    def _step(self, rows: Tensor, gains: Gains) -> None:
        """The full step where it lowers the cost enough, else the longest shorter one that does."""
        now, point, rules = self.now, self.point, self._rules
        problems = point.where.problems[rows]
        base = _some(point.where, rows, len(point.where.problems))
        cost, size = point.cost[rows], point.size[rows]
        rounding = 100 * torch.finfo(cost.dtype).eps * size
        trial, ahead, new, after = self._whole(base, gains)
        enough = new <= cost + rules.decrease * gains.slope
        # The cost cannot show so small a decrease any more; the gradient can.
        fine = gains.slope.abs() <= rounding
        fallen = (after <= 0.9 * now.residual[problems]) & (new <= cost + rounding)
        whole = torch.where(fine, fallen, enough) & torch.isfinite(new)
        indefinite = whole & (now.shift[problems] > 0) & ~fine
        short = (~whole & ~fine).nonzero().squeeze(1)
        now.status[problems[~whole & fine]] = STANDSTILL
        lengths = torch.ones_like(cost)
        if len(short):
            lengths[short] = self._shorter(base.at(short), gains.at(short), cost[short])
        long = indefinite.nonzero().squeeze(1)
        if len(long):
            lengths[long] = self._longer(base.at(long), gains.at(long), new[long])
        self._rounded(point, rows, problems)
        moved = (lengths > 0) & (now.status[problems] == RUNNING)
        self._reshift(problems, lengths)
        self._accept(base, gains, problems, lengths, moved, trial, ahead)

    def _accept(
        self,
        base: Swept,
        gains: Gains,
        problems: Tensor,
        lengths: Tensor,
        moved: Tensor,
        trial: Swept,
        ahead: Linearisation | None,
    ) -> None:
        """Move the problems that found a step, and linearise where they stand."""
        now = self.now
        everything = bool((moved & (lengths == 1)).all())
        if not everything:
            trial = self._rolled(base, gains, torch.where(moved, lengths, 0.0))
        i = problems[moved]
        now.steps[i] += 1
        now.swept[i] = now.shift[i]
        whole = lengths[moved] >= 0.5
        # Shrunk after a step that the model foretold, off once it is small.
        now.shift[i] = torch.where(whole, now.shift[i] / 10, now.shift[i])
        now.shift[i] = torch.where(now.shift[i] < self._least[i], 0.0, now.shift[i])
        where = now.where
        where.point.own[i] = trial.point.own[moved]
        where.point.shared[i] = trial.point.shared[moved]
        where.states[i] = trial.states[moved]
        same = ahead is not None and everything
        left = problems[now.status[problems] == RUNNING]
        if ahead is not None and same and len(left) == len(problems):
            self.point = ahead
        elif len(left):
            self.point = Linearisation(self._stages, where.at(left))
        else:
            return
        self._note(self.point)
        low = now.cost < -UNBOUNDED * (1 + now.begun.abs())
        now.status[low & (now.status == RUNNING)] = UNBOUNDED_BELOW

    def _whole(
        self, base: Swept, gains: Gains
    ) -> tuple[Swept, Linearisation | None, Tensor, Tensor]:
        """The full step, with what `_tried` says of it."""
        if self._straight and len(base.problems) == len(self.point.where.problems):
            # Where the dynamics are linear, states are known without calling them one by one.
            trial = self._foreseen(base, gains)
            ahead, new, after = self._tried(base, trial, rolled=False)
            if ahead is not None and ahead.follows(100):
                return trial, ahead, new, after
            self._straight = False
        trial = self._rolled(base, gains, torch.ones_like(gains.slope))
        return trial, *self._tried(base, trial)

    def _foreseen(self, base: Swept, gains: Gains) -> Swept:
        """The trajectory of the full step in the linearised dynamics."""
        n, K = self._stages.n, gains.gains
        maps = self.point.maps
        A, B = maps[:, :, :n, :n], maps[:, :, :n, n + 1 :]
        closed, moved = A + B @ K[..., :n], (B @ K[..., n:]).squeeze(3)
        states = affine(closed.flip(1), moved.flip(1), torch.zeros_like(base.states[:, 0])).flip(1)
        own = K[..., n] + (K[..., :n] @ states[:, :-1].unsqueeze(3)).squeeze(3)
        point = Point(base.point.own + own, base.point.shared)
        return Swept(base.problems, point, base.states + states)

    def _tried(
        self, base: Swept, trial: Swept, *, rolled: bool = True
    ) -> tuple[Linearisation | None, Tensor, Tensor]:
        """Linearisation, cost and residual of a trial; infinite where it leads nowhere."""
        finite = torch.isfinite(trial.states).flatten(1).all(1)
        nowhere = trial.states.new_full((len(finite),), torch.inf)
        if not bool(finite.all()):
            # Where one problem ends up does not matter to the others.
            keep = finite.view(-1, 1, 1)
            point = Point(
                torch.where(keep, trial.point.own, base.point.own),
                torch.where(keep[:, 0], trial.point.shared, base.point.shared),
            )
            trial = Swept(trial.problems, point, torch.where(keep, trial.states, base.states))
        try:
            ahead = Linearisation(self._stages, trial, rolled=rolled)
        except DivergenceError:
            cost = torch.where(finite, self._costs(trial), torch.inf)
            return None, cost, nowhere
        cost = torch.where(finite & torch.isfinite(ahead.cost), ahead.cost, torch.inf)
        return ahead, cost, self._residual(ahead)

    def _linearise(self, problems: Tensor) -> None:
        self.point = Linearisation(self._stages, self.now.where.at(problems))

    def _note(self, point: Linearisation) -> None:
        now, i = self.now, point.where.problems
        now.cost[i], now.residual[i] = point.cost, self._residual(point)
        now.history.append((now.cost.clone(), now.residual.clone(), now.shift.clone()))

    def _residual(self, point: Linearisation) -> Tensor:
        """Norm of the gradient, of the numbers that no bound holds."""
        own, shared = point.gradient.own, point.gradient.shared
        if self._limits is not None:
            own, shared = self._limits.free(point.where, point.gradient)
        return torch.hypot(
            torch.linalg.vector_norm(own.flatten(1), dim=1),
            torch.linalg.vector_norm(shared, dim=1),
        )

    def _rolled(self, base: Swept, gains: Gains, lengths: Tensor) -> Swept:
        """The trajectories of the steps of these lengths, in the nonlinear dynamics."""
        stages, limits = self._stages, self._limits
        n, q = stages.n, stages.controls.q
        a = lengths.view(-1, 1)
        shared = base.point.shared + a * gains.shared
        if limits is not None:
            shared = limits.cut(shared, base.problems)
        theta = base.point.own + a.unsqueeze(2) * gains.gains[..., -1]
        start = base.states[:, 0]
        if q:
            along = gains.gains[..., n : n + q] @ (shared - base.point.shared)[:, None, :, None]
            theta = theta + along.squeeze(3)
            start = stages.start(shared, base.problems)
        bounds = (None, None) if limits is None else limits.steps(base.problems)
        plan = Plan(theta, shared, gains.gains[..., :n], base.states[:, :-1], *bounds)
        states, own = stages.rollout(start, plan, base.problems)
        return Swept(base.problems, Point(own, shared), states)

    def _costs(self, trial: Swept) -> Tensor:
        """J of trajectories; infinite where it is not finite."""
        stages, horizon = self._stages, self._stages.problem.horizon
        w = trial.point.shared.unsqueeze(1).expand(-1, horizon, -1)
        parts = trial.states[:, :-1], w, trial.point.own
        _, running = stages.steps(parts, trial.problems)
        own, shared = trial.point.own, trial.point.shared
        cost = stages.terminal(trial.states[:, -1], shared, own, trial.problems) + running.sum(1)
        return torch.where(torch.isfinite(cost), cost, torch.inf)

    def _many(self, base: Swept, gains: Gains, lengths: Tensor) -> Tensor:
        """J at each of several step lengths: ``(b, lengths)``."""
        b, k = len(base.problems), len(lengths)
        every = torch.arange(b, device=lengths.device).repeat_interleave(k)
        rolled = self._rolled(base.at(every), gains.at(every), lengths.repeat(b))
        return self._costs(rolled).view(b, k)

    def _shorter(self, base: Swept, gains: Gains, cost: Tensor) -> Tensor:
        """The longest of 1/2, 1/4, ... that lowers the cost enough; 0 for none."""
        powers = torch.arange(1, self._rules.lengths + 1, device=cost.device)
        lengths = 0.5 ** powers.to(cost.dtype)
        found = self._many(base, gains, lengths)
        predicted = self._rules.decrease * lengths * gains.slope.unsqueeze(1)
        enough = found <= cost.unsqueeze(1) + predicted
        first = lengths[enough.int().argmax(1)]
        return torch.where(enough.any(1), first, 0.0)

    def _longer(self, base: Swept, gains: Gains, cost: Tensor) -> Tensor:
        """Along a direction of negative curvature the cost may fall much further."""
        lengths = 4.0 ** torch.arange(1, 9, device=cost.device).to(cost.dtype)
        found = self._many(base, gains, lengths)
        best, i = found.min(1)
        return torch.where(best < cost, lengths[i], 1.0)

    def _reshift(self, problems: Tensor, lengths: Tensor) -> None:
        """A larger shift where no step was found; too large a one ends it."""
        now = self.now
        stuck = problems[(lengths == 0) & (now.status[problems] == RUNNING)]
        if not len(stuck):
            return
        now.shift[stuck] = torch.maximum(now.shift[stuck] * 10, 1e4 * self._least[stuck])
        beyond = now.shift[stuck] > MOST_SHIFT / LEAST_SHIFT * self._least[stuck]
        now.status[stuck[beyond]] = STANDSTILL

    def _rounded(self, point: Linearisation, rows: Tensor, problems: Tensor) -> None:
        """A standstill where the gradient is within its rounding is convergence."""
        if not self._rules.rounding:
            return
        now = self.now
        stood = now.status[problems] == STANDSTILL
        if bool(stood.any()):
            noise = point.noise()[rows]
            near = stood & (now.residual[problems] <= noise) & (now.shift[problems] == 0)
            now.status[problems[near]] = ROUNDED
