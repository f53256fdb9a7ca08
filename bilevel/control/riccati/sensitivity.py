r"""How an optimum moves with the parameters of its problem: one more sweep, the factors kept.

With p = -lambda the optimum is where the derivatives of

.. math::
    L(y, p; a) = l(u(T), w) + \sum_t \big[ r + p_t \cdot (g - u(t)) \big] + p_0 \cdot (g_0 - u(0))

in y = (U, w, Theta) and p vanish. Its derivative along da solves the linear-quadratic problem with
the same matrices, linear costs L_ya da and defects L_pa da; the adjoint of that is the same solve.
Bounds that are active hold their numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.control.riccati.controls import Point
from bilevel.control.riccati.linearisation import Swept
from bilevel.control.riccati.stages import Stages
from bilevel.control.riccati.sweep import Gains, Model
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Terms:
    """A vector of the space of (y, p), its states with what is shared beside them.

    Attributes:
        steps: of (u(t-1), w, theta_t), ``(b, T, n + q + m)``.
        end: of (u(T), w), ``(b, n + q)``.
        shared: of w where it makes u(0), ``(b, q)``.
        following: of p_1, ..., p_T, ``(b, T, n)``.
        start: of p_0, ``(b, n)``.
    """

    steps: Tensor
    end: Tensor
    shared: Tensor
    following: Tensor
    start: Tensor


@dataclass(frozen=True, eq=False)
class Moves:
    """Derivatives of the optimum: of controls, states and costates."""

    point: Point
    states: Tensor
    costates: Tensor


def resweep(model: Model, gains: Gains, terms: Terms) -> Moves:
    """The linear-quadratic problem of `model` with other linear costs and with defects.

    Args:
        model: whose matrices they are.
        gains: of its sweep.
        terms: linear costs in `steps`, `end` and `shared`, defects in `following` and `start`.

    Returns:
        Its solution.
    """
    nx, q = model.terminal.shape[1] - 1, model.start.shape[2]
    n, horizon = nx - q, model.steps.shape[1]
    A, B = model.maps[:, :, :nx, :nx], model.maps[:, :, :nx, nx + 1 :]
    P, K = gains.values[:, :, :nx, :nx], gains.gains[..., :nx]
    free = torch.ones_like(K[..., 0]) if gains.free is None else gains.free.to(K.dtype)
    defects = torch.nn.functional.pad(terms.following, (0, q))
    s, changes = terms.end, []
    values = [s]
    for t in range(horizon - 1, -1, -1):
        ahead = (s + _times(P[:, t + 1], defects[:, t])).unsqueeze(2)
        qx = terms.steps[:, t, :nx] + (A[:, t].mT @ ahead).squeeze(2)
        qc = (terms.steps[:, t, nx:] + (B[:, t].mT @ ahead).squeeze(2)) * free[:, t]
        changes.append(-_solved(gains.factors[:, t], qc))
        s = qx + (K[:, t].mT @ qc.unsqueeze(2)).squeeze(2)
        values.append(s)
    values, changes = values[::-1], changes[::-1]
    first = torch.nn.functional.pad(terms.start, (0, q))
    slope = terms.shared + (model.start.mT @ (s + _times(P[:, 0], first)).unsqueeze(2)).squeeze(2)
    held = 1.0 if gains.shared_free is None else gains.shared_free.to(slope.dtype)
    shared = -_solved(gains.shared_factor, slope * held) * held
    x = first + _times(model.start, shared)
    states, own = [x], []
    for t in range(horizon):
        theta = changes[t] + _times(K[:, t], x)
        x = _times(A[:, t], x) + _times(B[:, t], theta) + defects[:, t]
        states.append(x)
        own.append(theta)
    every = torch.stack(states, 1)
    costates = torch.einsum("btij,btj->bti", P, every) + torch.stack(values, 1)
    steps = torch.stack(own, 1) if own else K[..., 0]
    return Moves(Point(steps, shared), every[..., :n], costates[..., :n])


def _times(A: Tensor, x: Tensor) -> Tensor:
    return (A @ x.unsqueeze(2)).squeeze(2)


def _solved(factor: Tensor, x: Tensor) -> Tensor:
    return torch.cholesky_solve(x.unsqueeze(2), factor).squeeze(2) if x.shape[1] else x


class Sensitivity:
    """The derivative of one optimum in parameters and observation."""

    def __init__(
        self,
        stages: Callable[[Tree, Tree], Stages],
        where: Swept,
        costates: Tensor,
        model: Model,
        gains: Gains,
    ) -> None:
        """Of the problems that `stages` makes of parameters and observation."""
        self._stages, self._where = stages, where
        self._p, self._model, self._gains = costates, model, gains

    def pull(
        self, arguments: tuple[Tree, Tree], point: Point, states: Tensor, cost: Tensor
    ) -> tuple[Tree, Tree]:
        """Gradients of Re<cotangents, optimum> in the arguments.

        Args:
            arguments: parameters and observation.
            point: cotangent of the controls.
            states: of the states, ``(b, T + 1, n)``.
            cost: of the cost, ``(b,)``.

        Returns:
            Vectors of the spaces of the arguments.
        """
        q, horizon = self._model.start.shape[2], states.shape[1] - 1
        zeros = states.new_zeros(states.shape[0], horizon, q)
        terms = Terms(
            -torch.cat([states[:, :-1], zeros, point.own], 2),
            -torch.nn.functional.pad(states[:, -1], (0, q)),
            -point.shared,
            torch.zeros_like(states[:, 1:]),
            torch.zeros_like(states[:, 0]),
        )
        found = resweep(self._model, self._gains, terms)
        w = found.point.shared.unsqueeze(1).expand(-1, horizon, -1)
        steps = torch.cat([found.states[:, :-1], w, found.point.own], 2)
        end = torch.cat([found.states[:, -1], found.point.shared], 1)
        inputs = autodiff.variables(arguments)
        with autodiff.recording():
            slopes, value = self._slopes(*inputs, *autodiff.variables(self._point))
            pairs = (
                (slopes.steps, steps),
                (slopes.end, end),
                (slopes.shared, found.point.shared),
                (slopes.following, found.costates[:, 1:]),
                (slopes.start, found.costates[:, 0]),
            )
            moved = sum((a * b).sum() for a, b in pairs)
            total = (cost * value).sum() - moved
            gradients = autodiff.pull(total, torch.ones_like(total), inputs)
        return tree.filled(gradients, arguments)

    def push(
        self, arguments: tuple[Tree, Tree], directions: tuple[Tree, Tree]
    ) -> tuple[Moves, Tensor]:
        """Derivatives of the optimum along directions of the arguments, and of its cost."""

        def function(*given: Tree) -> tuple[Tensor, ...]:
            terms, value = self._slopes(*given)
            return terms.steps, terms.end, terms.shared, terms.following, terms.start, value

        still = tuple(None for _ in self._point)
        _, (*terms, cost) = autodiff.pushforward(
            function, (*arguments, *self._point), (*directions, *still)
        )
        return resweep(self._model, self._gains, Terms(*terms)), cost

    @property
    def _point(self) -> tuple[Tensor, ...]:
        """Where the derivatives of L are taken: z, (u(T), w), w and the steps' own controls."""
        where = self._where
        w = where.point.shared.unsqueeze(1).expand(-1, where.point.own.shape[1], -1)
        return (
            torch.cat([where.states[:, :-1], w, where.point.own], 2),
            torch.cat([where.states[:, -1], where.point.shared], 1),
            where.point.shared,
            where.point.own,
        )

    def _slopes(
        self,
        parameters: Tree,
        observation: Tree,
        z: Tensor,
        end: Tensor,
        shared: Tensor,
        own: Tensor,
    ) -> tuple[Terms, Tensor]:
        """The derivatives of L in (y, p) at the optimum, and L, as functions of the arguments."""
        stages, problems = self._stages(parameters, observation), self._where.problems
        n = stages.n
        p = self._p[..., :n]
        g, r = stages.steps(z.split([n, stages.controls.q, own.shape[2]], 2), problems)
        l = stages.terminal(end[:, :n], end[:, n:], own, problems)  # noqa: E741  as in MODEL
        g0 = stages.start(shared, problems, tree.leaves_of(observation))
        stepped = r.sum(1) + (p[:, 1:] * g).sum((1, 2))
        begun = (p[:, 0] * g0).sum(1)
        one = torch.ones_like(l)
        terms = Terms(
            _pulled(stepped, one, z),
            _pulled(l, one, end),
            _pulled(begun, one, shared),
            g,
            g0,
        )
        return terms, stepped + l + begun


def _pulled(outputs: Tensor, cotangent: Tensor, inputs: Tensor) -> Tensor:
    found = autodiff.pull(outputs, cotangent, inputs, keep=True)
    return torch.zeros_like(inputs) if found is None else found
