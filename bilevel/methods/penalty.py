r"""Hypergradients without second derivatives: the penalty path.

With the inner objective f, the outer F and a strength s,

.. math::
    w_s = \arg\min_w f(w, \alpha) + F(w, \alpha) / s, \qquad
    h_s = \nabla_\alpha F(w_s, \alpha)
          + s \big( \nabla_\alpha f(w_s, \alpha) - \nabla_\alpha f(w_\infty, \alpha) \big),

:math:`s (w_\infty - w_s) \to q`, the multiplier that `Implicit` solves for, and
:math:`h_s = h + c_1 / s + c_2 / s^2 + \dots`, so that h is found by extrapolation in 1/s
(Kwon et al. 2023, A fully first-order method for stochastic bilevel optimization; Shen & Chen 2023;
Chen, Ma & Zhang 2023). All problems make the same inner steps from the same point, side by side:
what is left of the way to the minimiser is then common to them, and s does not multiply it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.checks import check_range, check_whole
from bilevel.dynamics.per_step import GradientSum
from bilevel.dynamics.steps import walk
from bilevel.errors import ArgumentError, DivergenceError, LostGradientError
from bilevel.inner.iteration import InnerIteration
from bilevel.inner.problem import Objective
from bilevel.methods.base import Comparison, Found, HypergradientMethod
from bilevel.methods.instance import Instance, Warm
from bilevel.tree import Tree

MOST_ORDERS = 6  # beyond, the weights of the extrapolation multiply rounding by thousands
LOOK_EVERY = 10  # inner steps from one look at the residuals to the next
ROUNDING = 100.0  # by how much an iteration multiplies the rounding of its params
NEAR = 30.0  # factor within which a strength chosen in advance was near enough


@final
@dataclass(frozen=True)
class Penalty(HypergradientMethod):
    """The penalty path: a few inner problems with a part of F, first derivatives alone.

    For models that have no second derivative: compiled, sharded, with fused kernels. Of order k, it
    follows k + 1 inner problems side by side, one of them without penalty, and a certificate one
    more. Exact for the exact inner minimiser but for an error of order ``s ** -k``.

    Attributes:
        strength: s > 0, that of the largest penalty; the others have 2 s, 4 s, ... None chooses it
            at each hypergradient: as large as rounding and the inner residual make it worth while.
        order: k, of the extrapolation; from 1, no extrapolation, to 6.
        rtol: the problems go on until the residual of their differences has fallen to this part,
            by at most the solver's `inner_steps`.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(problem, bl.optim.SGD(0.2), 80, Penalty())
        >>> found = solver.hypergradient(torch.tensor(0.0), torch.tensor(0.0))
        >>> round(float(found.gradient), 3)  # 2 (a / 3 - 1) / 3
        -0.667
        >>> found.certificate.products  # with second derivatives
        0
    """

    needs_objective: ClassVar[bool] = True
    strength: float | None = None
    order: int = 2
    rtol: float = 1e-8

    def __post_init__(self) -> None:
        if self.strength is not None:
            check_range(self.strength, "strength", above=0)
        check_whole(self.order, "order", 1)
        if self.order > MOST_ORDERS:
            raise ArgumentError(
                f"order must be at most {MOST_ORDERS}, got {self.order}: more multiplies rounding "
                "by more than it gains; raise the strength instead."
            )
        check_range(self.rtol, "rtol", above=0, below=1)

    def find(self, instance: Instance) -> Found:  # noqa: D102
        path = _Path(instance, instance.iterated, instance.linear_start, self.rtol)
        strength = path.suggested(self.order) if self.strength is None else self.strength
        strengths = [strength * 2**j for j in range(self.order)]
        followed = path.follow(strengths)
        if self.strength is None and not followed.near(path, self.order):
            # How far the penalty moves the params is known now; from there it is a short way.
            path = replace(path, begun=followed.reached, multiplier=followed.multiplier)
            strengths = [path.suggested(self.order) * 2**j for j in range(self.order)]
            followed = path.follow(strengths)
        gradient = GradientSum(instance.control)
        gradient.add(instance.control, followed.extrapolated(path))
        warm = replace(followed.reached, linear=followed.multiplier)
        outer = instance.outer_gradient(followed.params)

        def compare() -> Comparison:
            return followed.compared(path)

        flaw = _flaw(instance, path)
        return Found(outer.value, self._total(gradient), warm, outer, flaw=flaw, compare=compare)

    def _total(self, gradient: GradientSum) -> Tree:
        try:
            return gradient.total()
        except LostGradientError as error:
            raise LostGradientError(
                f"{error} Penalty differentiates the limit of the inner iteration, which depends "
                "neither on step sizes nor on the start: learn those with MLM() or Unrolled()."
            ) from error


def _flaw(instance: Instance, path: "_Path") -> str:
    first, drawn = instance.draws_inside(lambda: path.residual(path.params))
    # From elsewhere than torch's generators it shows by another value.
    change = tree.norm(tree.subtract(path.residual(path.params), first))
    size = max(tree.norm(first), path.stiffness * tree.norm(path.params))
    if drawn or change > ROUNDING * _eps(path.params) * size:
        return (
            "the inner objective draws at random, and Penalty multiplies the difference of two "
            "draws by its strength: draw outside and pass what was drawn as the batch, or take "
            "MLM(), which differentiates the steps with their draws"
        )
    if not instance.by_batches:
        return ""
    return (
        "the differences of Penalty are those of the last inner batch alone, not of the objective "
        "that the steps descended on: pass linear_batch=, all data or a large batch"
    )


@dataclass(frozen=True, eq=False)
class _Path:
    """The inner problems of one hypergradient, and where they begin.

    Attributes:
        instance: the problem without penalty.
        begun: where its iteration came to.
        multiplier: q as far as it is known; None is zero.
        rtol: as in `Penalty`.
    """

    instance: Instance
    begun: Warm
    multiplier: Tree
    rtol: float

    @property
    def params(self) -> Tree:
        """The common starting point."""
        return self.instance.dynamics.readout(self.begun.state)

    @cached_property
    def pull(self) -> Tree:
        """By how much the residual at the starting point changes with F added once."""
        there = self.params
        gradient = tree.filled(self.instance.outer_gradient(there).in_params, there)
        if self.instance.optimizer.symmetric:
            return gradient
        # Of a proximal step by a difference: with so much of F that it is no rounding, and small.
        size, base, weight = tree.norm(there) or 1.0, self.residual(there), 1.0
        least, wanted = math.sqrt(_eps(there)) * size, _eps(there) ** 0.25 * size
        change, force = tree.subtract(self.residual(there, weight), base), tree.norm(gradient)
        for _ in range(2):
            found = tree.norm(change)
            if least <= found <= 0.1 * size or not force:
                break
            weight = weight * wanted / found if found > _eps(there) * size else wanted / force
            change = tree.subtract(self.residual(there, weight), base)
        return tree.map_leaves(lambda x: None if x is None else x / weight, change)

    @cached_property
    def stiffness(self) -> float:
        r"""|H v| / |v| along the gradient v of F, by a difference."""
        there, force = self.params, tree.norm(self.pull)
        size = tree.norm(there) or 1.0
        if not (math.isfinite(force) and force > 0):
            return 0.0
        step = math.sqrt(_eps(there)) * size / force
        moved = tree.moved(there, self.pull, step)
        found = tree.norm(tree.subtract(self.residual(there), self.residual(moved)))
        return found / (step * force) if 0 < found < math.inf else force / size

    def suggested(self, order: int) -> float:
        r"""A strength: :math:`|q| / s` is a small part of the size of the params."""
        if not self.stiffness:
            return 1.0  # F is stationary, or not finite: all are alike
        size, q = tree.norm(self.params), self.multiplier
        length = tree.norm(self.pull) / self.stiffness if q is None else tree.norm(q)
        return (length or 1.0) / ((size or length or 1.0) * self.share(order))

    def share(self, order: int) -> float:
        """The part of the params that the penalty should move them by."""
        # Of |q| / (s |w|) = x, the error of the extrapolation is x ** order and that of rounding
        # eps / x. The first need not be smaller than what the inner residual does anyway.
        size = self.stiffness * tree.norm(self.params)
        left = tree.norm(self.residual(self.params)) / size if size else 0.0
        rounding = (ROUNDING * _eps(self.params)) ** (1 / (order + 1))
        return max(rounding, 0.1 * min(left, 1.0) ** (1 / order))

    def residual(self, params: Tree, weight: float = 0.0) -> Tree:
        """What vanishes at the solution with F times `weight` added."""
        instance = self.instance
        judging = replace(self._dynamics(weight), batch=instance.judging_batch)
        return judging.residual(params, instance.control, 1)

    def _dynamics(self, weight: float) -> InnerIteration:
        """The inner iteration with F times `weight` added, from the starting point on."""
        instance = self.instance
        problem = replace(instance.problem, start=None)
        if weight:
            problem = replace(problem, inner=_penalised(instance, weight))
        return InnerIteration(
            problem, instance.optimizer, instance.inner_batch, self.begun.steps, goes_on=True
        )

    def states(self, weight: float) -> Iterator[Tree]:
        """Of one problem, as often as asked for."""
        state, control = self.begun.state, self.instance.control
        if weight and self.multiplier is not None:
            there = tree.moved(self.params, self.multiplier, weight)
            state = self.instance.optimizer.placed(state, there)
        return walk(self._dynamics(weight), state, control, max(self.instance.inner_steps, 1))

    def slope(self, params: Tree) -> Tree:
        """Gradient in the control of the inner objective and of what the rule adds to it."""
        instance = self.instance
        t = self.begun.steps + 1

        def objective(p: Tree, c: Tree) -> Tensor:
            value = instance.problem.inner(p, c, instance.judging_batch)
            return value + instance.optimizer.term(p, c, t)

        _, (_, in_control) = autodiff.value_and_gradient(
            objective, params, instance.control, name="the inner objective"
        )
        return in_control

    def follow(self, strengths: list[float]) -> "_Followed":
        """All problems side by side, until their differences have settled."""
        weights = [0.0, *(1 / s for s in strengths)]
        readout = self.instance.dynamics.readout
        looks: dict[int, list[Tree]] = {}
        every = min(max(self.instance.inner_steps // 4, 1), LOOK_EVERY)
        made, states, residual = 0, [], math.inf
        for made, states in enumerate(zip(*map(self.states, weights), strict=True)):
            if not made or made % every:
                continue
            points = [readout(state) for state in states]
            residual = self.unsettled(points, weights)
            # Kept for comparison: one look each time their number has doubled.
            looks = {n: kept for n, kept in looks.items() if 4 * n >= made}
            if not looks or made >= 2 * max(looks):
                looks[made] = points
            if not residual > self.rtol:
                break
        points = [readout(state) for state in states]
        self.instance.check_finite(states[0])
        if not all(math.isfinite(tree.norm(p)) for p in points):
            raise DivergenceError(
                "an inner problem with penalty is not finite, while the one without it is: the "
                f"outer objective is too stiff for strength={strengths[0]:g}; raise the strength, "
                "or take smaller inner steps."
            )
        if made % every:
            residual = self.unsettled(points, weights)
        looks.pop(made, None)
        earlier = min(looks, key=lambda n: abs(n - made / 2), default=0)
        before = looks.get(earlier) or [self.params for _ in weights]
        reached = Warm(tree.detach(states[0]), self.begun.steps + made)
        return _Followed(strengths, made, points, earlier, before, residual, reached)

    def unsettled(self, points: list[Tree], weights: list[float]) -> float:
        """The largest relative residual of the differences to the first problem."""
        here, force = self.residual(points[0]), tree.norm(self.pull)
        left = [
            tree.norm(tree.subtract(self.residual(p, x), here)) / x
            for p, x in zip(points[1:], weights[1:], strict=True)
        ]
        return max(left) / force if force else 0.0


@dataclass(frozen=True, eq=False)
class _Followed:
    """Where the problems came to.

    Attributes:
        strengths: s, 2 s, ...
        made: steps.
        points: params of the problem without penalty, and of each strength.
        earlier: steps up to the look before.
        before: the params then.
        residual: of the differences, relative.
        reached: the state of the problem without penalty.
    """

    strengths: list[float]
    made: int
    points: list[Tree]
    earlier: int
    before: list[Tree]
    residual: float
    reached: Warm

    @property
    def params(self) -> Tree:
        """Of the problem without penalty."""
        return self.points[0]

    @property
    def multiplier(self) -> Tree:
        """q, by the weakest penalty."""
        s = self.strengths[-1]
        difference = tree.subtract(self.points[0], self.points[-1])
        return tree.map_leaves(lambda d: None if d is None else d * s, difference)

    def near(self, path: _Path, order: int) -> bool:
        """Whether the strength is near that which is suggested now that q is known."""
        again = replace(path, begun=self.reached, multiplier=self.multiplier)
        ratio = again.suggested(order) / self.strengths[0]
        return 1 / NEAR <= ratio <= NEAR

    def extrapolated(self, path: _Path) -> Tree:
        """The hypergradient."""
        return _extrapolated(_each(path, self.points, self.strengths), self.strengths)

    def compared(self, path: _Path) -> Comparison:
        """One problem more, and all of them at the look before."""
        stronger = 2 * self.strengths[-1]
        state = next(islice(path.states(1 / stronger), self.made, None))
        strengths = [*self.strengths, stronger]
        points = [*self.points, path.instance.dynamics.readout(state)]
        now = _each(path, points, strengths)
        better, given = _extrapolated(now, strengths), _extrapolated(now[:-1], self.strengths)
        then = _extrapolated(_each(path, self.before, self.strengths), self.strengths)
        # As much as the steps since then changed, times the sum of a geometric series.
        rate = min(self._rate(path), 1 - 1 / (1 + self.made))
        ahead = rate / (1 - rate)
        change = _combined([given, then], [ahead, -ahead])
        return Comparison(better, change, self.residual, self._rounding(path))

    def _rounding(self, path: _Path) -> float:
        """What part of the way from the first params to the nearest of the others is rounding."""
        if not tree.norm(path.pull):
            return 0.0
        way = tree.norm(tree.subtract(self.points[0], self.points[-1]))
        size = _eps(self.params) * tree.norm(self.params)
        return size / way if way else math.inf

    def _rate(self, path: _Path) -> float:
        """How much of the residuals the steps since the look before left."""
        weights = [0.0, *(1 / s for s in self.strengths)]
        pairs = [(self.residual, path.unsettled(self.before, weights))]
        first, last = (tree.norm(path.residual(p[0])) for p in (self.before, self.points))
        # Rounding does not fall any further, and what it leaves is common to all problems.
        if last > ROUNDING * _eps(self.params) * path.stiffness * tree.norm(self.params):
            pairs.append((last, first))
        return max((a / b for a, b in pairs if b > 0), default=0.0)


def _each(path: _Path, points: list[Tree], strengths: list[float]) -> list[Tree]:
    """h_s of each strength."""
    base = path.slope(points[0])
    return [
        _combined([path.instance.outer_gradient(p).in_control, path.slope(p), base], [1.0, s, -s])
        for p, s in zip(points[1:], strengths, strict=True)
    ]


def _extrapolated(each: list[Tree], strengths: list[float]) -> Tree:
    """The limit of strength without end: the polynomial through all of them at 1 / s = 0."""
    weights = [math.prod(s / (s - other) for other in strengths if other != s) for s in strengths]
    return _combined(each, weights)


def _combined(vectors: list[Tree], weights: list[float]) -> Tree:
    """A linear combination; None counts as zero, and stays where there is nothing else."""

    def at(*leaves: Any) -> Any:
        terms = [w * x for x, w in zip(leaves, weights, strict=True) if x is not None]
        return sum(terms[1:], terms[0]) if terms else None

    return tree.map_leaves(at, *vectors)


def _penalised(instance: Instance, weight: float) -> Objective:
    """The sum f + weight F, where F draws what it drew."""

    def objective(params: Tree, control: Tree, batch: Any) -> Tensor:
        value = instance.problem.inner(params, control, batch)
        with instance.draws.repeated((params, control)):
            return value + weight * instance.problem.outer(params, control, instance.outer_batch)

    return objective


def _eps(params: Tree) -> float:
    return max(torch.finfo(x.dtype).eps for x in tree.leaves_of(params) if tree.is_variable(x))
