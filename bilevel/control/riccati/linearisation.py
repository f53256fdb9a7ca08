r"""First and second derivatives of all steps of all problems, in one call each.

An augmented state x = (u, w) holds the shared numbers w, which stay as they are, and homogeneous
coordinates (x, 1) make affine maps linear and gradients a part of the Hessian:

.. math::
    F_t = \begin{pmatrix} A_t & 0 & B_t \\ 0 & 1 & 0 \end{pmatrix}, \qquad
    H_t = \begin{pmatrix} h_{xx} & r_x & h_{x\theta} \\ r_x^T & 0 & r_\theta^T \\
        h_{\theta x} & r_\theta & h_{\theta\theta} \end{pmatrix}, \qquad
    h = r + p_t \cdot g

at (u(t-1), theta_t), with p_t = -lambda_t of the multiplier sweep (7).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel import autodiff
from bilevel.control.riccati.blocks import affine
from bilevel.control.riccati.controls import Point
from bilevel.control.riccati.stages import Stages
from bilevel.errors import DivergenceError, UnsupportedError

CHUNK = 2**21  # numbers of the Jacobians that are found in one pass


@dataclass(frozen=True, eq=False)
class Swept:
    """The point where problems are linearised: a control, and where it leads.

    Attributes:
        problems: which ones, shape ``(b,)``.
        point: their controls.
        states: ``(b, T + 1, n)``.
    """

    problems: Tensor
    point: Point
    states: Tensor

    def at(self, i: Tensor) -> "Swept":
        """Some of the problems."""
        return Swept(self.problems[i], self.point.at(i), self.states[i])


@dataclass(frozen=True, eq=False)
class Hessians:
    """Second derivatives.

    Attributes:
        steps: H_t, ``(b, T, n + q + 1 + m)`` twice.
        terminal: of l in (u(T), w), 1 beside: ``(b, n + q + 1)`` twice.
        start: p_0 . g0'' in w, ``(b, q, q)``.
    """

    steps: Tensor
    terminal: Tensor
    start: Tensor


class Linearisation:
    """First derivatives at a point, and the second ones when they are asked for.

    Attributes:
        where: the point.
        cost: J, shape ``(b,)``.
        size: sum of the sizes of the costs that make J, for how far J rounds, ``(b,)``.
        maps: F_t, ``(b, T, n + q + 1, n + q + 1 + m)``.
        start: dg0/dw above the identity, ``(b, n + q, q)``.
        costates: p_0, ..., p_T in (u, w), ``(b, T + 1, n + q)``.
        gradient: of J.
    """

    def __init__(self, stages: Stages, where: Swept, *, rolled: bool = True) -> None:
        """One evaluation of every step, and the multiplier sweep (7).

        Args:
            stages: the problem.
            where: the point.
            rolled: whether its states were made by the steps, so that these must lead there again.
        """
        self._stages, self.where = stages, where
        self._n, self._q, self._m = stages.n, stages.controls.q, stages.controls.m
        self._chunks = self._evaluated()
        if rolled and not self._faithful():
            stages.one_by_one()
            self._chunks = self._evaluated()
        with autodiff.recording():
            self._ended()
            self._begun()
        r = torch.cat([chunk.costs.detach() for chunk in self._chunks], 1)
        self.cost = r.sum(0) + self._final.detach()
        self.size = r.abs().sum(0) + self._final.detach().abs()
        self._sweep()

    @cached_property
    def defects(self) -> Tensor:
        """How far each u(t) is from g of the one before, ``(b, T, n)``; rounding at most."""
        following = torch.cat([chunk.following for chunk in self._chunks], 1).transpose(0, 1)
        return self.where.states[:, 1:] - following

    @property
    def costate_defects(self) -> Tensor:
        """What is left of (7), ``(b, T, n + q)``; rounding at most."""
        nx = self._n + self._q
        maps, p = (x.transpose(0, 1).flatten(0, 1) for x in (self.maps, self.costates[:, 1:]))
        pulled = torch.bmm(maps[:, :nx, :nx].mT, p.unsqueeze(2)).view(*self._lead[::-1], nx)
        return self.costates[:, :-1] - self._slopes[..., :nx] - pulled.transpose(0, 1)

    def _faithful(self) -> bool:
        """Whether steps evaluated at once lead where they led in the roll-out, with t a number."""
        if not self._stages.at_once or not self._chunks:
            return True
        return self.follows(torch.finfo(self._stages.dtype).eps ** -0.5)

    def follows(self, roundings: float) -> bool:
        """Whether each state is g of the one before, but for so many roundings."""
        states = self.where.states
        if not self.defects.numel():
            return True
        allowed = roundings * torch.finfo(states.dtype).eps * (1 + float(states.abs().amax()))
        return not self._largest_defect > allowed

    @cached_property
    def _largest_defect(self) -> float:
        return float(self.defects.abs().amax())

    @property
    def _lead(self) -> tuple[int, int]:
        return len(self.where.problems), self._stages.problem.horizon

    def _evaluated(self) -> list["_Chunk"]:
        where = self.where
        b, horizon = self._lead
        w = where.point.shared.unsqueeze(1).expand(b, horizon, self._q)
        parts = where.states[:, :-1], w, where.point.own, where.problems
        width = self._n + self._q + self._m
        some = max(1, CHUNK // max(1, horizon * width * width))
        each = zip(*(part.split(some) for part in parts), strict=True)
        return [_Chunk(self._stages, x, problems) for *x, problems in each]

    def _ended(self) -> None:
        """L and its gradient in (u(T), w)."""
        where = self.where
        end = torch.cat([where.states[:, -1], where.point.shared], 1)
        self._end, own = autodiff.variables((end, where.point.own))
        u, w = self._end[:, : self._n], self._end[:, self._n :]
        self._final = self._stages.terminal(u, w, own, where.problems)
        self._stages.refuse_hidden(self._final, (self._end, own), "the terminal cost")
        one = torch.ones_like(self._final)
        self._end_slope, steps = autodiff.pull(self._final, one, (self._end, own), keep=True)
        if steps is not None and own.numel() and self._stages.controls.m:
            raise UnsupportedError(
                "Riccati needs a terminal cost of the final state and what is shared, got one that "
                "reads control.steps: put that part into the running cost, or take NewtonCG."
            )
        if self._end_slope is None:
            self._end_slope = torch.zeros_like(self._end)

    @cached_property
    def _end_curvature(self) -> Tensor:
        """L'' in (u(T), w), ``(b, n + q)`` twice."""
        with autodiff.recording():
            return autodiff.rows(self._end_slope, self._end, keep=True)

    def _begun(self) -> None:
        """g0 and its derivative in w."""
        where, b = self.where, len(self.where.problems)
        identity = torch.eye(self._q, dtype=self._end.dtype, device=self._end.device)
        identity = identity.expand(b, self._q, self._q)
        if not self._q:
            self.start = self._end.new_zeros(b, self._n, 0)
            return
        self._shared = autodiff.variables(where.point.shared)
        self._first = self._stages.start(self._shared, where.problems)
        self._stages.refuse_hidden(self._first, self._shared, "dynamics.init")
        self.start = torch.cat([autodiff.rows(self._first, self._shared, keep=True), identity], 1)

    def _sweep(self) -> None:
        """(7) and (8), for p = -lambda."""
        b, horizon = self._lead
        n, q, m = self._n, self._q, self._m
        nx = n + q
        # What belongs to one step of all problems lies together: sweeps go step by step.
        maps = self.where.states.new_empty(horizon, b, nx + 1, nx + 1 + m)
        slopes = maps.new_zeros(horizon, b, nx + 1 + m)
        start = 0
        for chunk in self._chunks:
            part = slice(start, start + len(chunk.problems))
            chunk.write(maps[:, part, :n], slopes[:, part])
            start = part.stop
        maps[..., :n, nx] = 0
        maps[..., n:, :] = 0
        maps[..., n:, n : nx + 1].diagonal(dim1=2, dim2=3).fill_(1)
        self.maps, self._slopes = maps.transpose(0, 1), slopes.transpose(0, 1)
        A = self.maps[:, :, :nx, :nx].mT
        self.costates = affine(A, self._slopes[..., :nx], self._end_slope.detach())
        pulled = maps[:, :, :nx, nx + 1 :].mT @ self.costates[:, 1:].transpose(0, 1).unsqueeze(3)
        own = slopes[..., nx + 1 :] + pulled.squeeze(3)
        shared = (self.start.mT @ self.costates[:, 0].unsqueeze(2)).squeeze(2)
        self.gradient = Point(own.transpose(0, 1), shared)
        self._check_finite("derivative", self.maps, self._slopes)

    def _check_finite(self, name: str, *parts: Tensor) -> None:
        """Refuse a derivative that is not finite, by its problem and step."""
        # One sum tells; which one is asked only if it does.
        if math.isfinite(sum(float(part.sum()) for part in parts)):
            return
        values = torch.cat([part.flatten(2) for part in parts], 2)
        if bool(torch.isfinite(values).all()):
            return
        i, t = (~torch.isfinite(values)).any(2).nonzero()[0].tolist()
        problem = f" of problem {int(self.where.problems[i])}" if self._stages.size > 1 else ""
        raise DivergenceError(
            f"the {name}s of step t = {t + 1}{problem} or its running cost are not finite at this "
            "control: look for a square root or a division at zero, or begin elsewhere."
        )

    def hessians(self, *, gauss_newton: bool) -> Hessians:
        """The second derivatives; Gauss-Newton leaves out p . g''."""
        b, horizon = self._lead
        n, nx, m = self._n, self._n + self._q, self._m
        p = self.costates[:, 1:, :n].transpose(0, 1)
        second = p.new_empty(horizon, b, nx + 1 + m, nx + 1 + m)
        start = 0
        for chunk in self._chunks:
            part = slice(start, start + len(chunk.problems))
            chunk.write_hessian(None if gauss_newton else p[:, part], second[:, part])
            start = part.stop
        steps = second.transpose(0, 1)
        steps[:, :, nx] = steps[..., nx] = self._slopes
        self._check_finite("second derivative", steps)
        with autodiff.recording():
            terminal = second.new_zeros(b, nx + 1, nx + 1)
            terminal[:, :nx, :nx] = self._end_curvature
            slope = self._end_slope.detach()
            terminal[:, nx, :nx] = terminal[:, :nx, nx] = slope
            first = second.new_zeros(b, self._q, self._q)
            if self._q and not gauss_newton:
                pulled = autodiff.pull(
                    self._first, self.costates[:, 0, :n], self._shared, keep=True
                )
                if pulled is not None:
                    first = autodiff.rows(pulled, self._shared, keep=True)
        return Hessians(steps, terminal, first)

    def suspects(self) -> bool:
        """Whether a number of the control moves no state and has no gradient, at any step."""
        n, nx = self._n, self._n + self._q
        still = (self.maps[:, :, :n, nx + 1 :] == 0).all(2) & (self.gradient.own == 0)
        shared = (self.maps[:, :, :n, n:nx] == 0).flatten(0, 2).all(0)
        shared &= (self.gradient.shared == 0).all(0)
        return bool(still.flatten(0, 1).all(0).any()) or bool(shared.any())

    def noise(self) -> Tensor:
        """How large a gradient may be by rounding alone, roughly: ``(b,)``."""
        horizon = max(1, self._stages.problem.horizon)
        return 30 * torch.finfo(self._stages.dtype).eps * horizon**0.5 * self.terms()

    def terms(self) -> Tensor:
        """The size of what cancels in the gradient, roughly: ``(b,)``."""
        n, nx = self._n, self._n + self._q
        end = self._end.detach()
        curved = self._end_curvature
        pull = torch.linalg.vector_norm(torch.bmm(curved.abs(), end.abs().unsqueeze(2)), dim=(1, 2))
        p = torch.linalg.vector_norm(self.costates, dim=2).amax(1) + pull
        size = torch.linalg.vector_norm(self.maps[:, :, :n, nx + 1 :].flatten(1), dim=1)
        size = size + torch.linalg.vector_norm(self.start.flatten(1), dim=1)
        return torch.linalg.vector_norm(self._slopes.flatten(1), dim=1) + size * p


class _Chunk:
    """The steps of some of the problems, evaluated with their graph; the axis of steps is first.

    Attributes:
        problems: which they are, ``(b,)``.
        following: g, shape ``(T, b, n)``.
        costs: r, shape ``(T, b)``.
    """

    def __init__(self, stages: Stages, z: list[Tensor], problems: Tensor) -> None:
        self.problems, lead = problems, (z[0].shape[1], z[0].shape[0])
        n, q = z[0].shape[2], z[1].shape[2]
        # Places of (u, shared) and of a step's own, where a 1 stands between.
        nx = n + q
        self._places = (slice(0, nx), slice(0, nx)), (slice(nx, None), slice(nx + 1, None))
        with autodiff.recording():
            joined = torch.cat(z, 2).transpose(0, 1).flatten(0, 1)
            self._z = autodiff.variables(joined)
            self._following, costs = stages.steps_in_turn(
                self._z.split([n, q, joined.shape[1] - nx], 1), problems
            )
            given = self._following, costs
            stages.refuse_hidden(given, self._z, "a step or its running cost")
            found = autodiff.pull(costs, torch.ones_like(costs), self._z, keep=True)
        self._slope = torch.zeros_like(self._z) if found is None else found
        self.costs = costs.unflatten(0, lead)
        self.following = self._following.detach().unflatten(0, lead)

    def write(self, maps: Tensor, slopes: Tensor) -> None:
        """First derivatives g', ``(T, b, n, d)``, and r', ``(T, b, d)``, with d = n + q + 1 + m."""
        with autodiff.recording():
            rows = autodiff.rows(self._following, self._z, keep=True)
        rows, slope = (x.unflatten(0, slopes.shape[:2]) for x in (rows, self._slope.detach()))
        for one, there in self._places:
            maps[..., there] = rows[..., one]
            slopes[..., there] = slope[..., one]

    def write_hessian(self, p: Tensor | None, into: Tensor) -> None:
        """Of r, and of p . g where p is given, in z: ``(T, b, n + q + 1 + m)`` twice."""
        with autodiff.recording():
            slope = self._slope
            if p is not None:
                pulled = autodiff.pull(self._following, p.flatten(0, 1), self._z, keep=True)
                slope = slope if pulled is None else slope + pulled
            rows = autodiff.rows(slope, self._z, keep=True)
        rows = rows.unflatten(0, into.shape[:2])
        for one, there in self._places:
            for other, beside in self._places:
                into[..., there, beside] = rows[..., one, other]
